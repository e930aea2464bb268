"""The controls of the CounterfactualExplorer, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets

from m2f_lab.explore.counterfactuals.views import DIFFERENCE, NOW, STATES
from m2f_lab.explore.parts.labels import NO_OBJECT
from m2f_lab.explore.parts.tool import button, controls, layer_slider, menu, share_slider, slider

HELP = {
    "layer": "Decoder layers refine the queries one after the other. Edits of attention masks are made at this layer, "
    "and muting starts with it. (The code counts from zero: layer n is decoder.layer.n-1.)",
    "query": "Each query proposes one mask and one class; here as the model has them without edits, the surest first.",
    "opacity": "How strongly colours cover the image.",
    "mute": "Take the query out of the decoder from this layer on: the other queries no longer see it, and it gives "
    "nothing to the result. On the keyboard: m.",
    "leave out": "Let the query take part in the decoder to the end, and leave it out of the result only.",
    "class": "Give the query's mask to this class for certain. Only the result changes: the decoder is never told the "
    "classes that its queries predict.",
    "unmask": "Let the query look at the whole image in this layer, instead of only inside the mask it predicted.",
    "unmask all": "Let all queries look at the whole image in this layer.",
    "brush": "What the pointer does on the attention mask: choose the query that won a pixel, hide cells from the "
    "query, or show them to it.",
    "radius": "Of the brush, in cells of the grid that the layer looks at.",
    "undo": "Take the last edit back. On the keyboard: u or ctrl-z.",
    "redo": "Make the edit again that was taken back. On the keyboard: y or shift-ctrl-z.",
    "reset": "Drop all edits.",
    "hidden": "Masked attention: a layer lets a query see the image only inside the mask it predicted just before. "
    "What lies in grey fog is hidden from it. Choose hide or show above, then paint.",
    "result": "The class of every pixel, without edits (before) and with them (now). Click to choose the query that "
    "contributes most there.",
    "difference": "The pixels whose class changed, in the colour of their new class.",
}

BRUSHES = (("choose", 0), ("hide", 1), ("show", -1))


class Controls:
    """Sliders, menus and buttons; each has the CSS class m2f-<name>."""

    def __init__(self, num_layers: int, queries: Sequence[tuple[str, int]], class_names: Sequence[str]) -> None:
        """Args:
        num_layers: N.
        queries: text and number of each, as they are sorted.
        class_names: of the K classes.
        """
        self.layer = layer_slider("layer", num_layers, HELP["layer"])
        self.query = slider("query-slider", "query", 0, len(queries) - 1, HELP["query"], readout=False)
        self.query_menu = menu("query-menu", "", queries, HELP["query"])
        self.opacity = share_slider("opacity-slider", "opacity", 0.7, HELP["opacity"])
        self.mute = _button("mute", "mute from this layer on", HELP["mute"])
        self.leave_out = _button("leave-out", "leave out of the result", HELP["leave out"])
        classes = [(name, number) for number, name in enumerate([*class_names, NO_OBJECT])]
        self.class_menu = menu("class-menu", "class", classes, HELP["class"])
        self.force_class = _button("force-class", "force this class", HELP["class"])
        self.brush = _choice("brush", BRUSHES, 0, HELP["brush"])
        self.radius = ipywidgets.FloatSlider(
            1.0, min=0.5, max=8, step=0.5, description="radius", readout_format=".1f", tooltip=HELP["radius"]
        ).add_class("m2f-radius-slider")
        self.unmask = _button("unmask", "masking off for the query", HELP["unmask"])
        self.unmask_all = _button("unmask-all", "masking off for all", HELP["unmask all"])
        self.undo = button("undo", "undo", HELP["undo"], icon="undo")
        self.redo = button("redo", "redo", HELP["redo"], icon="repeat")
        self.reset = button("reset", "reset", HELP["reset"])
        self.state = _choice("state", STATES[:DIFFERENCE], NOW, HELP["result"])
        self.status, self.edits = (ipywidgets.HTML().add_class(f"m2f-{name}") for name in ("status", "edits"))

    def rows(self) -> list[ipywidgets.Widget]:
        """From top to bottom; the list of edits stands elsewhere."""
        return [
            controls(self.layer, self.query, self.query_menu, self.opacity),
            controls(self.mute, self.leave_out, self.class_menu, self.force_class),
            controls(_label("pointer", HELP["brush"]), self.brush, self.radius, self.unmask, self.unmask_all),
            controls(self.undo, self.redo, self.reset, _label("result", HELP["result"]), self.state, self.status),
        ]


def _button(name: str, label: str, tooltip: str) -> ipywidgets.Button:
    """As wide as what it says."""
    return button(name, label, tooltip, layout={"width": "max-content"})


def _label(text: str, tooltip: str) -> ipywidgets.Label:
    """Before a choice; its own description would stand above it."""
    return ipywidgets.Label(text, tooltip=tooltip)


def _choice(name: str, options: Sequence, index: int, tooltip: str) -> ipywidgets.ToggleButtons:
    """A few options side by side."""
    made = ipywidgets.ToggleButtons(
        options=options, index=index, tooltips=[tooltip] * len(options), style={"button_width": "72px"},
        layout={"width": "max-content"},
    )  # fmt: skip
    return made.add_class(f"m2f-{name}")
