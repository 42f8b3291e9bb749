/* Histograms that filter: all pairs in grey, those that pass in color; a brush, or two fields for the keyboard. */

import { count, css, el, button, show } from "./dom.js";
import { opened, rangeOf, setFilter } from "./state.js";

const HEIGHT = 66;

/** Two fields for the ends of a column's filter, and what sets them back. `changed()` after a change. */
export class RangeFields {
  constructor(name, changed) {
    this.name = name;
    const field = (what, key) => el("input", {
      type: "number", step: "any", "aria-label": `${name}, ${what}`, placeholder: what === "at least" ? "min" : "max",
      on: { change: (event) => this.set(key, event.target.value, changed) },
    });
    this.low = field("at least", "low");
    this.high = field("at most", "high");
    this.off = button("×", () => { setFilter(name, null); changed(true); }, { "aria-label": `No filter on ${name}`, class: "quiet", hidden: true });
    this.node = el("span", { class: "range" }, this.low, el("span", { "aria-hidden": "true" }, "–"), this.high, this.off);
  }

  set(key, text, changed) {
    const { low = null, high = null } = rangeOf(this.name) ?? {};
    const filter = { low, high, [key]: text === "" ? null : Number(text) };
    setFilter(this.name, filter.low === null && filter.high === null ? null : filter);
    changed(true);
  }

  update() {
    const range = rangeOf(this.name);
    for (const key of ["low", "high"]) {
      if (this[key] !== document.activeElement) this[key].value = range?.[key] ?? "";
    }
    this.off.hidden = !range;
  }
}

export class Histogram {
  /** `changed(final)`: the filter of this column is another one now; not `final` while the brush moves. */
  constructor(name, changed, close) {
    this.column = opened.byName.get(name);
    this.changed = changed;
    this.fields = new RangeFields(name, changed);
    this.place = el("div", { class: "plot", "aria-hidden": "true" });
    this.note = el("p", { class: "outside" });
    this.node = el(
      "figure", { class: "histogram", "data-column": name },
      el("figcaption", { title: this.column.meaning }, el("b", {}, name), button("×", close, { "aria-label": `Close the histogram of ${name}`, class: "quiet" })),
      this.place, el("div", { class: "under" }, this.fields.node, this.note),
    );
    this.counts = null;
    this.base = null;
    this.chart = null;
  }

  /** Draw once the place has its final width. */
  mount() {
    const { low, high, bins } = this.column;
    const step = (high - low) / bins;
    this.x = Array.from({ length: bins }, (_, bin) => low + (bin + 0.5) * step);
    const bars = (color, series) => ({
      paths: uPlot.paths.bars({ size: [1, Infinity], gap: 1, align: 0 }), fill: () => css(color), width: 0, points: { show: false }, label: series,
    });
    this.chart = new uPlot({
      width: this.place.clientWidth, height: HEIGHT + 18, legend: { show: false }, padding: [2, 8, 0, 8],
      cursor: { y: false, points: { show: false }, drag: { x: true, y: false, setScale: false } },
      scales: { x: { time: false, range: [low, high] }, y: { range: () => [0, this.top()] } },
      axes: [
        { size: 18, gap: 2, font: "11px system-ui", stroke: () => css("--muted"), grid: { show: false }, ticks: { show: false }, space: 55, values: (_, ticks) => ticks.map(show) },
        { show: false },
      ],
      series: [{}, bars("--bar-all", "all"), bars("--bar", "shown")],
      hooks: { setSelect: [() => this.brushed(true)], setCursor: [() => this.hover()] },
    }, [this.x, this.x.map(() => 0), this.x.map(() => 0)], this.place);
    this.place.addEventListener("click", () => this.chart.select.width === 0 && rangeOf(this.column.name) && this.take(null, true));
    new ResizeObserver(() => {
      if (this.place.clientWidth && this.place.clientWidth !== this.chart.width) {
        this.chart.setSize({ width: this.place.clientWidth, height: HEIGHT + 18 });
        this.select();
      }
    }).observe(this.place);
  }

  /** The end of the y axis: all pairs, or, where few pass, those alone. */
  top() {
    const inner = (counts) => (counts ? Math.max(1, ...counts.slice(1, -2)) : 1);
    const [all, passing] = [inner(this.base), inner(this.counts)];
    this.zoomed = this.counts !== null && passing * 8 < all;
    return (this.zoomed ? passing : Math.max(all, passing)) * 1.05;
  }

  update(counts, base) {
    this.counts = counts;
    this.base = base ?? this.base ?? counts;
    this.fields.update();
    if (!this.chart) return;
    this.chart.setData([this.x, this.base.slice(1, -2), counts.slice(1, -2)]);
    this.select();
    const [below, above, missing] = [counts[0], counts.at(-2), counts.at(-1)];
    const parts = [below && `◂ ${count(below)} below`, above && `${count(above)} above ▸`, this.zoomed && "grey is cut off"].filter(Boolean);
    this.note.replaceChildren(parts.join(" · "), parts.length && missing ? " · " : "", missing
      ? button(`${count(missing)} missing`, () => { setFilter(this.column.name, { missing: true }); this.changed(true); }, { class: "link", title: "Show the pairs without a value" }) : "");
    this.place.title = "Drag over the bars to filter";
  }

  /** Draw the brush where the filter is, wherever it came from. */
  select() {
    const range = rangeOf(this.column.name);
    if (!this.chart || this.dragging()) return;
    if (!range) return this.chart.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    const at = (value, end) => Math.max(0, Math.min(this.chart.bbox.width / devicePixelRatio, this.chart.valToPos(value ?? end, "x")));
    const [left, right] = [at(range.low, this.column.low), at(range.high, this.column.high)];
    this.chart.setSelect({ left, width: Math.max(1, right - left), top: 0, height: this.chart.bbox.height / devicePixelRatio }, false);
  }

  dragging() {
    return this.chart.cursor.drag._x && this.chart.cursor.event?.buttons === 1;
  }

  hover() {
    if (!this.chart || !this.counts) return;
    if (this.dragging()) return this.brushed(false);
    const { idx } = this.chart.cursor;
    if (idx === null || idx === undefined) return;
    const { low, high, bins } = this.column;
    const step = (high - low) / bins;
    this.place.title = `${show(low + idx * step)} to ${show(low + (idx + 1) * step)}: ${count(this.counts[idx + 1])} of ${count(this.base[idx + 1])}`;
  }

  brushed(final) {
    const { left, width } = this.chart.select;
    if (width < 2) return;
    const right = left + width;
    const end = this.chart.bbox.width / devicePixelRatio;
    const value = (at) => neat(this.chart.posToVal(at, "x"), this.column);
    this.take({ low: left <= 1 ? null : value(left), high: right >= end - 1 ? null : value(right) }, final);
  }

  take(range, final) {
    const open = !range || (range.low === null && range.high === null);
    setFilter(this.column.name, open ? null : range);
    this.fields.update();
    this.changed(final);
  }
}

/** A value of an axis to a thousandth of its length, so that a link says what the fields say. */
export function neat(value, { low, high }) {
  const digits = Math.max(0, Math.ceil(-Math.log10((high - low) / 1000)));
  return Number(value.toFixed(Math.min(12, digits)));
}
