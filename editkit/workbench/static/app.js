// What the parts of the page share: the socket, the model, the fact in the fields, and where to edit.

import {$} from "./dom.js";
import {Link, Refused} from "./link.js";

export const app = Object.assign(new EventTarget(), {
  link: new Link(),
  model: null,      // name, blocks, dtype, device, digest, parameters, small
  compared: null,   // before and after of the step that is looked at
  view: {steps: []},
  tell(name, detail) { this.dispatchEvent(new CustomEvent(name, {detail})); },
  hear(name, action) { this.addEventListener(name, (event) => action(event.detail)); },
});

export const fact = () => Object.fromEntries(["prompt", "subject", "new", "true"].map((name) => [name, $(name).value]));

export function fill(values) {
  for (const name of ["prompt", "subject", "new", "true"]) if (values[name] !== undefined) $(name).value = values[name];
}

export function complain(text) {
  $("error-text").textContent = text;
  $("error").hidden = false;
}

// Ask the workbench; a refusal is shown, and the answer is then null.
export async function ask(name, fields = {}, part = null, quiet = false) {
  try {
    return await app.link.ask(name, fields, part, quiet);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    complain(error.message);
    return null;
  }
}

// Ask something that changes the stack; the page then shows the stack and what it does.
export async function change(name, fields = {}) {
  $("error").hidden = true;
  const found = await ask(name, fields, (part) => part.stack && app.tell("stack", part.stack));
  if (found) { app.tell("stack", found.stack); app.tell("compared", found.compared); }
  return found;
}

export const seed = () => Number.parseInt($("seed").value, 10) || 0;
