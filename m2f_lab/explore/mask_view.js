// The browser's half of MaskView (mask_view.py): everything that changes while a person plays is done here.
//
// Masks arrive once, as stacks of uint8 [num_masks, num_channels, height, width] one after the other. `stack`, `index`
// and `channel` choose one. A value is read bilinearly (or from its cell, if not `smooth`), looked up in a table of 256
// RGBA colours, and mixed into the image. `composite` in mask_view.py states the same in numpy; tests compare the two.

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function element(tag, className, parent, text) {
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

/** For every screen pixel along one axis: its two neighbouring cells and the weight of the second. */
function samplingTable(numPixels, numCells, coverage, smooth) {
  const first = new Int32Array(numPixels), second = new Int32Array(numPixels), weight = new Float32Array(numPixels);
  for (let pixel = 0; pixel < numPixels; pixel++) {
    const position = ((pixel + 0.5) / numPixels / coverage) * numCells;
    if (smooth) {
      const centred = clamp(position - 0.5, 0, numCells - 1);
      first[pixel] = Math.floor(centred);
      second[pixel] = Math.min(first[pixel] + 1, numCells - 1);
      weight[pixel] = centred - first[pixel];
    } else {
      first[pixel] = second[pixel] = Math.min(Math.floor(position), numCells - 1);
    }
  }
  return { first, second, weight };
}

/** Where the mask that the model shows now lies in its buffer. */
function chosenMask(model) {
  const shapes = model.get("shapes");
  const stack = clamp(model.get("stack"), 0, shapes.length - 1);
  let offset = 0, number = 0;
  for (let i = 0; i < stack; i++) {
    offset += shapes[i].reduce((a, b) => a * b);
    number += shapes[i][0] * shapes[i][1];
  }
  const [numMasks, numChannels, height, width] = shapes[stack];
  const index = clamp(model.get("index"), 0, numMasks - 1);
  const channel = clamp(model.get("channel"), 0, numChannels - 1);
  const position = index * numChannels + channel;
  const values = bytes(model.get("masks")).subarray(
    offset + position * height * width, offset + (position + 1) * height * width);
  const scales = model.get("scales");
  const scale = scales.getFloat32(4 * (number + position), true);
  return { values, height, width, scale, stack, index, channel };
}

/** Colour 0…255 and opacity 0…1 of each of the 256 values, threshold applied. */
function colors(model) {
  const table = bytes(model.get("table")), threshold = model.get("threshold"), opacity = model.get("opacity");
  const rgb = new Uint8Array(3 * 256), alpha = new Float32Array(256);
  for (let value = 0; value < 256; value++) {
    const shown = threshold > 0 ? (value >= 255 * threshold ? 255 : 0) : value;
    rgb.set(table.subarray(4 * shown, 4 * shown + 3), 3 * value);
    alpha[value] = (table[4 * shown + 3] / 255) * opacity;
  }
  return { rgb, alpha };
}

/** Mix the mask into the image, pixel by pixel. */
function composite(model, mask, image, target, lineWidth) {
  const { width, height, data: base } = image, out = target.data;
  const [coverX, coverY] = model.get("coverage"), smooth = model.get("smooth");
  const columns = samplingTable(width, mask.width, coverX, smooth);
  const rows = samplingTable(height, mask.height, coverY, smooth);
  const { rgb, alpha } = colors(model), values = mask.values;
  const contour = model.get("opacity") && 255 * model.get("contour");
  const inside = contour > 0 ? new Uint8Array(width * height) : null;
  const row = new Float32Array(mask.width); // of cells, read between two rows of the mask
  for (let y = 0, o = 0; y < height; y++) {
    const above = rows.first[y] * mask.width, below = rows.second[y] * mask.width, down = rows.weight[y];
    for (let i = 0; i < mask.width; i++) row[i] = values[above + i] + (values[below + i] - values[above + i]) * down;
    for (let x = 0; x < width; x++, o += 4) {
      const left = row[columns.first[x]], value = left + (row[columns.second[x]] - left) * columns.weight[x];
      const entry = (value + 0.5) | 0, a = alpha[entry], color = 3 * entry;
      out[o] = base[o] + (rgb[color] - base[o]) * a;
      out[o + 1] = base[o + 1] + (rgb[color + 1] - base[o + 1]) * a;
      out[o + 2] = base[o + 2] + (rgb[color + 2] - base[o + 2]) * a;
      out[o + 3] = 255;
      if (inside) inside[o >> 2] = value >= contour ? 1 : 0;
    }
  }
  if (inside) drawContour(inside, width, height, out, lineWidth);
}

/** A white line along the inner edge of the mask. */
function drawContour(inside, width, height, out, lineWidth) {
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!inside[i]) continue;
      const edge =
        (x >= lineWidth && !inside[i - lineWidth]) || (x + lineWidth < width && !inside[i + lineWidth]) ||
        (y >= lineWidth && !inside[i - lineWidth * width]) ||
        (y + lineWidth < height && !inside[i + lineWidth * width]);
      if (edge) out[4 * i] = out[4 * i + 1] = out[4 * i + 2] = 255;
    }
  }
}

/** The value at a place of the image given in 0…1, as the mask has it there: the cell's own, not interpolated. */
function valueAt(model, mask, u, v) {
  const [coverX, coverY] = model.get("coverage");
  const column = Math.min(Math.floor((u / coverX) * mask.width), mask.width - 1);
  const row = Math.min(Math.floor((v / coverY) * mask.height), mask.height - 1);
  return (mask.values[row * mask.width + column] / 255) * mask.scale;
}

function readout(model, value) {
  const words = model.get("words");
  if (words.length) return words[value < 0.5 ? 0 : 1];
  return model.get("readout").replace("{value}", value.toFixed(2)).replace("{percent}", percent(value));
}

function drawLegend(model, mask, nodes) {
  const words = model.get("words"), asPercent = model.get("readout").includes("{percent}");
  nodes.low.textContent = words.length ? words[0] : "0";
  nodes.high.textContent = words.length ? words[1] : asPercent ? percent(mask.scale) : mask.scale.toFixed(0);
  nodes.label.textContent = model.get("unit");
  const { rgb, alpha } = colors(model);
  const stops = Array.from({ length: 17 }, (_, i) => {
    const value = Math.round((255 * i) / 16);
    return `rgba(${rgb.subarray(3 * value, 3 * value + 3).join(", ")}, ${alpha[value].toFixed(3)})`;
  });
  nodes.bar.style.background = `linear-gradient(to right, ${stops.join(", ")}), #cfd3d8`;
}

function drawCaption(model, mask, nodes) {
  const caption = model.get("captions")[mask.stack]?.[mask.index] ?? {};
  nodes.text.textContent = caption.text ?? "";
  nodes.warning.textContent = caption.warning ?? "";
  nodes.warning.hidden = !caption.warning;
  nodes.bars.replaceChildren();
  for (const [label, value, color] of caption.bars ?? []) {
    const row = element("div", "m2f-bar", nodes.bars);
    element("span", "m2f-bar-label", row, label).title = label;
    const track = element("span", "m2f-bar-track", row);
    const fill = element("span", "m2f-bar-fill", track);
    fill.style.width = `${100 * value}%`;
    fill.style.background = color;
    element("span", "m2f-bar-value", row, percent(value));
  }
}

function render({ model, el }) {
  const listeners = new AbortController(), signal = listeners.signal;
  el.classList.add("m2f-maskview");
  const header = element("div", "m2f-header", el);
  const title = element("span", "m2f-title", header);
  const help = element("span", "m2f-help", header, "?");
  const stage = element("div", "m2f-stage", el);
  const canvas = element("canvas", "m2f-canvas", stage);
  canvas.tabIndex = 0;
  canvas.dataset.lmSuppressShortcuts = "true"; // else "x" would cut the cell: JupyterLab's command mode
  const cross = element("div", "m2f-cross", stage);
  const tip = element("div", "m2f-tip", stage);
  const warning = element("div", "m2f-warning", stage);
  cross.hidden = tip.hidden = warning.hidden = true;
  const legendNode = element("div", "m2f-legend", el);
  const legend = {};
  for (const part of ["low", "bar", "high", "label"]) legend[part] = element("span", `m2f-legend-${part}`, legendNode);
  const caption = { warning, text: element("div", "m2f-caption", el), bars: element("div", "m2f-bars", el) };

  const context = canvas.getContext("2d", { willReadFrequently: true });
  let picture = null; // the decoded image
  let image = null, target = null; // its pixels at the canvas's size; what is drawn next
  let frame = 0, pointer = null;

  function labels() {
    title.textContent = model.get("title");
    help.title = model.get("help");
    help.hidden = !model.get("help");
    header.hidden = !model.get("title");
    canvas.setAttribute("aria-label", `${model.get("title")}: arrow keys change what is shown`);
    stage.style.width = `${model.get("width")}px`;
    const [width, height] = model.get("image_size");
    stage.style.aspectRatio = `${width} / ${height}`;
    el.style.setProperty("--m2f-width", `${model.get("width")}px`);
  }

  /** Bring the image to the canvas's size in device pixels. */
  function fit() {
    const box = stage.getBoundingClientRect(), ratio = window.devicePixelRatio || 1;
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (!picture || width < 1 || height < 1) return false;
    if (image && image.source === picture && image.width === width && image.height === height) return true;
    canvas.width = width;
    canvas.height = height;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture, 0, 0, width, height);
    image = { width, height, source: picture, data: context.getImageData(0, 0, width, height).data };
    target = context.createImageData(width, height);
    return true;
  }

  function draw() {
    frame = 0;
    if (signal.aborted || !fit()) return;
    const mask = chosenMask(model);
    composite(model, mask, image, target, Math.max(1, Math.round(window.devicePixelRatio || 1)));
    context.putImageData(target, 0, 0);
    drawLegend(model, mask, legend);
    drawCaption(model, mask, caption);
    if (pointer) showTip(mask);
    canvas.dataset.drawn = `${mask.stack},${mask.index},${mask.channel}`;
  }
  const schedule = () => { if (!frame) frame = requestAnimationFrame(draw); };

  async function load() {
    const decoded = await createImageBitmap(new Blob([bytes(model.get("base"))]));
    if (signal.aborted) return;
    picture = decoded;
    schedule();
  }

  function showTip(mask) {
    const [width, height] = model.get("image_size"), [u, v] = pointer;
    const x = Math.min(Math.floor(u * width), width - 1), y = Math.min(Math.floor(v * height), height - 1);
    tip.textContent = `x ${x}, y ${y} · ${readout(model, valueAt(model, mask, u, v))}`;
    tip.style.left = `${100 * u}%`;
    tip.style.top = `${100 * v}%`;
    tip.classList.toggle("m2f-tip-left", u > 0.5);
    tip.classList.toggle("m2f-tip-above", v > 0.75);
  }

  /** The pointer's place on the image in 0…1, just below 1 at most. */
  function place(event) {
    const box = canvas.getBoundingClientRect();
    const fraction = (value) => clamp(value, 0, 0.999999);
    return [fraction((event.clientX - box.left) / box.width), fraction((event.clientY - box.top) / box.height)];
  }

  /** Tell the views of the same group where the pointer is, so that they mark the same place. */
  function announce(detail) {
    const group = model.get("group");
    if (group) window.dispatchEvent(new CustomEvent("m2f-pointer", { detail: { group, from: el, ...detail } }));
  }

  function set(name, value) {
    model.set(name, value);
    model.save_changes();
  }

  function step(name, value, count) {
    const kept = clamp(value, 0, count - 1);
    if (kept !== model.get(name)) set(name, kept);
  }

  canvas.addEventListener("pointermove", (event) => {
    pointer = place(event);
    tip.hidden = false;
    if (fit()) showTip(chosenMask(model));
    announce({ u: pointer[0], v: pointer[1] });
  }, { signal });
  canvas.addEventListener("pointerleave", () => {
    pointer = null;
    tip.hidden = true;
    announce({ gone: true });
  }, { signal });
  canvas.addEventListener("click", (event) => {
    canvas.focus({ preventScroll: true });
    const [u, v] = place(event), [width, height] = model.get("image_size");
    const [rows, columns] = model.get("pick_shape");
    if (rows) {
      const cell = Math.floor(v * rows) * columns + Math.floor(u * columns);
      model.set("index", model.get("pick").getUint16(2 * cell, true));
    }
    model.set("clicked", [Math.floor(u * width), Math.floor(v * height)]);
    model.save_changes();
  }, { signal });
  canvas.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const shapes = model.get("shapes"), stack = model.get("stack"), index = model.get("index");
    const numMasks = shapes[clamp(stack, 0, shapes.length - 1)][0], numChannels = model.get("num_channels");
    if (event.key === "ArrowRight") step("index", index + 1, numMasks);
    else if (event.key === "ArrowLeft") step("index", index - 1, numMasks);
    else if (event.key === "Home") step("index", 0, numMasks);
    else if (event.key === "End") step("index", numMasks - 1, numMasks);
    else if (event.key === "ArrowUp") step("stack", stack + 1, shapes.length);
    else if (event.key === "ArrowDown") step("stack", stack - 1, shapes.length);
    else if (/^[0-9]$/.test(event.key) && Number(event.key) < numChannels) {
      step("channel", Number(event.key), numChannels);
    }
    else return;
    event.preventDefault();
    event.stopPropagation();
  }, { signal });
  window.addEventListener("m2f-pointer", ({ detail }) => {
    if (detail.group !== model.get("group") || detail.from === el) return;
    cross.hidden = Boolean(detail.gone);
    cross.style.left = `${100 * detail.u}%`;
    cross.style.top = `${100 * detail.v}%`;
  }, { signal });
  const resize = new ResizeObserver(schedule);
  resize.observe(stage);

  const redrawn = ["stack", "index", "channel", "opacity", "threshold", "contour", "smooth", "masks", "shapes",
    "scales", "coverage", "table", "captions", "readout", "words", "unit"];
  const relabelled = ["title", "help", "width", "image_size"];
  const changed = () => { labels(); schedule(); };
  for (const name of redrawn) model.on(`change:${name}`, schedule);
  for (const name of relabelled) model.on(`change:${name}`, changed);
  model.on("change:base", load);
  labels();
  load();

  return () => {
    listeners.abort();
    resize.disconnect();
    cancelAnimationFrame(frame);
    for (const name of redrawn) model.off(`change:${name}`, schedule);
    for (const name of relabelled) model.off(`change:${name}`, changed);
    model.off("change:base", load);
  };
}

export default { render };
