/* What narrows the list and what it shows: filters as chips, ready filters, columns, charts, order, links. */

import { button, count, el, menu, pairs, show } from "./dom.js";
import { link, opened, setFilter, state } from "./state.js";

const SAVED = "saved queries";
const MOST_CHARTS = 8;

/** Build the toolbar of the open table. `on`: query(): the query changed; columns(), charts(): what is shown changed. */
export function toolbar(place, on) {
  const { info } = opened;
  place.replaceChildren(
    el("output", { id: "count" }, "…"), el("span", { class: "chips" }), ...menu("Filter", (panel) => filterMenu(panel, on)),
    ...(info.ready.length ? menu("Ready filters", (panel) => readyMenu(panel, on)) : []),
    ...menu("Columns", (panel) => choices(panel, info.loaded.filter((name) => name !== "id"), state.columns, (names) => { state.columns = names; on.columns(); })),
    ...menu("Charts", (panel) => chartMenu(panel, on)),
    el("span", { class: "order" }), el("span", { class: "space" }), ...menu("Links", (panel) => linkMenu(panel)),
  );
}

/** What changes with each query: how many pass, its filters, its order. */
export function updateToolbar(place, on, { count: passing, of }) {
  place.querySelector("#count").replaceChildren(el("b", {}, count(passing)), ` of ${pairs(of)}`);
  place.querySelector(".chips").replaceChildren(...chips(on));
  const there = place.querySelector(".order");
  const at = [...there.children].indexOf(document.activeElement);
  there.replaceChildren(...order(on));
  there.children[at]?.focus();
}

function chips(on) {
  const { filters = [], decided, queue, text, any_case: anyCase } = state.query;
  const chip = (label, remove) => el("span", { class: "chip" }, label, button("×", remove, { "aria-label": `Without: ${label}` }));
  const found = filters.map((one) => chip(words(one), () => {
    state.query = { ...state.query, filters: filters.filter((other) => other !== one) };
    on.query();
  }));
  const without = (...keys) => () => {
    state.query = Object.fromEntries(Object.entries(state.query).filter(([key]) => !keys.includes(key)));
    on.query();
  };
  if (text) found.push(chip(`contains “${text}”${anyCase ? ", any case" : ""}`, without("text", "any_case")));
  if (typeof decided === "boolean") found.push(chip(decided ? "decided" : "not decided yet", without("decided")));
  if (queue) found.push(chip(`queue: ${queue}`, without("queue")));
  if (found.length > 1) found.push(button("clear all", without("filters", "text", "any_case", "decided", "queue"), { class: "link" }));
  return found;
}

/** A filter in words. */
export function words({ column, low = null, high = null, names, missing }) {
  if (missing) return `${column} is missing`;
  if (names) return names.length === 1 ? `${column}: ${names[0]}` : `${column}: ${names.length ? `one of ${names.length}` : "none"}`;
  if (low !== null && high !== null) return `${column} ${show(low)} to ${show(high)}`;
  return low !== null ? `${column} ≥ ${show(low)}` : `${column} ≤ ${show(high)}`;
}

function filterMenu(panel, on) {
  const { info } = opened;
  const named = info.columns.filter(({ kind, values }) => (kind === "name" || kind === "flag") && values.length);
  const decided = [["any decision", null], ["decided", true], ["not decided yet", false]];
  panel.append(
    el("fieldset", {}, el("legend", {}, "decision"), decided.map(([title, value]) => el("label", { class: "check" },
      el("input", { type: "radio", name: "decided", checked: (state.query.decided ?? null) === value, on: { change: () => { state.query = { ...state.query, decided: value ?? undefined }; on.query(); } } }), title))),
    ...named.map((column) => nameFilter(column, on)),
    el("p", { class: "muted" }, "Numbers are filtered in their charts: drag, or type the ends below."),
  );
}

function nameFilter({ name, values, missing, meaning }, on) {
  const chosen = () => new Set((state.query.filters ?? []).find((one) => one.column === name)?.names ?? []);
  const isMissing = () => (state.query.filters ?? []).some((one) => one.column === name && one.missing);
  const take = (value, there) => {
    const names = chosen();
    if (there) names.add(value);
    else names.delete(value);
    setFilter(name, names.size ? { names: [...names] } : null);
    on.query();
  };
  return el("fieldset", {}, el("legend", { title: meaning }, name),
    values.map(([value, rows]) => el("label", { class: "check" },
      el("input", { type: "checkbox", checked: chosen().has(value), on: { change: (event) => take(value, event.target.checked) } }),
      el("span", { class: "grow" }, value || "(empty)"), el("span", { class: "muted" }, count(rows)))),
    missing ? el("label", { class: "check" }, el("input", { type: "checkbox", checked: isMissing(), on: { change: (event) => { setFilter(name, event.target.checked ? { missing: true } : null); on.query(); } } }),
      el("span", { class: "grow" }, "without a value"), el("span", { class: "muted" }, count(missing))) : null);
}

function readyMenu(panel, on) {
  panel.append(...opened.info.ready.map(({ name, what, query, count: rows }) => button(
    [el("span", { class: "grow" }, el("b", {}, name), el("br"), el("span", { class: "muted" }, what)), el("span", { class: "muted" }, rows === undefined || rows === null ? "" : count(rows))],
    () => { state.query = { ...query }; panel.hidePopover(); on.query(); }, { class: "item" })));
}

/** Check boxes for names, in their order; `take(names)` at each change. */
function choices(panel, names, chosen, take, most = Infinity) {
  const boxes = names.map((name) => el("label", { class: "check", title: opened.byName.get(name).meaning },
    el("input", { type: "checkbox", value: name, checked: chosen.includes(name), on: { change: () => {
      const now = [...panel.querySelectorAll("input[type=checkbox]:checked")].map((one) => one.value);
      take([...chosen.filter((one) => now.includes(one)), ...now.filter((one) => !chosen.includes(one))].slice(0, most));
      chosen = now;
    } } }), el("span", { class: "grow" }, name), el("span", { class: "muted" }, opened.byName.get(name).kind)));
  panel.append(...boxes);
}

function chartMenu(panel, on) {
  const numbers = opened.info.columns.filter(({ kind }) => kind === "number").map(({ name }) => name);
  const pick = (label, index) => el("label", { class: "check" }, label, el("select", { "aria-label": `Scatter, ${label}`, on: { change: (event) => {
    const both = state.scatter ?? [numbers[0], numbers[1] ?? numbers[0]];
    both[index] = event.target.value;
    state.scatter = both[0] === both[1] ? null : [...both];
    on.charts();
  } } }, numbers.map((name) => el("option", { value: name }, name))));
  const axes = [pick("x", 0), pick("y", 1)];
  axes.forEach((one, index) => { one.querySelector("select").value = state.scatter?.[index] ?? numbers[index] ?? ""; });
  const named = (opened.info.scatters ?? []).map(([x, y]) => button(`${y} against ${x}`, () => { state.scatter = [x, y]; panel.hidePopover(); on.charts(); }, { class: "item" }));
  panel.append(el("fieldset", {}, el("legend", {}, `histograms, at most ${MOST_CHARTS}`)));
  choices(panel.firstElementChild, numbers, state.charts, (names) => { state.charts = names; on.charts(); }, MOST_CHARTS);
  if (numbers.length > 1) {
    panel.append(el("fieldset", {}, el("legend", {}, "scatter"), axes, named, button("Draw", () => {
      const [x, y] = axes.map((one) => one.querySelector("select").value);
      state.scatter = x === y ? null : [x, y];
      panel.hidePopover();
      on.charts();
    }), state.scatter ? button("No scatter", () => { state.scatter = null; panel.hidePopover(); on.charts(); }) : null));
  }
}

function order(on) {
  const select = el("select", { "aria-label": "Order by", on: { change: (event) => {
    state.query = { ...state.query, sort: event.target.value || undefined, queue: undefined };
    on.query();
  } } }, el("option", { value: "" }, state.query.queue ? "order of the queue" : "table order"), opened.info.loaded.map((name) => el("option", { value: name }, name)));
  select.value = state.query.sort ?? "";
  const down = Boolean(state.query.descending);
  return [select, button(down ? "↓" : "↑", () => { state.query = { ...state.query, descending: !down }; on.query(); },
    { "aria-label": down ? "Largest first" : "Smallest first", title: down ? "largest first" : "smallest first", disabled: !state.query.sort })];
}

function saved() {
  try {
    return JSON.parse(localStorage.getItem(SAVED)) ?? [];
  } catch {
    return [];
  }
}

function linkMenu(panel) {
  const name = el("input", { type: "text", "aria-label": "Name of this query", placeholder: "name of this query" });
  const list = () => saved().map(({ title, hash }, index) => el("span", { class: "check" },
    el("a", { href: `#${hash}`, class: "grow" }, title),
    button("×", () => { localStorage.setItem(SAVED, JSON.stringify(saved().toSpliced(index, 1))); panel.hidePopover(); }, { "aria-label": `Forget ${title}`, class: "quiet" })));
  const said = el("output");
  panel.append(
    el("form", { class: "row", on: { submit: (event) => {
      event.preventDefault();
      const title = name.value.trim();
      if (!title) return;
      localStorage.setItem(SAVED, JSON.stringify([...saved().filter((one) => one.title !== title), { title, hash: location.hash.slice(1) }]));
      panel.hidePopover();
    } } }, name, el("button", {}, "Save")),
    ...list(),
    button("Copy a link to this view", async () => {
      await navigator.clipboard.writeText(link());
      said.textContent = "Copied: it opens in any browser of this machine while the viewer runs.";
    }, { class: "item" }), said,
    el("p", { class: "muted" }, "All of a view is in its address: a bookmark of it works too, in this tab."),
  );
}
