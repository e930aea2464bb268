"""Replay: run the decoder again on one image, with one thing changed.

    replay = Replay(model, "street.png")
    output = replay.run([Mute(3), PaintAttention(layer=2, query=5, blocked=blocked)])
    print(replay.change(output).flows()[:3])

The layers are the model's own: `start` and `step` of its decoder, variants included. Everything before the first
changed layer is reused, so that a change near the end costs least. No widget is needed; `CounterfactualExplorer` is one
around it.

Q queries, K classes, N decoder layers, C channels, S cells of a level, H/W height/width of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from m2f_lab.data import Classes
from m2f_lab.explore.counterfactuals.edits import (
    Edit,
    ForceClass,
    Mute,
    PaintAttention,
    Unmask,
    class_number,
    first_layer,
)
from m2f_lab.explore.counterfactuals.label_change import LabelChange, compare_label_maps
from m2f_lab.explore.parts.labels import known_classes
from m2f_lab.explore.parts.reading import AnyImage, check_numbers, coverage_of, hidden_cells
from m2f_lab.inference import postprocess
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import evaluating, seen_by
from m2f_lab.model import Mask2Former
from m2f_lab.model.transformer_decoder import TransformerDecoder
from m2f_lab.structures import DecoderState, Output


class Replay:
    """One image's way through a model, kept so that the decoder can be run again with edits.

    Runs are made in evaluation mode, without gradients, on the model's device. The model must not be trained on
    meanwhile: the kept states would no longer be its own.

    Attributes:
        image: uint8 [H, W, 3]
        classes: names and colours, made up where the model has none.
        output: the model's output without any edit and without attention weights.
    """

    def __init__(
        self,
        model: Mask2Former,
        image: AnyImage,
        *,
        classes: Classes | None = None,
        shortest_edge: int | None = None,
        longest_edge: int | None = None,
    ) -> None:
        """Run the model once.

        Args:
            model: a Mask2Former whose decoder is a TransformerDecoder or a variant of it.
            image: a path, a PIL image or RGB uint8 [H, W, 3].
            classes: names and colours; by default the model's own.
            shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
            longest_edge: but to no more than this, in pixels.

        Raises:
            TypeError: the model has no decoder that runs layer by layer.
        """
        if not isinstance(model, Mask2Former) or not isinstance(model.transformer_decoder, TransformerDecoder):
            raise TypeError(
                "Counterfactuals run the TransformerDecoder of a Mask2Former, or a variant of it, layer by layer; this "
                f"{type(model).__name__} has none."
            )
        self.image = as_rgb(image)
        images = seen_by(model, self.image, shortest_edge, longest_edge)
        self._model, self._decoder = model, model.transformer_decoder
        with evaluating(model), torch.inference_mode():
            padded = model.preprocess(images)
            mask_features, levels = model.pixel_decoder(model.backbone(padded))
            self._memory = self._decoder.prepare(levels, mask_features)
            self._sizes = images.shape[2:], padded.shape[2:]
            self._states: list[DecoderState] = self._decoder(self._memory)
        self.output = self._output(self._states)
        self.classes = known_classes(model.classes if classes is None else classes, self.output.num_classes)
        check_numbers(self.output)

    @property
    def num_queries(self) -> int:
        return self._states[0].queries.shape[1]

    @property
    def num_classes(self) -> int:
        """K, without "no object"."""
        return len(self.classes)

    @property
    def num_layers(self) -> int:
        return len(self._states) - 1

    @property
    def coverage(self) -> tuple[float, float]:
        """Size of the padded image divided by that of the image, along x and y."""
        return coverage_of(self.output)

    def grid(self, layer: int) -> tuple[int, int]:
        """Height and width of the grid that a layer looks at, in cells.

        It covers the padded image: cells beyond the share 1 / `coverage` hold padding, which the model looks at like
        any other.
        """
        self._check(Unmask(layer))
        return self._grids[layer - 1]

    @property
    def _grids(self) -> list[tuple[int, int]]:
        return [tuple(self._memory.sizes[state.level]) for state in self._states[1:]]

    def _check(self, edit: Edit) -> None:
        """Check that an edit fits the model; see `run`."""
        if not isinstance(edit, Edit):
            raise TypeError(f"An edit is a Mute, ForceClass, PaintAttention or Unmask, got {type(edit).__name__}.")
        query, layer = edit.query, first_layer(edit)
        if query not in range(self.num_queries) and not (query is None and isinstance(edit, Unmask)):
            raise ValueError(f"There is no query {query}; they are numbered 0…{self.num_queries - 1}.")
        if layer is not None and layer not in range(1, self.num_layers + 1):
            way_out = " To leave a query out of the result only, use from_layer=None." if isinstance(edit, Mute) else ""
            raise ValueError(f"There is no layer {layer}; layers are numbered 1…{self.num_layers}.{way_out}")
        if isinstance(edit, ForceClass):
            class_number(edit.label, self.classes.names)
        if isinstance(edit, PaintAttention) and edit.blocked.shape != (grid := self._grids[layer - 1]):
            raise ValueError(
                f"Layer {layer} looks at {grid[0]} × {grid[1]} cells of stride {self._sizes[1][0] // grid[0]}, padding "
                f"included, but the painted map is {edit.blocked.shape[0]} × {edit.blocked.shape[1]}."
            )

    def run(self, edits: Iterable[Edit] = (), *, attention_weights: bool = True) -> Output:
        """Run the decoder again, from the first layer that an edit changes.

        Args:
            edits: in order; where two disagree about the same thing, the later one holds.
            attention_weights: keep them in the output's states, where `QueryExplorer.from_output` needs them. They
                take time and memory, in all layers.

        Returns:
            An Output of all Q queries. Without edits it is the model's own, to the last bit. A muted query has
            certainly no class, a mask of logit 0, and no part in any attention.

        Raises:
            TypeError: something is no edit.
            ValueError: there is no such query, layer or class, a painted map does not fit, or no query would be left.
        """
        edits = tuple(edits)
        for edit in edits:
            self._check(edit)
        if len({edit.query for edit in edits if isinstance(edit, Mute)}) == self.num_queries:
            raise ValueError(f"All {self.num_queries} queries are muted, so nothing predicts anything; leave one.")
        first = min(filter(None, map(first_layer, edits)), default=self.num_layers + 1)
        with evaluating(self._decoder), torch.inference_mode():
            # Attention weights are never kept here, so all layers are run for them; the same numbers come out.
            first = 1 if attention_weights else first
            states = self._states[:first]
            for layer in range(first, self.num_layers + 1):
                states.append(self._run_layer(layer, states[-1], edits, attention_weights))
            for edit in sorted(edits, key=lambda edit: isinstance(edit, Mute)):  # a muted query has no class
                if isinstance(edit, (ForceClass, Mute)):
                    states = self._overrule(states, edit)
            return self._output(states)

    def hidden(self, layer: int, query: int, output: Output | None = None) -> np.ndarray:
        """Cells that a layer hides from a query, to paint on. bool [h, w]

        Args:
            layer: from 1.
            query: its number.
            output: of `run`; by default that without edits.
        """
        self._check(Unmask(layer, query))
        return hidden_cells(output or self.output, layer)[query]

    def label_map(self, output: Output) -> np.ndarray:
        """The class of every pixel, at the size of the image. [H, W]"""
        with torch.inference_mode():
            return postprocess.semantic(output, size=self.image.shape[:2]).label_map

    def change(self, output: Output, truth: np.ndarray | None = None) -> LabelChange:
        """Compare the class of every pixel with the model's output without edits.

        Args:
            output: of `run`.
            truth: the true label map, for the change of each class's IoU; 255 for pixels that do not count. [H, W]
        """
        return compare_label_maps(self._unedited, self.label_map(output), self.num_classes, truth)

    @cached_property
    def _unedited(self) -> np.ndarray:
        return self.label_map(self.output)

    def _run_layer(self, layer: int, before: DecoderState, edits: tuple[Edit, ...], keep: bool) -> DecoderState:
        """One layer on the queries that are not muted; the others' rows are empty afterwards."""
        muted = {e.query for e in edits if isinstance(e, Mute) and e.from_layer and e.from_layer <= layer}
        present = [query for query in range(self.num_queries) if query not in muted]
        edited = [e for e in edits if isinstance(e, (PaintAttention, Unmask)) and e.layer == layer]
        wanted: Tensor | None = None

        def edit_attention(index: int, blocked: Tensor, opened: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal wanted
            wanted, opened = _edited(edited, present, blocked, opened)
            return wanted, opened

        memory = self._memory._replace(keep_attention=keep, edit_attention=edit_attention if edited else None)
        rows = torch.tensor(present, device=before.queries.device)
        after = self._decoder.step(before.rows(rows) if muted else before, layer - 1, memory)
        if edited and (wanted is None or after.blocked is None or not torch.equal(after.blocked, wanted)):
            raise ValueError(
                f"Layer {layer} of this {type(self._decoder).__name__} does not use memory.edit_attention, so its "
                "attention cannot be edited; call it in attention_mask, or mute queries and force classes only."
            )
        return _spread(after, rows, self.num_queries) if muted else after

    def _overrule(self, states: list[DecoderState], edit: ForceClass | Mute) -> list[DecoderState]:
        """Fix the class of a query in the predictions that an edit speaks of; a muted one has no mask either."""
        last = self.num_layers
        if isinstance(edit, ForceClass):
            first, label = 0 if edit.every_prediction else last, class_number(edit.label, self.classes.names)
        else:
            first, label = edit.from_layer or last, self.num_classes
        changed = []
        for state in states[first:]:
            logits = state.class_logits.clone()
            logits[:, edit.query] = -math.inf
            logits[:, edit.query, label] = 0  # a softmax is exactly 1 there and 0 elsewhere
            state = state._replace(class_logits=logits)
            if isinstance(edit, Mute):
                embeddings = state.embeddings.clone()
                embeddings[:, edit.query] = 0
                state = state._replace(embeddings=embeddings)
            changed.append(state)
        return [*states[:first], *changed]

    def _output(self, states: Sequence[DecoderState]) -> Output:
        return self._model.output(states, self._memory, *self._sizes)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Replay({self.num_queries} queries, {self.num_layers} layers, {width} × {height} pixels)"


def _edited(
    edits: Sequence[PaintAttention | Unmask], present: list[int], blocked: Tensor, opened: Tensor
) -> tuple[Tensor, Tensor]:
    """Change what a layer hides from the queries that are present. bool [1, Q', S], bool [1, Q']"""
    blocked, opened = blocked.clone(), opened.clone()
    for edit in edits:
        rows = [row for row, query in enumerate(present) if edit.query in (None, query)]
        painted, everything = torch.zeros(blocked.shape[2], dtype=torch.bool), False
        if isinstance(edit, PaintAttention):
            everything = bool(edit.blocked.all())  # the fallback opens such a row
            painted = torch.from_numpy(edit.blocked & (not everything)).flatten()
        blocked[:, rows] = painted.to(blocked.device)
        opened[:, rows] = everything
    return blocked, opened


def _spread(state: DecoderState, rows: Tensor, num_queries: int) -> DecoderState:
    """Put the rows of some queries among those of all; the others see nothing and are zero elsewhere."""
    dims = {"positions": (-2,), "cross_attention": (2,), "self_attention": (2, 3)}  # dimension 1 of all others

    def spread(name: str, values: Tensor) -> Tensor:
        for dim in dims.get(name, (1,)):
            shape = [*values.shape]
            shape[dim] = num_queries
            values = values.new_full(shape, name == "blocked").index_copy_(dim, rows, values)
        return values

    fields = state._asdict().items()
    return state._replace(**{name: spread(name, value) for name, value in fields if isinstance(value, Tensor)})
