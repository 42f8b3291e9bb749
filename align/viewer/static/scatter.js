/* A scatter of two columns as counts in cells, so that a million pairs show their density; a rectangle filters both. */

import { post } from "./api.js";
import { button, count, css, el, newest, show } from "./dom.js";
import { neat, RangeFields } from "./histograms.js";
import { opened, rangeOf, setFilter, state } from "./state.js";

const EDGE = { left: 44, right: 8, top: 6, bottom: 20 };

export class Scatter {
  constructor(x, y, changed, close, problem) {
    [this.x, this.y] = [opened.byName.get(x), opened.byName.get(y)];
    this.changed = changed;
    this.canvas = el("canvas", { role: "img" });
    this.note = el("p", { class: "outside" });
    this.fields = [this.x, this.y].map((column) => new RangeFields(column.name, changed));
    this.node = el(
      "figure", { class: "scatter" },
      el("figcaption", {}, el("b", {}, `${y} against ${x}`), button("×", close, { "aria-label": "Close the scatter", class: "quiet" })),
      this.canvas,
      el("div", { class: "under" }, this.fields.map((one, index) => el("label", { class: "axis" }, [x, y][index], one.node))), this.note,
    );
    this.found = { cells: [], size: 96, outside: 0 };
    this.load = newest(async () => {
      try {
        const filters = (state.query.filters ?? []).filter((one) => one.column !== x && one.column !== y);
        this.found = await post("scatter", { table: state.table }, { query: { ...state.query, filters }, x, y });
        this.draw();
      } catch (failure) {
        problem(failure);
      }
    });
    this.canvas.addEventListener("pointerdown", (event) => this.start(event));
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  update() {
    this.fields.forEach((one) => one.update());
    this.draw();
    return this.load();
  }

  /** [x, y] of the plot in pixels for values, and back. */
  area() {
    const { clientWidth, clientHeight } = this.canvas;
    return { left: EDGE.left, top: EDGE.top, width: Math.max(1, clientWidth - EDGE.left - EDGE.right), height: Math.max(1, clientHeight - EDGE.top - EDGE.bottom) };
  }

  draw() {
    const { canvas } = this;
    if (!canvas.clientWidth) return;
    const scale = devicePixelRatio;
    canvas.width = canvas.clientWidth * scale;
    canvas.height = canvas.clientHeight * scale;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const { left, top, width, height } = this.area();
    const { cells, size, outside } = this.found;
    const most = Math.log1p(cells.reduce((found, [, , one]) => Math.max(found, one), 1));
    pen.fillStyle = css("--bar");
    const [w, h] = [width / size, height / size];
    const dot = cells.length < 1000 ? 3 : 1;
    for (const [column, row, one] of cells) {
      pen.globalAlpha = 0.25 + 0.75 * (Math.log1p(one) / most);
      pen.fillRect(left + column * w, top + (size - 1 - row) * h, Math.max(dot, w), Math.max(dot, h));
    }
    pen.globalAlpha = 1;
    this.axes(pen);
    this.rectangle(pen);
    this.note.textContent = outside ? `${count(outside)} beyond an axis or without a value` : "";
    canvas.setAttribute("aria-label", `${this.y.name} against ${this.x.name}: ${count(cells.reduce((sum, [, , one]) => sum + one, 0))} pairs in ${count(cells.length)} cells`);
  }

  axes(pen) {
    const { left, top, width, height } = this.area();
    pen.strokeStyle = css("--line");
    pen.strokeRect(left - 0.5, top + 0.5, width, height);
    pen.fillStyle = css("--muted");
    pen.font = "11px system-ui";
    for (const part of [0, 0.5, 1]) {
      pen.textAlign = part === 0 ? "left" : part === 1 ? "right" : "center";
      pen.fillText(show(tidy(this.x, part)), left + part * width, top + height + 14);
      pen.textAlign = "right";
      pen.fillText(show(tidy(this.y, part)), left - 5, top + (1 - part) * height + (part === 1 ? 9 : part === 0 ? 0 : 4));
    }
  }

  rectangle(pen) {
    const [x, y] = [rangeOf(this.x.name), rangeOf(this.y.name)];
    if (!x && !y && !this.dragged) return;
    const { left, top, width, height } = this.area();
    const part = (column, value, end) => Math.max(0, Math.min(1, ((value ?? end) - column.low) / (column.high - column.low)));
    const box = this.dragged ?? [
      left + width * part(this.x, x?.low, this.x.low), top + height * (1 - part(this.y, y?.high, this.y.high)),
      left + width * part(this.x, x?.high, this.x.high), top + height * (1 - part(this.y, y?.low, this.y.low)),
    ];
    pen.strokeStyle = css("--accent");
    pen.lineWidth = 1.5;
    pen.strokeRect(Math.min(box[0], box[2]), Math.min(box[1], box[3]), Math.abs(box[2] - box[0]), Math.abs(box[3] - box[1]));
  }

  start(event) {
    const { left, top, width, height } = this.area();
    const at = ({ offsetX, offsetY }) => [Math.max(left, Math.min(left + width, offsetX)), Math.max(top, Math.min(top + height, offsetY))];
    const first = at(event);
    const watch = new AbortController();
    this.canvas.setPointerCapture(event.pointerId);
    this.canvas.addEventListener("pointermove", (move) => { this.dragged = [...first, ...at(move)]; this.draw(); }, { signal: watch.signal });
    this.canvas.addEventListener("pointerup", (end) => {
      watch.abort();
      this.dragged = null;
      this.take(first, at(end), { left, top, width, height });
    }, { signal: watch.signal });
  }

  /** Filter both columns by the rectangle; a click without one takes both filters away. */
  take([x0, y0], [x1, y1], { left, top, width, height }) {
    const empty = Math.abs(x1 - x0) < 3 && Math.abs(y1 - y0) < 3;
    const range = (column, from, to) => {
      const value = (part) => neat(column.low + part * (column.high - column.low), column);
      const ends = { low: from <= 0.005 ? null : value(from), high: to >= 0.995 ? null : value(to) };
      return empty || (ends.low === null && ends.high === null) ? null : ends;
    };
    setFilter(this.x.name, range(this.x, (Math.min(x0, x1) - left) / width, (Math.max(x0, x1) - left) / width));
    setFilter(this.y.name, range(this.y, 1 - (Math.max(y0, y1) - top) / height, 1 - (Math.min(y0, y1) - top) / height));
    this.changed(true);
  }
}

function tidy(column, part) {
  return neat(column.low + part * (column.high - column.low), column);
}
