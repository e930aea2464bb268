// One picture: masks scrubbed over an image.

import { makeBrush } from "./controls.js";
import { chosenMask, clamp, composite, fitted, masksOf, onChange, onImage, save, scheduler, valueAt } from "./drawing.js";
import { frame } from "./frame.js";
import { drawMarks } from "./marks.js";
import { NOTHING, captionNodes, drawCaption, drawLegend, element, listOf, noteAt, readout } from "./panels.js";

function render({ model, el }) {
  el.classList.add("m2f-maskview");
  const { header, stage, canvas, signal, label, end } = frame(model, el, {
    stageName: "m2f-stage", canvasName: "m2f-canvas", keys: "change what is shown",
    resized: (content) => { box = content; schedule(); },
  });
  const dots = element("canvas", "m2f-dots", stage);
  const pin = element("div", "m2f-pin", stage), cross = element("div", "m2f-cross", stage);
  const tip = element("div", "m2f-tip", stage);
  const warning = element("div", "m2f-warning", stage);
  cross.hidden = tip.hidden = warning.hidden = true;
  const legendNode = element("div", "m2f-legend", el);
  const legend = {};
  for (const part of ["low", "bar", "high", "names", "groups", "label"]) {
    legend[part] = element("span", `m2f-legend-${part}`, legendNode);
  }
  const caption = captionNodes(el, warning), note = captionNodes(element("div", "m2f-place-note", el));

  const context = canvas.getContext("2d");
  let picture = null; // the decoded image
  let image = null; // its pixels at the canvas's size
  let box = { width: 0, height: 0 }; // of the stage, in CSS pixels; asking the page for it would lay it out every time
  let frames = 0, pointer = null;

  function labels() {
    label();
    header.hidden = !model.get("title");
    stage.style.width = `${model.get("width")}px`;
    const [width, height] = model.get("image_size");
    stage.style.aspectRatio = `${width} / ${height}`;
    el.style.setProperty("--m2f-width", `${model.get("width")}px`);
  }

  /** Bring the image to the canvas's size in device pixels. */
  function fit() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(box.width * ratio), height = Math.round(box.height * ratio);
    if (!picture || width < 1 || height < 1) return false;
    image = fitted(picture, width, height, image);
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    return true;
  }

  function draw() {
    if (signal.aborted || !fit()) return;
    const masks = masksOf(model, schedule);
    if (!masks) return; // the old picture stays until all of the new one is there
    const mask = chosenMask(model, masks);
    composite(model, mask, image, Math.max(1, Math.round(window.devicePixelRatio || 1)));
    context.putImageData(image.target, 0, 0);
    drawLegend(model, mask, legend);
    drawCaption(listOf(model, "captions")[mask.stack]?.[mask.index] ?? NOTHING, caption);
    drawCaption(noteAt(model, mask.stack), note);
    drawMarks(model, dots, image);
    showPin();
    if (pointer) showTip(mask);
    canvas.dataset.drawn = `${mask.stack},${mask.index},${mask.channel}`;
    canvas.dataset.frames = ++frames;
  }
  const schedule = scheduler(draw);

  /** Where the last click was. */
  function showPin() {
    const clicked = model.get("clicked"), [width, height] = model.get("image_size");
    pin.hidden = !clicked.length || !model.get("pinned");
    if (pin.hidden) return;
    pin.style.left = `${(100 * (clicked[0] + 0.5)) / width}%`;
    pin.style.top = `${(100 * (clicked[1] + 0.5)) / height}%`;
  }

  function showTip(mask) {
    const [width, height] = model.get("image_size"), [u, v] = pointer;
    const x = Math.min(Math.floor(u * width), width - 1), y = Math.min(Math.floor(v * height), height - 1);
    const where = model.get("coordinates") ? `x ${x}, y ${y} · ` : "";
    tip.textContent = where + readout(model, valueAt(model, mask, u, v));
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

  const brush = makeBrush(model, schedule);
  canvas.addEventListener("pointerdown", (event) => {
    if (!model.get("brush")) return;
    canvas.setPointerCapture(event.pointerId);
    brush.start(place(event));
  }, { signal });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, brush.end, { signal });
  canvas.addEventListener("pointermove", (event) => {
    pointer = place(event);
    brush.move(pointer);
    tip.hidden = false;
    const masks = masksOf(model, schedule);
    if (masks && fit()) showTip(chosenMask(model, masks));
    announce({ u: pointer[0], v: pointer[1] });
  }, { signal });
  canvas.addEventListener("pointerleave", () => {
    pointer = null;
    tip.hidden = true;
    announce({ gone: true });
  }, { signal });
  canvas.addEventListener("click", (event) => {
    if (model.get("brush")) return;
    const [u, v] = place(event), [width, height] = model.get("image_size");
    const [rows, columns] = model.get("pick_shape");
    if (rows) {
      const cell = Math.floor(v * rows) * columns + Math.floor(u * columns);
      model.set("index", model.get("pick").getUint16(2 * cell, true));
    }
    save(model, "clicked", [Math.floor(u * width), Math.floor(v * height)]);
  }, { signal });
  window.addEventListener("m2f-pointer", ({ detail }) => {
    if (detail.group !== model.get("group") || detail.from === el) return;
    cross.hidden = Boolean(detail.gone);
    cross.style.left = `${100 * detail.u}%`;
    cross.style.top = `${100 * detail.v}%`;
  }, { signal });

  onChange(model, ["stack", "index", "channel", "opacity", "threshold", "contour", "smooth", "masks", "shapes", "scales",
    "coverage", "table", "captions", "readout", "words", "names", "unit", "notes", "places", "marks", "pinned", "clicked"],
    schedule, signal);
  onChange(model, ["title", "help", "width", "image_size"], () => { labels(); schedule(); }, signal);
  onImage(model, (decoded) => { picture = decoded; schedule(); }, signal);
  labels();
  return end;
}

export default { render };
