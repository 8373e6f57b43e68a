// The page: opens the socket, starts the parts, shows what is running, and knows the keys.

import {app, ask, complain, fill} from "./app.js";
import {$, el, number, short, show} from "./dom.js";
import * as audit from "./audit.js";
import * as edit from "./edit.js";
import * as factPart from "./fact.js";
import * as leave from "./leave.js";
import * as stack from "./stack.js";
import * as where from "./where.js";

const FIRST = {prompt: "The Eiffel Tower is located in the city of", subject: "The Eiffel Tower",
  true: "Paris", new: "Rome"};
const DOING = {ask: "asking the model", where: "tracing", compute: "computing the edit", audit: "asking every fact",
  restore: "computing the edits of the link again", file: "writing the file", say: "writing text"};

async function begin() {
  theme();
  keys();
  const state = new URLSearchParams(location.hash.slice(1)).get("s");
  app.link.addEventListener("busy", busy);
  app.link.addEventListener("badge", (event) => badge(event.detail));
  app.link.addEventListener("error", (event) => complain(event.detail));
  app.link.addEventListener("note", (event) => complain(event.detail));
  app.link.addEventListener("stopped", ({detail}) => complain(`Stopped: ${DOING[detail] ?? detail}. `
    + "The model is as it was."));
  app.link.addEventListener("closed", ({detail}) => complain(`The connection to the workbench is closed`
    + `${detail ? `: ${detail}` : ""}. Reload the page: the link in its address makes its edits again.`));
  try {
    await app.link.open();
  } catch {
    return complain("The workbench does not answer. Is it running, and is this the link that it showed?");
  }
  const hello = await ask("hello");
  if (!hello) return;
  app.model = hello.model;
  const {name, parameters, dtype, device} = hello.model;
  $("model").textContent = `${name} · ${(parameters / 1e6).toFixed(1)} M parameters · ${dtype} on ${device}`;
  if (!hello.model.small) $("samples").value = "4";  // the paper's 10 take their time
  edit.start(hello);
  factPart.start();
  where.start();
  stack.start();
  audit.start();
  leave.start();
  if (state) await restore(state);
  else if (hello.model.small) { fill(FIRST); factPart.asked(true); where.traced(); }
  else fill(FIRST);
}

async function restore(state) {
  const found = await ask("restore", {state}, (part) => part.stack && app.tell("stack", part.stack));
  if (!found) return;
  for (const note of found.restored) complain(note);
  if (found.compared) fill(found.compared.fact);
  app.tell("stack", found.stack);
  app.tell("compared", found.compared);
  if (app.model.small && found.compared) where.traced();
}

// --- what is running --------------------------------------------------------------------------------------------

function busy() {
  const request = app.link.busy;
  const late = request && (request.state?.kind === "waiting" || performance.now() - request.began > 140);
  $("status").hidden = !late;
  if (!late) return;
  const state = request.state, doing = DOING[request.name] ?? "working";
  const count = state?.total ? ` ${number(state.done)} of ${number(state.total)}` : "";
  $("status-text").textContent = state?.kind === "waiting"
    ? `Waiting: ${state.place} ${state.place === 1 ? "job is" : "jobs are"} first`
      + (state.other ? "; another page uses the model" : "")
    : state?.kind === "progress" ? `${doing} · ${state.what}${count}` : doing;
  if (state?.kind === "progress" && state.total) $("status-bar").value = state.done / state.total;
  else $("status-bar").removeAttribute("value");
}

// The proof that the model at rest is the one that was loaded, after each job.
function badge(found) {
  const [mark, text] = found.equal === null ? ["…", "edited weights put back"]
    : found.equal ? ["✓", "bit for bit"] : ["✗", "not as it was"];
  $("badge").className = `badge ${found.equal === false ? "bad" : ""}`;
  $("badge").title = found.equal ? `After each job all weights are compared: ${found.tensors} tensors, `
    + `${found.bytes.toLocaleString("en")} bytes. Digest ${found.digest}`
    : found.text ?? "All weights are compared when nobody waits.";
  show($("badge"), el("b", {}, mark, " ", text), found.digest && el("code", {}, short(found.digest)));
  if (found.equal === false) complain(found.text);
}

// --- keys and theme ---------------------------------------------------------------------------------------------

function keys() {
  $("stop").addEventListener("click", () => app.link.stop());
  $("error").querySelector("button").addEventListener("click", () => { $("error").hidden = true; });
  document.addEventListener("keydown", (event) => {
    const writing = event.target.matches?.("input:not([type=range],[type=checkbox]), textarea");
    const control = event.ctrlKey || event.metaKey;
    if (event.key === "Escape") { if ($("status").hidden) $("error").hidden = true; else app.link.stop(); }
    else if (event.key === "/" && !writing) { event.preventDefault(); $("search").focus(); }
    else if (event.key === "Enter" && control) { event.preventDefault(); edit.compute(); }
    else if (event.key.toLowerCase() === "z" && control && !writing) {
      event.preventDefault();
      $(event.shiftKey ? "redo" : "undo").click();
    }
  });
}

function theme() {
  const kept = localStorage.getItem("theme");
  if (kept) document.documentElement.dataset.theme = kept;
  $("theme").addEventListener("click", () => {
    const set = document.documentElement.dataset.theme;
    const dark = set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", document.documentElement.dataset.theme);
  });
}

begin();
