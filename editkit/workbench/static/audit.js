// Part 4: the audit. Every fact of the atlas is a square; those that changed light up.

import {app, ask} from "./app.js";
import {$, choice, cividis, el, number, show} from "./dom.js";

let rows = [], order = [], digest = "", at = 0;  // `order`: numbers of rows as they stand on the page

export function start() {
  $("run-audit").addEventListener("click", run);
  app.hear("stack", (view) => { if (rows.length) $("audit-old")?.toggleAttribute("hidden", !view.total || view.total === digest); });
}

async function run() {
  $("run-audit").disabled = true;
  const found = await ask("audit");
  $("run-audit").disabled = false;
  if (!found) return;
  rows = found.rows;
  digest = found.digest;
  rows.forEach((row, i) => { row.rank = i + 1; });
  choice($("audit-shows"), [["happened", "What happened"], ["predicted", "What was predicted"]], "happened", draw);
  draw("happened");
}

function draw(shows) {
  const groups = new Map();
  rows.forEach((row, i) => groups.set(row.relation, [...(groups.get(row.relation) ?? []), i]));
  const changed = rows.filter((row) => row.changed && !row.edited);
  const sorted = [...groups].sort((a, b) => b[1].filter((i) => rows[i].changed).length - a[1].filter((i) => rows[i].changed).length || a[0].localeCompare(b[0]));
  order = sorted.flatMap(([, members]) => members);
  at = Math.max(order.findIndex((i) => rows[i].changed), 0);
  const place = new Map(order.map((i, p) => [i, p]));
  const square = (i) => {
    const row = rows[i], state = row.edited ? "edited" : row.changed ? "flipped" : "";
    return el("i", {class: `square ${shows === "happened" ? state : `predicted ${state}`}`, role: "gridcell", tabindex: place.get(i) === at ? 0 : -1, "data-row": i,
      style: shows === "predicted" ? {"background-color": cividis(Math.sqrt(row.pull))} : undefined,
      "aria-label": `${row.subject}: ${row.after}${row.changed ? `, was ${row.before}` : ""}`});
  };
  const grid = el("div", {class: "facts", role: "grid", "aria-label": "Facts of the atlas"}, sorted.map(([relation, members]) => {
    const moved = members.filter((i) => rows[i].changed && !rows[i].edited).length;
    return el("div", {class: "relation", role: "row"}, el("h4", {}, relation.replace(/_/g, " "), el("span", {class: "muted"}, moved ? ` ${moved} of ${members.length}` : ` ${members.length}`)), el("div", {class: "squares"}, members.map(square)));
  }));
  grid.addEventListener("click", (event) => event.target.dataset.row && tell(Number(event.target.dataset.row)));
  grid.addEventListener("focusin", (event) => event.target.dataset.row && tell(Number(event.target.dataset.row)));
  grid.addEventListener("keydown", keys);
  const legend = shows === "happened"
    ? el("p", {class: "legend"}, el("i", {class: "square"}), " as before ", el("i", {class: "square flipped"}), " another answer ", el("i", {class: "square edited"}), " edited")
    : el("p", {class: "legend"}, "pull 0 ", el("span", {class: "scale"}, Array.from({length: 24}, (_, i) => el("i", {style: {"background-color": cividis(i / 23)}}))), " 1: how much of the edit reaches the fact's own key, predicted; changed facts have a ring");
  show($("grid"),
    el("p", {}, el("b", {class: changed.length ? "bad" : "good"}, `${changed.length} of ${rows.length.toLocaleString("en")} facts`), " have another answer than the unedited model's, besides the edited ones. ",
      el("span", {id: "audit-old", class: "warn", hidden: true}, "The stack has changed since: ask again.")),
    legend, el("div", {id: "fact-detail", class: "card detail", "aria-live": "polite"}, "Click a square, or move with the arrows."), grid,
    changed.length ? table(changed) : null);
}

function table(changed) {
  return el("details", {}, el("summary", {}, "The changed facts as a table"), el("div", {class: "scroll"}, el("table", {class: "stacked"},
    el("thead", {}, el("tr", {}, ["fact", "before", "after", "pull", "nearest"].map((name) => el("th", {}, name)))),
    el("tbody", {}, changed.map((row) => el("tr", {}, el("td", {"data-label": "fact"}, row.prompt), el("td", {"data-label": "before"}, row.before), el("td", {"data-label": "after"}, el("mark", {}, row.after)),
      el("td", {"data-label": "pull", class: "num"}, number(row.pull)), el("td", {"data-label": "nearest", class: "num"}, `${row.rank}.`)))))));
}

function tell(i) {
  const row = rows[i];
  at = order.indexOf(i);
  $("grid").querySelectorAll(".square.active").forEach((square) => square.classList.remove("active"));
  $("grid").querySelector(`[data-row='${i}']`)?.classList.add("active");
  show($("fact-detail"),
    el("p", {}, row.prompt, " … ", el("b", {}, row.object), el("span", {class: "muted"}, " is true")),
    el("p", {}, "before ", el("b", {}, row.before), " · after ", row.changed ? el("mark", {}, row.after) : el("b", {}, row.after), row.edited ? " (edited)" : row.changed ? "" : " (as before)"),
    el("p", {class: "muted"}, `Predicted: pull ${number(row.pull)}, cosine of keys ${number(row.cosine)}; number ${row.rank.toLocaleString("en")} of ${rows.length.toLocaleString("en")} facts by nearness to the edit.`));
}

function keys(event) {
  const step = {ArrowRight: 1, ArrowLeft: -1, ArrowDown: 20, ArrowUp: -20}[event.key];
  if (!step) return;
  event.preventDefault();
  $("grid").querySelector(`[data-row='${order[at]}']`).tabIndex = -1;
  at = Math.min(Math.max(at + step, 0), order.length - 1);
  const next = $("grid").querySelector(`[data-row='${order[at]}']`);
  next.tabIndex = 0;
  next.focus();
}
