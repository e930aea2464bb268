"""CounterfactualExplorer: change one thing about an image's way through the model, and see the change of the result.

The kernel runs the decoder again once per click or stroke (`replay.Replay`); layers and queries are scrubbed in the
browser.
"""

from __future__ import annotations

import html
import time
from collections.abc import Callable

import ipywidgets
import numpy as np
import torch

from m2f_lab import explore
from m2f_lab.explore.counterfactuals import views as words
from m2f_lab.explore.counterfactuals.edits import Edit, EditHistory, ForceClass, Mute, PaintAttention, Unmask, with_edit
from m2f_lab.explore.counterfactuals.label_change import LabelChange
from m2f_lab.explore.counterfactuals.replay import Replay
from m2f_lab.explore.parts import controls as ui
from m2f_lab.explore.parts.labels import NO_OBJECT, class_labels, query_options
from m2f_lab.explore.parts.mask_view import MaskView, Stroke
from m2f_lab.explore.parts.reading import AnyImage, Model, rank_queries, to_numpy, winning_queries
from m2f_lab.explore.parts.tool import ImageTool
from m2f_lab.model import Mask2Former
from m2f_lab.structures import Output

HELP = {
    "layer": "Decoder layers refine the queries one after the other. Edits of attention masks are made at this layer, "
    "and muting starts with it.",
    "query": "Each query proposes one mask and one class; here as the model has them without edits, the surest first.",
    "mute": "Take the query out of the decoder from this layer on: the other queries no longer see it, and it gives "
    "nothing to the result. On the keyboard: m.",
    "leave-out": "Let the query take part in the decoder to the end, and leave it out of the result only.",
    "force-class": "Give the query's mask to this class for certain. Only the result changes: the decoder is never "
    "told the classes that its queries predict.",
    "unmask": "Let the query look at the whole image in this layer, instead of only inside the mask it predicted.",
    "unmask-all": "Let all queries look at the whole image in this layer.",
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
ICONS = {"undo": "undo", "redo": "repeat"}


class CounterfactualExplorer(ImageTool):
    """Ask for the model's result, had one thing been different.

        tool = CounterfactualExplorer(model, "street.png")
        tool.apply(Mute(3, from_layer=2))

    Choose a layer and a query, then mute it, force its class, paint its attention mask, or switch masking off. After
    a click on a picture, up and down arrows change the layer, left and right the query, but on the result they switch
    between before and now. m mutes the query from this layer on; u or ctrl-z takes the last edit back, y or
    shift-ctrl-z makes it again.

    Attributes:
        replay: runs the decoder again; also works without the widget. None once closed.
        output: of the last run; None once closed.
        change: of the label map by the edits; None once closed.
        seconds: time that the last edit took.
        order: query numbers as they are sorted, the surest without edits first. [Q]
        buttons: by name: mute, leave-out, force-class, unmask, unmask-all, undo, redo, reset.
        views: the pictures: "hidden", "result", "difference".
    """

    WIDTH = 310
    TITLE = "What would the model have said?"
    HELD = ("replay", "output", "change")

    query = ui.Chosen("query_slider", "The number of the query that is chosen.", order="order")
    layer = ui.Chosen("layer_slider", "The layer whose attention mask is shown, from 1.", first=1)

    def __init__(self, model: Mask2Former, image: AnyImage, *, truth: np.ndarray | None = None, **options) -> None:
        """Run the model once and keep it for edits.

        Args:
            model: a Mask2Former. It must not be trained on while the explorer is in use.
            image: a path, a PIL image or RGB uint8 [H, W, 3].
            truth: the true label map, to tell whether a change is for the better; 255 for pixels that do not count.
                [H, W]
            options: classes, shortest_edge, longest_edge and width, as for every tool; see `ImageTool`.

        Raises:
            TypeError: the model's decoder does not run layer by layer.
        """
        self._truth, self._history = truth, EditHistory()
        super().__init__(model, image, **options)

    def _read(self, models: dict[str, Model], edges: dict[str, int | None]) -> None:
        (model,) = models.values()
        self.replay = Replay(model, self.image, classes=self.classes, **edges)
        self.classes = self.replay.classes
        self._run(())
        self._probabilities = to_numpy(self.replay.output.class_logits[-1][0].float().softmax(-1))
        self.order = rank_queries(self._probabilities)

    def _build(self) -> None:
        replay, views = self.replay, self._make_views()
        labels = class_labels(self.classes, replay.num_classes)
        self.layer_slider = ui.layer_slider("layer", replay.num_layers, HELP["layer"])
        self.query_slider = ui.Stepper("query", query_options(self._probabilities, self.order, labels), HELP["query"])
        self.opacity_slider = ui.opacity_slider(0.7)
        classes = [(name, number) for number, name in enumerate([*self.classes.names, NO_OBJECT])]
        self.class_menu = ui.menu("class-menu", "class", classes, HELP["force-class"])
        self.brush = ui.choice("brush", BRUSHES, 0, HELP["brush"])
        self.radius_slider = ipywidgets.FloatSlider(
            1.0, min=0.5, max=8, step=0.5, description="radius", readout_format=".1f", tooltip=HELP["radius"]
        ).add_class("m2f-radius-slider")
        self.state = ui.choice("state", words.STATES[: words.DIFFERENCE], words.NOW, HELP["result"])
        self.status, self.edit_list = (ipywidgets.HTML().add_class(f"m2f-{name}") for name in ("status", "edits"))
        self.edit_list.layout.max_width = f"{self.width}px"
        self.buttons = press = {}
        for name, (label, act) in self._actions().items():
            press[name] = ui.button(name, label, HELP[name], layout={"width": "max-content"}, icon=ICONS.get(name, ""))
            press[name].on_click(lambda _, act=act: act())
        self._assemble(
            [
                ui.controls(self.layer_slider, self.query_slider, self.opacity_slider),
                ui.controls(press["mute"], press["leave-out"], self.class_menu, press["force-class"]),
                ui.controls(
                    ipywidgets.Label("pointer", tooltip=HELP["brush"]), self.brush, self.radius_slider,
                    press["unmask"], press["unmask-all"],
                ),
                ui.controls(
                    press["undo"], press["redo"], press["reset"],
                    ipywidgets.Label("result", tooltip=HELP["result"]), self.state, self.status,
                ),
                ui.pictures([views["hidden"], self.edit_list], views["result"], views["difference"]),
            ],
            views,
            name="counterfactuals",
            counts=f"{replay.num_queries} queries, {replay.num_layers} layers",
            moves=[
                ui.Moves("stack", self.layer_slider, page=False),
                ui.Moves("index", self.query_slider, ("hidden", "difference"), page=False),
                ui.Moves("index", self.state, ("result",), page=False),
                ui.Moves("brush_radius", self.radius_slider, ("hidden",), page=False),
                ui.Moves("opacity", self.opacity_slider),
            ],
        )  # fmt: skip
        self.brush.observe(lambda change: setattr(self.views["hidden"], "brush", change["new"]), "value")
        views["hidden"].on_stroke(self._on_stroke)
        keys = {
            "m": press["mute"].click, "u": self.undo, "ctrl-z": self.undo, "y": self.redo, "ctrl-y": self.redo,
            "shift-ctrl-z": self.redo,
        }  # fmt: skip
        for view in views.values():
            view.on_click(lambda x, y: setattr(self, "query", self.winner(x, y)))
            view.on_keys(keys)
        self._show()

    def _actions(self) -> dict[str, tuple[str, Callable[[], None]]]:
        """Buttons: their text, and what each does."""
        return {
            "mute": ("mute from this layer on", lambda: self._try(Mute(self.query, self.layer))),
            "leave-out": ("leave out of the result", lambda: self._try(Mute(self.query, from_layer=None))),
            "force-class": ("force this class", lambda: self._try(ForceClass(self.query, self.class_menu.value))),
            "unmask": ("masking off for the query", lambda: self._try(Unmask(self.layer, self.query))),
            "unmask-all": ("masking off for all", lambda: self._try(Unmask(self.layer))),
            "undo": ("undo", self.undo),
            "redo": ("redo", self.redo),
            "reset": ("reset", self.reset),
        }

    # ---------------------------------------------------------------------------------------------------------- edits

    @property
    def edits(self) -> tuple[Edit, ...]:
        """Edits in force; `replay.run(edits)` gives the same result without a widget."""
        return self._history.edits

    def apply(self, edit: Edit) -> None:
        """Make an edit, in place of an earlier one of the same query's attention, class or presence.

        Raises:
            TypeError, ValueError: it does not fit (see `Replay.run`); nothing is changed then.
        """
        self._run(with_edit(self.edits, edit))
        self._history.apply(edit)
        self._show()

    def undo(self) -> None:
        """Take the last edit back; without one, nothing happens."""
        self._go_to(self._history.undo())

    def redo(self) -> None:
        """Make the edit again that was taken back last; without one, nothing happens."""
        self._go_to(self._history.redo())

    def reset(self) -> None:
        """Drop all edits; this can be undone."""
        self._go_to(self._history.reset())

    def _go_to(self, edits: tuple[Edit, ...]) -> None:
        self._run(edits)
        self._show()

    def _run(self, edits: tuple[Edit, ...]) -> None:
        started = time.perf_counter()
        self.output: Output | None = self.replay.run(edits, attention_weights=False)
        self.change: LabelChange | None = self.replay.change(self.output, self._truth)
        self.seconds = time.perf_counter() - started
        self._maps = words.named_maps(self.change, self.classes)
        self._caption = words.change_caption(self.change, self.classes)

    # ---------------------------------------------------------------------------------------------- what is chosen

    def winner(self, x: int, y: int) -> int:
        """The query that contributes most to the class that a pixel has now.

        Raises:
            ValueError: the pixel is outside the image.
        """
        (height, width), (cover_x, cover_y) = self.replay.image.shape[:2], self.replay.coverage
        ui.check_range("column", x, width)
        ui.check_range("row", y, height)
        with torch.inference_mode():
            masks = self.output.masks[-1].float()
            place = torch.tensor([[[(x + 0.5) / width / cover_x, (y + 0.5) / height / cover_y]]])
            logits = masks.at(place.to(masks.features.device))[0]  # (Q, 1)
            probabilities = self.output.class_logits[-1][0].float().softmax(-1)
            return int(winning_queries(probabilities, logits.sigmoid()[..., None]))

    # ---------------------------------------------------------------------------------------------------- the widget

    def _make_views(self) -> dict[str, MaskView]:
        replay, maps = self.replay, self._maps
        common = {
            "width": self.width, "group": f"counterfactuals-{id(self)}", "num_stacks": replay.num_layers,
            "stack": replay.num_layers - 1,
        }  # fmt: skip
        return {
            "hidden": MaskView(
                replay.image, words.hidden_stacks(self.output, self.order), colors="blocked", smooth=False,
                coverage=replay.coverage, words=("visible", "hidden"), contour=0.5,
                title="What the query may not see", help=HELP["hidden"], **common,
            ),
            "result": MaskView(
                replay.image, maps.maps[:words.DIFFERENCE], colors=maps.table, names=maps.names, index=words.NOW,
                title="Result", help=HELP["result"], **common,
            ),
            "difference": MaskView(
                replay.image, maps.maps[words.DIFFERENCE:], colors=maps.table, names=maps.names, title="What changed",
                help=HELP["difference"], num_masks=replay.num_queries, **common,
            ),
        }  # fmt: skip

    def _show(self) -> None:
        """Bring pictures and words up to the last run."""
        maps, hidden = self._maps, self.views["hidden"]
        masks = b"".join(stack.tobytes() for stack in words.hidden_stacks(self.output, self.order))
        with hidden.hold_sync():
            hidden.set_captions(words.hidden_captions(self.output, self.order, self.edits))
            if hidden.masks == masks:
                hidden.send_state("masks")  # the browser may show a stroke that came to nothing
            hidden.masks = masks
        for name, shown in (("result", maps.maps[: words.DIFFERENCE]), ("difference", maps.maps[words.DIFFERENCE :])):
            view = self.views[name]
            with view.hold_sync():
                view.masks, view.table, view.names = shown.tobytes(), maps.table.tobytes(), maps.names
                view.set_captions([[self._caption] if name == "difference" else []])
        self.edit_list.value = words.edits_as_html(self.edits, self.classes.names)
        self.status.value = f"computed in {1000 * self.seconds:.0f} ms"
        self.buttons["undo"].disabled = not self._history.can_undo
        self.buttons["redo"].disabled = not self._history.can_redo
        self.buttons["reset"].disabled = not self.edits

    def _try(self, edit: Edit) -> None:
        """Make an edit for a person, who is told why where it is refused."""
        try:
            self.apply(edit)
        except ValueError as error:
            self.status.value = f"<b>{html.escape(str(error))}</b>"

    def _on_stroke(self, stroke: Stroke) -> None:
        layer, query = stroke.stack + 1, int(self.order[stroke.index])
        blocked = self.replay.hidden(layer, query, self.output).copy()
        blocked.flat[stroke.cells] = stroke.painted
        self._try(PaintAttention(layer, query, blocked))

    # --------------------------------------------------------------------------------------------------- to take away

    def figure(self) -> explore.plots.Figure:
        """A static figure: the result before and now, the pixels that changed, what every class gained or lost."""
        change, title = self.change, words.edits_as_text(self.edits, self.classes.names)
        return explore.plots.label_change(self.image, change.before, change.after, self.classes, title)

    def _page_controls(self) -> list[ui.Control]:
        return [ui.Control("index", "result", HELP["result"], options=words.STATES), *super()._page_controls()]

    def _page_columns(self) -> list[MaskView]:
        """One picture that switches between before, now and difference."""
        maps = self._maps
        view = MaskView(
            self.image, maps.maps, colors=maps.table, names=maps.names, index=words.NOW, width=720, title="Result",
            captions=[[self._caption] * len(maps.maps)], opacity=self.opacity_slider.value, help=HELP["result"],
        )  # fmt: skip
        return [view]

    def _page_note(self) -> str:
        now = words.edits_as_text(self.edits, self.classes.names)
        return f"Now: {now}. Click the picture, then left and right arrows switch."
