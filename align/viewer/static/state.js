/* What the page shows; all of it is in the address, so that a link brings it back. */

import { token } from "./api.js";

export const state = { page: "pairs", table: 0, query: {}, columns: null, charts: null, scatter: null, row: null, at: null, runs: null };

/** What the server said about the open table. */
export const opened = { info: null, byName: new Map() };

const JSONS = { q: "query", cols: "columns", charts: "charts", xy: "scatter", runs: "runs" };

/** The part of the address after the #. */
export function address() {
  const found = new URLSearchParams();
  if (state.table) found.set("t", state.table);
  for (const [short, name] of Object.entries(JSONS)) {
    const value = state[name];
    if (value && JSON.stringify(value) !== "{}") found.set(short, JSON.stringify(value));
  }
  if (state.row !== null) found.set("row", state.row);
  if (state.row !== null && state.at !== null) found.set("at", state.at);
  const rest = found.toString();
  return `/${state.page}${rest ? `?${rest}` : ""}`;
}

/** Take the state from the address; what it does not say, or says wrongly, is left out. */
export function readAddress() {
  const [page, rest = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const given = new URLSearchParams(rest);
  state.page = ["pairs", "judge", "runs"].includes(page) ? page : "pairs";
  state.table = whole(given.get("t")) ?? 0;
  state.row = whole(given.get("row"));
  state.at = whole(given.get("at"));
  for (const [short, name] of Object.entries(JSONS)) {
    try {
      state[name] = JSON.parse(given.get(short) ?? "null");
    } catch {
      state[name] = null;
    }
  }
  const { query } = state;
  state.query = query && typeof query === "object" && !Array.isArray(query) ? query : {};
  for (const name of ["columns", "charts", "scatter", "runs"]) if (!Array.isArray(state[name])) state[name] = null;
}

function whole(text) {
  return /^\d{1,11}$/.test(text ?? "") ? Number(text) : null;
}

/** Write the state into the address; `step`: as a place that the back button returns to. */
export function writeAddress(step = false) {
  const hash = `#${address()}`;
  if (hash === location.hash) return;
  history[step ? "pushState" : "replaceState"](null, "", hash);
}

/** A link that opens this state in any tab of this machine while the viewer runs. */
export const link = () => `${location.origin}/#${token()}${address()}`;

/** The filter of the query on a column of numbers by its ends. */
export function rangeOf(name) {
  return (state.query.filters ?? []).find((one) => one.column === name && !one.names && !one.missing) ?? null;
}

/** Put a filter in place of the others of its column; null takes them away. */
export function setFilter(name, filter) {
  const others = (state.query.filters ?? []).filter((one) => one.column !== name);
  state.query = { ...state.query, filters: filter ? [...others, { column: name, ...filter }] : others };
  if (!state.query.filters.length) delete state.query.filters;
}
