// What the page says of a video.

export const plural = (count, thing, things = `${thing}s`) => `${count} ${count === 1 ? thing : things}`;
export const passesText = (count) => plural(count, "pass", "passes");
export const stepsText = (plan, numSteps) =>
  plan === String(numSteps) ? plural(numSteps, "step") : `${plan} (${plural(numSteps, "step")})`;

export function secondsText(seconds) {
  if (seconds < 1) return `${Number((seconds * 1000).toPrecision(2))} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

export function statusText({ status, x_raydistill: about }) {
  const ended = { completed: "Done", failed: "Failed", cancelled: "Cancelled" }[status];
  if (ended) return ended;
  const eta = about.eta_s ? `, about ${secondsText(about.eta_s)} to go` : "";
  return `${status === "queued" ? queueText(about.queue_position) : stageText(about)}${eta}`;
}

function queueText(position) {
  if (position === null) return "Queued"; // lists do not say where
  return position ? `Queued: ${position} before it` : "Queued: next";
}

function stageText({ stage, step, num_steps: numSteps, expert }) {
  if (stage === "encode") return "Encoding the prompt";
  if (stage === "decode") return "Decoding the frames";
  return `Denoising: ${step} of ${plural(numSteps, "step")}${step && expert ? `, ${expert} expert` : ""}`;
}
