// Following a video to its end.

import { events, find, isEnded, noAnswer } from "./server.js";

const LOOK_MS = 1500;
const RETRY_WAITS_MS = [500, 1000, 2000, 4000, 8000, 8000];
// Browsers open six connections to a server, over all tabs; streams may not take up all of them.
const MOST_STREAMS = 3;

/** Wait; rejects as soon as the signal says so. */
function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    signal.throwIfAborted();
    signal.addEventListener("abort", () => reject(signal.reason));
    setTimeout(resolve, ms);
  });
}

/** Follows a video to its end, over broken connections; a view is told: show(video), showPreview(), say(). */
export class Follower {
  static streams = 0;

  constructor(video, view, signal) {
    Object.assign(this, { video, view, signal, heard: 0 });
  }

  /** Returns the video as it ended. Rejects with the last error after too many tries. */
  async run() {
    let failures = 0;
    while (!isEnded(this.video)) {
      const { heard } = this;
      try {
        if (Follower.streams < MOST_STREAMS) await this.stream();
        else await this.look(this.signal);
      } catch (error) {
        this.signal.throwIfAborted();
        if (this.heard > heard) failures = 0;
        if (!error.mayPass || failures === RETRY_WAITS_MS.length) throw error;
        this.view.say(`Connection lost: try ${failures + 1} of ${RETRY_WAITS_MS.length} ...`);
        await sleep(error.retryAfterS * 1000 || RETRY_WAITS_MS[failures], this.signal);
        failures += 1;
      }
    }
    return this.video;
  }

  /** Reads one connection's events, from after the last one that was heard. */
  async stream() {
    const closing = new AbortController();
    const signal = AbortSignal.any([this.signal, closing.signal]);
    const { heard } = this;
    Follower.streams += 1;
    try {
      const told = await events(this.video.id, this.lastId, signal);
      this.view.show(this.video); // the trouble is over
      this.lookWhileQueued(signal);
      for await (const event of told) {
        this.hear(event);
        if (isEnded(this.video)) return;
      }
    } finally {
      Follower.streams -= 1;
      closing.abort();
    }
    // A stream from beyond the last event, or of a video that was deleted (404), says nothing at all.
    if (heard === this.heard) await this.look(this.signal);
    if (!isEnded(this.video)) throw noAnswer();
  }

  /** Events do not tell how a queue gets shorter: this does. */
  async lookWhileQueued(signal) {
    while (this.video.status === "queued" && !signal.aborted) {
      await this.look(signal).catch(() => {}); // what is wrong, the stream says
    }
  }

  async look(signal) {
    await sleep(LOOK_MS, signal);
    const { heard } = this;
    const video = await find(this.video.id, signal);
    if (heard === this.heard) this.tell(video); // else an event came meanwhile, which is newer
  }

  hear({ id, event, data }) {
    const { progress, ...more } = data;
    this.lastId = id;
    if (event === "video.partial_frame") {
      this.view.showPreview(data);
    } else if (event === "video.in_progress") {
      const about = { ...this.video.x_raydistill, eta_s: null, ...more };
      this.tell({ ...this.video, status: "in_progress", progress, x_raydistill: about });
    } else if (data.video) {
      this.tell(data.video);
    }
  }

  tell(video) {
    this.heard += 1;
    this.video = video;
    this.view.show(video);
  }
}
