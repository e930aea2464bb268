"""What every query predicted and saw, prediction by prediction, as plain arrays.

L predictions, N = L - 1 decoder layers, Q queries, K classes, h/w height/width of a grid.

Layer i (0…N-1) looks at the image only inside prediction i, and makes prediction i + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from m2f_lab.structures import Output, sample_points


@dataclass(frozen=True)
class QueryTrace:
    """One image's way through the transformer decoder.

    Attributes:
        class_probabilities: of every prediction and query; "no object" last. float32 [L, Q, K+1]
        masks: mask probabilities on a grid over the image. float32 [L, Q, h, w]
        winners: the query that won each cell of that grid in the last prediction. int64 [h, w]
        blocked: what each layer did not let each query see, on the level it looked at. N × bool [Q, h_i, w_i]
        opened: whether the mask was empty there, so that the fallback let the query see everything. bool [N, Q]
        attention: where each head looked; sums to 1 over the cells. N × float32 [Q, heads, h_i, w_i]
        strides: image pixels per cell of the level each layer looked at. N
        coverage: how often the image fits into the padded area that blocked and attention span, along x and y.
    """

    class_probabilities: np.ndarray
    masks: np.ndarray
    winners: np.ndarray
    blocked: tuple[np.ndarray, ...]
    opened: np.ndarray
    attention: tuple[np.ndarray, ...]
    strides: tuple[int, ...]
    coverage: tuple[float, float]

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
        return self.attention[0].shape[1]


@torch.no_grad()
def trace_queries(output: Output, index: int = 0, max_cells: int = 96 * 96) -> QueryTrace:
    """Gather what an explorer shows from a model's output.

    Args:
        output: of `model(images, return_intermediates=True)`.
        index: which image of the batch.
        max_cells: masks are read at stride 4, or more coarsely where that would be more cells than this.

    Raises:
        ValueError: the output has no intermediates, or holds NaN.
    """
    seen = output.intermediates
    if seen is None:
        raise ValueError("This output has no intermediates; make it with model(images, return_intermediates=True).")
    check_numbers(output)
    layers = [f"decoder.layer.{i}" for i in range(output.num_predictions - 1)]
    levels = [int(seen[f"{layer}.level"]) for layer in layers]
    sizes = [tuple(seen["decoder.level_sizes"][level]) for level in levels]

    def grids(name: str) -> tuple[np.ndarray, ...]:
        flat = [seen[f"{layer}.{name}"][index] for layer in layers]  # (..., h * w)
        return tuple(_numpy(values.unflatten(-1, size)) for values, size in zip(flat, sizes, strict=True))

    class_probabilities = torch.stack([logits[index].float().softmax(-1) for logits in output.class_logits])
    masks = read_masks(output, index, grid_size(output.image_size, max_cells))
    (height, width), (padded_height, padded_width) = output.image_size, output.padded_size
    return QueryTrace(
        class_probabilities=_numpy(class_probabilities),
        masks=_numpy(masks),
        winners=_numpy(winning_queries(class_probabilities[-1], masks[-1])),
        blocked=grids("attention_blocked"),
        opened=np.stack([_numpy(seen[f"{layer}.attention_opened"][index]) for layer in layers]),
        attention=tuple(weights.swapaxes(0, 1) for weights in grids("cross_attention")),
        strides=tuple(padded_height // size[0] for size in sizes),
        coverage=(padded_width / width, padded_height / height),
    )


def check_numbers(output: Output) -> None:
    """Raises:
    ValueError: a prediction holds NaN, of which no picture would tell the truth. (-inf is a probability of 0.)
    """
    for prediction, (logits, masks) in enumerate(zip(output.class_logits, output.masks, strict=True)):
        for name, values in (("class logits", logits), ("mask embeddings", masks.embeddings)):
            if values.isnan().any():
                raise ValueError(
                    f"The {name} of prediction {prediction} hold NaN, so there is nothing to show. Look for NaN in the "
                    "weights (a training that diverged?), or run the model in float32."
                )


def grid_size(image_size: tuple[int, int], max_cells: int) -> tuple[int, int]:
    """Height and width of a grid over an image: a cell for every 4 × 4 pixels, or as many as allowed."""
    height, width = (math.ceil(edge / 4) for edge in image_size)
    shrink = min(1.0, math.sqrt(max_cells / (height * width)))
    return max(1, math.floor(height * shrink)), max(1, math.floor(width * shrink))


def read_masks(output: Output, index: int, size: tuple[int, int]) -> Tensor:
    """Mask probabilities of all predictions on a grid over the image, its padding left out. [L, Q, *size]

    Where image and grid fit the mask features exactly (no padding, stride 4), these are the model's own values.
    """
    (height, width), (padded_height, padded_width) = output.image_size, output.padded_size
    device = output.masks[0].features.device
    y = (torch.arange(size[0], device=device) + 0.5) / size[0] * (height / padded_height)
    x = (torch.arange(size[1], device=device) + 0.5) / size[1] * (width / padded_width)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)  # (1, h * w, 2)
    read: dict[int, Tensor] = {}  # predictions usually share their features: sample those once
    masks = []
    for prediction in output.masks:
        features = prediction.features
        if id(features) not in read:
            read[id(features)] = sample_points(features[index : index + 1].float(), points)[0]  # (C, h * w)
        logits = prediction.embeddings[index].float() @ read[id(features)]  # (Q, h * w)
        masks.append(logits.sigmoid().unflatten(1, size))
    return torch.stack(masks)


def winning_queries(class_probabilities: Tensor, masks: Tensor) -> Tensor:
    """The query that contributes most to the class that wins each pixel.

    The semantic score of class k is the sum over queries of p(class k | query) · p(pixel | query) (paper, section
    3.1, after MaskFormer); among its summands the largest belongs to the winning query.

    Args:
        class_probabilities: "no object" last. [Q, K+1]
        masks: mask probabilities. [Q, h, w]

    Returns:
        Query numbers. [h, w]
    """
    classes = class_probabilities[:, :-1]  # (Q, K)
    winner = torch.empty(masks.shape[1:], dtype=torch.long, device=masks.device)
    for row in range(masks.shape[1]):  # row by row: [K, h, w] of a large image is large
        shares = masks[:, row]  # (Q, w)
        label = (classes.T @ shares).argmax(0)  # (w,)
        winner[row] = (classes[:, label] * shares).argmax(0)
    return winner


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


def over_image(cells: np.ndarray, size: tuple[int, int], coverage: tuple[float, float]) -> np.ndarray:
    """Leave the padding out: the cell that every pixel of the image lies in.

    Args:
        cells: over the padded image. [h, w]
        size: height and width of the image, in pixels.
        coverage: how often the image fits into the padded image along x and y.

    Returns:
        [*size]
    """
    rows, columns = (
        np.minimum((np.arange(edge) + 0.5) / edge / cover * count, count - 1).astype(int)
        for edge, cover, count in zip(size, coverage[::-1], cells.shape, strict=True)
    )
    return cells[rows[:, None], columns]


def rank_queries(class_probabilities: np.ndarray) -> np.ndarray:
    """Query numbers, the surest of its best class first. [Q, K+1] → [Q]"""
    return np.argsort(-class_probabilities[:, :-1].max(axis=1), kind="stable")


def top_classes(probabilities: np.ndarray, count: int = 5) -> list[tuple[int, float]]:
    """The likeliest classes of one query and their probabilities; "no object" is class K. [K+1]"""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(int(label), float(probabilities[label])) for label in order]


def _numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
