/* One pair, large: conversation, differences, tokens, numbers, answers of the policies, neighbors, copies, decisions. */

import { get } from "./api.js";
import { decide, known, learn, moment, pending } from "./decisions.js";
import { difference } from "./diff.js";
import { announce, button, byId, count, el, show } from "./dom.js";
import { Editor } from "./edit.js";
import { pairSections } from "./pair_sections.js";
import { opened, state } from "./state.js";
import { coloredTokens, contentText, conversation } from "./text.js";

export const ACTIONS = [
  ["keep", "1", "The label is right"], ["flip", "2", "The rejected response is the better one"],
  ["tie", "3", "Neither is better"], ["drop", "4", "Not fit for training"],
];

export class PairView {
  /** `on`: move(step), close(), open(row), problem(failure), changed(): the row that is shown is another one. */
  constructor(place, on) {
    Object.assign(this, { place, on, row: null, pair: null, drawn: null, position: null, size: 0, mode: "differences" });
    this.editor = new Editor();
    const part = (name) => el("div", { class: name });
    [this.head, this.bar, this.said, this.texts, this.below] = ["row", "row decide", "status", "texts", "below"].map(part);
    this.bar.setAttribute("role", "toolbar");
    this.bar.setAttribute("aria-label", "Decide");
    place.append(el("div", { class: "pair-head" }, this.head, this.bar, this.said, this.editor.place), this.texts, this.below);
  }

  /** Show a row; the newest call wins. */
  async open(row, position = null, size = 0) {
    Object.assign(this, { row, position, size });
    this.place.hidden = false;
    document.body.classList.add("reading");
    const asked = moment();
    try {
      const found = await get("pair", { table: state.table, row });
      if (this.row !== row) return;
      const same = this.pair?.row === row;
      this.pair = found;
      learn(row, found.id, found, asked);
      this.tokens = null;
      if (!same) this.editor.close();
      await this.draw(same);
    } catch (failure) {
      if (this.row === row) this.on.problem(failure);
    }
  }

  close() {
    Object.assign(this, { row: null, pair: null, drawn: null });
    this.editor.close();
    this.place.hidden = true;
    document.body.classList.remove("reading", "large");
  }

  /** Draw all of it at once; `same`: the pair that was there, so the place in it stays. */
  async draw(same = false) {
    const { pair } = this;
    const top = same ? this.place.scrollTop : 0;
    await this.drawTexts();
    if (this.pair !== pair || this.row !== pair.row) return;
    this.below.replaceChildren(...pairSections(pair, this.on));
    this.drawHead();
    this.drawn = this.row;
    this.place.scrollTop = top;
    if (!same) announce(`Pair ${pair.id}${this.position === null ? "" : `, ${this.position + 1} of ${this.size}`}`);
  }

  /** The state of the decision, as it is now. */
  drawHead() {
    if (this.pair?.row !== this.row) return;
    const { state: decided, by, conflict } = known.get(this.row) ?? this.pair;
    const waiting = pending(state.table, this.row);
    const place = this.position === null ? "" : `${count(this.position + 1)} of ${count(this.size)}`;
    const label = waiting && ACTIONS.some(([name]) => name === waiting.action) ? waiting.action : decided.label;
    this.head.replaceChildren(
      button("←", () => this.on.close(), { "aria-label": "Back to the list", title: "Back to the list (Esc)", class: "quiet back" }),
      el("h2", {}, this.pair.id ?? `row ${this.row}`), el("span", { class: "muted" }, place), el("span", { class: "space" }),
      button("↑", () => this.on.move(-1), { "aria-label": "Previous pair", title: "Previous (k)" }),
      button("↓", () => this.on.move(1), { "aria-label": "Next pair", title: "Next (j)" }),
      button("⤢", () => document.body.classList.toggle("large"), { "aria-label": "Large or beside the list", title: "Large or beside the list (w)", class: "wide-only" }),
    );
    this.drawBar(label, !(known.get(this.row)?.heads.length || waiting));
    this.said.replaceChildren(...this.status(decided, by, conflict, waiting));
  }

  /** The buttons that decide; the one that has the focus keeps it. */
  drawBar(label, nothing) {
    const at = [...this.bar.children].indexOf(document.activeElement);
    const refused = !opened.info.can_decide;
    const act = (name, key, work, props) => button([name, el("kbd", { "aria-hidden": "true" }, key)], work, { disabled: refused, ...props });
    this.bar.replaceChildren(
      ...ACTIONS.map(([name, key, meaning]) => act(name, key, () => this.decide(name), { title: `${meaning} (${key})`, "aria-pressed": String(label === name), class: `act ${name}` })),
      act("edit", "e", () => this.edit()), act("note", "n", () => this.note()), act("undo", "u", () => this.decide("undo"), { disabled: refused || nothing }),
    );
    this.bar.children[at]?.focus();
  }

  status(decided, by, conflict, waiting) {
    const lines = [];
    if (!opened.info.can_decide) lines.push(el("p", { class: "warn" }, "Pairs of this table share ids, so none can be decided."));
    if (waiting) lines.push(el("p", { class: "warn" }, `${waiting.action}: not saved yet`));
    if (conflict?.length) {
      lines.push(el("div", { class: "warn" }, el("b", {}, "People disagree about this pair; what you decide now settles it:"),
        el("ul", {}, conflict.map(({ who, after }) => el("li", {}, `${who}: ${after.label ?? "no label"}${Object.keys(after.edits).length ? `, edited ${Object.keys(after.edits).join(", ")}` : ""}`)))));
    } else if (by?.length && (decided.label || decided.note || Object.keys(decided.edits).length)) {
      const last = by.at(-1);
      lines.push(el("p", { class: "muted" }, el("b", {}, decided.label ?? "no label"), ` · ${last.action} by ${last.who}, ${new Date(last.at).toLocaleString()}`));
    }
    if (this.pair.other_texts) lines.push(el("p", { class: "warn" }, "This was decided about other texts than those shown: the table was written anew since."));
    if (decided.note) lines.push(el("blockquote", { class: "note", dir: "auto" }, decided.note));
    return lines;
  }

  /** Decide about the pair that is shown; while the next one is on its way, nothing can be decided. */
  decide(action, value = null, draft = null) {
    if (!this.ready()) return;
    decide(state.table, [this.row], action, value, draft);
    if (state.query.queue && ACTIONS.some(([name]) => name === action)) {
      this.moving = true;
      this.on.move(1).finally(() => { this.moving = false; });
    }
  }

  ready() {
    return this.row !== null && this.drawn === this.row && !this.moving && opened.info.can_decide;
  }

  edit() {
    if (!this.ready()) return;
    const edits = known.get(this.row)?.state.edits ?? {};
    this.editor.edit(this.pair, edits, (value, draft) => this.decide("edit", value, draft));
  }

  note() {
    if (!this.ready()) return;
    this.editor.note(this.pair, known.get(this.row)?.state.note ?? "", (value, draft) => this.decide("note", value, draft));
  }

  /** Show differences, plain texts or token colors. */
  async show(mode) {
    this.mode = this.mode === mode ? "plain" : mode;
    if (this.pair) await this.drawTexts();
  }

  async drawTexts() {
    const { pair, row } = this;
    const { edits, label } = (known.get(row) ?? pair).state;
    const now = { ...pair.values, ...edits };
    const plain = Object.fromEntries(["chosen", "rejected"].map((name) => [name, single(now[name]) ?? pair.plain[name]]));
    const marks = this.mode === "differences" ? await difference(plain.chosen, plain.rejected) : null;
    if (this.mode === "tokens") await this.loadTokens();
    if (this.row !== row || this.pair !== pair) return;
    const [chosenNow, rejectedNow] = label === "flip" ? ["rejected by you", "chosen by you"] : ["", ""];
    const body = (name, side, tag) => {
      if (this.mode === "tokens" && this.tokens?.length) return this.tokens.map((one) => tokensOf(one, name));
      const compared = marks && !marks.why;
      return conversation(compared && single(now[name]) === null ? plain[name] : now[name], compared ? marks[side] : [], tag);
    };
    const column = (name, title, side, tag, extra) => el("section", { class: `response ${name}`, "aria-label": title },
      el("h3", {}, title, pair.words ? el("span", { class: "muted" }, ` · ${count(pair.words[name])} words`) : null, extra ? el("em", {}, ` · ${extra}`) : null, name in edits ? el("em", {}, " · edited") : null),
      body(name, side, tag), name in edits ? original(pair.values[name]) : null);
    this.texts.replaceChildren(
      el("section", { class: "prompt", "aria-label": "prompt" }, el("h3", {}, "prompt", "prompt" in edits ? el("em", {}, " · edited") : null),
        conversation(now.prompt), "prompt" in edits ? original(pair.values.prompt) : null),
      el("div", { class: "row modes" },
        ["differences", "tokens", "plain"].map((mode) => button(mode, () => { this.mode = mode; this.drawTexts(); }, { "aria-pressed": String(this.mode === mode) })),
        el("span", { class: "muted" }, this.hint(marks))),
      el("div", { class: "responses" }, column("chosen", "chosen", "left", "ins", chosenNow), column("rejected", "rejected", "right", "del", rejectedNow)),
    );
  }

  hint(marks) {
    if (marks?.why) return `Not marked: ${marks.why}.`;
    if (this.mode === "tokens" && this.tokens && !this.tokens.length) return "No measurement of this pair's tokens: `align entangle report` writes those of the pairs that it shows; open its folder with the table.";
    if (this.mode === "tokens") return "Orange: raising this token also raises the other response. Blue: it lowers it.";
    return "";
  }

  async loadTokens() {
    if (this.tokens) return;
    const { row } = this;
    try {
      this.tokens = (await get("tokens", { table: state.table, row })).measured;
    } catch (failure) {
      this.tokens = [];
      this.on.problem(failure);
    }
  }
}

/** The text that a value is, where it is one text; null for several turns. */
function single(value) {
  if (typeof value === "string") return value;
  const plainTurn = Array.isArray(value) && value.length === 1 && !value[0]?.tool_calls;
  return plainTurn ? contentText(value[0]?.content) : null;
}

function tokensOf(measured, name) {
  const numbers = [["cosine", "cosine"], ["norm_ratio", "|gl|/|gw|"]].filter(([key]) => typeof measured[key] === "number");
  return el("div", {}, el("p", { class: "muted" }, [measured.name, measured.verdict, ...numbers.map(([key, title]) => `${title} ${show(measured[key])}`)].filter(Boolean).join(" · ")),
    coloredTokens(measured[name] ?? []));
}

function original(value) {
  return el("details", {}, el("summary", {}, "as in the table"), conversation(value));
}

/** Keys of one pair: what `key` does, or nothing. */
export function pairKeys(view) {
  const acts = Object.fromEntries(ACTIONS.map(([name, key]) => [key, () => view.decide(name)]));
  return {
    ...acts, e: () => view.edit(), n: () => view.note(), u: () => view.decide("undo"),
    d: () => view.show("differences"), c: () => view.show("tokens"),
    w: () => byId("pair").hidden || document.body.classList.toggle("large"),
  };
}
