"""MatchingExplorer: the query that learns each segment, the costs of the others, and their change over training.

Predictions and segments change in the browser; the kernel is asked for another query, and for another checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ipywidgets
import numpy as np
from torch import Tensor, nn

from m2f_lab import explore
from m2f_lab.explore.matching import views as words
from m2f_lab.explore.matching.trace import (
    MatchedMasks,
    MatchingTrace,
    checked_target,
    matched_masks,
    resize_target,
    trace_matching,
)
from m2f_lab.explore.parts import controls as ui
from m2f_lab.explore.parts.labels import class_labels
from m2f_lab.explore.parts.reading import AnyImage, Model
from m2f_lab.explore.parts.tool import ImageTool
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import look
from m2f_lab.loss import Criterion
from m2f_lab.recipes import ModelConfig
from m2f_lab.references import resolve_loaded
from m2f_lab.structures import Target
from m2f_lab.training import Run


class MatchingExplorer(ImageTool):
    """Look into the matching of one image with its ground truth, for one model or over training.

        MatchingExplorer(model, sample.image, sample.label_map)
        MatchingExplorer({"step 100": early, "step 900": late}, image, target)
        MatchingExplorer.from_run(run, image, target)

    After a click on a picture, left and right arrows change the segment, up and down the layer, and digits the
    term that the cost matrix shows. A click on a cell of the matrix lays that query over that segment.

    Attributes:
        traces: costs, pairs, runners-up and margins, by name of the model; None once closed.
        views: the pictures: "choice", "rival", "matrix".
        cells: geometry of the picture of the matrix.
    """

    WIDTH = 420
    SEVERAL = True
    TITLE = "Which query learns which segment"
    NOTE = (
        "Click a row of the matrix to choose its segment. Then left and right arrows change the segment, up and down "
        "the layer, and digits the term."
    )
    HELD = ("traces", "_masks")

    layer = ui.Chosen("layer_slider", "The prediction that is shown: 0 is the learned queries', n that after layer n.")
    segment = ui.Chosen("segment_slider", "The number of the segment that is shown.")
    query = ui.Chosen("query_menu", "The query in the second picture; None for each segment's runner-up.", none=True)

    def __init__(
        self,
        model: Model | Mapping[str, Model],
        image: AnyImage,
        target: Target | np.ndarray,
        *,
        criterion: Criterion | None = None,
        points: Tensor | None = None,
        **options,
    ) -> None:
        """Match the predictions of models with the ground truth of an image.

        Args:
            model: a Mask2Former, or any function of images that returns an `Output`; or several by name, the earliest
                first.
            image: a path, a PIL image or RGB uint8 [H, W, 3].
            target: its ground truth: segments, or a label map with 255 for ignored pixels, integers [H, W].
            criterion: that the model is trained with; by default the paper's.
            points: at which masks are compared; see `trace_matching`. All models are compared at the same ones.
            options: classes, shortest_edge, longest_edge and width, as for every tool; see `ImageTool`.

        Raises:
            NonFiniteError: a prediction holds NaN or infinity.
            ValueError: the target holds no segment, or image, target and models do not belong together.
        """
        self._target = checked_target(target, as_rgb(image))
        self._criterion, self._points = criterion, points
        self.traces: dict[str, MatchingTrace] = {}
        self._masks: dict[str, MatchedMasks] = {}
        super().__init__(model, image, **options)

    def _read(self, models: dict[str, Model], edges: dict[str, int | None]) -> None:
        for name, model in models.items():
            output = look(model, self.image, **edges)
            seen = resize_target(self._target, output.image_size)
            matcher = (self._criterion or Criterion(output.num_classes)).matcher
            self.traces[name] = trace_matching(output, seen, matcher, self._points)
            self._masks[name] = matched_masks(output, seen)
        self._check_alike("predictions and queries", "num_predictions", "num_queries")
        self.names = words.segment_names(self.trace_of(), class_labels(self.classes, output.num_classes))

    def _build(self) -> None:
        trace, last = self.trace_of(), len(self.traces) - 1
        help_of, names = words.HELP, self.names
        self.cells = words.MatrixLayout(names, trace.num_queries)
        views = words.make_views(self.image, trace, self._masks[list(self.traces)[-1]], self.cells, self.width)
        tooltip = help_of["checkpoint"]
        self.checkpoint_slider = ui.slider("checkpoint-slider", "training", last, last, tooltip, readout=False)
        self.checkpoint_label = ipywidgets.Label(tooltip=tooltip).add_class("m2f-checkpoint")
        if last == 0:
            self.checkpoint_slider.layout.display = self.checkpoint_label.layout.display = "none"
        prediction = trace.num_predictions - 1
        self.layer_slider = ui.slider("prediction-slider", "layer", prediction, prediction, help_of["layer"])
        segments = [(f"segment {name}", place) for place, name in enumerate(names)]
        self.segment_slider = ui.Stepper("segment", segments, help_of["segment"])
        self.term_menu = ui.menu("term-menu", "cost", words.matrices(trace), help_of["sum"])
        queries = ["the runner-up", *(f"query {query}" for query in range(trace.num_queries))]
        self.query_menu = ui.menu("other-query-menu", "compare", queries, help_of["rival"])
        self.opacity_slider = ui.opacity_slider(1.0)
        self.table = ipywidgets.HTML().add_class("m2f-over-training")
        self._assemble(
            [
                ui.controls(self.checkpoint_slider, self.checkpoint_label, self.layer_slider, self.segment_slider),
                ui.controls(self.term_menu, self.query_menu, self.opacity_slider),
                ui.pictures(views["choice"], views["rival"]),
                views["matrix"],
                self.table,
            ],
            views,
            name="matching-inspector",
            counts=f"{self._names}, {len(names)} segments, {trace.num_queries} queries, "
            f"{trace.num_predictions} predictions",
            moves=[
                ui.Moves("stack", self.layer_slider),
                ui.Moves("index", self.segment_slider),
                ui.Moves("channel", self.term_menu),
                ui.Moves("opacity", self.opacity_slider, ("choice", "rival"), page=False),
            ],
        )
        views["matrix"].on_click(self._on_click)
        self.query_menu.observe(lambda change: self._show_rival(), "value")
        self.checkpoint_slider.observe(lambda change: self._show(), "value")
        self.layer_slider.observe(lambda change: self._show_training(), "value")
        self._show()

    @classmethod
    def from_run(
        cls,
        run: Run | str | Path,
        image: AnyImage,
        target: Target | np.ndarray,
        build: Callable[[ModelConfig], nn.Module] | None = None,
        **options,
    ) -> MatchingExplorer:
        """Compare the checkpoints that a run keeps, its best and its last, with the run's own weights of the terms.

        Args:
            run: a run or its folder.
            image, target: an image and its ground truth.
            build: the builder that the run was trained with; needed where its module is not imported yet.
            options: of MatchingExplorer.

        Raises:
            FileNotFoundError: the folder holds no run, or the run has no checkpoint yet.
            ValueError: the run's model or criterion is code of your own that is not imported yet.
        """
        run = run if isinstance(run, Run) else Run(run)
        recipe, best = run.recipe, run.best
        models = {f"last, step {run.iteration}": run.model("last", build)}
        if best and run.checkpoint("best").is_dir() and best["iteration"] != run.iteration:
            models = {f"best, step {best['iteration']}": run.model("best", build)} | models
        if options.get("criterion") is None:
            options["criterion"] = resolve_loaded(recipe.criterion)(recipe)
        return cls(models, image, target, **recipe.evaluation.edges | options)

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

    # ----------------------------------------------------------------------------------------------------- the widget

    def _on_click(self, x: int, y: int) -> None:
        """A cell of the matrix was clicked; the browser has chosen its segment already."""
        segment, query = self.cells.cell_at(x, y)
        if segment is not None and query is not None:
            self.segment, self.query = segment, query

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
        self._show_training()

    def _show_rival(self) -> None:
        other, trace = self.query, self.trace
        queries = trace.runner_up if other is None else np.full_like(trace.chosen, other)
        title = "The segment and the runner-up" if other is None else f"The segment and query {other}"
        captions = words.rival_captions(trace, other)
        words.show_agreement(self.views["rival"], self._masks[self.checkpoint], queries, captions, title)

    def _show_training(self) -> None:
        if len(self.traces) > 1:
            self.table.value = words.over_training(self.traces, self.layer, self.names)

    def figure(self, layer: int | None = None, checkpoint: str | None = None) -> explore.plots.Figure:
        """A static figure: the terms with choice and runner-up marked, the margins, and the assignment over
        all predictions.

        Args:
            layer: 0 is the learned queries', n after n layers; by default what is shown.
            checkpoint: name of a model; by default the one that is shown.
        """
        layer = MatchingExplorer.layer.checked(self, layer)
        trace = self.trace if checkpoint is None else self.trace_of(checkpoint)
        return explore.plots.matching(
            trace.terms, trace.chosen, trace.runner_up, trace.margin, self.names, layer, title=checkpoint or ""
        )
