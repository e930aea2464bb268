// Views on a saved page (pages.py): models without a kernel, links between views, and controls.

import { inflate } from "./drawing.js";
import { element } from "./panels.js";

const page = JSON.parse(document.getElementById("m2f-page").textContent);

class Model {
  constructor(state) {
    this.state = state;
    this.listeners = {};
  }
  get(name) { return this.state[name]; }
  set(name, value) {
    if (this.state[name] === value) return;
    this.state[name] = value;
    for (const listener of this.listeners[`change:${name}`] ?? []) listener();
  }
  save_changes() {}
  on(event, listener) { (this.listeners[event] ??= new Set()).add(listener); }
  off(event, listener) { this.listeners[event]?.delete(listener); }
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new DataView(await inflate(packed, "gzip"));
}

async function load(state) {
  const binary = {};
  for (const [name, number] of Object.entries(state.packed)) binary[name] = await unpack(page.buffers[number]);
  return Object.assign(new Model({ ...state.traits, ...binary }), { module: modules[state.module] });
}

/** A slider or a menu for one trait of all views. */
function addControl({ trait, label, help, options, low, high, step, first: start }, models) {
  const box = element("label", "", document.getElementById("m2f-controls"));
  box.title = help;
  element("span", "", box, label);
  const input = element(options ? "select" : "input", "", box);
  input.dataset.trait = trait;
  const shown = options ? undefined : element("output", "", box);
  if (options) for (const [text, value] of options) input.append(new Option(text, value));
  else Object.assign(input, { type: "range", min: low, max: high, step });
  const first = models.find((model) => model.get(trait) !== undefined);
  const read = () => {
    input.value = first.get(trait);
    if (shown) shown.textContent = step < 1 ? `${Math.round(100 * input.value)} %` : Number(input.value) + start;
  };
  const value = () => (options ? options[input.selectedIndex][1] : Number(input.value));
  input.addEventListener("input", () => models.forEach((model) => model.set(trait, value())));
  first.on(`change:${trait}`, read);
  read();
}

const modules = await Promise.all(
  page.modules.map((text) => import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })))));
const columns = await Promise.all(page.columns.map((column) => Promise.all(column.map(load))));
const models = columns.flat();
for (const trait of page.linked) {
  for (const model of models) {
    model.on(`change:${trait}`, () => models.forEach((other) => other.set(trait, model.get(trait))));
  }
}
for (const options of page.controls) addControl(options, models);
for (const column of columns) {
  const box = element("div", "m2f-column", document.getElementById("m2f-views"));
  for (const model of column) model.module.default.render({ model, el: element("div", "", box) });
}
