// The server's API, relative to where the page is, so that it works behind a proxy with a path of its own.

const KEY = "api-key";

/** What the server says about a request that it did not carry out: `message`, `param`, `code`, `status`. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, param, code, retryAfter });
  }
}

export const readKey = () => sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";

/** Keep the key for this tab, or in this browser; an empty one forgets it. */
export function saveKey(key, inBrowser) {
  for (const storage of [sessionStorage, localStorage]) storage.removeItem(KEY);
  if (key) (inBrowser ? localStorage : sessionStorage).setItem(KEY, key);
}

export const isKeyKept = () => localStorage.getItem(KEY) !== null;

/** Send a request, with the key if there is one. Throws an ApiError unless the answer is a success. */
export async function send(path, { method = "GET", body = null, headers = {}, signal } = {}) {
  const key = readKey();
  const isForm = body instanceof FormData;
  const sent = { ...headers };
  if (key) sent.Authorization = `Bearer ${key}`;
  if (body !== null && !isForm) sent["Content-Type"] = "application/json";
  const content = body === null || isForm ? body : JSON.stringify(body);
  const response = await arrival(
    fetch(new URL(path, document.baseURI), { method, headers: sent, body: content, signal }),
    "The server cannot be reached. Is it still running?",
  );
  if (!response.ok) throw await asError(response);
  return response;
}

export const call = async (path, options) => (await send(path, options)).json();

/** What a promise of the network brings. Throws an ApiError of status 0 if it brings nothing. */
export async function arrival(promise, message = "The connection to the server broke off before this was done.") {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { message, code: "unreachable" });
  }
}

async function asError(response) {
  const text = await response.text();
  let told = { message: `${response.status} ${response.statusText}` };
  try {
    told = JSON.parse(text).error ?? told;
  } catch {
    // A proxy on the way answers in a form of its own: the status says what there is to say.
  }
  return new ApiError(response.status, told, response.headers.get("Retry-After"));
}

/** Server-sent events of a path: `{name, data}`, until the server ends them. */
export async function* events(path, options) {
  const reader = (await send(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await arrival(reader.read());
    if (done) return;
    unread += value;
    const blocks = unread.split("\n\n");
    unread = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n");
      const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data !== undefined) yield { name: field("event"), data: JSON.parse(data) };
    }
  }
}
