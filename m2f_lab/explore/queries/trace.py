"""Predictions of every query and the view of every layer, as plain arrays.

L predictions 0…N, N = L - 1 decoder layers 1…N, Q queries, K classes, h/w height/width of a grid.

Layer n looks at the image only inside prediction n - 1, and makes prediction n. Entry n - 1 of a tuple belongs to
layer n.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from m2f_lab.explore.parts.reading import (
    check_numbers,
    coverage_of,
    grid_size,
    hidden_cells,
    opened_rows,
    read_masks,
    to_numpy,
    winning_queries,
)
from m2f_lab.structures import Output


@dataclass(frozen=True)
class QueryTrace:
    """One image's way through the decoder.

    An architecture without decoder states leaves `blocked`, `opened`, `strides` and `attention` empty; one that was run
    without attention weights leaves `attention` empty. `missing` says so in words.

    Attributes:
        class_probabilities: of every prediction and query; "no object" last. float32 [L, Q, K+1]
        masks: mask probabilities on a grid over the image. float32 [L, Q, h, w]
        winners: the query that won each cell of that grid in the last prediction. int64 [h, w]
        blocked: cells that each layer hid from each query, on the level it attended to. N × bool [Q, h_i, w_i]
        opened: True where that query's mask was empty, so that the fallback let it see everything. bool [N, Q]
        attention: weights of each head; they sum to 1 over the cells. N × float32 [Q, heads, h_i, w_i]
        strides: image pixels per cell of the level of each layer. N
        coverage: how often the image fits into the padded area that blocked and attention span, along x and y.
        missing: one sentence for each thing that the model does not tell.
    """

    class_probabilities: np.ndarray
    masks: np.ndarray
    winners: np.ndarray
    blocked: tuple[np.ndarray, ...]
    opened: np.ndarray
    attention: tuple[np.ndarray, ...]
    strides: tuple[int, ...]
    coverage: tuple[float, float]
    missing: tuple[str, ...] = ()

    @property
    def num_predictions(self) -> int:
        return self.masks.shape[0]

    @property
    def num_queries(self) -> int:
        return self.masks.shape[1]

    @property
    def num_classes(self) -> int:
        """K, without "no object"."""
        return self.class_probabilities.shape[2] - 1

    @property
    def num_heads(self) -> int:
        """0 where attention weights are missing."""
        return self.attention[0].shape[1] if self.attention else 0


NO_STATES = (
    "This model returns no decoder states with the level that each layer attends to (Output.states), so this tool does "
    "not know what layers hide from a query, nor where it looks."
)
NO_WEIGHTS = "No attention weights were kept (keep_attention=True), so this tool does not know where a query looks."


@torch.no_grad()
def trace_queries(output: Output, index: int = 0, max_cells: int = 96 * 96) -> QueryTrace:
    """Read the numbers that an explorer shows off a model's output.

    Args:
        output: of `model(images, keep_attention=True)`; without attention weights or states, those parts are missing.
        index: of the image in the batch.
        max_cells: masks are read at stride 4, or more coarsely where that would be more cells than this.

    Raises:
        ValueError: the output holds NaN.
    """
    check_numbers(output)
    states = output.states[1:]
    known = bool(states) and all(state.level is not None for state in states)
    weighed = known and all(state.cross_attention is not None for state in states)
    layers = range(1, len(states) + 1) if known else ()
    sizes = [tuple(output.level_sizes[state.level]) for state in states] if known else []
    class_probabilities = torch.stack([logits[index].float().softmax(-1) for logits in output.class_logits])
    masks = read_masks(output, index, grid_size(output.image_size, max_cells))
    attention = zip(states, sizes, strict=True) if weighed else ()
    return QueryTrace(
        class_probabilities=to_numpy(class_probabilities),
        masks=to_numpy(masks),
        winners=to_numpy(winning_queries(class_probabilities[-1], masks[-1])),
        blocked=tuple(hidden_cells(output, layer, index) for layer in layers),
        opened=np.array([opened_rows(output, layer, index) for layer in layers], bool).reshape(-1, masks.shape[1]),
        attention=tuple(to_numpy(s.cross_attention[index].unflatten(-1, size).swapaxes(0, 1)) for s, size in attention),
        strides=tuple(output.padded_size[0] // size[0] for size in sizes),
        coverage=coverage_of(output),
        missing=() if weighed else (NO_WEIGHTS,) if known else (NO_STATES,),
    )


def with_mean(attention: np.ndarray) -> np.ndarray:
    """Put the mean over heads before the heads. [Q, heads, h, w] → [Q, 1 + heads, h, w]"""
    return np.concatenate([attention.mean(axis=1, keepdims=True), attention], axis=1)


def pool(maps: np.ndarray, factor: int) -> np.ndarray:
    """Sum blocks of factor × factor cells. [..., h, w] → [..., h / factor, w / factor]

    Raises:
        ValueError: h or w is no multiple of the factor.
    """
    *rest, height, width = maps.shape
    if height % factor or width % factor:
        raise ValueError(f"Cannot pool {height} × {width} cells by {factor}: both must be multiples of it.")
    return maps.reshape(*rest, height // factor, factor, width // factor, factor).sum(axis=(-3, -1))
