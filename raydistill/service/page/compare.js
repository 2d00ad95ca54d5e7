// Side by side: one prompt and one seed, with every number of steps.

import { attempt, byId, reducedMotion } from "./elements.js";
import { RunView } from "./run.js";
import { create, isEnded } from "./server.js";
import { plural } from "./words.js";

/** Plays videos of one length in step: each round begins when all have come to their end. */
class Playback {
  constructor(button) {
    Object.assign(this, { button, players: [] });
    button.onclick = () => this.pause(!this.isPaused);
    this.pause(reducedMotion());
  }

  add(player) {
    Object.assign(player, { loop: false, autoplay: false, controls: false });
    player.onloadeddata = () => this.restart();
    player.onended = () => {
      if (this.players.every((one) => one.ended || one.error)) this.restart();
    };
    this.players.push(player);
  }

  restart() {
    for (const player of this.players) player.currentTime = 0;
    this.pause(this.isPaused);
  }

  pause(isPaused) {
    this.isPaused = isPaused;
    this.button.textContent = isPaused ? "Play all" : "Pause all";
    for (const player of this.players) {
      if (isPaused) player.pause();
      else player.play().catch(() => {}); // paused or removed before it began
    }
  }
}

export class Comparison {
  /** hooks: changed(video), open(video). */
  constructor(hooks) {
    const changed = (video) => {
      hooks.changed(video);
      this.sumUp();
    };
    this.playback = new Playback(byId("comparison-pause"));
    this.hooks = { ...hooks, changed, playing: (player) => this.playback.add(player) };
    this.views = [];
  }

  /** Ask for all of them. Rejects if the first one is refused: so would be the others. */
  async start({ plan, ...values }, steps) {
    values.seed ??= Math.floor(Math.random() * 2 ** 31);
    const bodies = steps.map((count) => ({ ...values, num_inference_steps: count }));
    const first = await create(bodies[0]);
    for (const view of this.views) view.dispose();
    this.playback.players = [];
    this.views = steps.map((count) => new RunView(this.hooks, plural(count, "step")));
    byId("comparison").hidden = false;
    byId("comparison-about").textContent = `${values.prompt} (seed ${values.seed})`;
    byId("comparison-row").replaceChildren(...this.views.map((view) => view.root));
    byId("comparison").scrollIntoView({ block: "nearest" });
    this.views[0].follow(first);
    for (let i = 1; i < steps.length; i++) await this.submit(this.views[i], bodies[i]); // queued in order
  }

  async submit(view, body) {
    const again = () => this.submit(view, body);
    const video = await attempt(() => create(body), (error) => view.offerAgain("Not accepted", error, again));
    if (video) view.follow(video);
  }

  sumUp() {
    const ended = this.views.filter(({ video }) => video && isEnded(video)).length;
    byId("comparison-status").textContent = `${ended} of ${this.views.length} finished`;
  }
}
