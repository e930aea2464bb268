// What a picture and a sheet of thumbnails share: a header, a canvas that has the keyboard, and an end.

import { onKey } from "./controls.js";
import { element } from "./panels.js";

/** Parts of a view in `el`. Left and right step through `order()`; `resized` hears how large the canvas's parent is. */
export function frame(model, el, { stageName, canvasName, keys, order, resized }) {
  const listeners = new AbortController(), signal = listeners.signal;
  const header = element("div", "m2f-header", el);
  const title = element("span", "m2f-title", header), help = element("span", "m2f-help", header, "?");
  const stage = stageName ? element("div", stageName, el) : el;
  const canvas = element("canvas", canvasName, stage);
  canvas.tabIndex = 0;
  canvas.dataset.lmSuppressShortcuts = "true"; // else "x" would cut the cell: JupyterLab's command mode
  canvas.addEventListener("click", () => canvas.focus({ preventScroll: true }), { signal });
  canvas.addEventListener("keydown", (event) => onKey(event, model, order?.()), { signal });
  const observer = new ResizeObserver(([entry]) => resized(entry.contentRect));
  observer.observe(stage);

  function label() {
    title.textContent = model.get("title");
    help.title = model.get("help");
    help.hidden = !model.get("help");
    canvas.setAttribute("aria-label", `${model.get("title")}: arrow keys ${keys}`);
  }
  function end() {
    listeners.abort();
    observer.disconnect();
  }
  return { header, stage, canvas, signal, label, end };
}
