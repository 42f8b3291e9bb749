/* Words of two texts that differ, away from the page's own thread and within a time limit. */

import "./vendor/diff.js";

const TIMEOUT = 400;
const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });

/** Words, spaces and signs of a text, in any script. */
const words = (text) => Array.from(segmenter.segment(text), ({ segment }) => segment);

addEventListener("message", ({ data: { id, left, right } }) => {
  const parts = self.Diff.diffArrays(words(left), words(right), { timeout: TIMEOUT });
  postMessage({ id, found: parts ? ranges(parts) : null });
});

/** Places that are only in the left text, only in the right one, and the share of the letters that are in both. */
function ranges(parts) {
  const found = { left: [], right: [], shared: 0 };
  const at = { left: 0, right: 0 };
  const letters = { left: 0, right: 0, both: 0 };
  for (const { value, added, removed } of parts) {
    const text = value.join("");
    const size = text.replace(/\s/g, "").length;
    if (added || removed) {
      const side = added ? "right" : "left";
      found[side].push([at[side], at[side] + text.length]);
      at[side] += text.length;
      letters[side] += size;
    } else {
      at.left += text.length;
      at.right += text.length;
      letters.both += size;
    }
  }
  found.shared = letters.both / Math.max(1, letters.both + Math.max(letters.left, letters.right));
  return found;
}
