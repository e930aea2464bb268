"""Colours for classes: made up where a data set has none, painted over images.

K classes, H/W height/width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from m2f_lab.data.dataset import Classes
from m2f_lab.structures import IGNORE

_SHOWN = 128  # half of what a byte holds, which leaves as many values to name changes of class

# The palette of Okabe and Ito (2008), "Color universal design", without black: black is for ignored pixels.
_FIRST = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))

# How linear RGB looks to people without one kind of cone: Machado, Oliveira, Fernandes (2009), severity 1.
_NORMAL = np.eye(3)
_PROTANOPIA = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
_DEUTERANOPIA = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)

# Linear RGB → cone responses → Oklab (Ottosson 2020), in which equal distances look about equally different.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@lru_cache
def distinct_colors(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that people with and without colour vision deficiency tell apart.

    They start with the palette of Okabe and Ito; each further one is the candidate that differs most from all before
    it. The same count always gives the same colours, and more colours begin with those of fewer.

    Args:
        count: how many.

    Returns:
        (r, g, b) in 0…255. count × (r, g, b)
    """
    levels = np.linspace(0, 255, 13).round().astype(int)
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    # Darker ones look like black, which is for ignored pixels.
    candidates = candidates[perceived(candidates)[0, :, 0] > 0.4]
    colors = [np.array(color) for color in _FIRST[:count]]
    seen = perceived(candidates)
    distance = np.full(len(candidates), np.inf)
    for color in colors:
        distance = np.minimum(distance, difference(seen, perceived(color[None])))
    while len(colors) < count:
        best = int(distance.round(6).argmax())  # rounded: the last digits differ between machines
        colors.append(candidates[best])
        distance = np.minimum(distance, difference(seen, seen[:, best : best + 1]))
    return tuple(tuple(int(value) for value in color) for color in colors)


def perceived(colors: np.ndarray) -> np.ndarray:
    """Positions of colours in Oklab for normal, protanope and deuteranope vision. [N, 3] → [3, N, 3]"""
    share = np.asarray(colors) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    seen = [np.clip(linear @ vision.T, 0, 1) for vision in (_NORMAL, _PROTANOPIA, _DEUTERANOPIA)]
    return np.stack([np.cbrt(rgb @ _CONES.T) @ _OKLAB.T for rgb in seen])


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest distance over the three kinds of vision. [3, N, 3], [3, N or 1, 3] → [N]"""
    return np.linalg.norm(a - b, axis=-1).min(0)


def colorize(label_map: np.ndarray, classes: Classes) -> np.ndarray:
    """Paint a label map in its classes' colours, ignored pixels black. integers [H, W] → uint8 [H, W, 3]"""
    return _color_table(classes.colors, classes.ignore)[_checked(label_map, classes)]


def overlay(image: np.ndarray, label_map: np.ndarray, classes: Classes, opacity: float = 0.5) -> np.ndarray:
    """Paint a label map over its image; ignored pixels show the image alone.

    Args:
        image: uint8 [H, W, 3]
        label_map: train ids 0…K-1, `classes.ignore` for ignored pixels. integers [H, W]
        classes: whose colours to use
        opacity: 0 shows the image alone, 1 the colours alone

    Returns:
        uint8 [H, W, 3]
    """
    if image.shape != (*label_map.shape, 3):
        raise ValueError(f"A label map {label_map.shape} cannot lie over an image {image.shape}.")
    weight = opacity * (label_map != classes.ignore)[..., None]
    return np.rint((1 - weight) * image + weight * colorize(label_map, classes)).astype(np.uint8)


def in_bytes(label_map: np.ndarray, classes: Classes) -> tuple[np.ndarray, Classes]:
    """A label map in bytes, as pictures with a palette need it.

    Of more than 254 classes those that occur are numbered anew, the largest first; beyond 127 of them the others become
    one, "other classes".

    Args:
        label_map: classes 0…K-1. integers, of any shape

    Returns:
        The map, uint8, and the classes that its values stand for; both as they were where K is at most 254.
    """
    if len(classes) < IGNORE:
        return label_map.astype(np.uint8), classes
    counts = np.bincount(label_map.ravel(), minlength=len(classes))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    kept, others = order[: _SHOWN - 1], order[_SHOWN - 1 :]
    number = np.full(len(classes), len(kept), np.uint8)
    number[kept] = np.arange(len(kept))
    names, colors = ([values[k] for k in kept] for values in (classes.names, classes.colors))
    if len(others):
        names, colors = [*names, "other classes"], [*colors, (128, 128, 128)]
    things = frozenset(number[k] for k in kept if k in classes.things)
    return number[label_map], Classes(tuple(names), tuple(colors), things)


def _checked(label_map: np.ndarray, classes: Classes) -> np.ndarray:
    outside = np.unique(label_map[(label_map != classes.ignore) & ((label_map < 0) | (label_map >= len(classes)))])
    if outside.size:
        raise ValueError(
            f"The label map holds {outside.tolist()}, but there are only {len(classes)} classes and {classes.ignore}."
        )
    return label_map


def _color_table(colors: Sequence[tuple[int, int, int]], ignore: int) -> np.ndarray:
    table = np.zeros((ignore + 1, 3), np.uint8)
    table[: len(colors)] = colors
    return table
