// Speaking to the server this page came from. Media and events are read with fetch, not by address, because
// an API key travels in a header.

const KEY_NAME = "raydistill-api-key";
const PAGE_SIZE = 12;
// The server says something at least every 15 s: a connection that is silent for longer is dead.
const SILENCE_MS = 45000;

export const isEnded = (video) => !["queued", "in_progress"].includes(video.status);

/** The error that an answer of 4xx or 5xx is, in the server's words; status 0 is no answer. */
function refusal(status, { code, message, param }, retryAfterS = 0) {
  const mayPass = [0, 408, 429].includes(status) || status >= 500; // later, for the same request
  return Object.assign(new Error(message), { status, code, param, retryAfterS, mayPass });
}

export const noAnswer = () => refusal(0, { code: "no_answer", message: "the server does not answer" });

/** For what fetch and bodies throw: all but being stopped is a failure of the connection. */
function broken(error) {
  throw error.name === "AbortError" ? error : noAnswer();
}

export const savedKey = () => sessionStorage.getItem(KEY_NAME);
export const saveKey = (key) => sessionStorage.setItem(KEY_NAME, key);

async function ask(path, { headers, ...options } = {}) {
  // The extended status tells cancelled videos from failed ones.
  const all = { "x-raydistill-extended-status": "1", ...headers };
  if (savedKey()) all.authorization = `Bearer ${savedKey()}`;
  const response = await fetch(path, { ...options, headers: all }).catch(broken);
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({})); // a proxy's answer has no envelope
  const told = { code: `http_${response.status}`, message: "the server answered with an error", ...error };
  const refused = refusal(response.status, told, Number(response.headers.get("retry-after")));
  if (response.status === 401) dispatchEvent(new CustomEvent("keywanted", { detail: refused }));
  throw refused;
}

async function json(path, options) {
  const response = await ask(path, options);
  return response.text().then(parseJson).catch(broken);
}

/** Parse JSON, with seeds as digits: they go to 2^63, beyond what a number here holds exactly. */
const parseJson = (text) =>
  JSON.parse(text, (name, value, context) => (name === "seed" ? (context?.source ?? value) : value));

const post = (path, body = {}) =>
  json(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const create = (body) => post("v1/videos", body);
export const remix = (id, prompt) => post(`v1/videos/${id}/remix`, { prompt });
export const cancel = (id) => post(`v1/videos/${id}/cancel`);
export const find = (id, signal) => json(`v1/videos/${id}`, { signal });
export const remove = (id) => json(`v1/videos/${id}`, { method: "DELETE" });
export const list = (after) =>
  json(`v1/videos?limit=${PAGE_SIZE}&order=desc${after ? `&after=${after}` : ""}`);
export const models = async () => (await json("v1/models")).data;

/** How full the server is; 503 says that too. */
export const load = () => fetch("ready", { cache: "no-store" }).then((answer) => answer.json()).catch(broken);

export async function media(id, variant, signal) {
  const response = await ask(`v1/videos/${id}/content?variant=${variant}&redirect=0`, { signal });
  return response.blob().catch(broken);
}

/** Open a video's stream after the event of this id; returns an iterator of {id, event, data}. */
export async function events(id, after, signal) {
  const headers = after ? { "last-event-id": after } : {};
  return readEvents(await ask(`v1/videos/${id}/events`, { headers, signal }));
}

async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const silence = setTimeout(() => reader.cancel(), SILENCE_MS); // reads as the stream's end
    const { done, value } = await reader.read().catch(broken).finally(() => clearTimeout(silence));
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const event = Object.fromEntries(block.split(/\r?\n/).map((line) => line.split(/: ?(.*)/s, 2)));
      if (event.data) yield { ...event, data: parseJson(event.data) }; // else a sign of life
    }
  }
}
