/* Word differences of two texts: {left, right} places to mark, or why there are none. */

const LEAST_SHARED = 0.25;
let worker = null;
let last = 0;
const open = new Map();

/** Resolves to {left, right} places [from, to], with `why` if both texts are better read whole. */
export function difference(left, right) {
  if (!worker) {
    worker = new Worker("/diff_worker.js", { type: "module" });
    worker.addEventListener("message", ({ data: { id, found } }) => {
      open.get(id)?.(found);
      open.delete(id);
    });
    worker.addEventListener("error", () => open.forEach((resolve) => resolve(null)));
  }
  const id = ++last;
  return new Promise((resolve) => {
    open.set(id, resolve);
    worker.postMessage({ id, left, right });
  }).then((found) => {
    if (!found) return { left: [], right: [], why: "too long to compare word by word" };
    if (found.shared < LEAST_SHARED) return { left: [], right: [], why: "too different to compare word by word" };
    return found;
  });
}
