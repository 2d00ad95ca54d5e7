// One video, from request to playing.

import { attempt, fromTemplate, make, onSubmit, picture, reducedMotion, showProblem } from "./elements.js";
import { Follower } from "./following.js";
import * as server from "./server.js";
import { passesText, plural, secondsText, statusText, stepsText } from "./words.js";

const STAGES = ["queue", "encode", "denoise", "decode"];

/** A bar of what the time went into. Stages do not add up to the whole: what is between them is shown too. */
function timingsBar(timings) {
  const spans = STAGES.map((stage) => [stage, timings[`${stage}_s`] ?? 0]);
  const known = spans.reduce((sum, [, seconds]) => sum + seconds, 0);
  const total = Math.max(timings.total_s, known);
  const bar = make("div", "bar");
  const legend = make("ul", "legend");
  for (const [stage, seconds] of [...spans, ["between", total - known]]) {
    const part = make("span", stage);
    part.style.flexGrow = seconds / total;
    bar.append(part);
    legend.append(make("li", "", make("span", `key-dot ${stage}`), `${stage} ${secondsText(seconds)}`));
  }
  return [make("p", "", `${secondsText(total)} in all, ${passesText(timings.passes)}`), bar, legend];
}

/** Rows of a video's record, [name, value, full value]. */
function recordRows({ id, size, remixed_from_video_id: base, x_raydistill: about }) {
  const { seed, bundle, attempt: number, latents_sha256: latents } = about;
  const short = (video) => `${video.slice(0, 14)}...`;
  return [
    ["seed", seed],
    ["plan", stepsText(about.plan, about.num_steps)],
    ["bundle", bundle],
    ["size", `${size}, ${plural(about.num_frames, "frame")} at ${about.fps} fps`],
    ["attempt", number],
    ["id", short(id), id],
    ["latents", latents && `sha256 ${latents.slice(0, 12)}...`, latents],
    ["remix of", base && Object.assign(make("a", "", short(base)), { href: `#${base}` })],
  ].filter(([, value]) => value);
}

/**
 * Shows one video and its buttons; with a name it is one of several side by side.
 *
 * hooks: changed(video); side by side playing(player), open(video); else reuse(video), remix(video, prompt).
 */
export class RunView {
  constructor(hooks, name = "") {
    const parts = fromTemplate("run-template");
    Object.assign(this, { hooks, parts, root: parts.root, isCompact: name !== "" });
    this.gone = new AbortController();
    this.root.classList.toggle("compact", this.isCompact);
    parts.name.textContent = name;
    // Four of them speaking at once say nothing: there the section sums up.
    if (!this.isCompact) {
      parts.status.setAttribute("role", "status");
      parts.problem.setAttribute("role", "alert");
    }
    parts.cancel.onclick = () => this.cancel();
    parts.open.onclick = () => hooks.open(this.video);
    parts.reuse.onclick = () => hooks.reuse(this.video);
    onSubmit(parts.remix, () => this.remix());
  }

  dispose() {
    this.gone.abort();
    URL.revokeObjectURL(this.url);
  }

  say(status) {
    this.parts.status.textContent = status;
  }

  /** Show what went wrong, and a button to try again. */
  offerAgain(status, error, work) {
    const { again, problem } = this.parts;
    this.say(status);
    showProblem(problem, error);
    again.hidden = false;
    again.onclick = () => {
      again.hidden = true;
      showProblem(problem, null);
      work();
    };
  }

  /** Show a video's state until its end, and then the video. */
  async follow(video) {
    this.show(video);
    const ended = await attempt(
      () => new Follower(video, this, this.gone.signal).run(),
      (error) => this.offerAgain("Lost sight of this video", error, () => this.follow(this.video)),
    );
    if (ended?.status === "completed") await this.play();
  }

  show(video) {
    const { parts } = this;
    const ended = server.isEnded(video);
    this.video = video;
    this.root.dataset.status = video.status;
    parts.prompt.textContent = video.prompt;
    this.say(statusText(video));
    parts.frame.style.aspectRatio = video.size.replace("x", " / ");
    parts.bar.value = video.progress;
    parts.bar.hidden = parts.cancel.hidden = ended;
    parts.open.hidden = parts.remix.hidden = !ended;
    parts["remix-prompt"].value ||= video.prompt;
    if (video.status === "failed") showProblem(parts.problem, video.error);
    if (video.status === "completed") this.showTimings(video.x_raydistill.timings);
    const rows = recordRows(video).filter(([name]) => !this.isCompact || ["seed", "bundle"].includes(name));
    const items = rows.map(([name, value, title = ""]) => [
      make("dt", "", name),
      Object.assign(make("dd", "", value), { title }),
    ]);
    parts.record.replaceChildren(...items.flat());
    this.hooks.changed(video);
  }

  showTimings(timings) {
    const { passes, denoise_s: denoising, total_s: total } = timings;
    const facts = `${passesText(passes)}, ${secondsText(denoising)} denoising,\n${secondsText(total)} in all`;
    this.parts.facts.textContent = facts;
    this.parts.timings.replaceChildren(...timingsBar(timings));
  }

  showPreview({ b64_json: data, step, format, expert }) {
    const { previews, frame } = this.parts;
    const { size, x_raydistill: about } = this.video;
    const src = `data:image/${format};base64,${data}`;
    const text = `preview, step ${step} of ${about.num_steps}`;
    const labels = [`step ${step}`, expert].map((label) => make("span", "", label));
    const item = make("li", "preview", picture("img", size, { src, alt: text }), ...labels);
    item.dataset.step = step;
    // A replica that takes over makes some steps again.
    previews.querySelector(`[data-step="${step}"]`)?.remove();
    previews.append(item);
    previews.hidden = false;
    previews.scrollTop = previews.scrollHeight;
    frame.replaceChildren(picture("img", size, { src, alt: "" }), make("p", "frame-label", text));
  }

  async play() {
    const { id, prompt, size } = this.video;
    const blob = await attempt(
      () => server.media(id, "video", this.gone.signal),
      (error) => this.offerAgain(statusText(this.video), error, () => this.play()),
    );
    if (!blob) return;
    this.url = URL.createObjectURL(blob);
    const about = { src: this.url, ariaLabel: `Video: ${prompt}`, autoplay: !reducedMotion() };
    const options = { muted: true, loop: true, playsInline: true, controls: true };
    const player = picture("video", size, { ...about, ...options });
    const unplayable = { code: "not_playable", message: "this browser plays no H.264: download it instead" };
    player.onerror = () => showProblem(this.parts.problem, unplayable);
    this.parts.frame.replaceChildren(player);
    Object.assign(this.parts.download, { href: this.url, download: `${id}.mp4`, hidden: false });
    this.hooks.playing?.(player);
  }

  async cancel() {
    const { cancel, problem } = this.parts;
    // What has ended meanwhile is about to be shown as that.
    const show = (error) => error.code !== "video_not_cancellable" && showProblem(problem, error);
    const video = await attempt(() => server.cancel(this.video.id), show, cancel);
    if (video) this.show(video);
  }

  async remix() {
    const { remix, "remix-prompt": prompt, "remix-problem": problem } = this.parts;
    showProblem(problem, null);
    const send = () => this.hooks.remix(this.video, prompt.value);
    await attempt(send, (error) => showProblem(problem, error), remix.querySelector("button"));
  }
}
