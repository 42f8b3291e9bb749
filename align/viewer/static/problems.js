/* What goes wrong is said at the top of the page, in words, with what can be done about it. */

import { takeToken } from "./api.js";
import { byId, button, el } from "./dom.js";

const shown = new Map();

/** Show a problem until it is closed or `solved`; one of the same code takes its place. */
export function say(failure, ...actions) {
  const code = failure.code ?? "page";
  const waits = failure.status === 0 || failure.status === 401;
  if (waits && shown.has(code)) return;
  const box = el("div", { class: `problem ${waits ? "waiting" : ""}`, "data-code": code },
    el("p", {}, el("strong", {}, failure.message), failure.hint ? ` · ${failure.hint}` : ""),
    actions, waits ? addressField(failure) : null,
    waits ? null : button("×", () => solved(code), { "aria-label": "Close", class: "quiet" }),
  );
  shown.get(code)?.remove();
  shown.set(code, box);
  byId("problems").append(box);
}

/** A problem is over. */
export function solved(...codes) {
  for (const code of codes) {
    shown.get(code)?.remove();
    shown.delete(code);
  }
}

/** Where the address of a viewer that was started again is pasted, so that this tab goes on with all it holds. */
function addressField(failure) {
  const field = el("input", { type: "text", "aria-label": "New address", placeholder: "paste the new address here", size: 30 });
  const again = failure.status === 0 ? `If it was stopped: start it again with --port ${location.port}, and ` : "Start-up prints an address: ";
  return el(
    "form", { class: "row", on: { submit: (event) => {
      event.preventDefault();
      if (takeToken(field.value)) location.reload();
      else field.setCustomValidity("expected http://127.0.0.1:PORT/#TOKEN"), field.reportValidity();
    }, input: () => field.setCustomValidity("") } },
    el("span", {}, `${again}paste it here. What you decided waits in this tab.`), field, el("button", {}, "Go on"),
  );
}
