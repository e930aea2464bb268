"""Segment one image, whole, in tiles, or several times with the results averaged.

B batch, K classes, H/W height/width of the image, h/w of what the model sees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.inference import postprocess
from m2f_lab.inference.images import as_rgb, fitted_size, resize_image
from m2f_lab.inference.instance_tiles import tiled_instances
from m2f_lab.inference.panoptic_tiles import tiled_panoptic
from m2f_lab.inference.rows import Rows, average
from m2f_lab.inference.tiles import tiled
from m2f_lab.ops import to_device
from m2f_lab.recipes import TASKS
from m2f_lab.structures import Output, Prediction

Model = Callable[[Tensor], Output]
"""A Mask2Former, or anything that turns images [B, 3, H, W] in 0..255 into an Output."""

Picture = str | Path | Image.Image | np.ndarray
"""An image: a path, a PIL image, or RGB uint8 [H, W, 3]."""

# Which option belongs to which task; predict refuses the others instead of ignoring them.
_OPTIONS = {
    "semantic": ("tile", "tile_overlap", "order", "flip", "scales", "return_scores"),
    "panoptic": ("tile", "tile_overlap", "object_mask_threshold", "overlap_threshold"),
    "instance": ("tile", "tile_overlap", "top_k", "score_threshold"),
}
_DEFAULTS = {"order": "combine_first", "flip": False, "scales": (1.0,), "return_scores": False}  # of others: None


def predict(
    model: Model,
    image: Picture | Sequence[Picture],
    task: str = "semantic",
    *,
    classes: Classes | None = None,
    shortest_edge: int | Sequence[int] | None = None,
    longest_edge: int | None = None,
    tile: int | tuple[int, int] | None = None,
    tile_overlap: float | None = None,
    order: str = "combine_first",
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    return_scores: bool = False,
    object_mask_threshold: float | None = None,
    overlap_threshold: float | None = None,
    top_k: int | None = None,
    score_threshold: float | None = None,
) -> Prediction | list[Prediction]:
    """Segment one image, or several, each on its own; a result has its image's size.

    The model runs in evaluation mode without gradients, on its own device, and is left as it was. Under
    `torch.autocast` the model runs in that precision; what follows it is computed in float32.

    Args:
        model: a Mask2Former, or any callable images [B, 3, H, W] → Output (which then runs on the CPU)
        image: a path, a PIL image of any mode, or a uint8 RGB array [H, W, 3]. EXIF orientation is applied. A list of
            them, of any sizes, gives a list of predictions
        task: "semantic", "panoptic" or "instance"
        classes: says which classes are things; by default `model.classes`. Every class is a thing if it is not known,
            which the panoptic task logs
        shortest_edge: resize the image to this before the model sees it, in pixels; by default it is not resized.
            Semantic only: the results at several sizes are averaged
        longest_edge: but to no more than this, in pixels

        tile: height and width in pixels (or one number for both) of overlapping tiles of the resized image, for images
            that are too large at once
        tile_overlap: with `tile`. The share of a tile that overlaps its neighbour, 0.25 by default
        order: semantic only. "combine_first" or "resize_first"; see `postprocess.semantic`
        flip: semantic only. Average with the prediction for the mirrored image
        scales: semantic only. Average over the image at these sizes, relative to what `shortest_edge` and
            `longest_edge` give
        return_scores: semantic only. Also return the class scores [K, H, W]

        object_mask_threshold: panoptic only. Least class probability of a query, 0.8 by default
        overlap_threshold: panoptic only. Least share of its mask that a query must win, 0.8 by default
        top_k: instance only. The number of pairs of query and class to consider, 100 by default
        score_threshold: instance only. Leave out instances below this score, 0 by default

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image, the array of the wrong type or shape, the task is unknown or has no such
            option, or classes and model do not fit.
    """
    if isinstance(image, list | tuple):
        common = {name: value for name, value in locals().items() if name not in ("model", "image")}
        return [predict(model, one, **common) for one in image]
    options = _checked_options(
        task, tile=tile, tile_overlap=tile_overlap, order=order, flip=flip, scales=tuple(scales),
        return_scores=return_scores, object_mask_threshold=object_mask_threshold, overlap_threshold=overlap_threshold,
        top_k=top_k, score_threshold=score_threshold,
    )  # fmt: skip
    tile, tile_overlap = _checked_tile(tile, tile_overlap)
    edges = _checked_edges(shortest_edge, task)
    pixels = as_rgb(image)
    size = (pixels.shape[0], pixels.shape[1])
    classes = getattr(model, "classes", None) if classes is None else classes

    def run(images: Tensor) -> Output:
        output = model(images)
        if classes is not None and len(classes) != output.num_classes:
            raise ValueError(
                f"The model predicts {output.num_classes} classes, but there are {len(classes)} class names; pass the "
                "classes it was trained with."
            )
        return output

    with evaluating(model), torch.inference_mode():
        if task == "semantic":
            views = [
                _view(run, seen_by(model, pixels, edge, longest_edge, scale), size, mirrored, tile, tile_overlap, order)
                for edge in edges
                for scale in scales
                for mirrored in ((False, True) if flip else (False,))
            ]
            return postprocess.read_prediction(average(views), return_scores=return_scores)
        chosen = {name: value for name, value in options.items() if name not in ("tile", "tile_overlap")}
        chosen["things"] = _things(classes, task)
        seen = fitted_size(size, edges[0], longest_edge)
        return _segments(run, model, pixels, task, seen, tile, tile_overlap, chosen)


def _segments(
    run: Model,
    model: Model,
    pixels: np.ndarray,
    task: str,
    seen: tuple[int, int],
    tile: tuple[int, int] | None,
    overlap: float,
    options: dict,
) -> Prediction:
    """Panoptic segments or instances of an image that the model sees at the size `seen`, whole or in tiles."""
    size = pixels.shape[:2]
    read = {"panoptic": postprocess.panoptic, "instance": postprocess.instance}[task]

    def of_part(part: np.ndarray) -> Prediction:
        part_seen = tuple(max(1, round(p * s / full)) for p, s, full in zip(part.shape, seen, size, strict=False))
        return read(run(seen_as(model, part, part_seen)), size=part.shape[:2], **options)

    if tile is None:
        return of_part(pixels)
    edges = tuple(max(1, round(t * full / s)) for t, s, full in zip(tile, seen, size, strict=True))
    if task == "panoptic":
        return tiled_panoptic(of_part, pixels, edges, overlap, options.get("overlap_threshold", 0.8))
    return tiled_instances(of_part, pixels, edges, overlap, options.get("top_k", 100))


def _view(
    run: Model,
    image: Tensor,
    size: tuple[int, int],
    mirrored: bool,
    tile: tuple[int, int] | None,
    overlap: float,
    order: str,
) -> Rows:
    """Class scores for one look at the image: at one scale, mirrored or not. [1, 3, h, w] → [K, *size]"""
    if mirrored:
        image = image.flip(-1)
    if tile is None:
        scores = postprocess.semantic_rows(run(image), order=order)
    else:
        scores = tiled(lambda part: postprocess.semantic_rows(run(part), order=order), image, tile, overlap)
    scores = scores.resized(size)
    return scores.mirrored() if mirrored else scores


def look(
    model: Model,
    image: np.ndarray,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    **options,
) -> Output:
    """Raw output of the model for one image, in evaluation mode and without gradients.

    Args:
        model, shortest_edge, longest_edge: as `predict` takes them
        image: RGB uint8 [H, W, 3]
        options: of the model, for example `keep_attention=True`
    """
    with evaluating(model), torch.inference_mode():
        return model(seen_by(model, image, shortest_edge, longest_edge), **options)


def seen_by(
    model: Model,
    image: np.ndarray,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The image as the model sees it: at its size, on its device. uint8 [H, W, 3] → [1, 3, h, w]"""
    return seen_as(model, image, fitted_size(image.shape[:2], shortest_edge, longest_edge, scale))


def seen_as(model: Model, image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """The image as the model sees it at a size. uint8 [H, W, 3] → [1, 3, *size]"""
    seen = resize_image(image, size)
    (seen,) = to_device([torch.from_numpy(np.array(seen))], device_of(model))
    return seen.permute(2, 0, 1)[None].contiguous()


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Evaluation mode while the block runs; afterwards every submodule is in the mode it was in before."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: Model) -> torch.device:
    """Device of the model's parameters; the CPU for a callable without parameters."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device


def _checked_options(task: str, **given) -> dict:
    """Options that were given, that is, differ from their default; all of them belong to the task."""
    options = {name: value for name, value in given.items() if value != _DEFAULTS.get(name)}
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}.")
    for name in options:
        if name not in _OPTIONS[task]:
            owner = next(t for t, names in _OPTIONS.items() if name in names)
            raise ValueError(f'{name} is an option of task="{owner}"; task="{task}" takes {", ".join(_OPTIONS[task])}.')
    scales = tuple(options.get("scales", (1.0,)))
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive numbers, got {scales}.")
    return options


def _checked_edges(shortest_edge: int | Sequence[int] | None, task: str) -> tuple[int | None, ...]:
    if not isinstance(shortest_edge, list | tuple):
        return (shortest_edge,)
    if not shortest_edge:
        raise ValueError("shortest_edge is a size in pixels, or several, got none.")
    if len(shortest_edge) > 1 and task != "semantic":
        raise ValueError(
            f'Results at several sizes are averaged in task="semantic" alone, got shortest_edge={shortest_edge} for '
            f"task={task!r}: segments of two sizes cannot be averaged."
        )
    return tuple(shortest_edge)


def _checked_tile(tile: int | tuple[int, int] | None, overlap: float | None) -> tuple[tuple[int, int] | None, float]:
    if tile is None:
        if overlap is not None:
            raise ValueError("tile_overlap says by how much tiles overlap; pass tile, their size in pixels, too.")
        return None, 0.0
    height, width = (tile, tile) if isinstance(tile, int) else tile
    if min(height, width) < 1:
        raise ValueError(f"tile is a positive size in pixels, or (height, width), got {tile}.")
    overlap = 0.25 if overlap is None else overlap
    if not 0 <= overlap < 1:
        raise ValueError(f"tile_overlap is a share of the tile in [0, 1), got {overlap}.")
    return (height, width), overlap


def _things(classes: Classes | None, task: str) -> frozenset[int] | None:
    if classes is not None:
        return classes.things
    if task == "panoptic":
        logging.getLogger("m2f_lab").warning(
            "Nothing says which classes are things, so every class is taken for one, and its instances are told apart: "
            "set model.classes, or pass classes=m2f_lab.data.Classes(names, colors, things)."
        )
    return None
