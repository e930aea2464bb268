// Masks drawn over an image.
//
// Masks arrive once, as stacks of uint8 [num_masks, num_channels, height, width] one after the other. `stack`, `index`
// and `channel` choose one. A value is read bilinearly (or from its cell, if not `smooth`), looked up in a table of 256
// RGBA colours, and mixed into the image. `composite` in drawing.py states the same in numpy; tests compare the two.

export const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
export const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

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

const inflated = new WeakMap(); // model → its masks as they were sent, as they are, and who waits for them

/** All masks of a model; undefined while they are inflated, after which `ready` is called. */
export function masksOf(model, ready) {
  const sent = model.get("masks");
  let known = inflated.get(model);
  if (known?.sent !== sent) {
    const [isDeflated] = bytes(sent), data = bytes(sent).subarray(1);
    inflated.set(model, known = { sent, masks: isDeflated ? undefined : data, waiting: new Set() });
    if (isDeflated) inflate(data, "deflate").then((masks) => {
      known.masks = new Uint8Array(masks);
      for (const each of known.waiting) each();
    });
  }
  if (!known.masks) known.waiting.add(ready);
  return known.masks;
}

export function inflate(data, format) {
  return new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream(format))).arrayBuffer();
}

/** Where a mask of the stack that the model shows now lies among all masks; by default the one that is chosen. */
export function chosenMask(model, masks, chosen = model.get("index")) {
  const shapes = model.get("shapes");
  const stack = clamp(model.get("stack"), 0, shapes.length - 1);
  let offset = 0, number = 0;
  for (let i = 0; i < stack; i++) {
    offset += shapes[i].reduce((a, b) => a * b);
    number += shapes[i][0] * shapes[i][1];
  }
  const [numMasks, numChannels, height, width] = shapes[stack];
  const index = clamp(chosen, 0, numMasks - 1);
  const channel = clamp(model.get("channel"), 0, numChannels - 1);
  const position = index * numChannels + channel;
  const start = offset + position * height * width, values = masks.subarray(start, start + height * width);
  const scale = model.get("scales").getFloat32(4 * (number + position), true);
  return { values, height, width, scale, stack, index, channel };
}

/** Colour 0…255 and opacity 0…1 of each of the 256 values, threshold applied. */
export function colors(model) {
  const table = bytes(model.get("table")), threshold = model.get("threshold"), opacity = model.get("opacity");
  const rgb = new Uint8Array(3 * 256), alpha = new Float32Array(256);
  for (let value = 0; value < 256; value++) {
    const shown = threshold > 0 ? (value >= 255 * threshold ? 255 : 0) : value;
    rgb.set(table.subarray(4 * shown, 4 * shown + 3), 3 * value);
    alpha[value] = (table[4 * shown + 3] / 255) * opacity;
  }
  return { rgb, alpha };
}

const OPAQUE = 0xff000000 | 0; // signed, as all words here: engines compute with numbers above 2^31 in floating point
const WHITE = -1;

/** The image at a size in device pixels: its pixels as words of 32 bits, red lowest, and what mixing needs at this size
 * again and again. `known` is what was made before, and stays if it still fits. */
export function fitted(source, width, height, known) {
  if (known?.source === source && known.width === width && known.height === height) return known;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height), target = new ImageData(width, height);
  return {
    width, height, source, target,
    words: new Int32Array(data.buffer), drawn: new Int32Array(target.data.buffer),
    inside: new Uint8Array(width * height),
  };
}

/** Mix the mask into the image, pixel by pixel; the result is image.target. */
export function composite(model, mask, image, lineWidth) {
  const { width, height } = image;
  const [coverX, coverY] = model.get("coverage"), smooth = model.get("smooth");
  const columns = samplingTable(width, mask.width, coverX, smooth);
  const rows = samplingTable(height, mask.height, coverY, smooth);
  const contour = model.get("opacity") && 255 * model.get("contour");
  const colors = mixture(model);
  let above = new Float32Array(width), below = new Float32Array(width); // two rows of the mask at the image's width
  let first = -1, second = -1;
  for (let y = 0; y < height; y++) {
    if (rows.first[y] !== first && rows.first[y] === second) [above, below, first, second] = [below, above, second, first];
    if (rows.first[y] !== first) stretch(mask, first = rows.first[y], columns, above);
    if (rows.second[y] !== second) stretch(mask, second = rows.second[y], columns, below);
    mixRow(image, y, above, below, rows.weight[y], colors);
    if (contour > 0) drawContour(image, y, above, below, rows.weight[y], contour, lineWidth);
  }
}

/** One row of the picture. A function of its own: engines compile what is called often. */
function mixRow({ width, words, drawn }, y, above, below, down, { kept, redAndBlue, green }) {
  for (let x = 0, o = y * width; x < width; x++, o++) {
    const entry = (above[x] + (below[x] - above[x]) * down + 0.5) | 0;
    const base = words[o], keep = kept[entry];
    drawn[o] = OPAQUE | // red and blue at once: 16 bits lie between them
      (((Math.imul(base & 0xff00ff, keep) + redAndBlue[entry]) >>> 8) & 0xff00ff) |
      (((Math.imul(base & 0xff00, keep) + green[entry]) >>> 8) & 0xff00);
  }
}

/** A white line along the inner edge of the mask: where a pixel inside meets one outside, in this row and above it. */
function drawContour({ width, drawn, inside }, y, above, below, down, contour, lineWidth) {
  const step = lineWidth * width;
  for (let x = 0, o = y * width; x < width; x++, o++) {
    const here = above[x] + (below[x] - above[x]) * down >= contour ? 1 : 0;
    inside[o] = here;
    if (x >= lineWidth && inside[o - lineWidth] !== here) drawn[here ? o : o - lineWidth] = WHITE;
    if (y >= lineWidth && inside[o - step] !== here) drawn[here ? o : o - step] = WHITE;
  }
}

/** For each of the 256 values in fixed point: how much is kept of the image, of 256, and what the colour adds to it. */
function mixture(model) {
  const { rgb, alpha } = colors(model);
  const kept = new Int32Array(256), redAndBlue = new Int32Array(256), green = new Int32Array(256);
  for (let value = 0; value < 256; value++) {
    const share = Math.round(256 * alpha[value]);
    const [red, g, blue] = rgb.subarray(3 * value, 3 * value + 3);
    kept[value] = 256 - share;
    redAndBlue[value] = (red * share + 128) | ((blue * share + 128) << 16);
    green[value] = (g * share + 128) << 8;
  }
  return { kept, redAndBlue, green };
}

/** One row of the mask at the width of the image. */
function stretch(mask, row, { first, second, weight }, out) {
  const values = mask.values, start = row * mask.width;
  for (let x = 0; x < out.length; x++) {
    const left = values[start + first[x]];
    out[x] = left + (values[start + second[x]] - left) * weight[x];
  }
}

/** The value at a place of the image given in 0…1, as the mask has it there: the cell's own, not interpolated. */
export function valueAt(model, mask, u, v) {
  const [coverX, coverY] = model.get("coverage");
  const column = Math.min(Math.floor((u / coverX) * mask.width), mask.width - 1);
  const row = Math.min(Math.floor((v / coverY) * mask.height), mask.height - 1);
  return (mask.values[row * mask.width + column] / 255) * mask.scale;
}

/** Call a function when one of a model's values changes, until the signal is aborted. */
export function onChange(model, names, call, signal) {
  for (const name of names) model.on(`change:${name}`, call);
  signal.addEventListener("abort", () => names.forEach((name) => model.off(`change:${name}`, call)));
}

/** Hand on the decoded image of a view, now and when it changes, until the signal is aborted. */
export function onImage(model, call, signal) {
  const load = async () => {
    const picture = await createImageBitmap(new Blob([bytes(model.get("base"))]));
    if (!signal.aborted) call(picture);
  };
  onChange(model, ["base"], load, signal);
  load();
}

/** Change a value and tell the kernel: at once, or `later` in the same turn, but after pictures were drawn. */
export function save(model, name, value, later = false) {
  model.set(name, value);
  if (later) queueMicrotask(() => model.save_changes());
  else model.save_changes();
}

/** Draw once per turn of the event loop, however much changed, and without waiting for the screen's next frame. */
export function scheduler(draw) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    queueMicrotask(() => {
      waiting = false;
      draw();
    });
  };
}
