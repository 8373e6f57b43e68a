// Part 3: the edit. Method and settings, the draft with what it is predicted to do, then before and after.

import {app, ask, change, complain, fact, fill, seed} from "./app.js";
import {$, el, marked, number, show, short, signed} from "./dom.js";
import {bars} from "./fact.js";

const MAIN = ["layer", "layers", "fact_token"];
const TOKENS = {subject_last: "subject's last token", subject_first: "subject's first token", subject_first_after_last: "token after the subject", last: "last token"};
let method = null;

export function start(hello) {
  show($("method"), hello.methods.map((name) => el("option", {value: name}, name)));
  $("method").value = hello.method.name;
  settle(hello.method);
  $("method").addEventListener("change", async () => {
    const found = await ask("method", {name: $("method").value});
    if (found) settle(found);
  });
  $("edit-form").addEventListener("submit", (event) => { event.preventDefault(); compute(); });
  app.hear("pick", picked);
  app.hear("compared", compared);
}

// --- the settings of the method ---------------------------------------------------------------------------------

function settle(found) {
  method = found;
  const known = Object.fromEntries(found.fields.map((field) => [field.name, field]));
  const main = MAIN.filter((name) => known[name]).map((name) => labelled(known[name]));
  show($("main-settings"), main);
  show($("settings"), found.fields.filter((field) => !MAIN.includes(field.name)).map(labelled));
  $("about-method").textContent = found.about;
  app.block = found.blocks[0];
  app.token = known.fact_token ? known.fact_token.resolved : null;
  for (const name of MAIN) if (known[name]) input(name).addEventListener("change", chosen);
  app.tell("where");
}

const input = (name) => $(`set-${name}`);

function labelled(field) {
  const value = field.resolved ?? field.default, id = `set-${field.name}`;
  let control;
  if (field.name === "layer") control = el("select", {id}, Array.from({length: app.model.blocks}, (_, i) => el("option", {value: String(i)}, `block ${i}`)));
  else if (field.choices.length) control = el("select", {id}, field.choices.map((one) => el("option", {value: one}, TOKENS[one] ?? one)));
  else if (field.kind === "bool") control = el("select", {id}, ["true", "false"].map((one) => el("option", {value: one}, one)));
  else control = el("input", {id, autocomplete: "off", spellcheck: "false", inputmode: field.kind === "int" || field.kind === "float" ? "decimal" : undefined});
  control.value = Array.isArray(value) ? value.join(", ") : value === null ? "" : String(value);
  control.dataset.first = control.value;
  const name = {layer: "Block", layers: "Blocks", fact_token: "Token"}[field.name] ?? field.name;
  return el("label", {}, name, control);
}

// The settings that differ from the method's own for this model, and the block, which is always said.
function settings() {
  const found = {};
  for (const field of method.fields) {
    const {value, dataset} = input(field.name);
    if (value === dataset.first && !["layer", "layers"].includes(field.name)) continue;
    if (value.trim() === "") { if (field.optional) found[field.name] = null; continue; }
    if (field.kind === "ints") found[field.name] = value.split(/[\s,]+/).filter(Boolean).map(Number);
    else if (field.kind === "bool") found[field.name] = value === "true";
    else found[field.name] = field.kind === "str" ? value : Number(value);
  }
  return found;
}

function chosen() {
  app.block = Number.parseInt(input("layer")?.value ?? input("layers")?.value ?? "0", 10);
  app.token = input("fact_token")?.value ?? null;
  app.tell("where");
}

// A cell of the trace was chosen.
function picked({block, token, word}) {
  if (input("layer")) input("layer").value = String(block);
  else if (input("layers")) input("layers").value = String(block);
  else return complain(`${method.name} chooses its blocks itself: it has no setting for one.`);
  if (token && input("fact_token")) input("fact_token").value = token;
  chosen();
  if (!token && input("fact_token")) complain(`Block ${block} is set. No method reads at “${word}”: it can be the subject's first or last token, the one after it, or the last.`);
}

// --- the draft --------------------------------------------------------------------------------------------------

export async function compute() {
  $("error").hidden = true;
  $("compute").disabled = true;
  const found = await ask("compute", {...fact(), method: method.name, settings: settings(), seed: seed(), watch: $("watch").value});
  $("compute").disabled = false;
  if (!found) return;
  const strength = el("input", {type: "number", id: "strength", value: "1", step: "0.05", min: "-4", max: "4", disabled: found.draft.installs});
  const apply = el("button", {type: "button", class: "main", onclick: () => applied(strength)}, "Apply it");
  show($("draft"), el("div", {class: "card"},
    el("h3", {}, "Computed, not applied yet"),
    el("dl", {}, found.draft.rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))),
      el("div", {}, el("dt", {}, "size"), el("dd", {}, `‖ΔW‖/‖W‖ ${number(found.draft.size)}`)), el("div", {}, el("dt", {}, "digest"), el("dd", {}, el("code", {}, short(found.draft.digest))))),
    found.draft.notes.map((note) => el("p", {class: "warn"}, "⚠ ", note)),
    found.predicted ? predicted(found.predicted) : el("p", {class: "muted"}, found.why),
    el("p", {class: "row"}, el("label", {class: "inline"}, "Strength ", strength), apply,
      el("button", {type: "button", onclick: async () => { await ask("discard"); show($("draft")); }}, "Discard"))));
  apply.focus();
  $("draft").scrollIntoView({block: "nearest", behavior: "smooth"});
}

function predicted(rows) {
  const most = Math.max(...rows.map((row) => row.moves), 1e-9);
  return el("div", {}, el("h4", {}, "What it will do, predicted from the model as it is"),
    el("div", {class: "scroll"}, el("table", {class: "stacked predictions"},
      el("thead", {}, el("tr", {}, el("th", {}, "prompt"), el("th", {}, "output moves by"), el("th", {}, "log p"))),
      el("tbody", {}, grouped(rows, 3, (row) => el("tr", {},
        el("td", {"data-label": "prompt"}, row.prompt, " ", el("b", {}, row.answer)),
        el("td", {"data-label": "output moves by"}, el("span", {class: "bar" + (row.stays ? " s1" : ""), style: {"--part": row.moves / most}}), el("span", {class: "num"}, number(row.moves))),
        el("td", {"data-label": "log p", class: "num"}, signed(row.change))))))),
    el("p", {class: "small muted"}, "“Output moves by”: ‖ΔW k′‖ relative to what the edited weights put out. “log p”: its change for the answer that is wanted, to first order."));
}

async function applied(strength) {
  const value = Number(strength.value);
  const found = await change("apply", {strength: value});
  if (!found) return;
  show($("draft"));
  $("compared").scrollIntoView({block: "start", behavior: "smooth"});
}

// --- before and after -------------------------------------------------------------------------------------------

function compared(found) {
  app.compared = found;
  if (!found) return show($("compared"));
  const step = app.view.steps[found.step], free = $("free")?.value ?? found.fact.prompt;
  const open = $("compared").querySelector("h3");
  if (!open || $("compared").dataset.digest !== step.digest) frame(found, step, free);
  $("slide-out").textContent = found.strength.toFixed(2);
  if (document.activeElement !== $("slide")) $("slide").value = String(found.strength);
  $("off-note").hidden = found.on;
  show($("next-tokens"),
    el("div", {}, el("h4", {}, "Before"), bars(found.next.before)), el("div", {}, el("h4", {}, "After"), bars(found.next.after, found.next.before)));
  show($("rows"), grouped(found.rows, 4, line));
  if ($("free").value.trim()) free_text();
}

// Rows of a table, with a title wherever another kind of prompt begins.
function grouped(rows, columns, line) {
  return rows.flatMap((row, i) => [
    ...(i && rows[i - 1].heading === row.heading ? [] : [el("tr", {class: "group"}, el("th", {colspan: columns, scope: "rowgroup"}, row.heading))]),
    line(row)]);
}

function line(row) {
  const wanted = row.stays ? row.true : row.new;
  const has = (said) => said.trim().toLowerCase().startsWith(wanted.trim().toLowerCase());
  const good = has(row.after.said), mark = row.stays ? (good ? "✓ stays" : has(row.before.said) ? "✗ moved" : "· not known") : good ? "✓ new" : "✗ not yet";
  const chips = (side) => el("span", {class: "small muted"}, row.true ? `${row.true} ${number(side.p_true)} · ` : "", `${row.new} ${number(side.p_new)}`);
  return el("tr", {class: good ? "" : row.stays ? "moved" : ""},
    el("td", {"data-label": "prompt"}, row.prompt),
    el("td", {"data-label": "before"}, el("span", {class: "said"}, row.before.said), chips(row.before)),
    el("td", {"data-label": "after"}, el("span", {class: "said"}, marked(row.before.said, row.after.said)), chips(row.after)),
    el("td", {"data-label": "log p", class: "change"}, el("b", {class: good ? "good" : "bad"}, mark), el("span", {class: "small muted"}, `log p ${signed(row.happened)}`, row.predicted === undefined ? "" : `, predicted ${signed(row.predicted)}`)));
}

function frame(found, step, free) {
  $("compared").dataset.digest = step.digest;
  const slide = el("input", {type: "range", id: "slide", min: "-1", max: "2", step: "0.05", value: String(found.strength), disabled: step.fixed,
    oninput: () => { $("slide-out").textContent = Number(slide.value).toFixed(2); change("strength", {number: app.compared.step, value: Number(slide.value)}); }});
  show($("compared"), el("div", {class: "card"},
    el("h3", {}, `Before and after: ${step.title}`),
    el("p", {id: "off-note", class: "warn", hidden: true}, "This edit is off: before and after are the same."),
    el("label", {class: "slider", for: "slide"}, "Strength, a factor of ΔW ", el("output", {id: "slide-out", for: "slide"}), slide),
    el("div", {id: "next-tokens", class: "columns"}),
    el("div", {class: "scroll"}, el("table", {class: "stacked both"}, el("thead", {}, el("tr", {}, el("th", {}, "prompt"), el("th", {}, "before"), el("th", {}, "after"), el("th", {}, ""))), el("tbody", {id: "rows"}))),
    el("h4", {}, "Ask anything"),
    el("label", {class: "wide"}, "Prompt ", el("input", {id: "free", value: free, autocomplete: "off", spellcheck: "false", oninput: free_text})),
    el("div", {class: "columns"}, el("div", {}, el("h4", {}, "Unedited"), el("p", {id: "free-before", class: "said"})), el("div", {}, el("h4", {}, "With all edits in force"), el("p", {id: "free-after", class: "said"})))));
}

async function free_text() {
  const prompt = $("free").value;
  if (!prompt.trim()) return;
  const found = await ask("say", {prompt, tokens: 24}, null, true);
  if (!found || !$("free-before")) return;
  show($("free-before"), found.prompt, el("b", {}, found.before));
  show($("free-after"), found.prompt, el("b", {}, marked(found.before, found.after)));
}
