// Part 2: where. The causal trace as a map of cells, and the logit lens beside it.

import {app, ask, fact, seed} from "./app.js";
import {$, choice, cividis, el, number, show, shown} from "./dom.js";

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
  await ask("where", {...fact(), seed: seed()}, (part) => {
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
  const values = trace.values[kind], blocks = values[0].length, low = trace.corrupted, high = trace.clean;
  const numbers = blocks <= WIDE, [first, last] = trace.subject, answer = trace.answer.trim();
  at ??= [last, trace.proposed ?? 0];
  const readout = el("p", {class: "readout", "aria-live": "polite"});
  const tell = (token, block) => {
    const p = values[token][block];
    readout.textContent = `“${trace.tokens[token].trim()}”, block ${block}: P(${answer}) = ${number(p)}, ${number(p - low)} of the ${number(high - low)} that were taken`;
  };
  const cell = (token, block) => {
    const p = values[token][block], part = (p - low) / (high - low || 1);
    return el("td", {role: "gridcell", tabindex: token === at[0] && block === at[1] ? 0 : -1,
      class: [app.block === block && isToken(token) ? "chosen" : "", part > 0.55 ? "light" : ""].join(" "),
      style: {"background-color": cividis(part)}, "data-token": token, "data-block": block,
      "aria-label": `${trace.tokens[token].trim()}, block ${block}, ${number(p)}`}, numbers ? p.toFixed(2).replace(/^0/, "") : "");
  };
  const head = el("tr", {}, el("th", {}), Array.from({length: blocks}, (_, block) =>
    el("th", {scope: "col", class: block === trace.proposed ? "proposed" : "", title: block === trace.proposed ? "proposed: the MLP with the largest effect at the subject's last token" : undefined},
      block === trace.proposed ? `${block}★` : numbers || block % 4 === 0 ? String(block) : "")));
  const body = values.map((row, token) => el("tr", {},
    el("th", {scope: "row", class: token >= first && token <= last ? "subject" : ""}, shown(trace.tokens[token]) + (token >= first && token <= last ? "*" : "")),
    row.map((_, block) => cell(token, block))));
  const table = el("table", {class: "heat" + (numbers ? "" : " dense"), role: "grid", "aria-label": `P(${answer}) by token and block`}, el("thead", {}, head), el("tbody", {}, body));
  table.addEventListener("pointerover", (event) => of(event.target, tell));
  table.addEventListener("focusin", (event) => of(event.target, (token, block) => { at = [token, block]; tell(token, block); }));
  table.addEventListener("click", (event) => of(event.target, pick));
  table.addEventListener("keydown", (event) => keys(event, table, values.length, blocks));
  const legend = el("p", {class: "legend"}, number(low), " corrupted ", el("span", {class: "scale"}, Array.from({length: 24}, (_, i) => el("i", {style: {"background-color": cividis(i / 23)}}))), " clean ", number(high));
  const proposed = trace.proposed === null ? null : el("p", {}, el("b", {}, `★ block ${trace.proposed}`), " is proposed: there the MLP at the subject's last token brings most back. ",
    app.block !== trace.proposed && el("button", {type: "button", onclick: () => pick(last, trace.proposed)}, `Edit block ${trace.proposed}`));
  tell(...at);
  show($("map"), legend, el("div", {class: "scroll"}, table), readout, el("p", {class: "small muted"}, "* subject · rows are tokens, columns are blocks" + (trace.window > 1 ? ` · MLP and attention in windows of ${trace.window} blocks` : "")), proposed);
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
  app.tell("pick", {block, token: names.includes("subject_last") ? "subject_last" : names[0] ?? null, word: trace.tokens[token].trim()});
  draw();
  focusCell($("map"), at);
}

function keys(event, table, tokens, blocks) {
  const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -blocks], End: [0, blocks]};
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); of(event.target, pick); return; }
  if (!moves[event.key]) return;
  event.preventDefault();
  const [down, right] = moves[event.key];
  const clamp = (value, most) => Math.min(Math.max(value, 0), most - 1);
  at = [clamp(at[0] + down, tokens), clamp(at[1] + right, blocks)];
  focusCell(table, at);
}

function focusCell(place, [token, block]) {
  place.querySelector("td[tabindex='0']")?.setAttribute("tabindex", "-1");
  const cell = place.querySelector(`td[data-token='${token}'][data-block='${block}']`);
  cell?.setAttribute("tabindex", "0");
  cell?.focus();
}

function lens(found) {
  const rows = found.said.map((said, depth) => el("tr", {}, el("th", {scope: "row"}, depth === 0 ? "embedding" : `block ${depth - 1}`),
    el("td", {class: "token"}, shown(said)),
    found.probability[depth].map((p, w) => el("td", {}, el("span", {class: `bar s${w}`, style: {"--part": p}, title: `${found.words[w]}: ${number(p)}`}), el("span", {class: "num"}, number(p))))));
  show($("lens"), el("h3", {}, "Logit lens"), el("p", {class: "small muted"}, "What the last token would say after each block."),
    el("div", {class: "scroll"}, el("table", {class: "lens"}, el("thead", {}, el("tr", {}, el("th", {}), el("th", {}, "says"), found.words.map((word) => el("th", {}, `P(${word})`)))), el("tbody", {}, rows))));
}
