/* Requests to the server of this page; the token stays in the tab. */

const KEY = "token";

/** A request that was refused, or got no answer (status 0). */
export class Failure extends Error {
  constructor(status, code, message, hint) {
    super(message);
    Object.assign(this, { status, code, hint: hint ?? null });
  }
}

/** Whether a later try with the same request may succeed. */
export const passing = (failure) => failure.status === 0 || failure.status === 401 || failure.status >= 500;

export const token = () => sessionStorage.getItem(KEY) ?? "";

/** Take the token out of the address, or out of a whole address that was pasted; false if there is none. */
export function takeToken(hash) {
  const [given, rest = ""] = hash.replace(/^[^#]*#/, "").split(/\/(.*)/s);
  if (!/^[\w-]{16,}$/.test(given)) return false;
  sessionStorage.setItem(KEY, given);
  history.replaceState(null, "", `${location.pathname}#/${rest}`);
  return true;
}

async function request(path, { method = "GET", body, signal } = {}) {
  const headers = { "x-token": token() };
  if (body !== undefined) headers["content-type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "connection", "align view does not answer: it was stopped, or this machine is very busy");
  }
  if (answer.ok) return answer;
  const found = (await answer.json().catch(() => ({}))).error ?? {};
  throw new Failure(answer.status, found.code ?? "unknown", found.message ?? `the server answered ${answer.status}`, found.hint);
}

/** The JSON answer of a GET with parameters. */
export async function get(name, parameters = {}, options = {}) {
  return (await request(`/api/${name}?${new URLSearchParams(parameters)}`, options)).json();
}

/** The JSON answer of a POST. */
export async function post(name, parameters, body, options = {}) {
  return (await request(`/api/${name}?${new URLSearchParams(parameters)}`, { method: "POST", body, ...options })).json();
}

/** Lines of an answer as they come. */
export async function* lines(path, options) {
  const answer = await request(path, options);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (left + value).split("\n");
      left = parts.pop();
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "connection", "the connection to align view was lost");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (left) yield left;
}

/** Server-sent events: [name, data] for each. */
export async function* events(path, options) {
  let name = "message";
  for await (const line of lines(path, options)) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) yield [name, JSON.parse(line.slice(5))];
  }
}
