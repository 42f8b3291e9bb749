/* The page: opens a table, and keeps list, charts, pair, judging and runs in step with the address. */

import "./policy.js";
import { Failure, events, get, lines, post, takeToken } from "./api.js";
import { decide, known, send, unsent, whenDecided } from "./decisions.js";
import { announce, button, byId, count, el, newest, pairs } from "./dom.js";
import { keepDraft } from "./edit.js";
import { keysOn, openHelp } from "./help.js";
import { Histogram } from "./histograms.js";
import { drawJudge } from "./judge.js";
import { ACTIONS, PairView, pairKeys } from "./pair.js";
import { say, solved } from "./problems.js";
import { Runs } from "./runs.js";
import { Scatter } from "./scatter.js";
import { opened, readAddress, state, writeAddress } from "./state.js";
import { listSource, PAGE, PairList, viewSource } from "./table.js";
import { toolbar, updateToolbar } from "./toolbar.js";

const NARROW = matchMedia("(max-width: 899px)");
const RETRY = 1000;
const TAB = crypto.randomUUID();
const charts = { histograms: new Map(), scatter: null, base: {} };
let found = null;
let searched = "";

const on = { query: () => queryChanged(true), columns: () => { writeAddress(); list.show(list.source, true); }, charts: () => { drawCharts(); queryChanged(true); } };

function problem(failure) {
  if (failure.name === "AbortError") return;
  if (!(failure instanceof Failure)) throw failure;
  const reload = failure.code === "table-changed" ? [button("Reload the table", reopen)] : [];
  say(failure, ...reload);
}

const list = new PairList(byId("list"), {
  open: (row, position) => openPair(row, position), sort, selected: drawSelection, problem, gone: () => refresh(),
});
const view = new PairView(byId("pair"), {
  move: (step) => list.go(list.cursor + step, true), close: closePair, open: (row) => openPair(row, null), problem,
});
const runs = new Runs(byId("runs"), problem);

async function start() {
  takeToken(location.hash);
  readAddress();
  byId("help-button").addEventListener("click", openHelp);
  byId("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
  byId("search-text").addEventListener("search", search);
  byId("search-case").addEventListener("change", search);
  byId("tables").addEventListener("change", (event) => { Object.assign(state, { table: Number(event.target.value), query: {}, columns: null, charts: null, scatter: null, row: null }); openTable(); });
  if (NARROW.matches) byId("charts-fold").open = false;
  byId("charts-fold").addEventListener("toggle", () => byId("charts-fold").open && found && drawCharts());
  await openTable();
  follow();
  send();
}

/** Ask for the table of the address and show it. */
async function openTable() {
  try {
    opened.info = await get("open", { table: state.table });
  } catch (failure) {
    problem(failure);
    if (failure.status === 0) setTimeout(openTable, RETRY);
    return;
  }
  ears.abort();
  last = { decisions: null, cache: null };
  solved("connection", "view-token", "table-changed");
  const { info } = opened;
  if (!info.tables.length) state.page = "runs";
  opened.byName = new Map(info.columns.map((column) => [column.name, column]));
  known.clear();
  charts.base = {};
  choose(info);
  byId("tables").replaceChildren(...info.tables.map((name, index) => el("option", { value: String(index) }, name)));
  byId("tables").value = String(state.table);
  byId("search-text").value = state.query.text ?? "";
  byId("search-case").checked = Boolean(state.query.any_case);
  sayNotes(info);
  found = null;
  toolbar(byId("toolbar"), on);
  showPage();
}

/** Columns and charts of the address that the table has; else those worth a look first. */
function choose(info) {
  const there = (names, kind) => names?.filter((name) => opened.byName.has(name) && (kind ? opened.byName.get(name).kind === kind : info.loaded.includes(name)));
  const numbers = info.columns.filter(({ kind }) => kind === "number").map(({ name }) => name);
  const telling = info.shown?.length ? info.shown : numbers.slice(0, 4);
  state.charts = there(state.charts, "number") ?? telling;
  state.columns = there(state.columns) ?? [...new Set([...(info.source ? [info.source] : []), ...telling, ...info.columns.filter(({ kind }) => kind === "flag").map(({ name }) => name)])].slice(0, 6);
  if (state.scatter && there(state.scatter, "number").length !== 2) state.scatter = null;
}

function sayNotes({ notes, cache, measurements }) {
  const texts = [...notes];
  sayCache(cache);
  if (cache.state === "none") texts.push(`Search is slow here, for texts are not copied: ${cache.why}`);
  if (measurements?.length) texts.push(`Joined by id: ${measurements.join(", ")}`);
  byId("notes")?.remove();
  if (texts.length) byId("list").after(el("details", { id: "notes" }, el("summary", {}, `${texts.length === 1 ? "1 remark" : `${texts.length} remarks`} about this table`), el("ul", {}, texts.map((text) => el("li", {}, text)))));
}

/** The page of the address. */
function showPage() {
  const { info } = opened;
  for (const name of ["pairs", "judge", "runs"]) byId(name).hidden = state.page !== name;
  byId("pages").replaceChildren(...[...(info.tables.length ? [["pairs", "Pairs"], ["judge", "Judge"]] : []), ["runs", info.runs.length ? `Runs (${info.runs.length})` : "Runs"]].map(([name, title]) => el("a", {
    href: "#", "aria-current": state.page === name ? "page" : null, on: { click: (event) => { event.preventDefault(); go(name); } },
  }, title)));
  byId("search").hidden = state.page !== "pairs";
  byId("table-choice").hidden = state.page === "runs" || info.tables.length < 2;
  if (state.page === "judge") drawJudge(byId("judge"), { queue: startQueue, open: openById, problem });
  if (state.page === "runs") runs.open();
  if (state.page === "pairs") {
    drawCharts();
    refresh().then(showRow);
  }
}

/** The pair of the address, at its place in the list if it still is there. */
async function showRow() {
  const { row, at } = state;
  if (row === null) return closePair();
  const there = at !== null && (await list.rowAt(at).catch(() => null)) === row;
  return there ? list.go(at, true) : openPair(row, null);
}

function go(page) {
  state.page = page;
  writeAddress(true);
  showPage();
}

function drawCharts() {
  const changed = (final) => queryChanged(final);
  charts.histograms = new Map(state.charts.map((name) => [name, new Histogram(name, changed, () => { state.charts = state.charts.filter((one) => one !== name); on.charts(); })]));
  charts.scatter = state.scatter ? new Scatter(...state.scatter, changed, () => { state.scatter = null; on.charts(); }, problem) : null;
  byId("charts").replaceChildren(...(charts.scatter ? [charts.scatter.node] : []), el("div", { class: "histograms" }, [...charts.histograms.values()].map((one) => one.node)));
  byId("charts-fold").hidden = !state.charts.length && !state.scatter;
  if (!byId("charts-fold").open) return;
  charts.histograms.forEach((one) => one.mount());
  fillCharts();
}

function fillCharts() {
  if (!found?.histograms) return;
  charts.histograms.forEach((one, name) => found.histograms[name] && one.update(found.histograms[name], charts.base[name]));
  if (byId("charts-fold").open) charts.scatter?.update();
}

let asked = "";
let drawn = null;

/** The query is another one: show what passes; `final`: it also is a place for the back button. */
function queryChanged(final) {
  if (final) {
    state.row = null;
    writeAddress(true);
  }
  const query = JSON.stringify([state.table, state.query, state.charts]);
  if (query !== asked) drawn = refresh();
  asked = query;
  return drawn;
}

const refreshed = newest(async () => {
  const { text, any_case: anyCase } = state.query;
  const wanted = JSON.stringify([state.table, text, anyCase]);
  try {
    if (text && wanted !== searched && !(await stream())) return;
    searched = wanted;
    await ground();
    found = await post("view", { table: state.table }, { query: state.query, columns: state.charts, first: PAGE });
    fillCharts();
    await list.show(viewSource(found));
    updateToolbar(byId("toolbar"), on, found);
    announce(`${pairs(found.count)} of ${count(found.of)}`);
  } catch (failure) {
    asked = "";
    problem(failure);
    if (failure.status === 0) setTimeout(refresh, RETRY);
  }
});

/** Show what passes now; `aria-busy` until it is drawn. */
async function refresh() {
  byId("pairs").setAttribute("aria-busy", "true");
  try {
    await refreshed();
  } finally {
    byId("pairs").setAttribute("aria-busy", "false");
  }
}

/** Counts of all pairs, for the grey bars. */
async function ground() {
  const missing = state.charts.filter((name) => !(name in charts.base));
  if (missing.length) Object.assign(charts.base, (await post("view", { table: state.table }, { query: {}, columns: missing })).histograms);
}

/** Show hits as they are found; false if another query has taken its place. */
async function stream() {
  const hits = [];
  const { query, table } = state;
  for await (const line of lines(`/api/search?table=${table}`, { method: "POST", body: { query, tab: TAB } })) {
    const part = JSON.parse(line);
    if (part.error) throw new Failure(400, part.error.code, part.error.message, part.error.hint);
    if (part.cancelled || query !== state.query) return false;
    if (part.rows) {
      const first = hits.length === 0 && part.rows.length > 0;
      hits.push(...part.rows);
      byId("search-state").textContent = `${count(part.hits)} found, ${Math.round((100 * part.done) / part.of)}% searched`;
      if (first) await list.show(listSource([...hits]));
    }
    if (part.end) byId("search-state").textContent = `${count(part.hits)} found`;
  }
  return true;
}

function search() {
  const text = byId("search-text").value;
  const anyCase = byId("search-case").checked;
  if ((state.query.text ?? "") === text && Boolean(state.query.any_case) === anyCase) return;
  const { text: _, any_case: __, ...rest } = state.query;
  state.query = text ? { ...rest, text, ...(anyCase ? { any_case: true } : {}) } : rest;
  if (!text) byId("search-state").textContent = "";
  queryChanged(true);
}

function sort(name) {
  const { sort: now, descending } = state.query;
  state.query = { ...state.query, sort: name, descending: now === name && !descending, queue: undefined };
  queryChanged(true);
}

async function openPair(row, position) {
  Object.assign(state, { row, at: position });
  writeAddress();
  await view.open(row, position, list.source.count);
}

function closePair() {
  const open = view.row !== null;
  state.row = null;
  writeAddress();
  view.close();
  if (open) list.table.focus({ preventScroll: true });
  list.draw();
}

async function startQueue(name) {
  Object.assign(state, { page: "pairs", query: { queue: name, decided: false }, row: null });
  writeAddress(true);
  showPage();
  await refresh();
  list.go(0, true);
}

async function openById(pair) {
  Object.assign(state, { page: "pairs", query: { filters: [{ column: "id", names: [pair] }] }, row: null });
  writeAddress(true);
  showPage();
  await refresh();
  list.go(0, true);
}

async function reopen() {
  try {
    await post("reopen", { table: state.table }, {});
    await openTable();
    send();
  } catch (failure) {
    problem(failure);
  }
}

/** Decide for all selected pairs. */
function drawSelection() {
  const size = list.selected.size;
  const place = byId("selection");
  place.hidden = !size;
  if (!size) return;
  const act = (action, value) => decide(state.table, [...list.selected.keys()], action, value);
  const note = el("input", { type: "text", "aria-label": "Note for the selected pairs", placeholder: "note" });
  place.replaceChildren(
    el("b", {}, `${pairs(size)} selected`), ...ACTIONS.map(([name, , meaning]) => button(name, () => act(name), { class: `act ${name}`, title: meaning })),
    el("form", { class: "row", on: { submit: (event) => { event.preventDefault(); act("note", note.value); note.value = ""; } } }, note, el("button", {}, "note")),
    button("undo", () => act("undo")), button("select all", () => list.select(0, list.source.count - 1), { title: "the first 500 of the list" }), button("clear", () => list.clear()),
  );
}

whenDecided((rows, refused) => {
  if (refused) {
    keepDraft(refused);
    list.again();
  }
  list.draw();
  if (!rows.includes(view.row)) return;
  if (refused || !unsent()) view.open(view.row, view.position, view.size);
  else view.drawHead();
});

let ears = new AbortController();

/** Follow what other tabs, other people and runs do, until the page is closed; say when the server is gone. */
async function follow() {
  for (;;) {
    ears = new AbortController();
    try {
      const which = opened.info?.runs.map((_, index) => index).join(",") ?? "";
      const asked = opened.info?.tables.length === 0 ? { runs: which } : { table: state.table, runs: which };
      for await (const [name, data] of events(`/api/events?${new URLSearchParams(asked)}`, { signal: ears.signal })) {
        solved("connection", "view-token");
        if (unsent()) send();
        if (name === "run") runs.take(data);
        else if (name === "state") heard(data);
      }
      throw new Failure(0, "connection", "the connection to align view was lost");
    } catch (failure) {
      if (failure.name === "AbortError") continue;
      problem(failure);
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }
}

function sayCache({ state: now, done, of }) {
  byId("search-text").placeholder = now === "building" ? `Search (texts ${Math.floor((100 * done) / of)}% ready)` : "Search the texts";
}

let last = { decisions: null, cache: null };

function heard({ cache, decisions, broken, changed, problem: why }) {
  if (why) problem(new Failure(422, "decision-file", `The decisions cannot be read: ${why}`));
  else solved("decision-file");
  if (changed) problem(new Failure(409, "table-changed", "The table was written anew since it was opened", "decisions are saved and stay"));
  sayCache(cache);
  if (broken) byId("saved").title = `${broken} lines of the decision file are broken and not used`;
  const more = last.decisions !== null && decisions !== last.decisions;
  const ready = last.cache === "building" && cache.state !== "building";
  last = { decisions, cache: cache.state };
  if (!more && !ready) return;
  if (!unsent()) list.again();
  if (more && !unsent() && view.row !== null && !view.editor.place.firstChild) view.open(view.row, view.position, view.size);
  if (more && state.page === "judge") drawJudge(byId("judge"), { queue: startQueue, open: openById, problem });
}

addEventListener("popstate", () => {
  if (takeToken(location.hash)) return location.reload();
  const { table } = state;
  readAddress();
  if (table !== state.table || !opened.info) return openTable();
  choose(opened.info);
  byId("search-text").value = state.query.text ?? "";
  byId("search-case").checked = Boolean(state.query.any_case);
  return showPage();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  charts.histograms.forEach((one) => one.chart?.redraw());
  charts.scatter?.draw();
  runs.charts.forEach((one) => one.redraw());
});

const keys = pairKeys(view);

/** With a selection, decisions hold for it; else for the pair that is open. */
function act(event) {
  const chosen = ACTIONS.find(([, key]) => key === event.key)?.[0] ?? (event.key === "u" ? "undo" : null);
  if (chosen && list.selected.size) return decide(state.table, [...list.selected.keys()], chosen);
  if (event.key === "j" || event.key === "k") return list.go(list.cursor + (event.key === "j" ? 1 : -1), true);
  return keys[event.key]?.();
}

addEventListener("keydown", (event) => {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest?.("dialog, [popover]") || document.querySelector(":popover-open")) return;
  const typing = target.matches?.("input, textarea, select");
  if (key === "Escape" && state.page === "pairs") {
    if (typing) return target.blur();
    if (list.selected.size) list.clear();
    else if (view.row !== null) closePair();
    return;
  }
  if (typing || !keysOn()) return;
  if (key === "?") openHelp();
  else if (key === "/" && state.page === "pairs") byId("search-text").focus();
  else if (state.page !== "pairs" || !(key in keys || key === "j" || key === "k")) return;
  else act(event);
  event.preventDefault();
});

start();
