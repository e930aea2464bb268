// Values of widgets that the browser keeps equal. The kernel hears of a change only after the pictures have followed:
// every message costs time that belongs to them.

const PREFIX = "IPY_MODEL_"; // how ipywidgets writes a widget in a message

async function initialize({ model }) {
  const find = (reference) => model.widget_manager.get_model(reference.slice(PREFIX.length));
  const ends = [];
  for (const [source, from, target, to] of model.get("pairs")) {
    const [a, b] = await Promise.all([find(source), find(target)]);
    follow(a, from, b, to);
    ends.push(...[[a, from, b, to], [b, to, a, from]].map(([leader, name, follower, other]) => {
      const changed = () => follow(leader, name, follower, other);
      leader.on(`change:${name}`, changed);
      return () => leader.off(`change:${name}`, changed);
    }));
  }
  return () => ends.forEach((end) => end());
}

function follow(leader, name, follower, other) {
  if (follower.get(other) === leader.get(name)) return;
  follower.set(other, leader.get(name));
  tellLater(follower);
}

const untold = new Set();

/** Send what changed once pictures were drawn, however often it changed until then. */
function tellLater(model) {
  if (!untold.size) {
    setTimeout(() => {
      for (const each of untold) each.save_changes();
      untold.clear();
    });
  }
  untold.add(model);
}

export default { initialize };
