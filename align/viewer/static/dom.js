/* Building nodes (never HTML from a text), and how numbers are written. */

/** An element with properties, listeners (`on`) and children; strings become text nodes. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "on") for (const [name, work] of Object.entries(value)) node.addEventListener(name, work);
    else if (key === "class") node.className = value;
    else if (key === "value" || key === "checked" || key === "disabled" || key === "open") node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** A button of the page. */
export function button(text, work, props = {}) {
  return el("button", { type: "button", on: { click: work }, ...props }, text);
}

export const byId = (id) => document.getElementById(id);

/** A color or length of the style sheet, as it is now (light or dark). */
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** A whole number with separators. */
export const count = (value) => value.toLocaleString("en-US");

/** "1 pair", "2 pairs". */
export const pairs = (value) => `${count(value)} ${value === 1 ? "pair" : "pairs"}`;

/** A value of a cell as text: at most four significant digits of a number. */
export function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") {
    if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? value.toLocaleString("en-US") : String(value);
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return value.toExponential(3);
    return String(Number(value.toPrecision(4))).replace("-", "−");
  }
  if (typeof value === "boolean") return value ? "yes" : "no";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** A share in percent with its interval: "12% (8% to 17%)". */
export function share(estimate) {
  const percent = (value) => `${(100 * value).toFixed(1).replace(/\.0$/, "")}%`;
  if (estimate.low === null) return `${percent(estimate.value)} (too few for an interval)`;
  return `${percent(estimate.value)} (${percent(estimate.low)} to ${percent(estimate.high)})`;
}

/** Seconds in words. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

let menus = 0;

/** A button with a panel that opens below it; `fill(panel)` is called at each opening. */
export function menu(text, fill, props = {}) {
  const id = `menu-${++menus}`;
  const panel = el("div", { id, popover: "auto", class: "menu", "aria-label": text });
  const opener = el("button", { type: "button", popovertarget: id, ...props }, text, el("span", { "aria-hidden": "true", class: "caret" }, " ▾"));
  panel.addEventListener("beforetoggle", (event) => {
    if (event.newState !== "open") return;
    panel.replaceChildren();
    fill(panel);
    const box = opener.getBoundingClientRect();
    panel.style.top = `${box.bottom + 4}px`;
    panel.style.left = `${Math.max(8, Math.min(box.left, innerWidth - 348))}px`;
    panel.style.maxHeight = `${innerHeight - box.bottom - 20}px`;
  });
  panel.addEventListener("toggle", (event) => {
    if (event.newState === "open") panel.querySelector("input, button, select, a")?.focus();
  });
  return [opener, panel];
}

/** Run `work` with the newest argument only, one call at a time; resolves when nothing is left to do. */
export function newest(work) {
  let busy = false;
  let done = null;
  let next = null;
  async function drain() {
    busy = true;
    try {
      while (next) {
        const now = next;
        next = null;
        await work(...now);
      }
    } finally {
      busy = false;
    }
  }
  return (...given) => {
    next = given;
    if (!busy) done = drain();
    return done;
  };
}

/** Say a change to a screen reader. */
export function announce(text) {
  byId("live").textContent = text;
}
