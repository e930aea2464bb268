// Keys and the brush: changes made on the picture itself.

import { chosenMask, clamp, masksOf, save } from "./drawing.js";

function step(model, name, value, count) {
  const kept = clamp(value, 0, count - 1);
  if (kept !== model.get(name)) save(model, name, kept, true);
}

/** What the kernel calls a key: "m", "shift-ctrl-z". The ⌘ of a Mac is ctrl. */
function nameOf(event) {
  const held = [["shift-", event.shiftKey], ["ctrl-", event.ctrlKey || event.metaKey], ["alt-", event.altKey]];
  return held.map(([name, down]) => (down ? name : "")).join("") + event.key.toLowerCase();
}

/** Tell the kernel of a key that it asked for. Numbered: the same key once more is another stroke. */
function report(model, key) {
  if (!model.get("bound_keys").includes(key)) return false;
  save(model, "pressed", [(model.get("pressed")[0] ?? 0) + 1, key]);
  return true;
}

/** Left and right: the mask. Up and down: the stack. Digits: the channel. `order` is what left and right step through. */
export function onKey(event, model, order) {
  if (!report(model, nameOf(event)) && !navigate(event, model, order)) return;
  event.preventDefault();
  event.stopPropagation();
}

/** Returns whether the key moves anything. */
function navigate(event, model, order) {
  if (event.altKey || event.ctrlKey || event.metaKey) return false;
  const shapes = model.get("shapes"), stack = model.get("stack"), numChannels = model.get("num_channels");
  const numStacks = Math.max(model.get("num_stacks"), shapes.length);
  const numMasks = Math.max(model.get("num_masks"), shapes[clamp(stack, 0, shapes.length - 1)][0]);
  const sequence = order ?? Array.from({ length: numMasks }, (_, i) => i);
  const place = Math.max(sequence.indexOf(model.get("index")), 0), last = sequence.length - 1;
  const places = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: last };
  const stacks = { ArrowUp: stack + 1, ArrowDown: stack - 1 };
  const { key } = event;
  if (key in places) step(model, "index", sequence[clamp(places[key], 0, last)], numMasks);
  else if (key in stacks) step(model, "stack", stacks[key], numStacks);
  else if (/^[0-9]$/.test(key) && Number(key) < numChannels) step(model, "channel", Number(key), numChannels);
  else return false;
  return true;
}

/** Paints cells of the mask while the pointer is down: at once on the screen, and told to the kernel at the end. */
export function makeBrush(model, redraw) {
  let cells = null, from = null, strokes = 0;

  function stamp(mask, [u, v]) {
    const [coverX, coverY] = model.get("coverage"), radius = model.get("brush_radius");
    const x = (u / coverX) * mask.width, y = (v / coverY) * mask.height; // in cells
    const value = model.get("brush") > 0 ? 255 : 0;
    const column = Math.floor(x), row = Math.floor(y), reach = Math.ceil(radius);
    for (let r = Math.max(row - reach, 0); r <= Math.min(row + reach, mask.height - 1); r++) {
      for (let c = Math.max(column - reach, 0); c <= Math.min(column + reach, mask.width - 1); c++) {
        const touched = (r === row && c === column) || Math.hypot(c + 0.5 - x, r + 0.5 - y) <= radius;
        if (!touched) continue;
        cells.add(r * mask.width + c);
        mask.values[r * mask.width + c] = value;
      }
    }
  }

  function move(to) {
    const masks = masksOf(model, redraw);
    if (!cells || !masks) return;
    const mask = chosenMask(model, masks);
    const steps = 1 + 2 * Math.ceil(Math.hypot((to[0] - from[0]) * mask.width, (to[1] - from[1]) * mask.height));
    for (let i = 1; i <= steps; i++) {
      const share = i / steps;
      stamp(mask, [from[0] + (to[0] - from[0]) * share, from[1] + (to[1] - from[1]) * share]);
    }
    from = to;
    redraw();
  }

  return {
    start(at) {
      cells = new Set();
      from = at;
      move(at);
    },
    move,
    end() {
      const masks = masksOf(model, redraw);
      if (!cells || !masks) return;
      const { stack, index, channel } = chosenMask(model, masks);
      // Numbered: the same stroke once more, after it was undone, is another one.
      save(model, "stroke", [++strokes, stack, index, channel, model.get("brush") > 0 ? 255 : 0, ...cells]);
      cells = null;
    },
  };
}
