// All masks of a stack at once, as thumbnails.

import { chosenMask, composite, fitted, masksOf, onChange, onImage, save, scheduler } from "./drawing.js";
import { frame } from "./frame.js";
import { element, listOf } from "./panels.js";

function render({ model, el }) {
  el.classList.add("m2f-maskgrid");
  const order = () => model.get("orders")[model.get("sort")] ?? [];
  const { header, canvas, signal, label, end } = frame(model, el, {
    canvasName: "m2f-grid-canvas", keys: "choose", order, resized,
  });
  const sorts = element("span", "m2f-sorts", header);
  const context = canvas.getContext("2d");
  const TEXT = 14, GAP = 6; // CSS pixels: of the line below a thumbnail, and between thumbnails
  const REST = 40; // ms: thumbnails follow when the hand rests, so that the large picture is never kept waiting
  let picture = null, frames = 0, resting = 0;
  let width = 0, style = null; // of the element; asking the page for them would lay it out every time
  let tile = null; // the image at the size of a thumbnail, in device pixels
  let sheet = null; // all thumbnails as they are now; only the frame around the chosen one changes more often

  function layout() {
    const ratio = window.devicePixelRatio || 1, [imageWidth, imageHeight] = model.get("image_size");
    const columns = Math.max(1, Math.floor((width + GAP) / (model.get("thumbnail") + GAP)));
    const tileWidth = Math.floor((width + GAP) / columns) - GAP;
    const tileHeight = Math.round((tileWidth * imageHeight) / imageWidth);
    const rows = Math.ceil(order().length / columns);
    return { ratio, columns, tileWidth, tileHeight, pitch: tileHeight + TEXT + GAP, rows };
  }

  function fit({ ratio, tileWidth, tileHeight, pitch, rows }) {
    const size = [Math.round(width * ratio), Math.round(rows * pitch * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${rows * pitch}px`;
    tile = fitted(picture, Math.round(tileWidth * ratio), Math.round(tileHeight * ratio), tile);
  }

  function drawSheet({ ratio, columns, tileWidth, pitch }, masks) {
    sheet = new OffscreenCanvas(canvas.width, canvas.height);
    const context = sheet.getContext("2d");
    context.font = `${11 * ratio}px ${style.font}`;
    context.textBaseline = "middle";
    context.fillStyle = style.ink;
    const labels = model.get("labels")[model.get("stack")] ?? [];
    for (const [place, index] of order().entries()) {
      const [left, top] = corner(place, ratio, columns, tileWidth, pitch);
      composite(model, chosenMask(model, masks, index), tile, 1);
      context.putImageData(tile.target, left, top);
      context.save();
      context.beginPath();
      context.rect(left, top, tile.width, pitch * ratio);
      context.clip();
      context.fillText(labels[index] ?? "", left, top + tile.height + (TEXT / 2) * ratio);
      context.restore();
    }
  }

  function corner(place, ratio, columns, tileWidth, pitch) {
    const left = (place % columns) * (tileWidth + GAP), top = Math.floor(place / columns) * pitch;
    return [Math.round(left * ratio), Math.round(top * ratio)];
  }

  function draw() {
    if (signal.aborted || !picture || width < 1) return;
    const grid = layout(), { ratio, columns, tileWidth, pitch } = grid;
    fit(grid);
    if (!sheet) {
      const masks = masksOf(model, schedule);
      if (!masks) return; // the old thumbnails stay until the new ones are there
      drawSheet(grid, masks);
    }
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(sheet, 0, 0);
    const place = order().indexOf(model.get("index"));
    if (place >= 0) {
      const [left, top] = corner(place, ratio, columns, tileWidth, pitch);
      context.strokeStyle = style.accent;
      context.lineWidth = 3 * ratio;
      context.strokeRect(left + 1.5 * ratio, top + 1.5 * ratio, tile.width - 3 * ratio, tile.height - 3 * ratio);
    }
    canvas.dataset.drawn = `${model.get("stack")},${model.get("index")},${model.get("sort")}`;
    canvas.dataset.frames = ++frames;
  }
  const schedule = scheduler(draw);
  const redraw = () => { sheet = null; schedule(); };
  const follow = () => {
    clearTimeout(resting);
    resting = setTimeout(redraw, REST);
  };

  /** The mask whose thumbnail is at this place of the page, or undefined between them. */
  function maskAt(event) {
    const { columns, tileWidth, tileHeight, pitch } = layout(), box = canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    const column = Math.floor(x / (tileWidth + GAP)), row = Math.floor(y / pitch);
    if (column >= columns || y % pitch > tileHeight + TEXT) return undefined;
    return order()[row * columns + column];
  }

  function drawHeader() {
    label();
    sorts.replaceChildren();
    const names = Object.keys(model.get("orders"));
    if (names.length < 2) return;
    element("span", "m2f-sorts-label", sorts, "sorted by");
    for (const name of names) {
      const button = element("button", name === model.get("sort") ? "m2f-sort m2f-sort-chosen" : "m2f-sort", sorts, name);
      button.addEventListener("click", () => save(model, "sort", name));
    }
  }

  canvas.addEventListener("click", (event) => {
    const index = maskAt(event);
    if (index !== undefined) save(model, "index", index);
  }, { signal });
  canvas.addEventListener("pointermove", (event) => {
    const index = maskAt(event), caption = listOf(model, "captions")[model.get("stack")]?.[index];
    canvas.title = caption?.text ?? "";
    canvas.style.cursor = index === undefined ? "default" : "pointer";
  }, { signal });
  function resized(content) {
    const found = getComputedStyle(el);
    style = { font: found.fontFamily, ink: found.color, accent: found.getPropertyValue("--m2f-accent") };
    width = Math.round(Math.min(model.get("width"), content.width));
    redraw();
  }

  onChange(model, ["stack", "channel", "opacity", "threshold", "contour", "smooth", "masks", "shapes",
    "scales", "coverage", "table", "labels"], follow, signal);
  onChange(model, ["title", "help", "orders", "sort", "width", "thumbnail", "image_size"],
    () => { drawHeader(); redraw(); }, signal);
  onChange(model, ["index"], schedule, signal);
  onImage(model, (decoded) => { picture = decoded; redraw(); }, signal);
  drawHeader();

  return () => {
    end();
    clearTimeout(resting);
  };
}

export default { render };
