// Part 5: the stack. Each edit on or off, stronger or weaker, moved, taken off; undo and redo; the alarm.

import {app, ask, change, fill} from "./app.js";
import {$, el, later, note, number, pairs, short, show} from "./dom.js";

const FIGURES = [["growth", "‖ΔW‖/‖W‖", "at most"], ["per_fact", "‖ΔW‖/√facts", "at most"],
  ["perplexity", "perplexity, × unedited", "at most"], ["untouched", "untouched facts that hold", "at least"]];

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
  show($("steps"), view.steps.length ? view.steps.map(item)
    : el("li", {class: "muted none"}, "No edit yet. The model is as it was loaded."));
  if (focused) $("steps").querySelector(`[data-key='${CSS.escape(focused)}']`)?.focus();
  show($("totals"), view.total && pairs([
    ["edit", short(view.total), view.total],
    ["size", `‖ΔW‖/‖W‖ ${number(view.size)}`],
    view.edited && ["edited weights", short(view.edited), view.edited]]));
  if (!view.steps.some((step) => step.on)) show($("alarm"));
}

function item(step, place) {
  // A button of this step; its key finds it again after the list is drawn anew.
  const button = (name, label, text, action, off = false) => el("button", {type: "button", disabled: off,
    "data-key": `${step.digest} ${name}`, "aria-label": `${step.title} ${label}`, onclick: action}, text);
  const move = (to) => change("move", {number: place, to});
  const look = () => { fill(step.fact); change("select", {number: place}); };
  const said = {layer: "block", layers: "blocks"};
  const settings = Object.entries(step.settings).map(([name, value]) => `, ${said[name] ?? name} ${value}`).join("");
  const below = step.on_top ? ` · on top of ${step.on_top}` : "";
  return el("li", {class: (step.selected ? "selected " : "") + (step.on ? "" : "off")},
    el("label", {class: "inline"}, el("input", {type: "checkbox", checked: step.on, "data-key": `${step.digest} on`,
      "aria-label": `${step.title} in force`, onchange: () => change("switch", {number: place})})),
    el("button", {type: "button", class: "title", "data-key": `${step.digest} look`, title: step.fact.prompt,
      "aria-current": step.selected ? "true" : undefined, onclick: look}, step.title),
    el("span", {class: "small muted about"}, `${step.method}${settings} · × ${step.strength.toFixed(2)}${below} · `,
      el("code", {title: step.digest}, step.digest.slice(0, 8))),
    el("span", {class: "tools"},
      button("up", "up", "↑", () => move(place - 1), place === 0),
      button("down", "down", "↓", () => move(place + 1), place === app.view.steps.length - 1),
      button("off", "off the stack", "✕", () => change("remove", {number: place}))));
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
    pairs(FIGURES.filter(([name]) => found.seen[name] !== null).map(([name, title, word]) => [title,
      el("span", {}, number(found.seen[name]), note(` ${word} ${number(found.limits[name])}`)),
      undefined, passed.includes(name) ? "bad" : ""]))));
}
