/* What the keys do and what the page shows. */

import { button, el } from "./dom.js";

const KEYS = [
  ["j  k", "next and previous pair"], ["↑ ↓ PgUp PgDn Home End", "move in the list"], ["Enter", "open the pair under the cursor"],
  ["Space, Shift+↑ ↓", "select pairs; decisions then hold for all of them"], ["Esc", "close the pair, the editor or the selection"],
  ["1  2  3  4", "keep, flip, tie, drop"], ["e  n  u", "edit, note, undo"], ["d  c", "word differences, token colors, or plain"],
  ["w", "the pair large, or beside the list"], ["/", "search"], ["?", "this help"],
];
const OFF = "keys off";

export const keysOn = () => localStorage.getItem(OFF) !== "yes";

export function openHelp() {
  const dialog = el("dialog", { "aria-labelledby": "help-title", on: { close: () => dialog.remove() } },
    el("h2", { id: "help-title" }, "Keys"),
    el("dl", { class: "keys" }, KEYS.flatMap(([keys, what]) => [el("dt", {}, el("kbd", {}, keys)), el("dd", {}, what)])),
    el("label", { class: "check" }, el("input", { type: "checkbox", checked: keysOn(), on: { change: (event) => localStorage.setItem(OFF, event.target.checked ? "no" : "yes") } }), "single letters and digits act"),
    el("h2", {}, "What is shown"),
    el("p", {}, "Grey bars are all pairs, colored ones those that pass all other filters. Drag over the bars, or type the ends below them; a click takes the filter away. ◂ and ▸ count pairs beyond the axis."),
    el("p", {}, "Keep: the label is right. Flip: the rejected response is the better one. Tie: neither is better. Drop: not fit for training."),
    el("p", {}, "In a pair, words that only one response has are marked. Numbers say where the pair stands among all: the mark is at the share of pairs below it."),
    el("p", {}, "Decisions are written beside the table, one line each, never into it. Undo is a decision too. What could not be saved waits in this tab and is sent again."),
    el("form", { method: "dialog" }, button("Close", () => dialog.close(), { autofocus: true })));
  document.body.append(dialog);
  dialog.showModal();
}
