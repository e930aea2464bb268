// How masks are drawn over an image. mask_view.js and mask_grid.js follow this text in one module (mask_view.py).
//
// Masks arrive once, as stacks of uint8 [num_masks, num_channels, height, width] one after the other. `stack`, `index`
// and `channel` choose one. A value is read bilinearly (or from its cell, if not `smooth`), looked up in a table of 256
// RGBA colours, and mixed into the image. `composite` in mask_view.py states the same in numpy; tests compare the two.

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

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

/** Where a mask of the stack that the model shows now lies in its buffer; by default the one that is chosen. */
function chosenMask(model, chosen = model.get("index")) {
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
