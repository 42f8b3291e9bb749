/* Decisions on their way to the server. Each waits in this tab's storage until the server has said that it is saved, and
   is sent again with the same id, so that neither a killed server nor a reload loses or doubles one. */

import { Failure, get, passing, post } from "./api.js";
import { byId, button, count } from "./dom.js";
import { say, solved } from "./problems.js";

const KEY = "unsent";
const AT_ONCE = 500;
const WAIT = 1000;

/** Row -> {pair, state, heads, by, conflict}: what this tab has shown of the open table. */
export const known = new Map();
const listeners = new Set();
let waiting = read();
let busy = false;
let sending = null;
let timer = 0;

function read() {
  try {
    return (JSON.parse(sessionStorage.getItem(KEY)) ?? []).map((one) => ({ ...one, unsure: true }));
  } catch {
    return [];
  }
}

function keep() {
  sessionStorage.setItem(KEY, JSON.stringify(waiting));
  byId("saved").textContent = waiting.length ? `${count(waiting.length)} not saved yet` : "";
  byId("saved").classList.toggle("unsaved", waiting.length > 0);
}

/** Call `work(rows)` when decisions about rows were saved, refused or put on their way. */
export const whenDecided = (work) => listeners.add(work);

const tell = (rows, refused = null) => listeners.forEach((work) => work(rows, refused));

/** The newest decision about a row that is not saved yet. */
export const pending = (table, row) => waiting.findLast((one) => one.table === table && one.row === row) ?? null;

export const unsent = () => waiting.length;

/** Decide about rows that were shown; `value`: text of a note or texts of an edit, `draft`: what was typed for it. */
export function decide(table, rows, action, value = null, draft = null) {
  for (const row of rows) {
    const seen = known.get(row);
    if (!seen) continue;
    const before = pending(table, row);
    waiting.push({
      id: crypto.randomUUID(), table, row, pair: seen.pair, content: seen.content ?? null, action, value, draft,
      base: before ? [before.id] : seen.heads,
    });
  }
  keep();
  tell(rows);
  return send();
}

/** Send what waits, in order, until nothing waits or the server does not take it. */
export function send() {
  clearTimeout(timer);
  if (!busy) sending = drain();
  return sending;
}

async function drain() {
  busy = true;
  try {
    while (waiting.length && (await sendOne()));
  } finally {
    busy = false;
  }
}

/** What goes into one request: of one table, each pair once, in order; one that was refused among others goes alone. */
function next() {
  const [first] = waiting;
  const found = [];
  const rows = new Set();
  for (const one of waiting) {
    if (one.table !== first.table || rows.has(one.row) || found.length === AT_ONCE || (found.length && (one.alone || first.alone))) break;
    found.push(one);
    rows.add(one.row);
  }
  return found;
}

async function sendOne() {
  const batch = next();
  const { table } = batch[0];
  try {
    if (!(await sure(batch))) return true;
    const decisions = batch.map(({ id, row, pair, content, action, value, base }) => ({ id, row, pair, ...(content ? { content } : {}), action, value, base }));
    const answer = await post("decide", { table }, { decisions });
    done(batch);
    answer.decisions.forEach((one, index) => learn(batch[index].row, one.pair, one));
    solved("connection", "disk-full", "output-folder", "view-token");
    tell(batch.map((one) => one.row));
    return true;
  } catch (failure) {
    if (!(failure instanceof Failure)) throw failure;
    return refused(batch, failure);
  }
}

/** Whether the rows still are the pairs that were judged; a server that was started again may show another table. */
async function sure(batch) {
  for (const one of batch.filter(({ unsure }) => unsure)) {
    const found = await get("pair", { table: one.table, row: one.row });
    one.unsure = false;
    if (found.id === one.pair && (!one.content || found.content === one.content)) continue;
    done([one]);
    say(new Failure(409, "other-pair", `${one.action} of pair ${one.pair} is not saved: its place in the table now holds another pair, or other texts`, "look at the pair again"));
    tell([one.row], one);
    return false;
  }
  return true;
}

/** After a refusal: wait and try again, or find out which one of several it was, or give that one up and say so. */
function refused(batch, failure) {
  if (passing(failure) || failure.code === "table-changed") {
    if (failure.code !== "table-changed") say(failure, ...(failure.status ? [button("Try again", send)] : []));
    waiting.forEach((one) => { one.unsure = true; });
    if (failure.status === 0) timer = setTimeout(send, WAIT);
    return false;
  }
  if (batch.length > 1) {
    batch.forEach((one) => { one.alone = true; });
    keep();
    return true;
  }
  done(batch);
  const [one] = batch;
  say(new Failure(failure.status, failure.code, `${one.action} of pair ${one.pair ?? one.row} is not saved: ${failure.message}`, failure.hint));
  tell([one.row], one);
  return true;
}

function done(batch) {
  const ids = new Set(batch.map((one) => one.id));
  waiting = waiting.filter((one) => !ids.has(one.id));
  keep();
}

let clock = 0;

/** The present moment, for `learn`: an answer to a question that was asked earlier may be older than a decision since. */
export const moment = () => clock;

/** Note what the server says about a row, unless something newer is known than at the moment when it was asked. */
export function learn(row, pair, { state, heads, by, conflict, content }, asked = ++clock) {
  const before = known.get(row);
  if (before && before.asked > asked) return;
  known.set(row, { pair, state, heads, by, conflict, content: content ?? before?.content, asked });
}

addEventListener("beforeunload", (event) => {
  if (waiting.length) event.preventDefault();
});
