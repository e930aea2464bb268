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

/** Pixels as words of 32 bits, red lowest, and what mixing needs again and again at this size. */
function drawable(width, height, data, source) {
  const target = new ImageData(width, height);
  return {
    width, height, source, target,
    words: new Uint32Array(data.buffer), drawn: new Uint32Array(target.data.buffer),
    inside: new Uint8Array(width * height),
  };
}

/** Mix the mask into the image, pixel by pixel; the result is image.target. */
function composite(model, mask, image, lineWidth) {
  const { width, height, words, drawn, inside } = image, values = mask.values, maskWidth = mask.width;
  const [coverX, coverY] = model.get("coverage"), smooth = model.get("smooth");
  const { first: left, second: right, weight } = samplingTable(width, maskWidth, coverX, smooth);
  const rows = samplingTable(height, mask.height, coverY, smooth);
  const contour = model.get("opacity") && 255 * model.get("contour");
  // In fixed point: what is kept of the image, of 256, and what the colour adds to each channel.
  const { rgb, alpha } = colors(model), kept = new Int32Array(256), added = new Int32Array(3 * 256);
  for (let value = 0; value < 256; value++) {
    const share = Math.round(256 * alpha[value]);
    kept[value] = 256 - share;
    for (let c = 0; c < 3; c++) added[3 * value + c] = rgb[3 * value + c] * share + 128;
  }
  const row = new Float32Array(maskWidth); // of cells, read between two rows of the mask
  for (let y = 0, o = 0; y < height; y++) {
    const above = rows.first[y] * maskWidth, below = rows.second[y] * maskWidth, down = rows.weight[y];
    for (let i = 0; i < maskWidth; i++) row[i] = values[above + i] + (values[below + i] - values[above + i]) * down;
    for (let x = 0; x < width; x++, o++) {
      const start = row[left[x]], value = start + (row[right[x]] - start) * weight[x], entry = (value + 0.5) | 0;
      const base = words[o], keep = kept[entry], color = 3 * entry;
      inside[o] = value >= contour ? 1 : 0;
      drawn[o] = keep === 256 ? base | 0xff000000 :
        (((base & 255) * keep + added[color]) >> 8) |
        ((((base >> 8) & 255) * keep + added[color + 1]) >> 8 << 8) |
        ((((base >> 16) & 255) * keep + added[color + 2]) >> 8 << 16) | 0xff000000;
    }
  }
  if (contour > 0) drawContour(inside, width, height, drawn, lineWidth);
}

/** A white line along the inner edge of the mask. */
function drawContour(inside, width, height, drawn, lineWidth) {
  const step = lineWidth * width;
  for (let y = 0, i = 0; y < height; y++) {
    for (let x = 0; x < width; x++, i++) {
      if (!inside[i]) continue;
      const edge =
        (x >= lineWidth && !inside[i - lineWidth]) || (x + lineWidth < width && !inside[i + lineWidth]) ||
        (y >= lineWidth && !inside[i - step]) || (y + lineWidth < height && !inside[i + step]);
      if (edge) drawn[i] = 0xffffffff;
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

/** Draw once per turn of the event loop, however much changed, and without waiting for the screen's next frame. */
function scheduler(draw) {
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
