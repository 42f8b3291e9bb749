/* The two queues, and what the judged pairs say: wrong labels per source, the reward model against the person, trust. */

import { get, post } from "./api.js";
import { button, count, el, pairs, share } from "./dom.js";
import { opened, state } from "./state.js";

const QUEUES = {
  random: ["Random pairs", ({ source }) => `A fair sample${source ? `, in proportion from each ${source}` : ""}: what you judge here estimates the share of wrong labels.`],
  margin: ["Where label and model disagree most", ({ margin }) => `Lowest ${margin.column} first. For reading: these pairs are no fair sample, so they are not in the estimate.${
    margin.fair ? "" : " It is not known that these margins are cross-fitted: a reward model that was trained on a wrong label tends to agree with it."}`],
};

/** Show the page; `on`: queue(name), open(pair id), problem(failure). */
export async function drawJudge(place, on) {
  if (!place.firstChild) place.append(el("p", { class: "muted" }, "…"));
  const { info } = opened;
  if (!info) return;
  try {
    const [found, conflicts] = await Promise.all([get("estimates", { table: state.table }), get("conflicts", { table: state.table })]);
    place.replaceChildren(el("div", { class: "columns judging" },
      el("div", { class: "stack" },
        el("section", { class: "card" }, el("h2", {}, "Queues"), queues(info, found, on)),
        el("section", { class: "card" }, el("h2", {}, "Disagreements"), disagreements(conflicts, on))),
      el("section", { class: "card" }, el("h2", {}, "What you have judged says"), estimates(found), exporter(found, on)),
      el("p", { class: "muted" }, "Decisions are appended to ", el("code", {}, info.decisions), ` as ${info.who}. The table itself is never written: `, el("code", {}, "align data apply"), " writes the corrected one."),
    ));
  } catch (failure) {
    on.problem(failure);
  }
}

function queues(info, found, on) {
  return (info.queues ?? ["random"]).map((name) => {
    const [title, what] = QUEUES[name];
    return el("div", { class: "queue" }, el("p", {}, what(info)),
      button(name === "random" && found.judged ? `Go on: ${title.toLowerCase()}` : title, () => on.queue(name), { class: "main", disabled: !info.can_decide }));
  });
}

function estimates(found) {
  const { judged, undecided, not_counted: outside, other_texts: changed, next, flips, sources, by, accuracy, trust, sentence } = found;
  if (!judged) return el("p", {}, `Nothing yet. After ${found.milestones[0]} pairs of the random queue the share of wrong labels is known to about ±9 points if a tenth of them are wrong, ±13 if half are.${outside ? ` ${pairs(outside)} judged outside of it, not counted.` : ""}`);
  const rows = Object.entries(sources ?? {});
  return el("div", {},
    el("p", {}, el("b", {}, pairs(judged)), " of the random queue judged", undecided ? `, ${count(undecided)} of them ties or dropped` : "", outside ? `; ${pairs(outside)} judged outside of it, not counted` : "", changed ? `; ${pairs(changed)} left out, for their texts have changed since` : "", "."),
    next ? el("div", { class: "progress" }, el("progress", { max: String(next), value: judged, "aria-label": `${judged} of ${next}` }), el("span", { class: "muted" }, `${next - judged} more until ${next}`)) : null,
    sentence ? el("p", { class: "sentence" }, sentence) : null,
    flips ? el("table", { class: "rates" }, el("thead", {}, el("tr", {}, [by ?? "", "wrong labels (95%)", "", "pairs"].map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, line("all", flips), rows.map(([name, one]) => line(name, one)))) : null,
    accuracy ? el("p", {}, el("b", {}, "Reward model against you: "), `${share(accuracy)} of ${pairs(accuracy.n)} agree (column ${accuracy.column}). `,
      accuracy.fair ? null : el("span", { class: "warn" }, "Its margins are not cross-fitted: it has seen these pairs, so this is too good.")) : null,
    trust?.text ? el("p", {}, el("b", {}, "Trust: "), trust.text) : null);
}

function line(name, estimate) {
  const bar = el("i");
  if (estimate.low !== null) {
    bar.style.left = `${100 * estimate.low}%`;
    bar.style.width = `${100 * (estimate.high - estimate.low)}%`;
  }
  const dot = el("b");
  dot.style.left = `${100 * estimate.value}%`;
  return el("tr", {}, el("th", { scope: "row" }, name), el("td", { class: "number" }, share(estimate)), el("td", {}, el("span", { class: "interval", "aria-hidden": "true" }, bar, dot)), el("td", { class: "number" }, count(estimate.n)));
}

function exporter(found, on) {
  if (!found.judged) return null;
  const said = el("div", { "aria-live": "polite" });
  return el("div", {}, button("Write them for training", async () => {
    try {
      const { path, pairs: size, config } = await post("export", { table: state.table }, { what: "checked" });
      said.replaceChildren(el("p", {}, `${pairs(size)} in `, el("code", {}, path), ". In the configuration:"), el("pre", { class: "code", tabindex: "0" }, config));
    } catch (failure) {
      on.problem(failure);
    }
  }), el("span", { class: "muted" }, " as pairs.checked"), said);
}

function disagreements(conflicts, on) {
  if (!conflicts.length) return el("p", { class: "muted" }, "None. They arise when decisions of two people are merged.");
  return el("ul", {}, conflicts.map(({ pair, heads }) => el("li", {}, button(pair, () => on.open(pair), { class: "link" }),
    `: ${heads.map(({ who, after }) => `${who} ${after.label ?? (Object.keys(after.edits).length ? "edited" : "noted")}`).join(", ")}`)));
}
