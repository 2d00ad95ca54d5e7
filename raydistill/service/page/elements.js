// Elements of the page. What came from a server or a person becomes text here, never markup.

const SMALL_PX = 256;

export const byId = (id) => document.getElementById(id);
export const reducedMotion = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

/** Make an element; children are elements or text. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

/** Make an img or a video. Small ones get hard edges: what one looks for in them is single pixels. */
export function picture(tag, size, properties) {
  const element = make(tag, Math.max(...size.split("x")) < SMALL_PX ? "pixelated" : "");
  return Object.assign(element, properties);
}

/** Copy a template; returns its root and its named parts. */
export function fromTemplate(id) {
  const root = byId(id).content.firstElementChild.cloneNode(true);
  const named = [...root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]);
  return { root, ...Object.fromEntries(named) };
}

export function onSubmit(form, work) {
  form.onsubmit = (event) => {
    event.preventDefault();
    work();
  };
}

/** Show an error's code and message in an element made for it; null hides it. */
export function showProblem(element, error) {
  element.hidden = !error;
  if (!error) return;
  const { code = "error", message, retryAfterS } = error;
  const at = new Date(Date.now() + retryAfterS * 1000).toLocaleTimeString();
  const wait = retryAfterS ? `. Try again in ${retryAfterS} s, at ${at}` : "";
  element.replaceChildren(make("code", "", code), ` ${message}${wait}`);
}

/** Run and return what it gives; errors but for being stopped are shown. A button is out of use meanwhile. */
export async function attempt(work, show = () => {}, button = {}) {
  button.disabled = true; // a second press would ask for the same again
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") show(error);
  } finally {
    button.disabled = false;
  }
}
