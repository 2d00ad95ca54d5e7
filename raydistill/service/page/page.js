// The page of a raydistill server: ask for videos, watch them being made, compare numbers of steps, look back.
//
// Everything that came from a server or a person is put on the page as text, never as markup. Media and events
// are read with fetch, not by address, because an API key travels in a header.

const KEY_NAME = "raydistill-api-key";
const VIDEO_ID = /^video_[0-9a-f]{32}$/;
const PAGE_SIZE = 12;
const BEAT_MS = 4000;
const LOOK_MS = 1500;
const RETRY_WAITS_MS = [500, 1000, 2000, 4000, 8000, 8000];
// The server says something at least every 15 s: a connection that is silent for longer is dead.
const SILENCE_MS = 45000;
// Browsers open six connections to a server, over all tabs; streams may not take up all of them.
const MOST_STREAMS = 3;
// Smaller videos are enlarged with hard edges: what one looks for in them is single pixels.
const SMALL_PX = 256;
const STAGES = ["queue", "encode", "denoise", "decode"];
const PREVIEW_FORMATS = new Set(["webp", "png", "jpeg"]);

// The words that the small world's captions are made of, as raydistill/world/sprites.py has them.
const WORDS = {
  colour: ["red", "green", "blue", "yellow"],
  shape: ["circle", "square", "triangle"],
  speed: ["slowly", "quickly"],
  direction: ["left", "right", "up", "down"],
  background: ["plain", "striped", "shaded"],
};
const EXAMPLES = [
  { colour: "red", shape: "circle", speed: "slowly", direction: "left", background: "plain" },
  { colour: "blue", shape: "square", speed: "quickly", direction: "up", background: "striped" },
  { colour: "yellow", shape: "triangle", speed: "slowly", direction: "right", background: "shaded" },
];

// The field of the form that a refused parameter is shown at.
const FIELD_OF = {
  prompt: "prompt",
  model: "model",
  num_inference_steps: "steps",
  plan: "plan",
  seed: "seed",
  size: "shape",
  width: "shape",
  height: "shape",
  num_frames: "shape",
  seconds: "shape",
  fps: "shape",
};

const byId = (id) => document.getElementById(id);
const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Make an element; children are elements or text. */
function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Copy a template; returns its root and its named parts. */
function fromTemplate(id) {
  const root = byId(id).content.firstElementChild.cloneNode(true);
  const parts = { root };
  for (const part of root.querySelectorAll("[data-part]")) parts[part.dataset.part] = part;
  return parts;
}

/** Wait; rejects as soon as the signal says so. */
function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal?.addEventListener("abort", stop, { once: true });
    if (signal?.aborted) stop();
  });
}

/** Run what the page does on its own or on a click; being stopped is no error, and others are shown. */
async function attempt(work, show = () => {}) {
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") show(error);
    return undefined;
  }
}

/** Run with a button out of use: a second press would ask for the same again. */
async function whileDisabled(button, work) {
  button.disabled = true;
  try {
    return await work();
  } finally {
    button.disabled = false;
  }
}

const randomBelow = (limit) => crypto.getRandomValues(new Uint32Array(1))[0] % limit;
const randomHex = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");
const captionOf = (words) =>
  `a ${words.colour} ${words.shape} moves ${words.speed} ${words.direction} over a ${words.background} background`;
const plural = (count, thing, things = `${thing}s`) => `${count} ${count === 1 ? thing : things}`;
const isEnded = (video) => !["queued", "in_progress"].includes(video.status);
const stepsText = (plan, numSteps) =>
  /^\d+$/.test(plan) ? plural(Number(plan), "step") : `${plan} (${plural(numSteps, "step")})`;

function secondsText(seconds) {
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  return `${seconds.toFixed(seconds < 9.995 ? 2 : 1)} s`;
}

function bytesText(bytes) {
  return bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

// Speaking to the server.

/** An answer of 4xx or 5xx, in the server's words. */
class Refusal extends Error {
  constructor(status, { code, message, param }, retryAfterS) {
    super(message);
    Object.assign(this, { name: "Refusal", status, code, param, retryAfterS });
  }

  /** Whether the same request may succeed later. */
  get mayPass() {
    return this.status === 408 || this.status === 429 || this.status >= 500;
  }
}

/** No answer, or one that broke off. */
class Unreachable extends Error {
  constructor(message = "the server does not answer") {
    super(message);
    Object.assign(this, { name: "Unreachable", code: "no_connection", mayPass: true });
  }
}

/** Parse JSON, with seeds as digits where they are beyond what a number here holds exactly (they go to 2^63). */
function parseJson(text) {
  return JSON.parse(text, (name, value, context) =>
    name === "seed" && typeof value === "number" && !Number.isSafeInteger(value) && context?.source
      ? context.source
      : value,
  );
}

async function refusalOf(response) {
  const seconds = Number(response.headers.get("retry-after") ?? NaN);
  let told = { code: `http_${response.status}`, message: "the server answered with an error", param: null };
  try {
    told = { ...told, ...(await response.json()).error };
  } catch {
    // Something between here and the server answered: there is no envelope.
  }
  return new Refusal(response.status, told, Number.isFinite(seconds) ? seconds : undefined);
}

/** Speaks to the server this page came from. */
class Server {
  onKeyWanted = () => {};

  get key() {
    return sessionStorage.getItem(KEY_NAME);
  }

  set key(key) {
    if (key) sessionStorage.setItem(KEY_NAME, key);
    else sessionStorage.removeItem(KEY_NAME);
  }

  async fetch(path, { headers, ...options } = {}) {
    // The extended status tells cancelled videos from failed ones.
    const all = { "x-raydistill-extended-status": "1", ...headers };
    const { key } = this;
    if (key) all.authorization = `Bearer ${key}`;
    const response = await fetch(new URL(path, document.baseURI), { ...options, headers: all }).catch((error) => {
      throw error.name === "AbortError" ? error : new Unreachable();
    });
    if (response.ok) return response;
    const refusal = await refusalOf(response);
    if (refusal.status === 401 && key === this.key) this.onKeyWanted(refusal); // else there is a newer one already
    throw refusal;
  }

  async json(path, options) {
    const response = await this.fetch(path, options);
    try {
      return parseJson(await response.text());
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable("the server's answer broke off");
    }
  }

  /** Send a request that makes a video. Its key lets it be sent again without making two. */
  async submit(path, body) {
    const headers = { "content-type": "application/json", "idempotency-key": randomHex() };
    const send = () => this.json(path, { method: "POST", headers, body: JSON.stringify(body) });
    try {
      return await send();
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
      await sleep(RETRY_WAITS_MS[1]);
      return send();
    }
  }

  create(body) {
    return this.submit("v1/videos", body);
  }

  remix(id, prompt) {
    return this.submit(`v1/videos/${id}/remix`, { prompt });
  }

  video(id, signal) {
    return this.json(`v1/videos/${id}`, { signal });
  }

  cancel(id) {
    return this.json(`v1/videos/${id}/cancel`, { method: "POST" });
  }

  remove(id) {
    return this.json(`v1/videos/${id}`, { method: "DELETE" });
  }

  list(after) {
    return this.json(`v1/videos?limit=${PAGE_SIZE}&order=desc${after ? `&after=${after}` : ""}`);
  }

  async models() {
    return (await this.json("v1/models")).data;
  }

  async media(id, variant, signal) {
    const response = await this.fetch(`v1/videos/${id}/content?variant=${variant}&redirect=0`, { signal });
    return response.blob();
  }

  /** How full the server is; 503 says that too. */
  async load() {
    const response = await fetch(new URL("ready", document.baseURI), { cache: "no-store" });
    return response.json();
  }
}

// Following a video.

/** Yields a stream's server-sent events as {id, event, data}. Raises Unreachable for a silent stream. */
async function* readEvents(response) {
  let rest = "";
  let event = {};
  for await (const text of readText(response)) {
    // A carriage return at the end may be half of a line's end: it waits for what follows.
    const lines = (rest + text).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (event.data !== undefined) yield event;
        event = {};
      } else {
        addField(event, line);
      }
    }
  }
}

function addField(event, line) {
  const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
  if (name === "data") event.data = event.data === undefined ? value : `${event.data}\n${value}`;
  else if (name === "id" || name === "event") event[name] = value; // a line that begins with ":" is a sign of life
}

async function* readText(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    while (true) {
      const { done, value } = await withinSilence(reader.read());
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {}); // it may be broken already
  }
}

function withinSilence(promise) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Unreachable("the connection went silent")), SILENCE_MS);
  });
  return Promise.race([promise, silence]).finally(() => clearTimeout(timer));
}

/**
 * Follows one video to its end, over broken connections.
 *
 * watch.video(resource) is told of every change, watch.frame(event, expert) of every preview, watch.trouble(text)
 * of a lost connection and, with "", of its return.
 */
class Follower {
  static streams = 0;

  constructor(server, video, watch) {
    this.server = server;
    this.video = video;
    this.watch = watch;
    this.lastEventId = null;
    this.heard = 0;
    this.stopped = new AbortController();
  }

  get signal() {
    return this.stopped.signal;
  }

  stop() {
    this.stopped.abort();
  }

  /** Returns the video as it ended. Rejects with the last error after too many tries. */
  async run() {
    while (Follower.streams >= MOST_STREAMS) {
      await sleep(LOOK_MS, this.signal);
      await this.lookIfPossible();
    }
    Follower.streams += 1;
    this.streaming = true;
    try {
      attempt(() => this.lookWhileQueued());
      return await this.streamUntilEnd();
    } finally {
      this.streaming = false;
      Follower.streams -= 1;
    }
  }

  /** Events do not tell how a queue gets shorter: this does. */
  async lookWhileQueued() {
    while (this.streaming && this.video.status === "queued") {
      await sleep(LOOK_MS, this.signal);
      if (this.streaming && this.video.status === "queued" && !document.hidden) await this.lookIfPossible();
    }
  }

  async lookIfPossible() {
    await attempt(
      () => this.look(),
      (error) => {
        if (!error.mayPass) throw error;
      },
    );
  }

  async look() {
    const heard = this.heard;
    const video = await this.server.video(this.video.id, this.signal);
    if (heard === this.heard) this.tell(video); // else an event came meanwhile, which is newer
  }

  tell(video) {
    this.video = video;
    this.watch.video(video);
  }

  async streamUntilEnd() {
    let failures = 0;
    while (!isEnded(this.video)) {
      const heard = this.heard;
      try {
        await this.stream();
      } catch (error) {
        this.signal.throwIfAborted();
        if (this.heard > heard) failures = 0;
        if (error instanceof Refusal && !error.mayPass) throw error;
        if (failures >= RETRY_WAITS_MS.length) throw error;
        this.watch.trouble(`Connection lost: try ${failures + 1} of ${RETRY_WAITS_MS.length} ...`);
        await sleep(error.retryAfterS ? error.retryAfterS * 1000 : RETRY_WAITS_MS[failures], this.signal);
        failures += 1;
      }
    }
    return this.video;
  }

  /** Reads one connection's events, from after the last one that was heard. */
  async stream() {
    const headers = this.lastEventId === null ? {} : { "last-event-id": this.lastEventId };
    const response = await this.server.fetch(`v1/videos/${this.video.id}/events`, { headers, signal: this.signal });
    const heard = this.heard;
    this.watch.trouble("");
    try {
      for await (const event of readEvents(response)) {
        this.hear(event);
        if (isEnded(this.video)) return;
      }
    } catch (error) {
      throw error.name === "AbortError" ? error : new Unreachable(error.message);
    }
    // A stream from beyond the last event, or of a video that was deleted (404), says nothing at all.
    if (heard === this.heard) await this.look();
    if (!isEnded(this.video)) throw new Unreachable("the connection broke off");
  }

  hear({ id, event, data }) {
    const told = parseJson(data);
    this.lastEventId = id ?? this.lastEventId;
    this.heard += 1;
    const about = this.video.x_raydistill;
    if (event === "video.queued" && this.video.status === "queued") {
      this.tell({ ...this.video, x_raydistill: { ...about, queue_position: told.position } });
    } else if (event === "video.in_progress") {
      const { progress, ...more } = told;
      this.tell({ ...this.video, status: "in_progress", progress, x_raydistill: { ...about, eta_s: null, ...more } });
    } else if (event === "video.partial_frame") {
      this.watch.frame(told, about.step === told.step ? about.expert : null);
    } else if (event === "video.completed" || event === "video.failed") {
      this.tell(told.video);
    }
  }
}

// Showing errors.

function whenToTryAgain(error) {
  if (!error.retryAfterS) return "";
  const at = new Date(Date.now() + error.retryAfterS * 1000).toLocaleTimeString();
  return ` Try again in ${error.retryAfterS} s, at ${at}.`;
}

/** Show an error's code and message in an element made for it; null hides it. */
function showProblem(element, error) {
  element.hidden = !error;
  if (!error) return element.replaceChildren();
  const code = make("code", "", error.code ?? "error");
  return element.replaceChildren(code, ` ${error.message}${whenToTryAgain(error)}`);
}

// One video.

function statusText(video) {
  const about = video.x_raydistill;
  if (video.status === "queued") return `${queueText(about.queue_position)}${etaText(about)}`;
  if (video.status === "in_progress") return `${stageText(about)}${etaText(about)}`;
  return { completed: "Done", failed: "Failed", cancelled: "Cancelled" }[video.status] ?? video.status;
}

function queueText(position) {
  if (position === null || position === undefined) return "Queued";
  return position ? `Queued: ${position} before it` : "Queued: next";
}

const etaText = (about) => (about.eta_s ? `, about ${secondsText(about.eta_s)} to go` : "");

function stageText({ stage, step, num_steps: numSteps, expert }) {
  if (stage === "encode") return "Encoding the prompt";
  if (stage === "decode") return "Decoding the frames";
  return `Denoising: ${step} of ${plural(numSteps, "step")}${step && expert ? `, ${expert} expert` : ""}`;
}

/** A bar of what the time went into. Stages do not add up to the whole: what lies between them is shown too. */
function timingsBar(timings) {
  const spans = STAGES.map((stage) => [stage, timings[`${stage}_s`] ?? 0]);
  const known = spans.reduce((sum, [, seconds]) => sum + seconds, 0);
  const total = Math.max(timings.total_s ?? 0, known);
  spans.push(["between", total - known]);
  const bar = make("div", "bar");
  const legend = make("ul", "legend");
  for (const [stage, seconds] of spans) {
    const part = make("span", `span ${stage}`);
    part.style.flexGrow = String(total ? seconds / total : 0);
    bar.append(part);
    legend.append(make("li", "", make("span", `key-dot ${stage}`), `${stage} ${secondsText(seconds)}`));
  }
  bar.setAttribute("aria-hidden", "true");
  const passes = plural(timings.passes ?? 0, "pass", "passes");
  const title = make("p", "timings-title", `${secondsText(total)} in all, ${passes}`);
  return [title, bar, legend];
}

/** Rows of a video's record, [name, value, full value]. */
function recordRows(video) {
  const about = video.x_raydistill;
  const rows = [
    ["seed", String(about.seed)],
    ["plan", stepsText(about.plan, about.num_steps)],
    ["bundle", about.bundle],
    ["size", `${video.size}, ${plural(about.num_frames, "frame")} at ${about.fps} fps`],
    ["attempt", about.attempt ? String(about.attempt) : null],
    ["id", `${video.id.slice(0, 14)}...`, video.id],
    ["latents", about.latents_sha256 && `sha256 ${about.latents_sha256.slice(0, 12)}...`, about.latents_sha256],
  ];
  return rows.filter(([, value]) => value);
}

/** The same for videos side by side. Versions of a model share its requests: the bundles may differ. */
function compactRows(video) {
  const { seed, bundle, timings } = video.x_raydistill;
  const rows = [
    ["seed", String(seed)],
    ["bundle", bundle],
  ];
  if (timings.total_s !== undefined) rows.push(["in all", `${secondsText(timings.total_s)} with the wait`]);
  return rows;
}

function playerOf(url, size) {
  const player = make("video", "");
  Object.assign(player, { muted: true, loop: true, playsInline: true, controls: true, src: url });
  player.autoplay = !reducedMotion();
  player.classList.toggle("pixelated", Math.max(...size) < SMALL_PX);
  return player;
}

/**
 * Shows one video from request to playing, and its buttons.
 *
 * hooks: changed(video), ended(video), playing(player), and where there is a button for it open(video),
 * reuse(video), remix(video, prompt).
 */
class RunView {
  constructor(server, { name = "", compact = false, hooks = {} }) {
    this.server = server;
    this.hooks = hooks;
    this.compact = compact;
    this.video = null;
    this.url = null;
    this.parts = fromTemplate("run-template");
    this.root = this.parts.root;
    this.root.classList.toggle("compact", compact);
    this.parts.name.hidden = !name;
    this.parts.name.textContent = name;
    // Four of them speaking at once say nothing: there the section sums up.
    if (!compact) this.parts.status.setAttribute("role", "status");
    this.parts.problem.setAttribute("role", compact ? "note" : "alert");
    this.listen();
  }

  listen() {
    const { cancel, open, reuse, remix } = this.parts;
    cancel.addEventListener("click", () => this.cancel());
    open.addEventListener("click", () => this.hooks.open(this.video));
    reuse.addEventListener("click", () => this.hooks.reuse(this.video));
    this.parts.again.addEventListener("click", () => this.again());
    remix.addEventListener("submit", (event) => {
      event.preventDefault();
      this.remix();
    });
  }

  /** Show a video's state and follow it. */
  start(video) {
    this.show(video);
    return this.follow();
  }

  /** Show that there is none, and how to try again. */
  refuse(error, again) {
    this.parts.status.textContent = "Not accepted";
    this.offerAgain(error, again);
  }

  dispose() {
    this.follower?.stop();
    if (this.url) URL.revokeObjectURL(this.url);
    this.root.remove();
  }

  offerAgain(error, again) {
    showProblem(this.parts.problem, error);
    this.whatAgain = again;
    this.parts.again.hidden = false;
  }

  again() {
    this.parts.again.hidden = true;
    showProblem(this.parts.problem, null);
    this.whatAgain();
  }

  async follow() {
    if (!isEnded(this.video)) {
      this.follower = new Follower(this.server, this.video, {
        video: (video) => this.show(video),
        frame: (frame, expert) => this.addPreview(frame, expert),
        trouble: (text) => (this.parts.status.textContent = text || statusText(this.video)),
      });
      const followed = await attempt(() => this.follower.run(), (error) => this.lost(error));
      if (!followed) return;
    }
    this.hooks.ended?.(this.video);
    if (this.video.status === "completed") await this.play();
  }

  lost(error) {
    if (error.status === 404) {
      this.parts.status.textContent = "This video was deleted";
      this.parts.cancel.hidden = true;
      return;
    }
    this.parts.status.textContent = "Lost sight of this video";
    this.offerAgain(error, () => this.follow());
  }

  show(video) {
    const { parts } = this;
    const ended = isEnded(video);
    this.video = video;
    parts.prompt.textContent = video.prompt;
    parts.status.textContent = statusText(video);
    parts.bar.value = video.progress;
    parts.bar.hidden = ended;
    parts.frame.style.aspectRatio = video.size.replace("x", " / ");
    if (!parts.frame.hasChildNodes()) parts.frame.append(make("p", "frame-note", "the video appears here"));
    this.root.dataset.status = video.status;
    parts.cancel.hidden = ended;
    parts.open.hidden = !this.hooks.open || !ended;
    parts.reuse.hidden = !this.hooks.reuse;
    if (ended) this.showEnd(video);
    this.showRecord(video);
    this.hooks.changed?.(video);
  }

  showEnd(video) {
    const { parts } = this;
    const { timings } = video.x_raydistill;
    if (video.status === "failed") showProblem(parts.problem, video.error);
    parts.facts.hidden = !this.compact || video.status !== "completed";
    const passes = plural(timings.passes ?? 0, "pass", "passes");
    parts.facts.textContent = `${passes}, ${secondsText(timings.denoise_s ?? 0)} denoising`;
    parts.timings.hidden = this.compact || timings.queue_s === undefined;
    if (!parts.timings.hidden) parts.timings.replaceChildren(...timingsBar(timings));
    parts.remix.hidden = !this.hooks.remix;
    if (!parts["remix-prompt"].value) parts["remix-prompt"].value = video.prompt;
  }

  showRecord(video) {
    const items = (this.compact ? compactRows(video) : recordRows(video)).flatMap(([name, value, full]) => {
      const shown = make("dd", "", value);
      if (full) shown.title = full;
      return [make("dt", "", name), shown];
    });
    const from = video.remixed_from_video_id;
    if (from && this.hooks.openId) items.push(make("dt", "", "remix of"), make("dd", "", this.linkTo(from)));
    this.parts.record.replaceChildren(...items);
  }

  linkTo(id) {
    const link = make("button", "link", `${id.slice(0, 14)}...`);
    link.type = "button";
    link.addEventListener("click", () => this.hooks.openId(id));
    return link;
  }

  addPreview({ b64_json: data, step, format }, expert) {
    if (!PREVIEW_FORMATS.has(format)) return;
    const { previews, frame } = this.parts;
    const about = this.video.x_raydistill;
    const picture = this.pictureOf(`data:image/${format};base64,${data}`);
    picture.alt = `Preview after step ${step} of ${about.num_steps}`;
    const item = make("li", "preview", picture, make("span", "", `step ${step}`), make("span", "", expert ?? ""));
    item.dataset.step = String(step);
    // A replica that takes over makes some steps again.
    previews.querySelector(`[data-step="${step}"]`)?.remove();
    previews.append(item);
    previews.hidden = false;
    previews.scrollTop = previews.scrollHeight;
    const large = this.pictureOf(picture.src);
    large.alt = "";
    frame.replaceChildren(large, make("p", "frame-label", `preview, step ${step} of ${about.num_steps}`));
  }

  pictureOf(src) {
    const picture = make("img", "");
    picture.src = src;
    picture.classList.toggle("pixelated", Math.max(...this.size) < SMALL_PX);
    return picture;
  }

  get size() {
    return this.video.size.split("x").map(Number);
  }

  async play() {
    const blob = await attempt(
      () => this.server.media(this.video.id, "video", this.follower?.signal),
      (error) => this.offerAgain(error, () => this.play()),
    );
    if (!blob) return;
    this.url = URL.createObjectURL(blob);
    const player = playerOf(this.url, this.size);
    player.setAttribute("aria-label", `Video: ${this.video.prompt}`);
    player.addEventListener("error", () => this.cannotPlay());
    this.parts.frame.replaceChildren(player);
    const { download } = this.parts;
    Object.assign(download, { href: this.url, download: `${this.video.id}.mp4`, hidden: this.compact });
    download.textContent = `Download mp4 (${bytesText(blob.size)})`;
    this.hooks.playing?.(player);
  }

  cannotPlay() {
    const message = "this browser plays no H.264 video: download it instead";
    showProblem(this.parts.problem, { code: "not_playable", message });
  }

  async cancel() {
    const video = await attempt(
      () => whileDisabled(this.parts.cancel, () => this.server.cancel(this.video.id)),
      // What has ended meanwhile is about to be shown as that.
      (error) => error.code !== "video_not_cancellable" && showProblem(this.parts.problem, error),
    );
    if (!video) return;
    this.follower?.stop();
    this.show(video);
    this.hooks.ended?.(video);
  }

  async remix() {
    const problem = this.parts["remix-problem"];
    const send = () => this.hooks.remix(this.video, this.parts["remix-prompt"].value);
    showProblem(problem, null);
    await attempt(
      () => whileDisabled(this.parts.remix.querySelector("button"), send),
      (error) => showProblem(problem, error),
    );
  }
}

// The form.

/** What to ask for: the form's fields, filled from the models that the server has. */
class AskForm {
  constructor() {
    this.models = [];
    this.root = byId("ask");
    this.fields = Object.fromEntries(
      ["prompt", "model", "steps", "plan", "shape", "seed"].map((name) => [name, byId(name)]),
    );
    this.fields.model.addEventListener("change", () => this.showModel());
    this.fields.plan.addEventListener("change", () => this.showPlan());
    this.fields.steps.addEventListener("input", () => this.showPlan());
    this.fields.shape.addEventListener("change", () => this.showShape());
    this.root.addEventListener("input", (event) => this.clearProblem(event.target.id));
    this.fields.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.root.requestSubmit();
    });
    this.offerExamples();
  }

  offerExamples() {
    for (const words of EXAMPLES) this.offer(shortly(words), () => words);
    const anything = () =>
      Object.fromEntries(Object.entries(WORDS).map(([name, known]) => [name, known[randomBelow(known.length)]]));
    this.offer("surprise me", anything);
  }

  offer(label, choose) {
    const chip = make("button", "chip", label);
    chip.type = "button";
    chip.addEventListener("click", () => {
      this.fields.prompt.value = captionOf(choose());
      this.clearProblem("prompt");
    });
    byId("examples").append(chip);
  }

  get model() {
    return this.models.find((model) => model.id === this.fields.model.value)?.x_raydistill;
  }

  setModels(models) {
    const before = this.fields.model.value;
    this.models = models;
    this.fields.model.replaceChildren(...models.map((model) => new Option(model.id, model.id)));
    if (models.some((model) => model.id === before)) this.fields.model.value = before;
    if (models.length) this.showModel();
  }

  showModel() {
    const { steps, plans, shapes, bundles, kind, default_plan: first } = this.model;
    byId("model-hint").textContent = `${kind}: ${bundlesText(bundles)}`;
    this.fields.shape.replaceChildren(
      ...shapes.map(({ size, num_frames: frames }, i) =>
        new Option(`${size}, ${plural(frames, "frame")}`, String(i)),
      ),
    );
    const named = Object.keys(plans).filter((plan) => !steps.includes(Number(plan)));
    const options = named.map((plan) => new Option(plan, plan));
    if (steps.length) options.unshift(new Option("by number of steps", ""));
    this.fields.plan.replaceChildren(...options);
    byId("plan-field").hidden = !named.length;
    byId("steps-field").hidden = !steps.length;
    byId("compare").hidden = byId("compare-hint").hidden = steps.length < 2;
    this.fields.steps.max = String(Math.max(0, steps.length - 1));
    byId("ticks").replaceChildren(...steps.map((count) => make("span", "", String(count))));
    this.choosePlan(first);
    this.showShape();
  }

  showShape() {
    const { shapes, fps } = this.model;
    const { num_frames: frames } = shapes[Number(this.fields.shape.value)];
    byId("shape-hint").textContent = `${Number((frames / fps).toFixed(2))} s at ${fps} fps`;
  }

  choosePlan(plan) {
    const at = this.model.steps.indexOf(Number(plan));
    this.fields.plan.value = at < 0 ? plan : "";
    if (at >= 0) this.fields.steps.value = String(at);
    this.showPlan();
  }

  get plan() {
    return this.fields.plan.value || String(this.model.steps[Number(this.fields.steps.value)]);
  }

  showPlan() {
    const { plans, scores, default_plan: first } = this.model;
    const { num_steps: numSteps, passes, experts } = plans[this.plan];
    const byNumber = !this.fields.plan.value;
    this.fields.steps.disabled = !byNumber;
    byId("steps-value").textContent = byNumber ? this.plan : `${numSteps}, as planned`;
    this.fields.steps.setAttribute("aria-valuetext", plural(numSteps, "step"));
    const parts = [`${plural(passes, "pass", "passes")}: ${experts.join(", then ")}`];
    if (this.plan === first) parts.push("the default");
    parts.push(...measured(scores?.[this.plan]));
    byId("plan-hint").textContent = parts.join("; ");
  }

  /** The request's fields, unchecked: the server knows better what is wrong. */
  values() {
    const values = { prompt: this.fields.prompt.value };
    if (!this.model) return values;
    const shape = this.model.shapes[Number(this.fields.shape.value)];
    Object.assign(values, { model: this.fields.model.value, size: shape.size, num_frames: shape.num_frames });
    if (this.fields.plan.value) values.plan = this.plan;
    else values.num_inference_steps = Number(this.plan);
    const seed = this.fields.seed.value.trim();
    if (seed) values.seed = seed; // as digits: a number here would round large ones
    return values;
  }

  /** Take over how another video was made. */
  reuse(video) {
    const about = video.x_raydistill;
    if (this.models.some((model) => model.id === video.model)) {
      this.fields.model.value = video.model;
      this.showModel();
    }
    this.fields.prompt.value = video.prompt;
    this.fields.seed.value = String(about.seed);
    const { plans, shapes } = this.model;
    if (about.plan in plans) this.choosePlan(about.plan);
    const at = shapes.findIndex((one) => one.size === video.size && one.num_frames === about.num_frames);
    if (at >= 0) this.fields.shape.value = String(at);
    this.showShape();
    this.fields.prompt.focus();
  }

  /** Show an error at the field that it names, or below all of them. */
  showProblem(error) {
    let name = FIELD_OF[error.param];
    if (name && byId(`${name}-error`).parentElement.hidden) name = undefined;
    showProblem(byId(name ? `${name}-error` : "ask-problem"), error);
    if (!name) return;
    this.fields[name].setAttribute("aria-invalid", "true");
    this.fields[name].focus();
  }

  clearProblem(name) {
    const error = byId(`${name}-error`);
    if (error) showProblem(error, null);
    this.fields[name]?.removeAttribute("aria-invalid");
  }

  clearProblems() {
    for (const name of Object.keys(this.fields)) this.clearProblem(name);
    showProblem(byId("ask-problem"), null);
  }
}

const shortly = ({ colour, shape, speed, direction }) => `${colour} ${shape}, ${speed} ${direction}`;

function bundlesText(bundles) {
  const entries = Object.entries(bundles);
  if (entries.length === 1) return entries[0][0];
  const all = entries.reduce((sum, [, weight]) => sum + weight, 0);
  return entries.map(([label, weight]) => `${label} ${Math.round((100 * weight) / all)} %`).join(", ");
}

/** What an evaluation found of a plan, if there was one of the small world's captions. */
function measured(scores) {
  const right = scores?.figures?.["right/all"];
  if (!right) return [];
  const [value, low, high] = [right.value, right.low, right.high].map((share) => (100 * share).toFixed(1));
  const over = scores.num_seeds > 1 ? `, mean of ${scores.num_seeds} trainings` : "";
  return [`measured: all that was asked for in ${value} % [${low}, ${high}] of ${scores.num_clips} clips${over}`];
}

// Side by side.

/** Plays videos of one length in step: each round begins when all have come to their end. */
class SyncedPlayback {
  constructor(button) {
    this.players = new Set();
    this.paused = reducedMotion();
    this.button = button;
    button.addEventListener("click", () => this.toggle());
    this.label();
  }

  add(player) {
    Object.assign(player, { loop: false, autoplay: false, controls: false });
    player.addEventListener("ended", () => this.next());
    player.addEventListener("loadeddata", () => this.restart(), { once: true });
    this.players.add(player);
  }

  clear() {
    this.players.clear();
  }

  next() {
    if ([...this.players].every((player) => player.ended || player.error)) this.restart();
  }

  restart() {
    for (const player of this.players) {
      player.currentTime = 0;
      this.apply(player);
    }
  }

  toggle() {
    this.paused = !this.paused;
    this.label();
    for (const player of this.players) this.apply(player);
  }

  apply(player) {
    if (this.paused) player.pause();
    else player.play().catch(() => {}); // paused or removed before it began
  }

  label() {
    this.button.textContent = this.paused ? "Play all" : "Pause all";
  }
}

/** One prompt and one seed, with every number of steps. */
class Comparison {
  constructor(server, hooks) {
    this.server = server;
    this.hooks = hooks;
    this.views = [];
    this.round = 0;
    this.section = byId("comparison");
    this.playback = new SyncedPlayback(byId("comparison-pause"));
  }

  /** Ask for all of them. Rejects if the first one is refused: so would be the others. */
  async start(values, steps) {
    const { plan, num_inference_steps: ignored, ...same } = values;
    same.seed ??= randomBelow(2 ** 31);
    const bodies = steps.map((count) => ({ ...same, num_inference_steps: count }));
    const first = await this.server.create(bodies[0]);
    this.clear();
    const round = this.round;
    this.section.hidden = false;
    byId("comparison-about").textContent = `${values.prompt} (seed ${same.seed})`;
    this.views = bodies.map((body) => this.addView(body));
    this.follow(this.views[0], first);
    this.section.scrollIntoView({ block: "nearest" });
    for (const [i, view] of this.views.entries()) {
      if (i && round === this.round) await this.submit(view, bodies[i]); // in this order they are queued
    }
  }

  clear() {
    this.round += 1;
    this.playback.clear();
    for (const view of this.views) view.dispose();
    this.views = [];
  }

  addView(body) {
    const view = new RunView(this.server, {
      name: plural(body.num_inference_steps, "step"),
      compact: true,
      hooks: {
        ...this.hooks,
        ended: () => this.sumUp(),
        playing: (player) => this.playback.add(player),
      },
    });
    byId("comparison-row").append(view.root);
    return view;
  }

  async submit(view, body) {
    const video = await attempt(
      () => this.server.create(body),
      (error) => view.refuse(error, () => this.submit(view, body)),
    );
    if (video) this.follow(view, video);
  }

  follow(view, video) {
    view.start(video);
    this.sumUp();
  }

  sumUp() {
    const ended = this.views.filter((view) => view.video && isEnded(view.video)).length;
    byId("comparison-status").textContent = `${ended} of ${this.views.length} finished`;
  }
}

// The gallery.

/** One video of the gallery. */
class Card {
  constructor(server, hooks) {
    this.server = server;
    this.url = null;
    this.parts = fromTemplate("card-template");
    this.root = this.parts.root;
    this.parts.open.addEventListener("click", () => hooks.open(this.video));
    this.parts.delete.addEventListener("click", () => this.askTwice(() => hooks.remove(this)));
    this.parts.delete.addEventListener("blur", () => this.calmDown());
  }

  show(video) {
    const { parts } = this;
    const about = video.x_raydistill;
    const wasPictured = this.video?.status === "completed";
    this.video = video;
    this.shownAt = Date.now();
    this.root.dataset.status = video.status;
    parts.prompt.textContent = video.prompt;
    parts.about.textContent = `${stepsText(about.plan, about.num_steps)}, seed ${about.seed}`;
    parts.open.setAttribute("aria-label", `${statusText(video)}: ${video.prompt}`);
    parts.note.textContent = video.status === "completed" ? "" : statusText(video);
    showProblem(parts.problem, video.status === "failed" ? video.error : null);
    if (video.status === "completed" && !wasPictured) this.showPicture();
  }

  async showPicture() {
    if (this.video.expires_at && this.video.expires_at * 1000 < Date.now()) {
      this.parts.note.textContent = "expired";
      return;
    }
    const blob = await attempt(
      () => this.server.media(this.video.id, "thumbnail"),
      (error) => (this.parts.note.textContent = error.code === "video_expired" ? "expired" : error.message),
    );
    if (!blob) return;
    this.url = URL.createObjectURL(blob);
    const picture = make("img", "");
    Object.assign(picture, { src: this.url, alt: "" });
    picture.classList.toggle("pixelated", Math.max(...this.video.size.split("x").map(Number)) < SMALL_PX);
    this.parts.open.append(picture);
  }

  /** A deleted video does not come back: the first press asks. */
  askTwice(sure) {
    if (this.parts.delete.dataset.asked) return sure();
    this.parts.delete.dataset.asked = "yes";
    this.parts.delete.textContent = "Delete for good?";
    return undefined;
  }

  calmDown() {
    delete this.parts.delete.dataset.asked;
    this.parts.delete.textContent = "Delete";
  }

  dispose() {
    if (this.url) URL.revokeObjectURL(this.url);
    this.root.remove();
  }
}

/** The caller's videos, newest first. */
class Gallery {
  /** hooks: open(video), removed(id). */
  constructor(server, hooks) {
    this.server = server;
    this.hooks = hooks;
    this.cards = new Map();
    this.root = byId("gallery");
    byId("gallery-more").addEventListener("click", () => this.run(() => this.more()));
    byId("gallery-refresh").addEventListener("click", () => this.run(() => this.refresh()));
  }

  async run(work) {
    showProblem(byId("gallery-problem"), null);
    await attempt(work, (error) => showProblem(byId("gallery-problem"), error));
  }

  async refresh() {
    const page = await this.server.list();
    for (const card of this.cards.values()) card.dispose();
    this.cards.clear();
    this.addPage(page);
  }

  async more() {
    const last = this.root.lastElementChild;
    try {
      this.addPage(await this.server.list(last?.dataset.id));
    } catch (error) {
      if (error.code !== "video_not_found") throw error;
      await this.refresh(); // the last one here was deleted from elsewhere
      return;
    }
    (last?.nextElementSibling ?? last)?.querySelector("button").focus();
  }

  addPage({ data, has_more: hasMore }) {
    for (const video of data) this.put(video, "append");
    byId("gallery-more").hidden = !hasMore;
    this.showEmpty();
  }

  showEmpty() {
    byId("gallery-empty").hidden = this.cards.size > 0;
  }

  /** Show a video as it is now; one that is not there yet comes first. */
  put(video, where = "prepend") {
    const newest = this.cards.get(this.root.firstElementChild?.dataset.id);
    if (!this.cards.has(video.id)) {
      if (where === "prepend" && newest && newest.video.created_at > video.created_at) return; // of a later page
      this.add(video.id, where);
    }
    this.cards.get(video.id).show(video);
  }

  add(id, where) {
    const remove = (card) => this.run(() => this.remove(card));
    const card = new Card(this.server, { open: this.hooks.open, remove });
    card.root.dataset.id = id;
    this.cards.set(id, card);
    this.root[where](card.root);
    this.showEmpty();
  }

  async remove(card) {
    await this.server.remove(card.video.id);
    this.hooks.removed(card.video.id);
    const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
    this.drop(card);
    (next?.querySelector("button") ?? byId("gallery-title")).focus();
  }

  drop(card) {
    this.cards.delete(card.video.id);
    card.dispose();
    this.showEmpty();
  }

  /** Look again at unfinished videos that nobody here follows. */
  async refreshUnfinished() {
    const stale = [...this.cards.values()].filter(
      (card) => !isEnded(card.video) && Date.now() - card.shownAt > BEAT_MS / 2,
    );
    for (const card of stale.slice(0, PAGE_SIZE)) {
      await attempt(
        async () => this.put(await this.server.video(card.video.id)),
        (error) => error.status === 404 && this.drop(card),
      );
    }
  }
}

// The page as a whole.

/** Asks for the key when the server wants one. */
class KeyForm {
  constructor(server, onKey) {
    this.server = server;
    this.root = byId("key-form");
    server.onKeyWanted = (refusal) => this.ask(refusal);
    this.root.addEventListener("submit", (event) => {
      event.preventDefault();
      this.use(byId("key").value.trim(), onKey);
    });
    byId("forget-key").addEventListener("click", () => {
      server.key = null;
      onKey();
    });
    this.showForget();
  }

  ask(refusal) {
    const wasKey = this.server.key;
    this.server.key = null;
    this.showForget();
    if (wasKey) showProblem(byId("key-error"), refusal);
    if (!this.root.hidden) return;
    this.root.hidden = false;
    byId("key").focus();
  }

  use(key, onKey) {
    // Others cannot be sent in a header.
    if (!/^[\x21-\x7e]+$/.test(key)) {
      showProblem(byId("key-error"), { code: "invalid_api_key", message: "a key has no spaces, and ASCII alone" });
      return;
    }
    showProblem(byId("key-error"), null);
    this.server.key = key;
    this.root.hidden = true;
    byId("key").value = "";
    this.showForget();
    onKey();
  }

  showForget() {
    byId("forget-key").hidden = !this.server.key;
  }
}

/** Shows every few seconds how full the server is; not while nobody looks. */
class Heartbeat {
  constructor(server, onBeat) {
    this.server = server;
    this.onBeat = onBeat;
    document.addEventListener("visibilitychange", () => this.beat());
    this.beat();
  }

  async beat() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    const load = await attempt(() => this.server.load());
    this.show(load);
    if (load) await attempt(this.onBeat);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.beat(), BEAT_MS);
  }

  show(load) {
    const { state, text } = loadText(load);
    byId("load").dataset.state = state;
    byId("load-text").textContent = text;
  }
}

function loadText(load) {
  if (load?.queued === undefined) return { state: "down", text: load?.error?.message ?? "the server does not answer" };
  const replicas = plural(load.replicas, "replica");
  const queue = load.queued ? `${load.queued} queued` : "nothing queued";
  if (load.status !== "ready") return { state: "busy", text: `queue full, ${queue}, ${replicas}` };
  if (!load.replicas) return { state: "busy", text: `no replica yet, ${queue}` };
  return { state: "ready", text: `${queue}, ${replicas}` };
}

/** Wires the parts. */
class Page {
  constructor() {
    this.server = new Server();
    this.view = null;
    this.form = new AskForm();
    this.gallery = new Gallery(this.server, {
      open: (video) => this.open(video),
      removed: (id) => this.forget(id),
    });
    this.comparison = new Comparison(this.server, {
      changed: (video) => this.gallery.put(video),
      open: (video) => this.open(video),
    });
    this.keys = new KeyForm(this.server, () => this.load());
    this.heartbeat = new Heartbeat(this.server, () => this.gallery.refreshUnfinished());
    this.form.root.addEventListener("submit", (event) => {
      event.preventDefault();
      const send = async (values) => this.show(await this.server.create(values));
      whileDisabled(byId("generate"), () => this.ask(send));
    });
    byId("compare").addEventListener("click", () => {
      const send = (values) => this.comparison.start(values, this.form.model.steps);
      whileDisabled(byId("compare"), () => this.ask(send));
    });
    addEventListener("hashchange", () => this.openHash());
  }

  async load() {
    const failed = (error) => {
      // A missing key has a form of its own; another failure is shown where videos are asked for.
      if (error.status !== 401) this.form.showProblem({ ...error, message: error.message, param: null });
    };
    const models = await attempt(() => this.server.models(), failed);
    if (!models) return;
    this.form.clearProblems();
    this.form.setModels(models);
    await this.gallery.run(() => this.gallery.refresh());
    await this.openHash();
  }

  /** Send what the form holds. */
  async ask(send) {
    this.form.clearProblems();
    if (!this.form.model) await this.load(); // the server was away when the page came
    if (this.form.model) await attempt(() => send(this.form.values()), (error) => this.form.showProblem(error));
    this.heartbeat.beat();
  }

  show(video) {
    this.view?.dispose();
    this.view = new RunView(this.server, {
      hooks: {
        changed: (changed) => this.gallery.put(changed),
        openId: (id) => this.openId(id),
        reuse: (made) => this.form.reuse(made),
        remix: async (made, prompt) => this.open(await this.server.remix(made.id, prompt)),
      },
    });
    byId("result").replaceChildren(this.view.root);
    history.replaceState(null, "", `#${video.id}`); // a reload comes back to it
    this.view.start(video);
  }

  /** Show no longer what was deleted. */
  forget(id) {
    if (this.view?.video.id !== id) return;
    this.view.dispose();
    this.view = null;
    byId("result").replaceChildren(make("p", "empty", "This video was deleted."));
    history.replaceState(null, "", location.pathname);
  }

  open(video) {
    this.show(video);
    byId("result-title").focus({ preventScroll: true });
    byId("result-title").scrollIntoView({ block: "start" });
  }

  async openId(id) {
    await this.gallery.run(async () => this.open(await this.server.video(id)));
  }

  /** Show the video that the address names. */
  async openHash() {
    const id = location.hash.slice(1);
    if (!VIDEO_ID.test(id) || id === this.view?.video.id) return;
    const video = await attempt(() => this.server.video(id));
    if (video) this.show(video);
    else history.replaceState(null, "", location.pathname);
  }
}

new Page().load();
