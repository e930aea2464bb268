"""Numbers that several tools read off an Output: masks on a grid, winning queries, likeliest classes.

L predictions, Q queries, K classes, T segments, H/W height/width of the image, h/w of a grid over it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from m2f_lab.structures import Output, sample_points

Model = Callable[..., Output]
AnyImage = str | Path | Image.Image | np.ndarray
"""A path, a PIL image or RGB uint8 [H, W, 3]."""


def constant_model(output: Output) -> Model:
    """A model that returns one given output, for the image that output was made of.

    Raises, when it is called:
        ValueError: the image is of another size.
    """

    def model(images: Tensor, **options) -> Output:
        given, seen = (f"{width} × {height}" for height, width in (images.shape[2:], output.image_size))
        if given != seen:
            raise ValueError(
                f"The output was made of an image of {seen} pixels, not of {given}. Pass the one that it was made of, "
                "and shortest_edge and longest_edge where that was resized for the model."
            )
        return output

    return model


def attention_option(model: Model) -> dict[str, bool]:
    """keep_attention=True for models that take it; other models are called without."""
    parameters = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
    takes = "keep_attention" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"keep_attention": True} if takes else {}


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


def coverage_of(output: Output) -> tuple[float, float]:
    """Size of the padded area divided by that of the image, along x and y."""
    (height, width), (padded_height, padded_width) = output.image_size, output.padded_size
    return padded_width / width, padded_height / height


def to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


# --------------------------------------------------------------------------------------------------------------- masks


def grid_size(image_size: tuple[int, int], max_cells: int) -> tuple[int, int]:
    """Height and width of a grid over an image: a cell for every 4 × 4 pixels, or as many as allowed."""
    height, width = (math.ceil(edge / 4) for edge in image_size)
    shrink = min(1.0, math.sqrt(max_cells / (height * width)))
    return max(1, math.floor(height * shrink)), max(1, math.floor(width * shrink))


def read_masks(output: Output, index: int, size: tuple[int, int]) -> Tensor:
    """Mask probabilities of all predictions on a grid over the image, without its padding. [L, Q, *size]

    Where image and grid fit the mask features exactly (no padding, stride 4), these are the model's own values.
    """
    (height, width), (padded_height, padded_width) = output.image_size, output.padded_size
    device = output.masks[0].features.device
    y = (torch.arange(size[0], device=device) + 0.5) / size[0] * (height / padded_height)
    x = (torch.arange(size[1], device=device) + 0.5) / size[1] * (width / padded_width)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)  # (1, h * w, 2)
    masks = []
    for group in output.groups():  # predictions usually share their features: sample those once
        sampled = sample_points(group.features[index : index + 1].float(), points)[0]  # (C, h * w)
        logits = group.embeddings[index : index + 1].float() @ sampled  # (1, l, Q, h * w)
        masks.append(logits.sigmoid().unflatten(3, size))
    return output.in_order(masks)[0]


def nearest_cells(num_pixels: int, num_cells: int, coverage: float = 1.0) -> np.ndarray:
    """The cell that the centre of every pixel along one edge lies in. int64 [num_pixels]

    Args:
        num_pixels: along the edge of the image.
        num_cells: along the same edge of a grid.
        coverage: how often the image fits into the grid: above 1 where the grid covers padding.
    """
    cells = (np.arange(num_pixels) + 0.5) * num_cells / (num_pixels * coverage)
    return np.minimum(cells, num_cells - 1).astype(int)


def nearest(maps: np.ndarray, size: tuple[int, int], coverage: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """Read maps at the cell that every pixel's centre lies in, without padding. [..., h, w] → [..., *size]

    Args:
        maps: over the image or over the padded image. [..., h, w]
        size: height and width to read at, in pixels.
        coverage: how often the image fits into the maps, along x and y.
    """
    rows, columns = map(nearest_cells, size, maps.shape[-2:], coverage[::-1])
    return maps[..., rows[:, None], columns]


def hidden_cells(output: Output, layer: int, index: int = 0) -> np.ndarray:
    """Cells that a layer, from 1, hides from each query; none where it has no mask. bool [Q, h, w]"""
    state = output.states[layer]
    size = tuple(output.level_sizes[state.level])
    if state.blocked is None:
        return np.zeros((state.class_logits.shape[1], *size), bool)
    return to_numpy(state.blocked[index].unflatten(-1, size))


def opened_rows(output: Output, layer: int, index: int = 0) -> np.ndarray:
    """Queries whose row the fallback opened in a layer, from 1. bool [Q]"""
    state = output.states[layer]
    return np.zeros(state.class_logits.shape[1], bool) if state.opened is None else to_numpy(state.opened[index])


# ------------------------------------------------------------------------------------------------- queries and classes


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


def rank_queries(class_probabilities: np.ndarray) -> np.ndarray:
    """Query numbers, the surest of its best class first. [Q, K+1] → [Q]"""
    return np.argsort(-class_probabilities[:, :-1].max(axis=1), kind="stable")


def top_classes(probabilities: np.ndarray, count: int = 5) -> list[tuple[int, float]]:
    """The likeliest classes of one query and their probabilities; "no object" is class K. [K+1]"""
    order = np.argsort(-probabilities, kind="stable")[:count]
    return [(int(label), float(probabilities[label])) for label in order]


def kept_share(queries: np.ndarray) -> np.ndarray:
    """Share of the segments with a query that still have the same one in the next row.

    Args:
        queries: of each segment, -1 for none: over the predictions of an image, or one prediction over training. [N, T]

    Returns:
        NaN where no segment had a query. float64 [N - 1]
    """
    before, after = queries[:-1], queries[1:]
    had = before >= 0
    return np.where(had.any(axis=1), (had & (before == after)).sum(axis=1) / np.maximum(had.sum(axis=1), 1), np.nan)
