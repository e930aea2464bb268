"""MatchingInspector: which query learns which segment, what the others would have cost, and how it changes.

Predictions and segments change in the browser; the kernel is asked for another query, and for another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets
import numpy as np
from PIL import Image
from torch import Tensor

from m2f_lab.data import Classes
from m2f_lab.explore.matching import views as words
from m2f_lab.explore.matching.trace import (
    MatchedMasks,
    MatchingTrace,
    checked_target,
    matched_masks,
    resize_target,
    trace_matching,
)
from m2f_lab.explore.parts.labels import class_labels
from m2f_lab.explore.parts.pages import Control, save_page
from m2f_lab.explore.parts.tool import (
    Explorer,
    LayerChoice,
    check_range,
    controls,
    menu,
    pictures,
    recalled,
    share_slider,
    slider,
)
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import look
from m2f_lab.loss import Criterion
from m2f_lab.structures import Output, Target
from m2f_lab.training import Run

if TYPE_CHECKING:
    from m2f_lab.explore.parts.mask_view import MaskView
    from m2f_lab.explore.plots import Figure

Model = Callable[[Tensor], Output]


class MatchingInspector(LayerChoice, Explorer):
    """Look into the matching of one image with its ground truth, for one model or over training.

        MatchingInspector(model, sample.image, sample.label_map)
        MatchingInspector({"step 100": early, "step 900": late}, image, target)
        MatchingInspector.from_run(run, image, target)

    After a click on a picture, left and right arrows change the segment, up and down the layer, and digits the
    term that the cost matrix shows. A click on a cell of the matrix lays that query over that segment.

    Attributes:
        traces: costs, pairs, runners-up and margins, by name of the model; empty once closed.
        views: the pictures: "choice", "rival", "matrix".
        cells: where the cells of the matrix are in its picture.
    """

    def __init__(
        self,
        model: Model | Mapping[str, Model],
        image: str | Path | Image.Image | np.ndarray,
        target: Target | np.ndarray,
        *,
        criterion: Criterion | None = None,
        classes: Classes | None = None,
        points: Tensor | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
        width: int = 420,
    ) -> None:
        """Args:
        model: a Mask2Former, or anything that is called like one; or several by name, the earliest first.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        target: its ground truth: segments, or a label map with 255 for ignored pixels, integers [H, W].
        criterion: that the model is trained with; by default the paper's.
        classes: names of the classes; by default the model's own.
        points: where masks are compared; see `trace_matching`. All models are compared at the same ones.
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        width: of each of the two pictures, in CSS pixels.

        Raises:
            NonFiniteError: a prediction holds NaN or infinity.
            ValueError: the target holds no segment, or image, target and models do not belong together.
        """
        models = dict(model) if isinstance(model, Mapping) else {"": model}
        if not models:
            raise ValueError("MatchingInspector needs a model, or several by name; there is none.")
        self.image = as_rgb(image)
        target = checked_target(target, self.image)
        self.traces: dict[str, MatchingTrace] = {}
        self._masks: dict[str, MatchedMasks] = {}
        for name, each in models.items():
            output = look(each, self.image, shortest_edge, longest_edge)
            seen = resize_target(target, output.image_size)
            matcher = (criterion or Criterion(output.num_classes)).matcher
            self.traces[name] = trace_matching(output, seen, matcher, points)
            self._masks[name] = matched_masks(output, seen)
        _check_alike(self.traces)
        first = next(iter(models.values()))
        labels = class_labels(getattr(first, "classes", None) if classes is None else classes, output.num_classes)
        self.names = words.segment_names(self.trace_of(), labels)
        self._other: int | None = None
        self.cells = words.MatrixLayout(self.names, self.trace_of().num_queries)
        views = words.make_views(self.image, self.trace_of(), next(iter(self._masks.values())), self.cells, width)
        self._make_controls()
        super().__init__(
            [
                controls(
                    self.checkpoint_slider,
                    self.checkpoint_label,
                    self.layer_slider,
                    self.segment_slider,
                    self.segment_menu,
                ),
                controls(self.term_menu, self.query_menu, self.opacity_slider),
                pictures(views["choice"], views["rival"]),
                views["matrix"],
                self.table,
            ],
            views,
            name="matching-inspector",
            summary=f"MatchingInspector({' | '.join(filter(None, models)) or '1 model'}, {len(self.names)} segments, "
            f"{self.trace.num_queries} queries, {self.trace.num_predictions} predictions)",
            links=self._pairs(views),
        )
        views["matrix"].observe(self._on_click, "clicked")
        self.query_menu.observe(self._on_query, "value")
        self.checkpoint_slider.observe(lambda change: self._show(), "value")
        self.layer_slider.observe(lambda change: self._tell_training(), "value")
        self._show()

    @classmethod
    def from_output(
        cls, output: Output | Mapping[str, Output], image: np.ndarray, target: Target | np.ndarray, **options
    ) -> MatchingInspector:
        """Look into outputs that are there already, made of this image.

        Args:
            output: one, or several by name.
            image, target: as above.
            options: of MatchingInspector.

        Raises:
            ValueError: an output was made of an image of another size.
        """
        outputs = output if isinstance(output, Mapping) else {"": output}
        return cls({name: recalled(made) for name, made in outputs.items()}, image, target, **options)

    @classmethod
    def from_run(
        cls,
        run: Run | str | Path,
        image: str | Path | Image.Image | np.ndarray,
        target: Target | np.ndarray,
        **options,
    ) -> MatchingInspector:
        """Compare the checkpoints that a run keeps, its best and its last, with the run's own weights of the terms.

        Args:
            run: a run or its folder.
            options: of MatchingInspector.

        Raises:
            FileNotFoundError: the folder holds no run, or the run has no checkpoint yet.
        """
        run = run if isinstance(run, Run) else Run(run)
        recipe, best = run.recipe, run.best
        models = {f"last, step {run.iteration}": run.model("last")}
        if best and run.checkpoint("best").is_dir() and best["iteration"] != run.iteration:
            models = {f"best, step {best['iteration']}": run.model("best")} | models
        options.setdefault("criterion", Criterion(recipe.model.num_classes, **vars(recipe.loss)))
        options.setdefault("shortest_edge", recipe.evaluation.shortest_edge)
        options.setdefault("longest_edge", recipe.evaluation.longest_edge)
        return cls(models, image, target, **options)

    # ------------------------------------------------------------------------------------------------------ the state

    def trace_of(self, name: str | None = None) -> MatchingTrace:
        """The numbers of a model; by default of the last."""
        return list(self.traces.values())[-1] if name is None else self.traces[name]

    @property
    def checkpoint(self) -> str:
        """The name of the model that is shown."""
        return list(self.traces)[self.checkpoint_slider.value]

    @checkpoint.setter
    def checkpoint(self, name: str) -> None:
        if name not in self.traces:
            raise ValueError(f"There is no model {name!r}; there are {', '.join(map(repr, self.traces))}.")
        self.checkpoint_slider.value = list(self.traces).index(name)

    @property
    def trace(self) -> MatchingTrace:
        """The numbers that are shown."""
        return self.traces[self.checkpoint]

    @property
    def segment(self) -> int:
        """The number of the segment that is shown."""
        return self.segment_slider.value

    @segment.setter
    def segment(self, segment: int) -> None:
        check_range("segment", segment, len(self.names))
        self.segment_slider.value = segment

    @property
    def query(self) -> int | None:
        """The query in the second picture; None for the runner-up of each segment."""
        return self._other

    @query.setter
    def query(self, query: int | None) -> None:
        check_range("query", 0 if query is None else query, self.trace.num_queries)
        self.query_menu.value = query

    # ----------------------------------------------------------------------------------------------------- the widget

    def _make_controls(self) -> None:
        last = self.trace_of().num_predictions - 1
        help_of = words.HELP
        self.checkpoint_slider = slider(
            "checkpoint-slider", "training", len(self.traces) - 1, len(self.traces) - 1, help_of["checkpoint"],
            readout=False,
        )  # fmt: skip
        self.checkpoint_label = ipywidgets.Label(tooltip=help_of["checkpoint"]).add_class("m2f-checkpoint")
        if len(self.traces) == 1:
            self.checkpoint_slider.layout.display = self.checkpoint_label.layout.display = "none"
        self.layer_slider = slider("prediction-slider", "layer", last, last, help_of["layer"])
        self.segment_slider = slider(
            "segment-slider", "segment", 0, len(self.names) - 1, help_of["segment"], readout=False
        )
        options = [(f"segment {name}", place) for place, name in enumerate(self.names)]
        self.segment_menu = menu("segment-menu", "", options, help_of["segment"])
        self.term_menu = menu("term-menu", "cost", words.MATRICES, help_of["sum"])
        queries = [("the runner-up", None), *((f"query {q}", q) for q in range(self.trace_of().num_queries))]
        self.query_menu = menu("other-query-menu", "compare", queries, help_of["rival"])
        self.opacity_slider = share_slider("opacity-slider", "opacity", 1.0, help_of["opacity"])
        self.table = ipywidgets.HTML().add_class("m2f-over-training")

    def _pairs(self, views: dict[str, MaskView]) -> list[tuple[tuple, tuple]]:
        """What the browser keeps equal."""
        pairs = [((self.segment_slider, "value"), (self.segment_menu, "index"))]
        pairs += [((self.opacity_slider, "value"), (views[name], "opacity")) for name in ("choice", "rival")]
        for view in views.values():
            pairs.append(((self.layer_slider, "value"), (view, "stack")))
            pairs.append(((self.segment_slider, "value"), (view, "index")))
            pairs.append(((self.term_menu, "index"), (view, "channel")))
        return pairs

    def _on_click(self, change: dict) -> None:
        """A cell of the matrix was clicked; the browser has chosen its segment already."""
        if change["new"]:
            segment, query = self.cells.cell_at(*change["new"])
            if segment is not None and query is not None:
                self.segment, self.query = segment, query

    def _on_query(self, change: dict) -> None:
        self._other = change["new"]
        self._show_rival()

    def _show(self) -> None:
        """Show the model that is chosen."""
        if not self.views:
            return
        self.checkpoint_label.value = self.checkpoint
        captions = words.choice_captions(self.trace, self.names)
        masks = self._masks[self.checkpoint]
        words.show_agreement(
            self.views["choice"], masks, self.trace.chosen, captions, title="The segment and its query"
        )
        self._show_rival()
        words.show_matrix(self.views["matrix"], self.trace, self.cells)
        self._tell_training()

    def _show_rival(self) -> None:
        other, trace = self._other, self.trace
        queries = trace.runner_up if other is None else np.full_like(trace.chosen, other)
        title = "The segment and the runner-up" if other is None else f"The segment and query {other}"
        captions = words.rival_captions(trace, other)
        words.show_agreement(self.views["rival"], self._masks[self.checkpoint], queries, captions, title)

    def _tell_training(self) -> None:
        if len(self.traces) > 1:
            self.table.value = words.over_training(self.traces, self.layer, self.names)

    def figure(self, layer: int | None = None, checkpoint: str | None = None) -> Figure:
        """A static figure: the three terms with choice and runner-up marked, the margins, and the assignment over
        all predictions.

        Args:
            layer: 0 is the learned queries', n after n layers; by default what is shown.
            checkpoint: name of a model; by default the one that is shown.
        """
        from m2f_lab.explore import plots  # a second to import, and most tools are never printed

        layer = self.layer if layer is None else layer
        trace = self.trace if checkpoint is None else self.trace_of(checkpoint)
        check_range("layer", layer, trace.num_predictions)
        return plots.matching(
            trace.terms, trace.chosen, trace.runner_up, trace.margin, self.names, layer, title=checkpoint or ""
        )

    def save_html(self, path: str | Path, title: str = "Which query learns which segment") -> None:
        """Write one self-contained page, of the model that is shown, that scrubs and hovers without a kernel."""
        self.update()
        segments = tuple((name, place) for place, name in enumerate(self.names))
        save_page(
            path,
            [self.views["choice"], self.views["rival"], self.views["matrix"]],
            controls=[
                Control("stack", "layer", words.HELP["layer"], high=self.trace.num_predictions - 1),
                Control("index", "segment", words.HELP["segment"], options=segments),
                Control(
                    "channel", "cost", words.HELP["sum"], options=tuple((m, i) for i, m in enumerate(words.MATRICES))
                ),
            ],
            linked=("stack", "index", "channel"),
            title=title,
            note="Click a row of the matrix to choose its segment. Then left and right arrows change the segment, up "
            "and down the layer, and digits the term.",
        )

    def close(self) -> None:
        """Take the inspector off the page and give its memory back."""
        self.traces, self._masks = {}, {}
        super().close()


def _check_alike(traces: Mapping[str, MatchingTrace]) -> None:
    shapes = {name: (trace.num_predictions, trace.num_queries) for name, trace in traces.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name}: {predictions} and {queries}" for name, (predictions, queries) in shapes.items())
        raise ValueError(f"The models differ in their numbers of predictions and queries ({found}).")
