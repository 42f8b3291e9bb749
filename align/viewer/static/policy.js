/* The only markup that may become HTML: two constant templates of regular-table; and the only worker. */
const TEMPLATES = new Set([
  '<table cellspacing="0"><thead></thead><tbody></tbody></table>',
  '<div class="rt-virtual-panel"></div><div class="rt-scroll-table-clip"><slot></slot></div>',
]);
const WORKERS = new Set([new URL("/diff_worker.js", location.origin).href]);

function refuse() {
  throw new TypeError("refused by the policy of this page");
}

if (globalThis.trustedTypes) {
  trustedTypes.createPolicy("default", {
    createHTML: (text) => (TEMPLATES.has(text) ? text : refuse()),
    createScript: refuse,
    createScriptURL: (text) => (WORKERS.has(new URL(text, location.origin).href) ? text : refuse()),
  });
}
