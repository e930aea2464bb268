"""What would the model have said, had one thing been different? The decoder is run again from where it was changed.

    replay = Replay(model, "street.png")
    output = replay.run([Mute(3), PaintAttention(layer=2, query=5, blocked=blocked)])
    print(replay.change(output).flows()[:3])

Everything before the first changed layer is reused, so that a change near the end costs least. Nothing here needs a
widget; `CounterfactualExplorer` is one around it.

Q queries, K classes, N decoder layers, C channels, S cells of a level, H/W height/width of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2f_lab.data import Classes
from m2f_lab.explore.counterfactuals.edits import (
    Edit,
    ForceClass,
    Mute,
    PaintAttention,
    Unmask,
    check_edit,
    class_number,
)
from m2f_lab.explore.counterfactuals.label_change import LabelChange, compare_label_maps
from m2f_lab.explore.parts.labels import known_classes
from m2f_lab.explore.queries.trace import check_numbers
from m2f_lab.inference import postprocess
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import evaluating, seen_by
from m2f_lab.model import Mask2Former
from m2f_lab.model.pixel_decoder import NUM_LEVELS
from m2f_lab.model.transformer_decoder import attention_blocked
from m2f_lab.structures import MaskLogits, Output


class Step(NamedTuple):
    """The state after one layer.

    Attributes:
        queries: [1, Q, C]
        class_logits: [1, Q, K+1]
        embeddings: of the masks. [1, Q, mask_dim]
        blocked: what the layer hid from each query; None before the first layer. bool [1, Q, S]
        opened: whether the fallback opened the row. bool [1, Q]
    """

    queries: Tensor
    class_logits: Tensor
    embeddings: Tensor
    blocked: Tensor | None = None
    opened: Tensor | None = None


class Replay:
    """One image's way through a model, kept so that the decoder can be run again with edits.

    Runs are made in evaluation mode, without gradients, on the model's device. The model must not be trained on
    meanwhile: what was kept would no longer be its own.

    Attributes:
        image: uint8 [H, W, 3]
        classes: names and colours, made up where the model has none.
        output: what the model says without any edit, its attention weights left out.
    """

    def __init__(
        self,
        model: Mask2Former,
        image: str | Path | Image.Image | np.ndarray,
        *,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
    ) -> None:
        """Args:
        model: a Mask2Former; its parts are run one by one.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        classes: names and colours; by default the model's own.
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
        longest_edge: but to no more than this, in pixels.
        """
        if not isinstance(model, Mask2Former):
            raise TypeError(
                f"Replay runs the parts of a Mask2Former one by one, which a {type(model).__name__} does not have; "
                "build one with m2f_lab.build_model and load the weights into it."
            )
        self.image = as_rgb(image)
        images = seen_by(model, self.image, shortest_edge, longest_edge)
        self.classes = known_classes(model.classes if classes is None else classes, model.config.num_classes)
        self._decoder = decoder = model.transformer_decoder
        with evaluating(model), torch.inference_mode():
            padded = model.preprocess(images)
            self._mask_features, levels = model.pixel_decoder(model.backbone(padded))
            self._memory = decoder.remember(levels, self._mask_features)
            learned = decoder.query_features.expand(1, -1, -1)
            self._sizes = (images.shape[2], images.shape[3]), (padded.shape[2], padded.shape[3])
            self._steps = [Step(learned, *decoder.predict(learned))]
            for layer in range(1, self.num_layers + 1):
                self._steps.append(self._run_layer(layer, self._steps[-1], ()))
        self.output = self._output(self._steps)
        check_numbers(self.output)

    @property
    def num_queries(self) -> int:
        return self._decoder.query_features.shape[0]

    @property
    def num_classes(self) -> int:
        """K, without "no object"."""
        return len(self.classes)

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    @property
    def coverage(self) -> tuple[float, float]:
        """How often the image fits into the padded image, along x and y."""
        (height, width), (padded_height, padded_width) = self._sizes
        return padded_width / width, padded_height / height

    def grid(self, layer: int) -> tuple[int, int]:
        """Height and width of the grid that a layer looks at, in cells. It covers the padded image: cells whose place
        is beyond the share 1 / `coverage` hold padding, which the model looks at like any other."""
        check_edit(Unmask(layer), self.num_queries, self.classes.names, self._grids, self._strides)
        return self._grids[layer - 1]

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return [self._memory.sizes[layer % NUM_LEVELS] for layer in range(self.num_layers)]

    @property
    def _strides(self) -> list[int]:
        return [self._sizes[1][0] // height for height, _ in self._grids]

    def run(self, edits: Iterable[Edit] = (), *, attention_weights: bool = True) -> Output:
        """Run the decoder again, from the first layer that an edit changes.

        Args:
            edits: in order; where two disagree about the same thing, the later one holds.
            attention_weights: put them among the intermediates, where `QueryExplorer.from_output` needs them. They
                take time and memory, in all layers.

        Returns:
            An Output of all Q queries, with the decoder's intermediates. Without edits it is the model's own, to the
            last bit. A muted query has certainly no class, a mask of logit 0, and no part in any attention.

        Raises:
            TypeError, ValueError: an edit does not fit (see `check_edit`), or no query would be left.
        """
        edits = tuple(edits)
        for edit in edits:
            check_edit(edit, self.num_queries, self.classes.names, self._grids, self._strides)
        if len({edit.query for edit in edits if isinstance(edit, Mute)}) == self.num_queries:
            raise ValueError(f"All {self.num_queries} queries are muted, so nothing predicts anything; leave one.")
        first = min((edit.first_layer for edit in edits if edit.first_layer), default=self.num_layers + 1)
        weights: list[tuple[Tensor, Tensor]] | None = [] if attention_weights else None
        with evaluating(self._decoder), torch.inference_mode():
            # Attention weights are never kept, so all layers are run for them; the same numbers come out.
            start = 1 if attention_weights else first
            steps = self._steps[:start]
            for layer in range(start, self.num_layers + 1):
                steps.append(self._run_layer(layer, steps[-1], edits, weights))
            for edit in edits:
                if isinstance(edit, ForceClass):
                    steps = self._force(steps, edit)
            for edit in edits:
                if isinstance(edit, Mute):
                    steps = self._silence(steps, edit)
            return self._output(steps, weights)

    def hidden(self, layer: int, query: int, output: Output | None = None) -> np.ndarray:
        """What a layer hides from a query, to paint on. bool [h, w]

        Args:
            layer: from 1.
            query: its number.
            output: of `run`; by default that without edits.
        """
        check_edit(Unmask(layer, query), self.num_queries, self.classes.names, self._grids, self._strides)
        blocked = (output or self.output).intermediates[f"decoder.layer.{layer - 1}.attention_blocked"]
        return blocked[0, query].unflatten(0, self._grids[layer - 1]).cpu().numpy()

    def label_map(self, output: Output) -> np.ndarray:
        """The class of every pixel, at the size of the image. [H, W]"""
        with torch.inference_mode():
            return postprocess.semantic(output, size=self.image.shape[:2]).label_map

    def change(self, output: Output, truth: np.ndarray | None = None) -> LabelChange:
        """How the class of every pixel differs from what the model says without edits.

        Args:
            output: of `run`.
            truth: the true label map, for the change of each class's IoU; 255 for pixels that do not count. [H, W]
        """
        return compare_label_maps(self._unedited, self.label_map(output), self.num_classes, truth)

    @cached_property
    def _unedited(self) -> np.ndarray:
        return self.label_map(self.output)

    def _run_layer(self, layer: int, before: Step, edits: tuple[Edit, ...], weights: list | None = None) -> Step:
        """One layer on the queries that are not muted; the others' rows are empty afterwards."""
        index, level = layer - 1, (layer - 1) % NUM_LEVELS
        decoder, memory = self._decoder, self._memory
        rows = self._present(edits, layer)
        blocked, opened = attention_blocked(before.embeddings[:, rows], memory.mask_features[level])
        blocked, opened = self._spread(blocked, rows), self._spread(opened, rows)
        for edit in edits:
            _edit_attention(edit, layer, blocked, opened)
        blocked, opened = self._spread(blocked[:, rows], rows, fill=True), self._spread(opened[:, rows], rows)
        queries, *attention = decoder.layers[index](
            before.queries[:, rows],
            decoder.query_positions[rows],
            memory.features[level],
            memory.keys[level],
            blocked[:, rows],
            return_weights=weights is not None,
        )
        if weights is not None:
            cross, within = attention
            weights.append((self._spread(cross, rows, 2), self._spread(self._spread(within, rows, 2), rows, 3)))
        predicted = (self._spread(values, rows) for values in (queries, *decoder.predict(queries)))
        return Step(*predicted, blocked, opened)

    def _present(self, edits: tuple[Edit, ...], layer: int) -> slice | Tensor:
        """The queries that take part in a layer, as an index; all of them stay where they are."""
        muted = {e.query for e in edits if isinstance(e, Mute) and e.from_layer and e.from_layer <= layer}
        if not muted:
            return slice(None)
        kept = [query for query in range(self.num_queries) if query not in muted]
        return torch.tensor(kept, device=self._mask_features.device)

    def _spread(self, values: Tensor, rows: slice | Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """Put the rows of some queries among those of all, which are filled."""
        if isinstance(rows, slice):
            return values
        shape = [*values.shape[:dim], self.num_queries, *values.shape[dim + 1 :]]
        return values.new_full(shape, fill).index_copy_(dim, rows, values)

    def _force(self, steps: list[Step], edit: ForceClass) -> list[Step]:
        label = class_number(edit.label, self.classes.names)
        first = 0 if edit.every_prediction else self.num_layers
        return [*steps[:first], *(_with_class(step, edit.query, label) for step in steps[first:])]

    def _silence(self, steps: list[Step], edit: Mute) -> list[Step]:
        """Let a query predict nothing, from the prediction of the layer on that it is missing in."""
        first = edit.from_layer or self.num_layers
        silent = []
        for step in steps[first:]:
            embeddings = step.embeddings.clone()
            embeddings[:, edit.query] = 0
            silent.append(_with_class(step._replace(embeddings=embeddings), edit.query, self.num_classes))
        return [*steps[:first], *silent]

    def _output(self, steps: list[Step], weights: list[tuple[Tensor, Tensor]] | None = None) -> Output:
        """In the model's own words."""
        seen = {"decoder.initial_queries": steps[0].queries, "decoder.level_sizes": self._memory.sizes}
        for i, step in enumerate(steps[1:]):
            seen |= {
                f"decoder.layer.{i}.level": i % NUM_LEVELS,
                f"decoder.layer.{i}.queries": step.queries,
                f"decoder.layer.{i}.attention_blocked": step.blocked,
                f"decoder.layer.{i}.attention_opened": step.opened,
            }
        for i, (cross, within) in enumerate(weights or ()):
            seen |= {f"decoder.layer.{i}.cross_attention": cross, f"decoder.layer.{i}.self_attention": within}
        image_size, padded_size = self._sizes
        return Output(
            class_logits=[step.class_logits for step in steps],
            masks=[MaskLogits(step.embeddings, self._mask_features) for step in steps],
            image_size=image_size,
            padded_size=padded_size,
            intermediates=seen,
        )

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Replay({self.num_queries} queries, {self.num_layers} layers, {width} × {height} pixels)"


def _edit_attention(edit: Edit, layer: int, blocked: Tensor, opened: Tensor) -> None:
    """Change in place what a layer hides. bool [1, Q, S], bool [1, Q]"""
    if isinstance(edit, Unmask) and edit.layer == layer:
        rows = slice(None) if edit.query is None else edit.query
        blocked[:, rows] = False
        opened[:, rows] = False
    elif isinstance(edit, PaintAttention) and edit.layer == layer:
        everything = bool(edit.blocked.all())
        painted = edit.blocked & (not everything)
        blocked[:, edit.query] = torch.from_numpy(painted).flatten().to(blocked.device)
        opened[:, edit.query] = everything


def _with_class(step: Step, query: int, label: int) -> Step:
    """A query that is of one class for certain: a softmax of its logits is exactly 1 there and 0 elsewhere."""
    logits = step.class_logits.clone()
    logits[:, query] = -math.inf
    logits[:, query, label] = 0
    return step._replace(class_logits=logits)
