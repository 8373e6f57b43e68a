// Part 3: the edit. Method and settings, the draft with what it is predicted to do, then before and after.

import {app, ask, change, complain, fact, seed} from "./app.js";
import {$, bar, cell, el, marked, note, number, pairs, short, show, signed, table} from "./dom.js";
import {bars} from "./fact.js";

const MAIN = ["layer", "layers", "fact_token"];
const NAMES = {layer: "Block", layers: "Blocks", fact_token: "Token"};
const TOKENS = {subject_last: "subject's last token", subject_first: "subject's first token",
  subject_first_after_last: "token after the subject", last: "last token"};
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
  const chosen = (options) => el("select", {id}, options.map(([one, name]) => el("option", {value: one}, name)));
  const typed = ["int", "float"].includes(field.kind) ? "decimal" : undefined;
  const blocks = Array.from({length: app.model.blocks}, (_, i) => [String(i), `block ${i}`]);
  const control = field.name === "layer" ? chosen(blocks)
    : field.choices.length ? chosen(field.choices.map((one) => [one, TOKENS[one] ?? one]))
    : field.kind === "bool" ? chosen([["true", "true"], ["false", "false"]])
    : el("input", {id, autocomplete: "off", spellcheck: "false", inputmode: typed});
  control.value = Array.isArray(value) ? value.join(", ") : value === null ? "" : String(value);
  control.dataset.first = control.value;
  return el("label", {}, NAMES[field.name] ?? field.name, control);
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
  if (!token && input("fact_token"))
    complain(`Block ${block} is set. No method reads at “${word}”: it can be the subject's first or last token, `
      + "the one after it, or the last.");
}

// --- the draft --------------------------------------------------------------------------------------------------

export async function compute() {
  $("error").hidden = true;
  $("compute").disabled = true;
  const asked = {...fact(), method: method.name, settings: settings(), seed: seed(), watch: $("watch").value};
  const found = await ask("compute", asked);
  $("compute").disabled = false;
  if (!found) return;
  const draft = found.draft;
  const strength = el("input", {type: "number", id: "strength", value: "1", step: "0.05", min: "-4", max: "4",
    disabled: draft.installs});
  const apply = el("button", {type: "button", class: "main", onclick: () => applied(strength)}, "Apply it");
  const discard = async () => { await ask("discard"); show($("draft")); };
  show($("draft"), el("div", {class: "card"},
    el("h3", {}, "Computed, not applied yet"),
    pairs([...draft.rows, ["size", `‖ΔW‖/‖W‖ ${number(draft.size)}`], ["digest", short(draft.digest), draft.digest]]),
    draft.notes.map((text) => el("p", {class: "warn"}, "⚠ ", text)),
    found.predicted ? predicted(found.predicted) : el("p", {class: "muted"}, found.why),
    el("p", {class: "row"}, el("label", {class: "inline"}, "Strength ", strength), apply,
      el("button", {type: "button", onclick: discard}, "Discard"))));
  apply.focus();
  $("draft").scrollIntoView({block: "nearest", behavior: "smooth"});
}

function predicted(rows) {
  const most = Math.max(...rows.map((row) => row.moves), 1e-9);
  const line = (row) => el("tr", {},
    cell("prompt", {}, row.prompt, " ", el("b", {}, row.answer)),
    cell("output moves by", {}, bar(row.moves / most, row.stays ? "s1" : ""),
      el("span", {class: "num"}, number(row.moves))),
    cell("log p", {class: "num"}, signed(row.change)));
  return el("div", {}, el("h4", {}, "What it will do, predicted from the model as it is"),
    table("stacked predictions", ["prompt", "output moves by", "log p"], grouped(rows, 3, line)),
    el("p", {class: "small muted"}, "“Output moves by”: ‖ΔW k′‖ relative to what the edited weights put out. “log p”: "
      + "its change for the answer that is wanted, to first order."));
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
    el("div", {}, el("h4", {}, "Before"), bars(found.next.before)),
    el("div", {}, el("h4", {}, "After"), bars(found.next.after, found.next.before)));
  show($("rows"), grouped(found.rows, 4, line));
  if ($("free").value.trim()) free_text();
}

// Rows of a table, with a title wherever another kind of prompt begins.
function grouped(rows, columns, line) {
  const title = (row) => el("tr", {class: "group"}, el("th", {colspan: columns, scope: "rowgroup"}, row.heading));
  return rows.flatMap((row, i) => i && rows[i - 1].heading === row.heading ? [line(row)] : [title(row), line(row)]);
}

function line(row) {
  const wanted = row.stays ? row.true : row.new;
  const has = (said) => said.trim().toLowerCase().startsWith(wanted.trim().toLowerCase());
  const good = has(row.after.said), lost = row.stays && !good && has(row.before.said);
  const mark = !row.stays ? (good ? "✓ new" : "✗ not yet") : good ? "✓ stays" : lost ? "✗ moved" : "· not known";
  const chips = (side) => note(
    row.true ? `${row.true} ${number(side.p_true)} · ` : "", `${row.new} ${number(side.p_new)}`);
  const predicted = row.predicted === undefined ? "" : `, predicted ${signed(row.predicted)}`;
  return el("tr", {class: lost ? "moved" : ""},
    cell("prompt", {}, row.prompt),
    cell("before", {}, el("span", {class: "said"}, row.before.said), chips(row.before)),
    cell("after", {}, el("span", {class: "said"}, marked(row.before.said, row.after.said)), chips(row.after)),
    cell("log p", {}, el("b", {class: good ? "good" : "bad"}, mark), note(`log p ${signed(row.happened)}`, predicted)));
}

// The parts that stay while the slider moves.
function frame(found, step, free) {
  $("compared").dataset.digest = step.digest;
  const slid = () => {
    $("slide-out").textContent = Number(slide.value).toFixed(2);
    change("strength", {number: app.compared.step, value: Number(slide.value)});
  };
  const slide = el("input", {type: "range", id: "slide", min: "-1", max: "2", step: "0.05", disabled: step.fixed,
    value: String(found.strength), oninput: slid});
  const asked = el("input", {id: "free", value: free, autocomplete: "off", spellcheck: "false", oninput: free_text});
  const said = (title, id) => el("div", {}, el("h4", {}, title), el("p", {id, class: "said"}));
  show($("compared"), el("div", {class: "card"},
    el("h3", {}, `Before and after: ${step.title}`),
    el("p", {id: "off-note", class: "warn", hidden: true}, "This edit is off: before and after are the same."),
    el("label", {class: "slider", for: "slide"},
      "Strength, a factor of ΔW ", el("output", {id: "slide-out", for: "slide"}), slide),
    el("div", {id: "next-tokens", class: "columns"}),
    table("stacked both", ["prompt", "before", "after", ""], [], "rows"),
    el("h4", {}, "Ask anything"),
    el("label", {class: "wide"}, "Prompt ", asked),
    el("div", {class: "columns"},
      said("Unedited", "free-before"), said("With all edits in force", "free-after"))));
}

async function free_text() {
  const prompt = $("free").value;
  if (!prompt.trim()) return;
  const found = await ask("say", {prompt, tokens: 24}, null, true);
  if (!found || !$("free-before")) return;
  show($("free-before"), found.prompt, el("b", {}, found.before));
  show($("free-after"), found.prompt, el("b", {}, marked(found.before, found.after)));
}
