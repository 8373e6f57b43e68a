// Part 6: leave with it. Files, and the texts that make this very state again.

import {app, ask} from "./app.js";
import {$, el, later, short, show} from "./dom.js";

export function start() {
  const each = (what, action) => document.querySelectorAll(what).forEach((button) =>
    button.addEventListener("click", () => action(button)));
  each("[data-file]", (button) => take(button.dataset.file));
  each("[data-copy]", copy);
  app.hear("compared", later(texts));
}

async function take(what) {
  const found = await ask("file", {what});
  if (!found) return;
  const anchor = el("a", {href: app.link.file(found.word), download: found.name});
  document.body.append(anchor);
  anchor.click();
  anchor.remove();
  show($("fetched"), `${found.name}, ${(found.bytes / 1024).toFixed(0)} KiB · edit `,
    el("code", {title: found.digest}, short(found.digest)));
}

async function texts() {
  const found = await ask("texts", {}, null, true);
  if (!found) return;
  const any = app.view.steps.length > 0;
  $("leave-empty").hidden = any;
  $("leaving").hidden = !any;
  $("python").textContent = found.python;
  $("command").textContent = found.command || "Nothing is in force.";
  $("link").textContent = `${location.origin}${location.pathname}#s=${found.state}`;
  history.replaceState(null, "", any ? `#s=${found.state}` : location.pathname + location.search);
}

async function copy(button) {
  const text = $(button.dataset.copy).textContent;
  try { await navigator.clipboard.writeText(text); } catch { select($(button.dataset.copy)); return; }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// Where the browser allows no copy (a page that is not on this machine): select it, so that Ctrl C does.
function select(place) {
  const range = document.createRange();
  range.selectNodeContents(place);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}
