"""CounterfactualExplorer: change one thing about the decoder, and see what becomes of the result.

The kernel runs the decoder again once per click or stroke (`counterfactual.Replay`); layers and queries are scrubbed in
the browser.
"""

from __future__ import annotations

import html
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore.counterfactuals.controls import HELP, Controls
from m2f_lab.explore.counterfactuals.edits import (
    Edit,
    EditHistory,
    ForceClass,
    Mute,
    PaintAttention,
    Unmask,
    with_edit,
)
from m2f_lab.explore.counterfactuals.replay import Replay
from m2f_lab.explore.counterfactuals.views import (
    DIFFERENCE,
    NOW,
    STATES,
    change_caption,
    edits_as_html,
    edits_as_text,
    hidden_captions,
    hidden_stacks,
    named_maps,
)
from m2f_lab.explore.parts.labels import class_labels
from m2f_lab.explore.parts.mask_view import MaskView, Stroke
from m2f_lab.explore.parts.pages import Control, off_page, save_page
from m2f_lab.explore.parts.tool import Explorer, check_range, pictures
from m2f_lab.explore.queries.trace import rank_queries, winning_queries
from m2f_lab.explore.queries.views import query_options
from m2f_lab.model import Mask2Former

if TYPE_CHECKING:
    from m2f_lab.explore.counterfactuals.label_change import LabelChange
    from m2f_lab.explore.plots import Figure
    from m2f_lab.structures import Output


class CounterfactualExplorer(Explorer):
    """Ask what the model would have said, had one thing been different.

        tool = CounterfactualExplorer(model, "street.png")
        tool.apply(Mute(3, from_layer=2))

    Choose a layer and a query, then mute it, force its class, paint its attention mask, or switch masking off. After
    a click on a picture, up and down arrows change the layer, left and right the query, but on the result they switch
    between before and now. m mutes the query from this layer on; u or ctrl-z takes the last edit back, y or
    shift-ctrl-z makes it again.

    Attributes:
        replay: runs the decoder again; works without the widget, too. None once closed.
        output: of the last run; None once closed.
        change: what the edits did to the label map; None once closed.
        seconds: how long the last edit took to compute.
        order: query numbers as they are sorted, the surest without edits first. [Q]
        controls: everything below which something can be chosen or clicked.
        views: the pictures: "hidden", "result", "difference".
    """

    def __init__(
        self,
        model: Mask2Former,
        image: str | Path | Image.Image | np.ndarray,
        *,
        truth: np.ndarray | None = None,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int = 310,
    ) -> None:
        """Args:
        model: a Mask2Former. It must not be trained on while the explorer is in use.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        truth: the true label map, to tell whether a change is for the better; 255 for pixels that do not count. [H, W]
        classes: names and colours; by default the model's own.
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        width: of each picture, in CSS pixels.
        """
        replay = Replay(model, image, classes=classes, shortest_edge=shortest_edge, longest_edge=longest_edge)
        self.replay: Replay | None = replay
        self._truth, self._history = truth, EditHistory()
        self._run(())
        self.order = rank_queries(self._probabilities(replay.output))
        views = self._make_views(width)
        labels = class_labels(replay.classes, replay.num_classes)
        options = query_options(self._probabilities(replay.output), self.order, labels)
        self.controls = shown = Controls(replay.num_layers, options, replay.classes.names)
        shown.edits.layout.max_width = f"{width}px"
        height, breadth = replay.image.shape[:2]
        super().__init__(
            [
                *shown.rows(),
                pictures([views["hidden"], shown.edits], views["result"], views["difference"]),
            ],
            views,
            name="counterfactuals",
            summary=f"CounterfactualExplorer({replay.num_queries} queries, {replay.num_layers} layers, "
            f"{breadth} × {height} pixels)",
            links=[
                ((shown.query, "value"), (shown.query_menu, "index")),
                *(((shown.query, "value"), (views[name], "index")) for name in ("hidden", "difference")),
                *(((shown.layer, "index"), (view, "stack")) for view in views.values()),
                ((shown.state, "index"), (views["result"], "index")),
                ((shown.radius, "value"), (views["hidden"], "brush_radius")),
                *(((shown.opacity, "value"), (view, "opacity")) for view in views.values()),
            ],
        )
        self._connect()
        self._show()

    # ---------------------------------------------------------------------------------------------------------- edits

    @property
    def edits(self) -> tuple[Edit, ...]:
        """What is changed now; `replay.run(edits)` gives the same result without a widget."""
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
        """Drop all edits, which can be undone, too."""
        self._go_to(self._history.reset())

    def _go_to(self, edits: tuple[Edit, ...]) -> None:
        self._run(edits)
        self._show()

    def _run(self, edits: tuple[Edit, ...]) -> None:
        started = time.perf_counter()
        self.output: Output | None = self.replay.run(edits, attention_weights=False)
        self.change: LabelChange | None = self.replay.change(self.output, self._truth)
        self.seconds = time.perf_counter() - started

    # ---------------------------------------------------------------------------------------------- what is chosen

    @property
    def layer(self) -> int:
        """The layer whose attention mask is shown, from 1."""
        return self.controls.layer.index + 1

    @layer.setter
    def layer(self, layer: int) -> None:
        self.replay.grid(layer)  # refuses what is no layer
        self.controls.layer.index = layer - 1

    @property
    def query(self) -> int:
        """The number of the query that is chosen."""
        return int(self.order[self.controls.query.value])

    @query.setter
    def query(self, query: int) -> None:
        check_range("query", query, len(self.order))
        self.controls.query.value = int(np.flatnonzero(self.order == query)[0])

    def winner(self, x: int, y: int) -> int:
        """The query that contributes most to the class that a pixel has now.

        Raises:
            ValueError: the pixel is outside the image.
        """
        (height, width), (cover_x, cover_y) = self.replay.image.shape[:2], self.replay.coverage
        check_range("column", x, width)
        check_range("row", y, height)
        with torch.inference_mode():
            masks = self.output.masks[-1].float()
            place = torch.tensor([[[(x + 0.5) / width / cover_x, (y + 0.5) / height / cover_y]]])
            logits = masks.at(place.to(masks.features.device))[0]  # (Q, 1)
            probabilities = self.output.class_logits[-1][0].float().softmax(-1)
            return int(winning_queries(probabilities, logits.sigmoid()[..., None]))

    # ---------------------------------------------------------------------------------------------------- the widget

    def _connect(self) -> None:
        """What the kernel does when a control is used; the rest is linked in the browser."""
        controls = self.controls
        for clicked, edit in (
            (controls.mute, lambda: Mute(self.query, self.layer)),
            (controls.leave_out, lambda: Mute(self.query, from_layer=None)),
            (controls.force_class, lambda: ForceClass(self.query, controls.class_menu.value)),
            (controls.unmask, lambda: Unmask(self.layer, self.query)),
            (controls.unmask_all, lambda: Unmask(self.layer)),
        ):
            clicked.on_click(lambda _, edit=edit: self._try(edit()))
        for clicked, move in ((controls.undo, self.undo), (controls.redo, self.redo), (controls.reset, self.reset)):
            clicked.on_click(lambda _, move=move: move())
        controls.brush.observe(lambda change: setattr(self.views["hidden"], "brush", change["new"]), "value")
        self.views["hidden"].on_stroke(self._on_stroke)
        keys = {
            "m": controls.mute.click, "u": self.undo, "ctrl-z": self.undo, "y": self.redo, "ctrl-y": self.redo,
            "shift-ctrl-z": self.redo,
        }  # fmt: skip
        for view in self.views.values():
            view.observe(self._on_click, "clicked")
            view.on_keys(keys)

    def _make_views(self, width: int) -> dict[str, MaskView]:
        replay, maps = self.replay, named_maps(self.change, self.replay.classes)
        common = {
            "width": width, "group": f"counterfactuals-{id(self)}", "num_stacks": replay.num_layers,
            "stack": replay.num_layers - 1,
        }  # fmt: skip
        return {
            "hidden": MaskView(
                replay.image, hidden_stacks(self.output, self.order), colors="blocked", smooth=False,
                coverage=replay.coverage, words=("visible", "hidden"), contour=0.5,
                title="What the query may not see", help=HELP["hidden"], **common,
            ),
            "result": MaskView(
                replay.image, maps.maps[:DIFFERENCE], colors=maps.table, names=maps.names, index=NOW, title="Result",
                help=HELP["result"], **common,
            ),
            "difference": MaskView(
                replay.image, maps.maps[DIFFERENCE:], colors=maps.table, names=maps.names, title="What changed",
                help=HELP["difference"], num_masks=replay.num_queries, **common,
            ),
        }  # fmt: skip

    def _show(self) -> None:
        """Bring pictures and words up to the last run."""
        maps = named_maps(self.change, self.replay.classes)
        caption = change_caption(self.change, self.replay.classes)
        hidden = self.views["hidden"]
        masks = b"".join(stack.tobytes() for stack in hidden_stacks(self.output, self.order))
        with hidden.hold_sync():
            hidden.set_captions(hidden_captions(self.output, self.order, self.edits))
            if hidden.masks == masks:
                hidden.send_state("masks")  # the browser may show a stroke that came to nothing
            hidden.masks = masks
        for name, shown in (("result", maps.maps[:DIFFERENCE]), ("difference", maps.maps[DIFFERENCE:])):
            view = self.views[name]
            with view.hold_sync():
                view.masks, view.table, view.names = shown.tobytes(), maps.table.tobytes(), maps.names
                view.set_captions([[caption] if name == "difference" else []])
        self.controls.edits.value = edits_as_html(self.edits, self.replay.classes.names)
        self.controls.status.value = f"computed in {1000 * self.seconds:.0f} ms"
        self.controls.undo.disabled = not self._history.can_undo
        self.controls.redo.disabled = not self._history.can_redo
        self.controls.reset.disabled = not self.edits

    def _try(self, edit: Edit) -> None:
        """Make an edit for a person, who is told why where it is refused."""
        try:
            self.apply(edit)
        except ValueError as error:
            self.controls.status.value = f"<b>{html.escape(str(error))}</b>"

    def _on_stroke(self, stroke: Stroke) -> None:
        layer, query = stroke.stack + 1, int(self.order[stroke.index])
        blocked = self.replay.hidden(layer, query, self.output).copy()
        blocked.flat[stroke.cells] = stroke.painted
        self._try(PaintAttention(layer, query, blocked))

    def _on_click(self, change: dict) -> None:
        if change["new"]:
            self.query = self.winner(*change["new"])

    @staticmethod
    def _probabilities(output: Output) -> np.ndarray:
        """Of the last prediction. [Q, K+1]"""
        return output.class_logits[-1][0].float().softmax(-1).cpu().numpy()

    # --------------------------------------------------------------------------------------------------- to take away

    def figure(self) -> Figure:
        """A static figure: the result before and now, the pixels that changed, what every class gained or lost."""
        from m2f_lab.explore import plots  # a second to import, and most explorers are never printed

        replay, change = self.replay, self.change
        title = edits_as_text(self.edits, replay.classes.names)
        return plots.label_change(replay.image, change.before, change.after, replay.classes, title)

    def save_html(self, path: str | Path, title: str = "What would the model have said?") -> None:
        """Write one self-contained page that switches between before, now and difference, and tells what is where."""
        maps = named_maps(self.change, self.replay.classes)
        caption = change_caption(self.change, self.replay.classes)
        with off_page():
            view = MaskView(
                self.replay.image, maps.maps, colors=maps.table, names=maps.names, index=NOW, width=720, title="Result",
                captions=[[caption] * len(maps.maps)], opacity=self.controls.opacity.value, help=HELP["result"],
            )  # fmt: skip
        try:
            save_page(
                path,
                [view],
                controls=[
                    Control("index", "result", HELP["result"], options=STATES),
                    Control("opacity", "opacity", HELP["opacity"], step=0.05),
                ],
                title=title,
                note=f"Now: {edits_as_text(self.edits, self.replay.classes.names)}. Click the picture, then left and "
                "right arrows switch.",
            )
        finally:
            view.close()

    def close(self) -> None:
        """Take the explorer off the page and give its memory back."""
        self.replay = self.output = self.change = None
        super().close()
