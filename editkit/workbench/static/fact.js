// Part 1: the fact. Search the atlas, write a prompt, see what the model says now.

import {app, ask, fact, fill} from "./app.js";
import {$, bar, el, later, number, show, shown} from "./dom.js";

let found = [], active = -1;

export function start() {
  $("search").addEventListener("input", search);
  $("search").addEventListener("keydown", keys);
  $("search").addEventListener("blur", () => setTimeout(close, 150));
  $("fact-form").addEventListener("submit", (event) => { event.preventDefault(); asked(); });
  app.hear("compared", later(() => $("prompt").value && asked(true)));
}

async function search() {
  const answer = await ask("search", {text: $("search").value}, null, true);
  if (!answer) return;
  found = answer.found;
  active = found.length ? 0 : -1;
  draw();
}

function draw() {
  const none = $("search").value.trim() && !found.length;
  const clicked = (event, i) => { event.preventDefault(); pick(i); };
  show($("found"),
    found.map((row, i) => el("li", {role: "option", id: `found-${i}`, "aria-selected": String(i === active),
      onmousedown: (event) => clicked(event, i)},
      el("b", {}, row.subject), " ", el("span", {class: "muted"}, row.relation.replace(/^\S+ /, "")), " ", row.true)),
    none ? el("li", {class: "muted none"}, "No fact of the atlas has these words. Write a prompt below.") : null);
  $("found").hidden = !found.length && !none;
  $("search").setAttribute("aria-expanded", String(!$("found").hidden));
  $("search").setAttribute("aria-activedescendant", active >= 0 ? `found-${active}` : "");
  $(`found-${active}`)?.scrollIntoView({block: "nearest"});
}

function keys(event) {
  const move = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (move && found.length) { event.preventDefault(); active = (active + move + found.length) % found.length; draw(); }
  else if (event.key === "Enter" && active >= 0 && !$("found").hidden) { event.preventDefault(); pick(active); }
  else if (event.key === "Escape" && !$("found").hidden) { event.stopPropagation(); close(); }
}

function close() {
  $("found").hidden = true;
  $("search").setAttribute("aria-expanded", "false");
}

function pick(i) {
  const row = found[i];
  close();
  $("search").value = "";
  fill({...row, new: ""});
  show($("others"), row.others.map((other) => el("option", {value: other})));
  asked();
  $("new").placeholder = `as ${row.new}`;
  $("new").focus();
}

// What the model, with this tab's edits, says of the fact in the fields.
export async function asked(quiet = false) {
  const said = await ask("ask", fact(), null, quiet);
  if (!said) return;
  const words = {yes: "knows it", no: "does not know it", unsure: "cannot be told", new: "says the new answer"};
  show($("answer"),
    el("p", {class: `verdict ${said.verdict}`}, el("b", {}, words[said.verdict]), " ", said.sentence),
    el("div", {class: "columns"},
      el("div", {},
        el("h3", {}, said.edited ? "Next tokens, with the edits in force" : "Next tokens"), bars(said.next)),
      el("div", {},
        el("h3", {}, "It goes on"), el("p", {class: "said"}, said.prompt, el("b", {}, said.says)),
        said.probabilities.map(([word, p]) =>
          el("p", {class: "small"}, "P(", el("b", {}, word), `) = ${number(p)}`)))));
}

// Likeliest tokens with their probabilities as bars; those that `other` lacks are marked.
export function bars(rows, other = null) {
  const known = other && new Set(other.map(([token]) => token));
  return el("table", {class: "bars"}, el("tbody", {}, rows.map(([token, p]) => el("tr", {},
    el("th", {scope: "row"}, known && !known.has(token) ? el("mark", {}, shown(token)) : shown(token)),
    el("td", {}, bar(p)), el("td", {class: "num"}, number(p))))));
}
