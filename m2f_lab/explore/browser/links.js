// Values of widgets that the browser keeps equal. A source that follows its target is saved, so that the kernel hears of
// it; a target that follows its source is not: every message costs time that belongs to the pictures.

import { onChange, save } from "./drawing.js";

const PREFIX = "IPY_MODEL_"; // how ipywidgets writes a widget in a message

async function initialize({ model }) {
  const find = (reference) => model.widget_manager.get_model(reference.slice(PREFIX.length));
  const listeners = new AbortController();
  for (const [source, from, target, to] of model.get("pairs")) {
    const [leader, follower] = await Promise.all([find(source), find(target)]);
    const forth = () => follower.set(to, leader.get(from));
    const back = () => {
      if (leader.get(from) !== follower.get(to)) save(leader, from, follower.get(to), true);
    };
    forth();
    onChange(leader, [from], forth, listeners.signal);
    onChange(follower, [to], back, listeners.signal);
  }
  return () => listeners.abort();
}

export default { initialize };
