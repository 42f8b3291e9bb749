/* The list of pairs: a virtual table over the rows of a view, with a cursor and a selection. */

import "./vendor/regular-table.js";
import { get, post } from "./api.js";
import { known, learn, moment, pending } from "./decisions.js";
import { announce, byId, count, el, show } from "./dom.js";
import { opened, state } from "./state.js";

export const PAGE = 100;
const TEXTS_AFTER = 150;
const ROW_HEIGHT = 26;
const TEXTS = ["prompt", "chosen", "rejected"];
const SIGNS = { keep: "✓ keep", drop: "✕ drop", flip: "⇄ flip", tie: "= tie" };

/** What the list shows: `count` rows, of which `load(start)` brings some; `page`: the first ones, without their texts. */
export function viewSource({ view, count: size, page }) {
  return { count: size, page, load: (start) => get("rows", { table: state.table, view, start, count: PAGE }) };
}

/** The rows of a list of numbers. */
export function listSource(rows) {
  return {
    count: rows.length,
    load: (start) => post("cells", { table: state.table }, { rows: rows.slice(start, start + PAGE), texts: true }),
  };
}

/** Note the rows of a page that has come. */
function took(source, number, found, asked) {
  const place = opened.info.loaded.indexOf("id");
  found.rows.forEach((row, index) => {
    source.loaded.set(number * PAGE + index, row);
    learn(row, found.cells[index][place], found.decisions[index], asked);
  });
  return found;
}

export class PairList {
  /** `on`: open(row, position), sort(name), selected(), problem(failure), gone(): the view is no longer kept. */
  constructor(place, on) {
    this.on = on;
    this.source = { count: 0, pages: new Map(), loaded: new Map() };
    this.cursor = 0;
    this.anchor = 0;
    this.selected = new Map();
    this.seen = [0, 0];
    this.table = document.createElement("regular-table");
    this.table.tabIndex = 0;
    this.table.setAttribute("role", "grid");
    this.table.setAttribute("aria-label", "Pairs; up and down to move, Enter to open, Space to select");
    this.table.setAttribute("aria-multiselectable", "true");
    this.empty = el("p", { class: "none", hidden: true }, "No pair passes. Take a filter away, or search for something else.");
    place.append(this.table, this.empty);
    this.table.setDataListener((...ends) => this.data(...ends));
    this.table.addStyleListener(() => this.style());
    this.table.addEventListener("mousedown", (event) => this.clicked(event));
    this.table.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(place);
  }

  columns() {
    return ["", "id", ...(state.columns ?? []), ...TEXTS];
  }

  /** Show other rows, from the first one. */
  async show(source, keepPlace = false) {
    if (!keepPlace) {
      this.cursor = 0;
      this.table.scrollTop = 0;
    }
    this.source = { ...source, pages: new Map(), loaded: new Map() };
    this.cursor = Math.max(0, Math.min(this.cursor, source.count - 1));
    this.empty.hidden = source.count > 0;
    if (source.page) {
      const now = this.source;
      now.pages.set(0, Promise.resolve(took(now, 0, source.page, moment())));
      setTimeout(() => this.source === now && this.again(), TEXTS_AFTER);
    }
    this.table.resetAutoSize();
    await this.draw();
  }

  draw() {
    return this.table.draw({ invalid_viewport: true });
  }

  /** Ask again for what is shown: decisions of others, texts that are ready now. */
  async again() {
    const { source, seen } = this;
    const numbers = [...source.pages.keys()].filter((number) => (number + 1) * PAGE >= seen[0] && number * PAGE <= seen[1]);
    const asked = moment();
    try {
      const fresh = await Promise.all(numbers.map(async (number) => [number, took(source, number, await source.load(number * PAGE), asked)]));
      source.pages.clear();
      fresh.forEach(([number, found]) => source.pages.set(number, Promise.resolve(found)));
    } catch (failure) {
      if (failure.code === "view-gone") return this.on.gone();
      return this.on.problem(failure);
    }
    return this.source === source ? this.draw() : null;
  }

  async page(number) {
    const { source } = this;
    if (!source.pages.has(number)) {
      const asked = moment();
      const loading = source.load(number * PAGE).then((found) => took(source, number, found, asked));
      source.pages.set(number, loading);
      loading.catch(() => source.pages.delete(number));
    }
    return source.pages.get(number);
  }

  /** The row number at a place of the list; null beyond its ends. */
  async rowAt(position) {
    if (position < 0 || position >= this.source.count) return null;
    return (await this.page(Math.floor(position / PAGE))).rows[position % PAGE] ?? null;
  }

  /** The cells that the table wants to draw: columns `x0` to `x1`, places `from` to `to`. */
  async data(x0, from, x1, to) {
    const columns = this.columns();
    const some = columns.slice(x0, x1);
    const { source } = this;
    const end = Math.min(to, source.count);
    const rows = [];
    if (end > from) this.seen = [from, end];
    try {
      const numbers = [];
      for (let page = Math.floor(from / PAGE); page * PAGE < end; page++) numbers.push(page);
      const pages = new Map(await Promise.all(numbers.map(async (one) => [one, await this.page(one)])));
      for (let at = from; at < end; at++) rows.push(this.line(pages.get(Math.floor(at / PAGE)), at % PAGE, some));
    } catch (failure) {
      if (failure.code === "view-gone") this.on.gone();
      else this.on.problem(failure);
    }
    return {
      num_rows: source.count, num_columns: columns.length, row_height: ROW_HEIGHT, num_column_headers: 1,
      column_headers: some.map((name) => [this.title(name)]),
      data: some.map((_, index) => Array.from({ length: Math.max(0, end - from) }, (_, at) => rows[at]?.[index] ?? "")),
    };
  }

  title(name) {
    return (name || "decision") + (name && name === state.query.sort && !state.query.queue ? (state.query.descending ? " ↓" : " ↑") : "");
  }

  line(page, index, columns) {
    const row = page.rows[index];
    if (row === undefined) return null;
    return columns.map((name) => {
      if (name === "") return this.mark(row);
      const text = TEXTS.indexOf(name);
      if (text >= 0) return page.texts ? page.texts[index][text] : "…";
      return show(page.cells[index][opened.info.loaded.indexOf(name)]);
    });
  }

  mark(row) {
    const waiting = pending(state.table, row);
    const { state: decided, conflict } = known.get(row) ?? {};
    const box = this.selected.has(row) ? "☑" : "☐";
    if (waiting) return `${box} … ${waiting.action}`;
    if (conflict?.length) return `${box} ⚠ conflict`;
    if (!decided) return box;
    const extra = `${Object.keys(decided.edits).length ? " ✎" : ""}${decided.note ? " ✉" : ""}`;
    return `${box} ${SIGNS[decided.label] ?? ""}${extra}`;
  }

  /** Classes and labels of the cells that are shown now. */
  style() {
    const columns = this.columns();
    const { table } = this;
    table.setAttribute("aria-rowcount", String(this.source.count + 1));
    for (const head of table.querySelectorAll("thead th")) {
      const name = columns[table.getMeta(head)?.x];
      if (name === undefined) continue;
      head.scope = "col";
      head.className = this.kind(name);
      head.title = opened.byName.get(name)?.meaning ?? (name ? "" : "selection and decision");
      const sorted = name && name === state.query.sort && !state.query.queue;
      head.setAttribute("aria-sort", sorted ? (state.query.descending ? "descending" : "ascending") : "none");
    }
    for (const line of table.querySelectorAll("tbody tr")) {
      const first = line.firstElementChild && table.getMeta(line.firstElementChild);
      if (!first) continue;
      const row = this.shown(first.y);
      line.id = `row-${first.y}`;
      line.setAttribute("aria-rowindex", String(first.y + 2));
      line.classList.toggle("cursor", first.y === this.cursor);
      line.classList.toggle("picked", this.selected.has(row));
      line.setAttribute("aria-selected", String(this.selected.has(row)));
      for (const cell of line.children) {
        const name = columns[table.getMeta(cell)?.x];
        if (name !== undefined) cell.className = this.kind(name);
        cell.dir = TEXTS.includes(name) ? "auto" : "";
      }
    }
    table.setAttribute("aria-activedescendant", `row-${this.cursor}`);
  }

  kind(name) {
    if (name === "") return "mark";
    if (TEXTS.includes(name)) return "text";
    return opened.byName.get(name)?.kind === "number" ? "number" : name === "id" ? "name id" : "name";
  }

  /** The row at a place that has been loaded. */
  shown(position) {
    return this.source.loaded.get(position) ?? null;
  }

  clicked(event) {
    const meta = this.table.getMeta(event.target.closest("td, th"));
    if (!meta || event.button !== 0) return;
    const name = this.columns()[meta.x];
    if (event.target.closest("thead")) {
      if (name && !TEXTS.includes(name)) this.on.sort(name);
    } else if (event.shiftKey) {
      event.preventDefault();
      this.select(Math.min(this.anchor, meta.y), Math.max(this.anchor, meta.y));
    } else if (name === "" || event.ctrlKey || event.metaKey) this.toggle(meta.y);
    else this.go(meta.y, true);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const visible = Math.max(1, Math.floor(this.table.clientHeight / ROW_HEIGHT) - 2);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: visible, PageUp: -visible, Home: -Infinity, End: Infinity };
    if (event.key in moves) {
      const place = Math.max(0, Math.min(this.source.count - 1, this.cursor + moves[event.key]));
      if (event.shiftKey) this.select(Math.min(this.anchor, place), Math.max(this.anchor, place), place);
      else this.go(place, !byId("pair").hidden && matchMedia("(min-width: 900px)").matches);
    } else if (event.key === "Enter") this.go(this.cursor, true);
    else if (event.key === " ") this.toggle(this.cursor);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  /** Move the cursor, scroll to it, and open its pair if asked. */
  async go(position, open) {
    if (!this.source.count) return;
    position = Math.max(0, Math.min(position, this.source.count - 1));
    this.cursor = this.anchor = position;
    this.scroll();
    try {
      const row = await this.rowAt(position);
      await this.draw();
      announce(`${count(position + 1)} of ${count(this.source.count)}: ${known.get(row)?.pair ?? row}`);
      if (open && row !== null) await this.on.open(row, position);
    } catch (failure) {
      this.on.problem(failure);
    }
  }

  /** Scroll by the share of the rows: the height of a long list is capped, so pixels are no rows. */
  scroll() {
    const { table } = this;
    const seen = table.clientHeight / ROW_HEIGHT - 1;
    const whole = table.scrollHeight - table.clientHeight;
    const places = Math.max(1, this.source.count - seen);
    const first = (table.scrollTop / Math.max(1, whole)) * places;
    if (this.cursor >= first && this.cursor <= first + seen - 1) return;
    const wanted = this.cursor < first ? this.cursor : this.cursor - seen + 1.5;
    table.scrollTop = (Math.max(0, wanted) / places) * whole;
  }

  async toggle(position) {
    const row = await this.rowAt(position);
    if (row === null) return;
    if (!this.selected.delete(row)) this.selected.set(row, position);
    this.cursor = this.anchor = position;
    this.draw();
    this.on.selected();
  }

  /** Select all places from `first` to `last`, at most as many as one request may decide. */
  async select(first, last, cursor = last) {
    const end = Math.min(last, first + 499);
    for (let at = first; at <= end; at++) {
      const row = await this.rowAt(at);
      if (row !== null) this.selected.set(row, at);
    }
    this.cursor = cursor;
    this.scroll();
    this.draw();
    this.on.selected();
  }

  clear() {
    this.selected.clear();
    this.draw();
    this.on.selected();
  }
}
