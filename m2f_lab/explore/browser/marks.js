// Dots over the image: where something reads, the larger the heavier, coloured by group.

import { clamp } from "./drawing.js";
import { placeOf } from "./panels.js";

const DOT_RADIUS = 17; // CSS pixels of a dot of size 1; its area is proportional to the size

/** Draw the dots of the place that was clicked last, for the stack and channel that are shown; channel 0 is all. */
export function drawMarks(model, canvas, image) {
  const data = model.get("marks"), clicked = model.get("clicked");
  canvas.hidden = !data.byteLength || !clicked.length;
  if (canvas.hidden) return;
  canvas.width = image.width;
  canvas.height = image.height;
  const [rows, columns, stacks, channels, count] = model.get("marks_shape");
  const groups = model.get("mark_groups"), ratio = window.devicePixelRatio || 1;
  const context = canvas.getContext("2d");
  const first = (placeOf(model, rows, columns) * stacks + clamp(model.get("stack"), 0, stacks - 1)) * channels;
  const channel = model.get("channel");
  const shown = channel ? [channel - 1] : Array.from({ length: channels }, (_, i) => i);
  context.lineWidth = 0.8 * ratio;
  context.strokeStyle = "rgb(255 255 255 / 90%)";
  for (const c of shown) {
    for (let i = 0; i < count; i++) {
      const at = 12 * ((first + c) * count + i); // three float32
      const [x, y, size] = [0, 4, 8].map((offset) => data.getFloat32(at + offset, true));
      context.beginPath();
      context.arc(x * image.width, y * image.height, (1.5 + DOT_RADIUS * Math.sqrt(size)) * ratio, 0, 2 * Math.PI);
      context.fillStyle = groups[Math.floor((i * groups.length) / count)][1];
      context.globalAlpha = 0.8;
      context.fill();
      context.stroke();
    }
  }
}
