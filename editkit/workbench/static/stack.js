// Part 5: the stack. Each edit on or off, stronger or weaker, moved, taken off; undo and redo; the alarm.

import {app, ask, change, fill} from "./app.js";
import {$, el, later, number, short, show} from "./dom.js";

const FIGURES = [["growth", "‖ΔW‖/‖W‖", "at most"], ["per_fact", "‖ΔW‖/√facts", "at most"], ["perplexity", "perplexity, × unedited", "at most"], ["untouched", "untouched facts that hold", "at least"]];

export function start() {
  $("undo").addEventListener("click", () => change("undo"));
  $("redo").addEventListener("click", () => change("redo"));
  app.hear("stack", draw);
  app.hear("compared", later(look));
  draw(app.view);
}

function draw(view) {
  const focused = document.activeElement?.closest?.("#steps li") && document.activeElement.dataset.key;
  app.view = view;
  $("undo").disabled = !view.undo;
  $("redo").disabled = !view.redo;
  show($("steps"), view.steps.length ? view.steps.map(item) : el("li", {class: "muted none"}, "No edit yet. The model is as it was loaded."));
  if (focused) $("steps").querySelector(`[data-key='${CSS.escape(focused)}']`)?.focus();
  show($("totals"),
    view.total && el("dl", {}, row("edit", short(view.total), view.total), row("size", `‖ΔW‖/‖W‖ ${number(view.size)}`), view.edited && row("edited weights", short(view.edited), view.edited)));
  if (!view.steps.some((step) => step.on)) show($("alarm"));
}

const row = (name, value, whole) => el("div", {}, el("dt", {}, name), el("dd", {title: whole}, value));

function item(step, number_) {
  const key = (name) => ({"data-key": `${step.digest} ${name}`});
  const last = app.view.steps.length - 1;
  const settings = Object.entries(step.settings).map(([name, value]) => `${name} ${value}`).join(", ");
  return el("li", {class: (step.selected ? "selected " : "") + (step.on ? "" : "off")},
    el("label", {class: "inline"}, el("input", {type: "checkbox", checked: step.on, ...key("on"), "aria-label": `${step.title} in force`, onchange: () => change("switch", {number: number_})})),
    el("button", {type: "button", class: "title", ...key("look"), title: step.fact.prompt, "aria-current": step.selected ? "true" : undefined,
      onclick: () => { fill(step.fact); change("select", {number: number_}); }}, step.title),
    el("span", {class: "small muted about"}, `${step.method}${settings ? `, ${settings}` : ""} · × ${step.strength.toFixed(2)}`, step.on_top ? ` · on top of ${step.on_top}` : "", " · ", el("code", {title: step.digest}, short(step.digest).slice(0, 8))),
    el("span", {class: "tools"},
      el("button", {type: "button", ...key("up"), disabled: number_ === 0, "aria-label": `${step.title} up`, onclick: () => change("move", {number: number_, to: number_ - 1})}, "↑"),
      el("button", {type: "button", ...key("down"), disabled: number_ === last, "aria-label": `${step.title} down`, onclick: () => change("move", {number: number_, to: number_ + 1})}, "↓"),
      el("button", {type: "button", ...key("off"), "aria-label": `${step.title} off the stack`, onclick: () => change("remove", {number: number_})}, "✕")));
}

// After each change: what the collapse alarm sees. It takes longer than an answer, so it comes after it.
async function look() {
  if (!app.view.steps.some((step) => step.on)) return show($("alarm"));
  const found = await ask("health", {}, null, true);
  if (!found) return;
  if (!found.seen) return show($("alarm"));
  const passed = found.seen.passed;
  show($("alarm"), el("div", {class: passed.length ? "card alarm" : "card"},
    el("h3", {}, passed.length ? "⚠ Collapse alarm" : "✓ No sign of collapse"),
    passed.length ? el("p", {}, found.line) : null,
    el("dl", {}, FIGURES.filter(([name]) => found.seen[name] !== null).map(([name, title, word]) => el("div", {class: passed.includes(name) ? "bad" : ""}, el("dt", {}, title), el("dd", {}, number(found.seen[name]), el("span", {class: "muted"}, ` ${word} ${number(found.limits[name])}`)))))));
}
