/* Editing the texts of a pair and its note; a draft stays in the tab until it is saved or thrown away. */

import { button, el } from "./dom.js";
import { state } from "./state.js";
import { contentText } from "./text.js";

const NAMES = ["prompt", "chosen", "rejected"];
const slot = (kind, row) => `draft ${kind} ${state.table} ${row}`;

/** Keep what was written but could not be saved, for the next time that the pair is edited. */
export function keepDraft({ action, row, draft }) {
  if (draft) sessionStorage.setItem(slot(action, row), JSON.stringify(draft));
}

export class Editor {
  constructor() {
    this.place = el("div", { class: "editor" });
  }

  close() {
    this.place.replaceChildren();
  }

  /** Fields for the three texts; `save({name: new value}, draft)` with those that are other than they were. */
  edit(pair, edits, save) {
    const now = { ...pair.values, ...edits };
    const fields = new Map();
    const parts = NAMES.map((name) => {
      const turns = Array.isArray(now[name]) ? now[name].map((turn) => [turn.role, contentText(turn.content)]) : [[null, String(now[name])]];
      const areas = turns.map(([role, text]) => el("textarea", { "aria-label": role ? `${name}, ${role}` : name, dir: "auto", rows: rowsFor(text), value: text }));
      fields.set(name, areas);
      const back = name in edits ? button("as in the table", () => this.finish(() => save({ [name]: null }, null)), { class: "link" }) : null;
      return el("label", {}, el("b", {}, name), back, areas.map((area, index) => [turns[index][0] ? el("span", { class: "muted" }, turns[index][0]) : null, area]));
    });
    const value = () => Object.fromEntries(NAMES.map((name) => [name, changed(now[name], fields.get(name))]).filter(([, one]) => one !== undefined));
    this.form(slot("edit", pair.row), [...fields.values()].flat(), parts, () => {
      const found = value();
      if (Object.keys(found).length) save(found, texts([...fields.values()].flat()));
    });
    fields.get("chosen")[0]?.focus();
  }

  /** A field for the note. */
  note(pair, text, save) {
    const area = el("textarea", { "aria-label": "Note", dir: "auto", rows: 3, maxlength: 10000, value: text });
    this.form(slot("note", pair.row), [area], [el("label", {}, el("b", {}, "note"), area)], () => save(area.value, texts([area])));
    area.focus();
  }

  form(key, areas, parts, save) {
    const draft = JSON.parse(sessionStorage.getItem(key) ?? "null");
    if (Array.isArray(draft) && draft.length === areas.length) areas.forEach((area, index) => { area.value = draft[index]; });
    const drop = () => { sessionStorage.removeItem(key); this.close(); };
    this.finish = (work) => { work(); drop(); };
    const form = el("form", { on: {
      submit: (event) => { event.preventDefault(); this.finish(save); },
      input: () => sessionStorage.setItem(key, JSON.stringify(texts(areas))),
      keydown: (event) => {
        if (event.key === "Escape") drop();
        else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.finish(save);
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    } }, parts, el("div", { class: "row" }, el("button", {}, "Save"), button("Cancel", drop), el("span", { class: "muted" }, "Ctrl+Enter saves, Esc cancels; the table itself is never written")));
    this.place.replaceChildren(form);
  }
}

const texts = (areas) => areas.map((area) => area.value);

function rowsFor(text) {
  return Math.max(2, Math.min(14, text.split("\n").length + Math.floor(text.length / 90)));
}

/** The value with the texts of its fields; undefined if none is another one. */
function changed(value, areas) {
  if (!Array.isArray(value)) return areas[0].value === String(value) ? undefined : areas[0].value;
  if (value.every((turn, index) => contentText(turn.content) === areas[index].value)) return undefined;
  return value.map((turn, index) => (contentText(turn.content) === areas[index].value ? turn : { ...turn, content: areas[index].value }));
}
