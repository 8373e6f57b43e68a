// Part 2: where. The causal trace as a map of cells, and the logit lens beside it.

import {app, ask, fact, seed} from "./app.js";
import {$, bar, choice, cividis, el, number, show, shown, swatches, table} from "./dom.js";

const NAMES = {mlp: "MLP", state: "Residual stream", attention: "Attention"};
const WIDE = 16;  // blocks up to which cells show their numbers
let trace = null, kind = "mlp", at = null;  // `at`: the cell that the keyboard is in, [token, block]

export function start() {
  $("trace").addEventListener("click", traced);
  app.hear("where", () => trace && draw());  // another block was chosen
}

export async function traced() {
  $("map").setAttribute("aria-busy", "true");
  at = null;
  await ask("where", {...fact(), seed: seed(), samples: Number($("samples").value) || 10}, (part) => {
    if (part.lens) lens(part.lens);
    if (part.trace) { trace = part.trace; if (!trace.values[kind]) kind = "mlp"; draw(); }
  });
  $("map").removeAttribute("aria-busy");
}

function draw() {
  const kinds = Object.keys(NAMES).filter((name) => trace.values[name]);
  choice($("kinds"), kinds.map((name) => [name, NAMES[name]]), kind, (picked) => { kind = picked; map(); });
  map();
}

function map() {
  const values = trace.values[kind], blocks = values[0].length, [first, last] = trace.subject;
  const low = trace.corrupted, high = trace.clean, answer = trace.answer.trim();
  const numbers = blocks <= WIDE, inSubject = (token) => token >= first && token <= last;
  at ??= [last, trace.proposed ?? 0];

  // 1) What the cell says that is pointed at, or where the keyboard is.
  const readout = el("p", {class: "readout", "aria-live": "polite"});
  const tell = (token, block) => {
    const p = values[token][block];
    readout.textContent = `“${trace.tokens[token].trim()}”, block ${block}: P(${answer}) = ${number(p)}, `
      + `${number(p - low)} of the ${number(high - low)} that were taken`;
  };

  // 2) The cells: a row a token, a column a block.
  const made = (token, block) => {
    const p = values[token][block], part = (p - low) / (high - low || 1);
    const chosen = app.block === block && isToken(token);
    return el("td", {role: "gridcell", tabindex: token === at[0] && block === at[1] ? 0 : -1,
      class: `${chosen ? "chosen" : ""} ${part > 0.55 ? "light" : ""}`, style: {"background-color": cividis(part)},
      "data-token": token, "data-block": block,
      "aria-label": `${trace.tokens[token].trim()}, block ${block}, ${number(p)}`},
      numbers ? p.toFixed(2).replace(/^0/, "") : "");
  };
  const heads = Array.from({length: blocks}, (_, block) => block === trace.proposed
    ? el("th", {scope: "col", class: "proposed", title: "proposed: the largest effect of an MLP there"}, `${block}★`)
    : el("th", {scope: "col"}, numbers || block % 4 === 0 ? String(block) : ""));
  const rows = values.map((row, token) => el("tr", {},
    el("th", {scope: "row", class: inSubject(token) ? "subject" : ""},
      shown(trace.tokens[token]) + (inSubject(token) ? "*" : "")),
    row.map((_, block) => made(token, block))));
  const grid = el("table", {class: "heat" + (numbers ? "" : " dense"), role: "grid",
    "aria-label": `P(${answer}) by token and block`},
    el("thead", {}, el("tr", {}, el("th", {}), heads)), el("tbody", {}, rows));

  // 3) Mouse and keyboard.
  grid.addEventListener("pointerover", (event) => of(event.target, tell));
  grid.addEventListener("focusin", (event) => of(event.target, (...place) => { at = place; tell(...place); }));
  grid.addEventListener("click", (event) => of(event.target, pick));
  grid.addEventListener("keydown", (event) => keys(event, grid, values.length, blocks));
  tell(...at);

  // 4) Around it: the scale, how to read it, the proposal.
  const windows = trace.window > 1 ? ` · MLP and attention in windows of ${trace.window} blocks` : "";
  show($("map"),
    el("p", {class: "legend"}, number(low), " corrupted ", swatches(), " clean ", number(high)),
    el("div", {class: "scroll"}, grid), readout,
    el("p", {class: "small muted"}, "* subject · rows are tokens, columns are blocks" + windows),
    trace.proposed === null ? null : el("p", {},
      el("b", {}, `★ block ${trace.proposed}`),
      " is proposed: there the MLP at the subject's last token brings most back. ",
      app.block === trace.proposed ? null
        : el("button", {type: "button", onclick: () => pick(last, trace.proposed)}, `Edit block ${trace.proposed}`)));
}

const isToken = (token) => (trace.lookups[token] ?? []).includes(app.token);

function of(target, action) {
  const cell = target.closest("td[data-token]");
  if (cell) action(Number(cell.dataset.token), Number(cell.dataset.block));
}

// A cell was chosen: edit at its block and, where methods can read that token, at its token.
function pick(token, block) {
  const names = trace.lookups[token] ?? [];
  at = [token, block];
  const name = names.includes("subject_last") ? "subject_last" : names[0] ?? null;
  app.tell("pick", {block, token: name, word: trace.tokens[token].trim()});
  draw();
  focusCell($("map"), at);
}

function keys(event, grid, tokens, blocks) {
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -blocks], End: [0, blocks]};
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); of(event.target, pick); return; }
  if (!moves[event.key]) return;
  event.preventDefault();
  const [down, right] = moves[event.key];
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  at = [clamp(at[0] + down, tokens), clamp(at[1] + right, blocks)];
  focusCell(grid, at);
}

function focusCell(place, [token, block]) {
  place.querySelector("td[tabindex='0']")?.setAttribute("tabindex", "-1");
  const cell = place.querySelector(`td[data-token='${token}'][data-block='${block}']`);
  cell?.setAttribute("tabindex", "0");
  cell?.focus();
}

function lens(found) {
  const rows = found.said.map((said, depth) => el("tr", {},
    el("th", {scope: "row"}, depth === 0 ? "embedding" : `block ${depth - 1}`),
    el("td", {class: "token"}, shown(said)),
    found.probability[depth].map((p, w) => el("td", {}, bar(p, `s${w}`), el("span", {class: "num"}, number(p))))));
  show($("lens"), el("h3", {}, "Logit lens"),
    el("p", {class: "small muted"}, "What the last token would say after each block."),
    table("lens", ["", "says", ...found.words.map((word) => `P(${word})`)], rows));
}
