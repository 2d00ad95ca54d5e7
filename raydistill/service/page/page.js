// The page of a raydistill server: ask for videos, watch them being made, compare, look back.

import { Comparison } from "./compare.js";
import { attempt, byId, make, onSubmit, showProblem } from "./elements.js";
import { AskForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { RunView } from "./run.js";
import * as server from "./server.js";
import { plural } from "./words.js";

const BEAT_MS = 4000;

/** Asks for the key when the server wants one. */
function installKeyForm() {
  const [form, field, problem, forget] = ["key-form", "key", "key-error", "forget-key"].map(byId);
  const use = (key) => {
    server.saveKey(key);
    location.reload(); // nothing stays that was shown for another key
  };
  forget.hidden = !server.savedKey();
  forget.onclick = () => use("");
  onSubmit(form, () => use(field.value.trim()));
  addEventListener("keywanted", ({ detail: refusal }) => {
    if (server.savedKey()) showProblem(problem, refusal);
    server.saveKey("");
    forget.hidden = true;
    if (!form.hidden) return;
    form.hidden = false;
    field.focus();
  });
}

/** Wires the parts. */
class Page {
  constructor() {
    this.hooks = {
      changed: (video) => this.gallery.put(video),
      open: (video) => this.open(video),
      removed: (id) => this.forget(id),
      reuse: (video) => this.form.reuse(video),
      remix: async (video, prompt) => this.open(await server.remix(video.id, prompt)),
    };
    this.form = new AskForm();
    this.gallery = new Gallery(this.hooks);
    this.comparison = new Comparison(this.hooks);
    installKeyForm();
    onSubmit(this.form.root, () =>
      this.ask(byId("generate"), async (values) => this.show(await server.create(values))),
    );
    byId("compare").onclick = () =>
      this.ask(byId("compare"), (values) => this.comparison.start(values, this.form.model.steps));
    addEventListener("hashchange", () => this.openHash());
    document.addEventListener("visibilitychange", () => this.beat());
    this.beat();
    this.load();
  }

  async load() {
    // A missing key has a form of its own.
    const show = (error) => error.status !== 401 && this.form.showProblem(error);
    const models = await attempt(server.models, show);
    if (!models) return;
    this.form.setModels(models);
    await this.gallery.refresh();
    await this.openHash();
  }

  /** Send what the form holds. */
  async ask(button, send) {
    this.form.clearProblems();
    if (!this.form.model) return this.load(); // the server was away when the page came
    await attempt(() => send(this.form.values()), (error) => this.form.showProblem(error), button);
    this.beat();
  }

  show(video) {
    this.view?.dispose();
    this.view = new RunView(this.hooks);
    byId("result").replaceChildren(this.view.root);
    history.replaceState(null, "", `#${video.id}`); // a reload comes back to it
    this.view.follow(video);
  }

  open(video) {
    this.show(video);
    byId("result-title").focus({ preventScroll: true });
    byId("result-title").scrollIntoView();
  }

  /** Show no longer what was deleted. */
  forget(id) {
    if (this.view?.video.id !== id) return;
    this.view.dispose();
    this.view = null;
    byId("result").replaceChildren(make("p", "empty", "This video was deleted."));
    history.replaceState(null, "", location.pathname);
  }

  /** Show the video that the address names. */
  async openHash() {
    const id = location.hash.slice(1);
    if (!id.startsWith("video_") || id === this.view?.video.id) return;
    await this.gallery.run({}, async () => this.show(await server.find(id)));
  }

  /** Show every few seconds how full the server is; not while nobody looks. */
  async beat() {
    clearTimeout(this.nextBeat);
    if (document.hidden) return;
    const { status, queued, replicas, error } = await server.load().catch((away) => ({ error: away }));
    const isFull = status === "queue_full";
    const made = replicas ? plural(replicas, "replica") : "no replica yet";
    const text = `${isFull ? "queue full, " : ""}${queued || "nothing"} queued, ${made}`;
    byId("load").dataset.state = error ? "down" : isFull || !replicas ? "busy" : "ready";
    byId("load-text").textContent = error?.message ?? text;
    await this.gallery.refreshUnfinished();
    clearTimeout(this.nextBeat); // of a beat that was begun meanwhile
    this.nextBeat = setTimeout(() => this.beat(), BEAT_MS);
  }
}

new Page();
