/* Below the texts of a pair: its numbers, answers of the policies, copies, neighbors, history and other columns. */

import { get, post } from "./api.js";
import { button, count, el, show } from "./dom.js";
import { opened, state } from "./state.js";
import { conversation } from "./text.js";

/** Nodes of all sections; those that ask the server do it when they are opened. */
export function pairSections(pair, on) {
  return [
    numbers(pair),
    lazy("Answers of the policies", on, async () => answers(await get("answers", { table: state.table, row: pair.row }))),
    lazy("Copies of this pair", on, async () => copies(await get("copies", { table: state.table, row: pair.row }), on)),
    lazy("Nearest prompts", on, async () => neighbors(await get("neighbors", { table: state.table, row: pair.row }), on)),
    pair.history?.length ? fold(`History (${pair.history.length})`, history(pair.history)) : null,
    Object.keys(pair.others).length ? fold("Other columns", others(pair.others)) : null,
  ].filter(Boolean);
}

function fold(title, ...content) {
  return el("details", { class: "fold" }, el("summary", {}, title), content);
}

/** Which sections are open stays from pair to pair. */
const wanted = new Set();

function lazy(title, on, load) {
  const body = el("div", { "aria-live": "polite" }, el("p", { class: "muted" }, "…"));
  const node = el("details", { class: "fold" }, el("summary", {}, title), body);
  let asked = false;
  node.addEventListener("toggle", async () => {
    if (node.open) wanted.add(title);
    else wanted.delete(title);
    if (!node.open || asked) return;
    asked = true;
    try {
      body.replaceChildren(...[await load()].flat());
    } catch (failure) {
      asked = false;
      body.replaceChildren(el("p", { class: "warn" }, failure.message));
      on.problem(failure);
    }
  });
  node.open = wanted.has(title);
  return node;
}

function numbers(pair) {
  const rows = (pair.numbers ?? []).filter(({ value }) => value !== null);
  const missing = (pair.numbers ?? []).filter(({ value }) => value === null).map(({ name }) => name);
  if (!pair.numbers?.length) return el("p", { class: "muted" }, "The table has no numbers of its pairs: `align reward score` adds margins.");
  return el("section", { class: "numbers" }, el("h3", {}, "Numbers of this pair"),
    el("table", {}, el("thead", {}, el("tr", {}, ["column", "value", "among the others", "meaning"].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map(({ name, value, meaning, kind, rank }) => el("tr", {},
        el("th", { scope: "row" }, name), el("td", { class: kind === "number" ? "number" : "" }, show(value)),
        el("td", {}, rank === null || rank === undefined ? null : rankBar(rank)), el("td", { class: "muted" }, meaning))))),
    missing.length ? el("p", { class: "muted" }, `Without a value: ${missing.join(", ")}`) : null);
}

function rankBar(rank) {
  const mark = el("i");
  mark.style.left = `${100 * rank}%`;
  const text = `above ${Math.round(100 * rank)}% of them`;
  return el("span", { class: "rank", role: "img", "aria-label": text, title: text }, mark);
}

function answers({ answers: found, why }) {
  if (!found.length) return el("p", { class: "muted" }, why || "No run holds an answer to this prompt.");
  return found.map(({ run, policy, step, text, reward, tokens, kl, finish_reason: finish }) => {
    const facts = [step === null ? null : `step ${count(step)}`, reward === null ? null : `reward ${show(reward)}`, kl === null ? null : `KL ${show(kl)} nats`,
      tokens === null ? null : `${count(tokens)} tokens`, finish === "length" ? "cut off" : null].filter(Boolean);
    return el("section", { class: "answer" }, el("h4", {}, policy, el("span", { class: "muted" }, ` · ${[run, ...facts].join(" · ")}`)), conversation(text));
  });
}

function copies(found, on) {
  if (!found) return el("p", { class: "muted" }, "Copies are found once the texts are copied to the disk; see below the list.");
  const parts = [["same", "same prompt and responses"], ["flipped", "responses the other way around"], ["prompt", "same prompt"]];
  if (parts.every(([key]) => !found[key].length)) return el("p", { class: "muted" }, "No other pair has this prompt.");
  return parts.filter(([key]) => found[key].length).map(([key, title]) => el("p", {}, `${title}: `, found[key].map((row) => [button(`row ${count(row)}`, () => on.open(row), { class: "link" }), " "])));
}

async function neighbors({ neighbors: found, what, why }, on) {
  if (!found.length) return el("p", { class: "muted" }, why || "None.");
  const cells = await post("cells", { table: state.table }, { rows: found.map(({ row }) => row), texts: true });
  const id = opened.info.loaded.indexOf("id");
  return [el("p", { class: "muted" }, what), el("ol", { class: "near" }, found.map(({ row, similarity }, index) => el("li", {},
    button(String(cells.cells[index][id] ?? row), () => on.open(row), { class: "link" }), ` ${show(similarity)} `, el("span", { dir: "auto" }, cells.texts?.[index][0] ?? ""))))];
}

function history(events) {
  return el("ol", {}, events.map(({ at, who, action, after, value }) => el("li", {},
    `${new Date(at).toLocaleString()} · ${who} · ${action}${action === "note" ? `: ${value ?? after.note}` : action === "undo" ? ` → ${after.label ?? "no label"}` : ""}`)));
}

function others(columns) {
  return Object.entries(columns).map(([name, value]) => el("section", {}, el("h4", {}, name, el("span", { class: "muted" }, ` ${opened.byName.get(name)?.meaning ?? ""}`)),
    el("pre", { class: "code", tabindex: "0" }, typeof value === "string" ? value : JSON.stringify(value, null, 1))));
}
