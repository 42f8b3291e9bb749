/* Conversations as nodes: turns, paragraphs with their own direction, code, tool calls. No text becomes HTML. */

import { el } from "./dom.js";

const SPEAKERS = /(?:^|\n\n)(Human|Assistant|System): ?/g;

/** Blocks of a text by their places: paragraphs, and code between lines of three backticks. */
export function blocks(text) {
  const found = [];
  let start = 0;
  let code = null;
  const close = (end) => {
    if (end > start) found.push({ kind: code === null ? "text" : "code", from: start, to: end, language: code });
  };
  for (let at = 0; at <= text.length;) {
    const next = text.indexOf("\n", at);
    const end = next < 0 ? text.length : next;
    const fence = /^\s{0,3}```+\s*([\w+#.-]*)\s*$/.exec(text.slice(at, end));
    if (fence) {
      close(at);
      code = code === null ? fence[1] : null;
      start = Math.min(text.length, end + 1);
    } else if (code === null && end === at) {
      close(at);
      start = Math.min(text.length, end + 1);
    }
    at = end + 1;
  }
  close(text.length);
  return found;
}

/** A text as nodes; `marks`: places [from, to] that differ, in order, drawn as `tag`. */
export function rendered(text, marks = [], tag = "mark") {
  return blocks(text).map(({ kind, from, to, language }) => {
    const end = text[to - 1] === "\n" ? to - 1 : to;
    const parts = pieces(text, from, end, marks, tag);
    if (kind === "code") return el("pre", { class: "code", "data-language": language || null, tabindex: "0" }, el("code", {}, parts));
    return el("p", { dir: "auto" }, marks.length ? parts : inline(text.slice(from, end)));
  });
}

function pieces(text, from, to, marks, tag) {
  const found = [];
  let at = from;
  for (const [first, last] of marks) {
    if (last <= at) continue;
    if (first >= to) break;
    if (first > at) found.push(text.slice(at, first));
    const end = Math.min(last, to);
    found.push(el(tag, {}, text.slice(Math.max(first, at), end)));
    at = end;
  }
  if (at < to) found.push(text.slice(at, to));
  return found;
}

function inline(text) {
  return text.split(/(`[^`\n]+`)/).map((part, index) => (index % 2 ? el("code", {}, part.slice(1, -1)) : part));
}

/** The content of a message as text; parts that are no text as JSON. */
export function contentText(content) {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return content === null || content === undefined ? "" : JSON.stringify(content, null, 1);
  return content.map((part) => part?.text ?? JSON.stringify(part)).join("\n");
}

/** Text or messages as turns; `marks` only for a text or a single message. */
export function conversation(value, marks = [], tag = "mark") {
  if (typeof value === "string") {
    const turns = spoken(value);
    if (!turns) return value ? rendered(value, marks, tag) : [el("p", { class: "empty" }, "empty text")];
    return turns.map(([role, text]) => turn({ role, content: text }, [], tag));
  }
  if (!Array.isArray(value)) return [el("pre", { class: "code" }, JSON.stringify(value, null, 1))];
  if (!value.length) return [el("p", { class: "empty" }, "no turn")];
  return value.map((message) => turn(message ?? {}, value.length === 1 ? marks : [], tag));
}

/** Turns of a text written as "Human: ... Assistant: ..."; null if it is none. */
function spoken(text) {
  const found = [...text.matchAll(SPEAKERS)];
  if (!found.length || text.slice(0, found[0].index).trim() || found[0][1] === "Assistant") return null;
  return found.map((one, index) => [one[1].toLowerCase(), text.slice(one.index + one[0].length, found[index + 1]?.index)]);
}

const PLAIN_KEYS = new Set(["role", "content", "tool_calls"]);

function turn(message, marks, tag) {
  const { role, content, tool_calls: calls } = message;
  const rest = Object.entries(message).filter(([key, value]) => !PLAIN_KEYS.has(key) && value !== null);
  const text = contentText(content);
  return el(
    "section", { class: "turn", "data-role": String(role) }, el("h4", {}, String(role ?? "?")),
    rest.map(([key, value]) => el("p", { class: "extra" }, el("b", {}, key), ` ${typeof value === "string" ? value : JSON.stringify(value)}`)),
    role === "tool" ? el("pre", { class: "code", tabindex: "0" }, pretty(text)) : rendered(text, marks, tag),
    (Array.isArray(calls) ? calls : []).map(toolCall),
  );
}

function toolCall(call) {
  const { name, arguments: given } = call?.function ?? call ?? {};
  return el("details", { class: "tool", open: true }, el("summary", {}, `calls ${name ?? "a tool"}`),
    el("pre", { class: "code", tabindex: "0" }, typeof given === "string" ? pretty(given) : JSON.stringify(given ?? call, null, 2)));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Tokens in the colors of their shades (-1 to 1). */
export function coloredTokens(tokens) {
  return el("p", { class: "tokens", dir: "auto" }, tokens.map(({ text, value, shade }) => {
    const node = el("span", { title: String(value) }, text);
    const strength = Math.min(1, Math.abs(shade)) * 0.65;
    node.style.backgroundColor = `rgb(${shade > 0 ? "var(--up)" : "var(--down)"} / ${strength.toFixed(3)})`;
    return node;
  }));
}
