/* Runs, finished or going on: stages, curves side by side, time left, the end of the log, the report. */

import { get, post } from "./api.js";
import { button, count, css, duration, el, show } from "./dom.js";
import { opened, state, writeAddress } from "./state.js";

const HEIGHT = 170;
const COLORS = ["--line-1", "--line-2", "--line-3", "--line-4", "--line-5", "--line-6"];
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

export class Runs {
  constructor(place, problem) {
    Object.assign(this, { place, problem, found: new Map(), charts: new Map(), drawn: "" });
    this.cards = el("div", { class: "columns" });
    this.curves = el("div", { class: "curves" });
    this.more = el("details", { class: "fold", hidden: true, on: { toggle: () => this.more.open && this.draw() } });
    this.report = el("div", { class: "report" });
    this.choice = el("div", { class: "row", role: "group", "aria-label": "Runs that are shown" });
    place.append(this.choice, this.cards, this.report, this.curves, this.more);
  }

  shown() {
    const all = opened.info.runs.map((_, index) => index);
    return state.runs?.filter((one) => all.includes(one)) ?? all;
  }

  /** Load all runs that are shown, and draw. */
  async open() {
    if (!opened.info.runs.length) {
      this.cards.replaceChildren(el("p", { class: "none" }, "No run is open: `align view RUN [RUN ...]` follows runs, also while they go on."));
      return;
    }
    this.choose();
    try {
      await Promise.all(this.shown().map(async (run) => this.found.set(run, await get("run", { run }))));
      this.draw();
    } catch (failure) {
      this.problem(failure);
    }
  }

  /** A run has gone on. */
  take(data) {
    this.found.set(data.run, data);
    if (state.page === "runs") this.draw();
  }

  choose() {
    const shown = new Set(this.shown());
    this.choice.replaceChildren(...opened.info.runs.map((folder, index) => el("label", { class: "check" }, el("input", { type: "checkbox", checked: shown.has(index), on: { change: (event) => {
      if (event.target.checked) shown.add(index);
      else shown.delete(index);
      state.runs = [...shown].sort();
      writeAddress();
      this.open();
    } } }), folder.split("/").at(-1))));
    this.choice.hidden = opened.info.runs.length < 2;
  }

  draw() {
    const runs = this.shown().filter((run) => this.found.has(run)).map((run) => [run, this.found.get(run)]);
    this.cards.replaceChildren(...runs.map(([run, one]) => this.card(run, one)));
    const groups = grouped(runs);
    const names = [...groups.keys()].join("\n");
    if (names !== this.drawn) {
      this.charts.forEach((chart) => chart.destroy());
      this.charts.clear();
      const figures = [...groups].map(([title, { single }]) => [single, el("figure", { class: "curve", "data-title": title }, el("figcaption", {}, el("b", {}, title)), el("div", { class: "plot" }), el("div", { class: "legend" }))]);
      const rest = figures.filter(([single]) => single).map(([, figure]) => figure);
      this.curves.replaceChildren(...figures.filter(([single]) => !single).map(([, figure]) => figure));
      this.more.replaceChildren(el("summary", {}, `${count(rest.length)} more curves`), el("div", { class: "curves" }, rest));
      this.more.hidden = !rest.length;
      this.drawn = names;
    }
    for (const [title, { single, lines }] of groups) if (!single || this.more.open) this.chart(title, lines);
  }

  card(run, { name, folder, stages, methods, log, report }) {
    const going = Object.entries(methods).map(([method, { step, of, seconds_left: left, silent }]) => (of ? el("p", {}, el("b", {}, method), ` step ${count(step ?? 0)} of ${count(of)}`,
      silent ? el("span", { class: "warn" }, `; nothing logged for ${duration(60 * silent)}: it may have stopped. The same command goes on.`) : left === null ? "" : `, about ${duration(left)} left`, el("progress", { max: String(of), value: step ?? 0, "aria-label": `${method}: step ${step ?? 0} of ${of}` })) : null));
    const state = Object.values(methods).some(({ silent }) => silent) ? "not finished" : "running";
    return el("section", { class: "card" }, el("h2", {}, name, el("span", { class: "muted" }, ` ${stages.some((one) => !one.finished) ? state : ""}`)), going,
      el("ol", { class: "stages" }, stages.map(({ name: stage, finished, seconds }) => el("li", { class: finished ? "" : "going" }, finished ? "✓ " : "… ", stage, finished ? el("span", { class: "muted" }, ` ${duration(seconds)}`) : ` ${state}`))),
      report ? button("Report", () => this.openReport(run)) : el("p", { class: "muted" }, "The report comes when the run is finished."),
      this.logOf(run, log), el("p", { class: "muted" }, folder));
  }

  /** The end of the log; open and closed stays as it was. */
  logOf(run, log) {
    if (!log.length) return null;
    this.logs ??= new Set();
    return el("details", { open: this.logs.has(run), on: { toggle: (event) => (event.target.open ? this.logs.add(run) : this.logs.delete(run)) } },
      el("summary", {}, "End of the log"), el("pre", { class: "code log", tabindex: "0" }, log.join("\n")));
  }

  async openReport(run) {
    try {
      const { address } = await post("ticket", { run }, {});
      if (!address) return;
      const frame = el("iframe", { src: address, sandbox: "allow-scripts", title: `Report of ${this.found.get(run)?.name ?? "the run"}` });
      this.report.replaceChildren(el("div", { class: "row" }, el("h2", {}, "Report"), button("Close", () => this.report.replaceChildren())), frame);
      this.report.scrollIntoView({ behavior: "smooth" });
    } catch (failure) {
      this.problem(failure);
    }
  }

  chart(title, lines) {
    const figure = [...this.place.querySelectorAll("figure")].find((one) => one.dataset.title === title);
    const place = figure.querySelector(".plot");
    const key = lines.map(({ label, band }) => `${label} ${Boolean(band)}`).join("\n");
    const column = (points, index) => points.map((point) => point[index]);
    const measured = lines.filter(({ band }) => band);
    const data = uPlot.join([...lines.map(({ points }) => [column(points, 0), column(points, 1)]), ...measured.map(({ band }) => [column(band, 0), column(band, 2), column(band, 1)])]);
    const old = this.charts.get(title);
    if (old?.key === key) {
      old.lines = lines;
      old.setData(data);
      return legend(figure, old);
    }
    old?.destroy();
    const end = { stroke: "transparent", spanGaps: true, points: { show: false } };
    const chart = new uPlot({
      width: Math.max(200, place.clientWidth), height: HEIGHT, legend: { show: false }, padding: [6, 10, 0, 0], scales: { x: { time: false } }, cursor: { y: false },
      axes: [axis({ size: 22 }), axis({ size: 52 })],
      series: [{}, ...lines.map(({ label, color, dash, points }) => ({ label, stroke: () => css(color), dash, width: 1.5, spanGaps: true, points: { show: points.length < 12, size: 5 } })), ...measured.flatMap(() => [end, end])],
      bands: measured.map(({ color }, index) => ({ series: [lines.length + 1 + 2 * index, lines.length + 2 + 2 * index], fill: () => `${css(color)}26` })),
      hooks: { setCursor: [(made) => made.lines && legend(figure, made)] },
    }, data, place);
    Object.assign(chart, { key, lines });
    legend(figure, chart);
    new ResizeObserver(() => place.clientWidth && place.clientWidth !== chart.width && chart.setSize({ width: place.clientWidth, height: HEIGHT })).observe(place);
    this.charts.set(title, chart);
    return chart;
  }
}

function axis(more) {
  return { stroke: () => css("--muted"), font: "11px system-ui", grid: { stroke: () => css("--line"), width: 0.5 }, ticks: { show: false }, values: (_, ticks) => ticks.map(show), ...more };
}

/** Names of the lines with their value under the cursor, or their last one. */
function legend(figure, chart) {
  const { lines, cursor: { idx } } = chart;
  const there = idx !== null && idx !== undefined;
  figure.querySelector(".legend").replaceChildren(...lines.map(({ label, color, dash, points }, index) => {
    const mark = el("i", { class: dash.length ? "dashed" : "" });
    mark.style.borderColor = `var(${color})`;
    const value = there ? chart.data[index + 1][idx] : points.at(-1)?.[1];
    return el("span", {}, mark, label, value === null || value === undefined ? "" : ` ${show(value)}`);
  }), el("span", { class: "muted" }, there ? `at step ${show(chart.data[0][idx])}` : "last values; across: steps"));
}

/** Title -> lines of all runs and methods that belong into one chart; a color is a run and method, a dash a curve. */
function grouped(runs) {
  const found = new Map();
  const several = runs.length > 1;
  let policies = 0;
  for (const [, { name, methods }] of runs) {
    for (const [method, { curves, groups, bands }] of Object.entries(methods)) {
      const color = COLORS[policies++ % COLORS.length];
      for (const { title, curves: names } of groups) {
        const there = names.filter((one) => curves[one]?.length);
        const alone = names.length === 1;
        if (!there.length) continue;
        if (!found.has(title)) found.set(title, { single: alone && names[0] === title, lines: [] });
        there.forEach((curve, index) => found.get(title).lines.push({
          label: [several ? name : "", method, alone ? "" : curve].filter(Boolean).join(" "), color, dash: DASHES[index % DASHES.length], points: curves[curve], band: bands[curve],
        }));
      }
    }
  }
  return found;
}
