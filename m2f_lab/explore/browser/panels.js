// The text around a picture: legend, caption, and notes on a place.

import { bytes, colors } from "./drawing.js";

export function element(tag, className, parent, text) {
  const node = document.createElement(tag);
  node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function percent(value) {
  const hundredth = 100 * value;
  if (hundredth === 0 || hundredth >= 9.95) return `${hundredth.toFixed(0)} %`;
  return hundredth >= 0.095 ? `${hundredth.toFixed(1)} %` : `${hundredth.toPrecision(1)} %`;
}

export function readout(model, value) {
  const words = model.get("words"), names = model.get("names");
  if (names.length) return names[Math.round(255 * value)] ?? "nothing";
  if (words.length) return words[value < 0.5 ? 0 : 1];
  return model.get("readout").replace("{value}", value.toFixed(2)).replace("{percent}", percent(value));
}

/** Write a text, unless it stands there already: every change of the page makes the browser lay it out again. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function drawLegend(model, mask, nodes) {
  const named = model.get("names").length > 0;
  for (const part of ["low", "bar", "high"]) nodes[part].hidden = named;
  drawChips(named ? presentNames(model, mask) : [], nodes.names);
  drawChips(model.get("mark_groups"), nodes.groups);
  if (named) return;
  const words = model.get("words"), asPercent = model.get("readout").includes("{percent}");
  const top = asPercent ? percent(mask.scale) : String(Number(mask.scale.toPrecision(2)));
  say(nodes.low, words.length ? words[0] : "0");
  say(nodes.high, words.length ? words[1] : top);
  say(nodes.label, model.get("unit"));
  const { rgb, alpha } = colors(model);
  const stops = Array.from({ length: 17 }, (_, i) => {
    const value = Math.round((255 * i) / 16);
    return `rgba(${rgb.subarray(3 * value, 3 * value + 3).join(", ")}, ${alpha[value].toFixed(3)})`;
  });
  const gradient = `linear-gradient(to right, ${stops.join(", ")}), #cfd3d8`;
  if (nodes.bar.dataset.gradient !== gradient) nodes.bar.style.background = nodes.bar.dataset.gradient = gradient;
}

function drawChips(chips, parent) {
  if (!parent.childElementCount && !chips.length) return;
  parent.replaceChildren();
  for (const [name, color] of chips) element("span", "m2f-chip", parent, name).style.setProperty("--m2f-chip", color);
}

/** Name and colour of every label that occurs, the most frequent first. */
function presentNames(model, mask) {
  const names = model.get("names"), table = bytes(model.get("table")), counts = new Uint32Array(256);
  for (const label of mask.values) counts[label]++;
  const present = names.map((_, label) => label).filter((label) => counts[label]);
  const chip = (label) => [names[label], `rgb(${table.subarray(4 * label, 4 * label + 3).join(", ")})`];
  return present.sort((a, b) => counts[b] - counts[a]).map(chip);
}

export const NOTHING = {}; // no caption

const read = new WeakMap(); // model → the texts that were read already, by name

/** A list of captions or notes. From a kernel it comes as text, which is read once. */
export function listOf(model, name) {
  const value = model.get(name);
  if (typeof value !== "string") return value;
  if (!read.has(model)) read.set(model, {});
  const known = read.get(model);
  if (known[name]?.text !== value) known[name] = { text: value, list: JSON.parse(value) };
  return known[name].list;
}

/** What the picture says of the place that was clicked last: of the cell of a grid of places. */
export function noteAt(model, stack) {
  const [rows, columns] = model.get("places"), clicked = model.get("clicked"), notes = listOf(model, "notes");
  if (!clicked.length || !notes.length) return NOTHING;
  const cell = placeOf(model, rows, columns);
  return notes[cell][Math.min(stack, notes[cell].length - 1)];
}

/** The cell of a grid over the image that the last click fell into. */
export function placeOf(model, rows, columns) {
  const [width, height] = model.get("image_size"), [x, y] = model.get("clicked");
  return Math.floor((y / height) * rows) * columns + Math.floor((x / width) * columns);
}

function drawTable(table, parent) {
  parent.replaceChildren();
  if (!table) return;
  const head = element("tr", "", element("thead", "", parent)), body = element("tbody", "", parent);
  for (const [text, help] of table.header) element("th", "", head, text).title = help;
  for (const [number, cells] of table.rows.entries()) {
    const row = element("tr", table.marked.includes(number) ? "m2f-marked" : "", body);
    for (const text of cells) element("td", "", row, text);
  }
}

export function drawCaption(caption, nodes) {
  if (nodes.shown === caption) return;
  nodes.shown = caption;
  say(nodes.text, caption.text ?? "");
  say(nodes.warning, caption.warning ?? "");
  nodes.warning.hidden = !caption.warning;
  drawTable(caption.table, nodes.table);
  drawBars(caption.bars ?? [], nodes.bars);
}

/** A bar for each class. Rows that are there are used again: new ones would have to be styled and laid out. */
function drawBars(bars, parent) {
  while (parent.children.length > bars.length) parent.lastChild.remove();
  while (parent.children.length < bars.length) {
    const row = element("div", "m2f-bar", parent);
    element("span", "m2f-bar-label", row);
    element("span", "m2f-bar-fill", element("span", "m2f-bar-track", row));
    element("span", "m2f-bar-value", row);
  }
  for (const [place, [label, value, color]] of bars.entries()) {
    const [name, track, share] = parent.children[place].children;
    say(name, name.title = label);
    track.firstChild.style.width = `${100 * value}%`;
    track.firstChild.style.background = color;
    say(share, percent(value));
  }
}

/** The elements of one caption; a warning may stand elsewhere. */
export function captionNodes(parent, warning) {
  return {
    text: element("div", "m2f-caption", parent),
    warning: warning ?? element("div", "m2f-caption-warning", parent),
    bars: element("div", "m2f-bars", parent),
    table: element("table", "m2f-table", parent),
  };
}
