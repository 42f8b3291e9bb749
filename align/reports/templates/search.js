"use strict";
const field = document.getElementById("search");
const count = document.getElementById("count");
const articles = Array.from(document.querySelectorAll("#samples article"));
const texts = articles.map((article) => article.textContent.toLowerCase());
field.hidden = false;
field.addEventListener("input", () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  articles.forEach((article, k) => {
    article.hidden = !words.every((word) => texts[k].includes(word));
    shown += article.hidden ? 0 : 1;
  });
  count.textContent = words.length ? shown + " of " + articles.length + " prompts" : "";
});
