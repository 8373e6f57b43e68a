// Small helpers for the page. Text from the model and from the user goes in as text, never as HTML.

export const $ = (id) => document.getElementById(id);

// el("p", {class: "muted", onclick: f}, "text", child): an element. Properties that begin with "on" are listeners.
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, one] of Object.entries(value)) made.style.setProperty(key, one);
    else if (name === "value") made.value = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function show(place, ...children) {
  place.replaceChildren(...children.flat().filter((child) => child));
}

// A probability or a size for people: three significant digits.
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.0001) return value.toExponential(0);
  return size < 0.01 ? value.toFixed(4) : String(Number(value.toPrecision(3)));
}

export function signed(value) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(2);
  return text === "0.00" ? "0.00" : (value > 0 ? "+" : "−") + text;
}

export const short = (digest) => (digest ? digest.slice(0, 12) : "");

// The action, once after a pause: so that what is dragged or typed does not ask for everything each time.
export function later(action, pause = 350) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => action(...given), pause); };
}

// A token, with spaces that can be seen.
export const shown = (token) => token.replace(/ /g, "·").replace(/\n/g, "⏎") || "∅";

// The words of `after`, those that are not in `before` at their place marked. Longest common subsequence of words.
export function marked(before, after) {
  const a = before.split(/(?<=\s)/), b = after.split(/(?<=\s)/);
  const long = Array.from({length: a.length + 1}, () => new Array(b.length + 1).fill(0));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      long[i][j] = a[i].trim() === b[j].trim() ? long[i + 1][j + 1] + 1 : Math.max(long[i + 1][j], long[i][j + 1]);
  const parts = [];
  let i = 0;
  for (let j = 0; j < b.length; j++) {
    while (i < a.length && a[i].trim() !== b[j].trim() && long[i + 1][j] >= long[i][j + 1] && long[i + 1][j] > 0) i++;
    if (i < a.length && a[i].trim() === b[j].trim()) { parts.push(b[j]); i++; }
    else parts.push(el("mark", {}, b[j].trimEnd()), b[j].slice(b[j].trimEnd().length));
  }
  return parts;
}

// cividis, as in editkit/report/heat.py: readable with any kind of colour vision.
const CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "fee838"]
  .map((hex) => [0, 2, 4].map((at) => Number.parseInt(hex.slice(at, at + 2), 16)));
export function cividis(part) {
  const at = Math.min(Math.max(part, 0), 1) * (CIVIDIS.length - 1), i = Math.min(Math.floor(at), CIVIDIS.length - 2);
  return "rgb(" + CIVIDIS[i].map((low, c) => Math.round(low + (CIVIDIS[i + 1][c] - low) * (at - i))).join(",") + ")";
}

export const swatches = () =>
  el("span", {class: "scale"}, Array.from({length: 24}, (_, i) =>
    el("i", {style: {"background-color": cividis(i / 23)}})));

// A table that scrolls by itself where it is too wide.
export const table = (kind, heads, rows, id) => el("div", {class: "scroll"}, el("table", {class: kind},
  el("thead", {}, el("tr", {}, heads.map((head) => el("th", {}, head)))), el("tbody", {id}, rows)));

// A cell; on a narrow page its name stands before it.
export const cell = (name, properties, ...children) => el("td", {"data-label": name, ...properties}, children);

// Names and values, one below the other; the whole value where the mouse rests.
export const pairs = (rows) => el("dl", {}, rows.filter(Boolean).map(([name, value, whole, kind]) =>
  el("div", {class: kind}, el("dt", {}, name), el("dd", {title: whole}, value))));

export const bar = (part, kind = "") => el("span", {class: `bar ${kind}`, style: {"--part": part}});
export const note = (...children) => el("span", {class: "small muted"}, children);

// A row of buttons of which one is chosen. Arrow keys move, as in radio buttons.
export function choice(place, options, chosen, pick) {
  const buttons = options.map(([value, name]) =>
    el("button", {type: "button", role: "radio", "aria-checked": String(value === chosen),
      tabindex: value === chosen ? 0 : -1, onclick: () => choose(value)}, name));
  const choose = (value) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", String(options[i][0] === value));
      button.tabIndex = options[i][0] === value ? 0 : -1;
    });
    pick(value);
  };
  place.onkeydown = (event) => {
    const move = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
    if (!move) return;
    event.preventDefault();
    const next = (buttons.indexOf(document.activeElement) + move + buttons.length) % buttons.length;
    buttons[next].focus();
    choose(options[next][0]);
  };
  show(place, buttons);
  place.hidden = false;
}
