// The gallery: the caller's videos, newest first.

import { attempt, byId, fromTemplate, picture, showProblem } from "./elements.js";
import * as server from "./server.js";
import { statusText, stepsText } from "./words.js";

/** One video of the gallery. */
class Card {
  constructor(open, remove) {
    const { root, ...parts } = fromTemplate("card-template");
    Object.assign(this, { root, parts });
    parts.open.onclick = () => open(this.video);
    // A deleted video does not come back: the first press asks.
    const ask = (asked) => {
      parts.delete.textContent = asked ? "Delete for good?" : "Delete";
      parts.delete.classList.toggle("asked", asked);
    };
    parts.delete.onclick = () => (parts.delete.classList.contains("asked") ? remove() : ask(true));
    parts.delete.onblur = () => ask(false);
  }

  show(video) {
    if (this.video && server.isEnded(this.video)) return; // anything else was asked for earlier
    const { parts } = this;
    const about = video.x_raydistill;
    this.video = video;
    parts.prompt.textContent = video.prompt;
    parts.about.textContent = `${stepsText(about.plan, about.num_steps)}, seed ${about.seed}`;
    parts.open.ariaLabel = `${statusText(video)}: ${video.prompt}`;
    showProblem(parts.problem, video.status === "failed" ? video.error : null);
    parts.note.textContent = video.status === "completed" ? "" : statusText(video);
    if (video.status === "completed") this.showPicture();
  }

  async showPicture() {
    const { note, open } = this.parts;
    const fail = (error) => (note.textContent = error.code === "video_expired" ? "Expired" : error.message);
    const blob = await attempt(() => server.media(this.video.id, "thumbnail"), fail);
    if (!blob) return;
    this.url = URL.createObjectURL(blob);
    open.append(picture("img", this.video.size, { src: this.url, alt: "" }));
  }
}

export class Gallery {
  /** hooks: open(video), removed(id). */
  constructor(hooks) {
    this.hooks = hooks;
    this.cards = new Map();
    this.root = byId("gallery");
    byId("gallery-refresh").onclick = () => this.refresh();
    byId("gallery-more").onclick = ({ target }) =>
      this.run(target, async () => this.addPage(await server.list(this.root.lastElementChild?.dataset.id)));
  }

  run(button, work) {
    const problem = byId("gallery-problem");
    showProblem(problem, null);
    return attempt(work, (error) => showProblem(problem, error), button);
  }

  refresh() {
    return this.run(byId("gallery-refresh"), async () => {
      const page = await server.list();
      for (const card of this.cards.values()) this.drop(card);
      this.addPage(page);
    });
  }

  addPage({ data, has_more: hasMore }) {
    for (const video of data) this.put(video, "append");
    byId("gallery-more").hidden = !hasMore;
    byId("gallery-empty").hidden = false; // the style sheet hides it beside videos
  }

  /** Show a video as it is now; one that is not there yet comes first. */
  put(video, where = "prepend") {
    const newest = this.cards.get(this.root.firstElementChild?.dataset.id)?.video;
    if (!this.cards.has(video.id)) {
      if (where === "prepend" && newest?.created_at > video.created_at) return; // it belongs on a later page
      const card = new Card(this.hooks.open, () => this.remove(card));
      card.root.dataset.id = video.id;
      this.cards.set(video.id, card);
      this.root[where](card.root);
    }
    this.cards.get(video.id).show(video);
  }

  remove(card) {
    return this.run(card.parts.delete, async () => {
      await server.remove(card.video.id);
      this.hooks.removed(card.video.id);
      const next = card.root.nextElementSibling ?? card.root.previousElementSibling;
      this.drop(card);
      (next?.querySelector("button") ?? byId("gallery-title")).focus();
    });
  }

  drop(card) {
    this.cards.delete(card.video.id);
    URL.revokeObjectURL(card.url);
    card.root.remove();
  }

  /** Look again at unfinished videos: nobody here may follow them. */
  async refreshUnfinished() {
    for (const card of [...this.cards.values()].filter(({ video }) => !server.isEnded(video))) {
      const gone = (error) => error.status === 404 && this.drop(card);
      await attempt(async () => card.show(await server.find(card.video.id)), gone);
    }
  }
}
