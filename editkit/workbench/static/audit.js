// Part 4: the audit. Every fact of the atlas is a square; those that changed light up.

import {app, ask} from "./app.js";
import {$, cell, choice, cividis, el, number, show, swatches, table} from "./dom.js";

const ROW = 20;  // squares that an arrow up or down moves by
let rows = [], order = [], digest = "", at = 0;  // `order`: numbers of rows as they stand on the page

export function start() {
  $("run-audit").addEventListener("click", run);
  app.hear("stack", (view) => $("audit-old")?.toggleAttribute("hidden", !view.total || view.total === digest));
}

async function run() {
  $("run-audit").disabled = true;
  const found = await ask("audit");
  $("run-audit").disabled = false;
  if (!found) return;
  rows = found.rows.map((row, i) => ({...row, rank: i + 1}));
  digest = found.digest;
  choice($("audit-shows"), [["happened", "What happened"], ["predicted", "What was predicted"]], "happened", draw);
  draw("happened");
}

const moved = (row) => row.changed && !row.edited;
const square = (kind, properties = {}) => el("i", {class: `square ${kind}`, ...properties});
const many = (count) => count.toLocaleString("en");

function draw(shows) {
  // 1) The facts by relation, those with the most changes first.
  const groups = new Map();
  rows.forEach((row, i) => groups.set(row.relation, [...(groups.get(row.relation) ?? []), i]));
  const changes = (members) => members.filter((i) => moved(rows[i])).length;
  const other = (members) => members.filter((i) => rows[i].changed || rows[i].edited).length;
  const sorted = [...groups].sort(([a, mine], [b, theirs]) => other(theirs) - other(mine) || a.localeCompare(b));
  order = sorted.flatMap(([, members]) => members);
  at = Math.max(order.findIndex((i) => rows[i].changed), 0);

  // 2) A square for each.
  const made = (i) => {
    const row = rows[i], predicted = shows === "predicted";
    const state = row.edited ? "edited" : row.changed ? "flipped" : "";
    return square(predicted ? `predicted ${state}` : state, {role: "gridcell", tabindex: i === order[at] ? 0 : -1,
      "data-row": i, style: predicted ? {"background-color": cividis(Math.sqrt(row.pull))} : undefined,
      "aria-label": `${row.subject}: ${row.after}${row.changed ? `, was ${row.before}` : ""}`});
  };
  const title = (relation, members) => relation.replace(/_/g, " ")
    + (changes(members) ? ` ${changes(members)} of ` : " ") + members.length;
  const grid = el("div", {class: "facts", role: "grid", "aria-label": "Facts of the atlas"},
    sorted.map(([relation, members]) => el("div", {class: "relation", role: "row"},
      el("h4", {}, title(relation, members)),
      el("div", {class: "squares"}, members.map(made)))));
  const chosen = (event) => event.target.dataset.row && tell(Number(event.target.dataset.row));
  grid.addEventListener("click", chosen);
  grid.addEventListener("focusin", chosen);
  grid.addEventListener("keydown", keys);

  // 3) Around them: the count, the legend, the fact that is looked at, the changed ones as a table.
  const changed = rows.filter(moved);
  const legend = shows === "happened"
    ? [["", "as before"], ["flipped", "another answer"], ["edited", "edited"]]
      .map(([kind, text]) => el("span", {class: "explained"}, square(kind), text))
    : ["pull 0 ", swatches(), " 1: how much of the edit reaches the fact's own key; changed facts have a ring"];
  show($("grid"),
    el("p", {}, el("b", {class: changed.length ? "bad" : "good"}, `${changed.length} of ${many(rows.length)} facts`),
      " have another answer than the unedited model's, besides the edited ones. ",
      el("span", {id: "audit-old", class: "warn", hidden: true}, "The stack has changed since: ask again.")),
    el("p", {class: "legend"}, legend),
    el("div", {id: "fact-detail", class: "card detail", "aria-live": "polite"},
      "Click a square, or move with the arrows."),
    grid, changed.length ? listed(changed) : null);
}

function listed(changed) {
  return el("details", {}, el("summary", {}, "The changed facts as a table"),
    table("stacked", ["fact", "before", "after", "pull", "nearest"], changed.map((row) => el("tr", {},
      cell("fact", {}, row.prompt), cell("before", {}, row.before), cell("after", {}, el("mark", {}, row.after)),
      cell("pull", {class: "num"}, number(row.pull)), cell("nearest", {class: "num"}, String(row.rank))))));
}

function tell(i) {
  const row = rows[i];
  at = order.indexOf(i);
  $("grid").querySelectorAll(".square.active").forEach((other) => other.classList.remove("active"));
  $("grid").querySelector(`[data-row='${i}']`)?.classList.add("active");
  show($("fact-detail"),
    el("p", {}, row.prompt, " … ", el("b", {}, row.object), el("span", {class: "muted"}, " is true")),
    el("p", {}, "before ", el("b", {}, row.before), " · after ", el(row.changed ? "mark" : "b", {}, row.after),
      row.edited ? " (edited)" : row.changed ? "" : " (as before)"),
    el("p", {class: "muted"}, `Predicted: pull ${number(row.pull)}, cosine of keys ${number(row.cosine)}; number `
      + `${many(row.rank)} of ${many(rows.length)} facts by nearness to the edit.`));
}

function keys(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: ROW, ArrowUp: -ROW}[event.key];
  if (!step) return;
  event.preventDefault();
  $("grid").querySelector(`[data-row='${order[at]}']`).tabIndex = -1;
  at = Math.min(Math.max(at + step, 0), order.length - 1);
  const next = $("grid").querySelector(`[data-row='${order[at]}']`);
  next.tabIndex = 0;
  next.focus();
}
