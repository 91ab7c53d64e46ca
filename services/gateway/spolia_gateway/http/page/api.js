// The gateway's own HTTP: a key where one is wanted, errors as they are told, streams as they come.

const KEY = "spolia-key";
const LIMIT_MS = 10_000;

export const storedKey = () => sessionStorage.getItem(KEY) ?? "";

export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

/** What the gateway refused: `status` is 0 where it was not reached. */
export class Refused extends Error {
  constructor(status, message, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** A short call's JSON. */
export async function getJson(path, body) {
  return (await call(path, body, AbortSignal.timeout(LIMIT_MS))).json();
}

/** The events of a stream, parsed; it ends at [DONE], and throws what the stream says went wrong. */
export async function* events(path, body, signal) {
  const response = await call(path, body, signal);
  let rest = "";
  for await (const text of pieces(response.body)) {
    const frames = (rest + text).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue;
      if (frame === "data: [DONE]") return;
      const event = JSON.parse(frame.slice(6));
      if (event.error) throw new Refused(200, event.error.message, event.error.code);
      yield event;
    }
  }
  throw new Refused(0, "The stream ended before its end.");
}

async function call(path, body, signal) {
  const headers = storedKey() ? { authorization: `Bearer ${storedKey()}` } : {};
  const options = { headers, signal };
  if (body !== undefined) {
    options.method = "POST";
    options.body = JSON.stringify(body);
    headers["content-type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, error.name === "TimeoutError" ? "The gateway did not answer in time." : "The gateway cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  const wait = response.headers.get("retry-after");
  const message = told.error?.message ?? `The gateway answered ${response.status}.`;
  const error = new Refused(response.status, wait ? `${message} (try again in ${wait} s)` : message, told.error?.code);
  if (response.status === 401) document.dispatchEvent(new CustomEvent("key-wanted"));
  return error;
}

async function* pieces(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
