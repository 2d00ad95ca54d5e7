// The form: what to ask for, filled from the models that the server has.

import { byId, make, showProblem } from "./elements.js";
import { passesText, plural } from "./words.js";

const FIELDS = ["prompt", "model", "steps", "plan", "shape", "seed"];
// The field that a refused parameter is shown at, where it is called otherwise.
const FIELD_OF = { num_inference_steps: "steps", size: "shape", num_frames: "shape" };

/** What an evaluation found of a plan, if there was one of the small world's captions. */
function measured({ num_clips: numClips, num_seeds: numSeeds, figures }) {
  const right = figures["right/all"];
  if (!right) return [];
  const [value, low, high] = [right.value, right.low, right.high].map((share) => (100 * share).toFixed(1));
  const over = numSeeds > 1 ? `, mean of ${numSeeds} trainings` : "";
  return [`measured: all that was asked for in ${value} % [${low}, ${high}] of ${numClips} clips${over}`];
}

export class AskForm {
  constructor() {
    this.models = [];
    this.root = byId("ask");
    this.fields = Object.fromEntries(FIELDS.map((name) => [name, byId(name)]));
    const { prompt, model, steps, plan } = this.fields;
    model.onchange = () => this.showModel();
    plan.onchange = steps.oninput = () => this.showPlan();
    prompt.onkeydown = ({ key, ctrlKey, metaKey }) => {
      if (key === "Enter" && (ctrlKey || metaKey)) this.root.requestSubmit();
    };
    this.root.addEventListener("input", (event) => this.clearProblem(event.target.id));
    byId("examples").onclick = ({ target }) => {
      prompt.value = target.value || prompt.value; // the gaps between them have none
      this.clearProblem("prompt");
    };
  }

  get model() {
    return this.models.find((model) => model.id === this.fields.model.value)?.x_raydistill;
  }

  /** The chosen plan's name. */
  get plan() {
    return this.fields.plan.value || String(this.model.steps[this.fields.steps.value]);
  }

  setModels(models) {
    this.models = models;
    this.fields.model.replaceChildren(...models.map((model) => new Option(model.id)));
    this.showModel();
  }

  showModel() {
    const { steps, plans, shapes, fps, bundles, kind, default_plan: first } = this.model;
    const named = Object.keys(plans).filter((plan) => !steps.includes(Number(plan)));
    const options = named.map((plan) => new Option(plan));
    if (steps.length) options.unshift(new Option("by number of steps", ""));
    const sizes = shapes.map(({ size, num_frames: frames }, i) => {
      const seconds = Number((frames / fps).toFixed(2));
      return new Option(`${size}, ${plural(frames, "frame")}, ${seconds} s`, i);
    });
    byId("model-hint").textContent = `${kind}: ${Object.keys(bundles).join(", ")}`;
    this.fields.plan.replaceChildren(...options);
    this.fields.shape.replaceChildren(...sizes);
    this.fields.steps.max = steps.length - 1;
    byId("ticks").replaceChildren(...steps.map((count) => make("span", "", count)));
    byId("plan-field").hidden = !named.length;
    byId("steps-field").hidden = !steps.length;
    byId("compare").hidden = byId("compare-hint").hidden = steps.length < 2;
    this.choosePlan(first);
  }

  choosePlan(plan) {
    const at = this.model.steps.indexOf(Number(plan));
    this.fields.plan.value = at < 0 ? plan : "";
    if (at >= 0) this.fields.steps.value = at;
    this.showPlan();
  }

  showPlan() {
    const { plans, scores, default_plan: first } = this.model;
    const { num_steps: numSteps, passes, experts } = plans[this.plan];
    const isNamed = this.fields.plan.value !== "";
    this.fields.steps.disabled = isNamed;
    this.fields.steps.ariaValueText = plural(numSteps, "step");
    byId("steps-value").textContent = isNamed ? `${numSteps}, as planned` : this.plan;
    const about = [`${passesText(passes)}: ${experts.join(", then ")}`];
    if (this.plan === first) about.push("the default");
    if (scores?.[this.plan]) about.push(...measured(scores[this.plan]));
    byId("plan-hint").textContent = about.join("; ");
  }

  /** The request's fields, unchecked: the server knows better what is wrong. */
  values() {
    const { prompt, model, seed, plan, shape } = this.fields;
    const values = { prompt: prompt.value, model: model.value, ...this.model.shapes[shape.value] };
    if (plan.value) values.plan = plan.value;
    else values.num_inference_steps = Number(this.plan);
    if (seed.value.trim()) values.seed = seed.value.trim(); // as digits: a number here would round large ones
    return values;
  }

  /** Take over how another video was made, as far as it is served still. */
  reuse({ model, prompt, size, x_raydistill: about }) {
    if (this.models.some((one) => one.id === model)) {
      this.fields.model.value = model;
      this.showModel();
    }
    const { plans, shapes } = this.model;
    if (about.plan in plans) this.choosePlan(about.plan);
    const at = shapes.findIndex((one) => one.size === size && one.num_frames === about.num_frames);
    if (at >= 0) this.fields.shape.value = at;
    this.fields.seed.value = about.seed;
    this.fields.prompt.value = prompt;
    this.fields.prompt.focus();
  }

  /** Show an error at the field that it names, or below all of them. */
  showProblem(error) {
    const name = FIELD_OF[error.param] ?? error.param;
    const field = this.fields[name];
    const isShown = field?.checkVisibility();
    showProblem(byId(isShown ? `${name}-error` : "ask-problem"), error);
    if (!isShown) return;
    field.ariaInvalid = "true";
    field.focus();
  }

  clearProblem(name) {
    showProblem(byId(`${name}-error`), null);
    this.fields[name].ariaInvalid = null;
  }

  clearProblems() {
    for (const name of FIELDS) this.clearProblem(name);
    showProblem(byId("ask-problem"), null);
  }
}
