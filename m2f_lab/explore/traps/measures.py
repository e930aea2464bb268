"""Measures of several traps: the model with a fault in it, and the damage that it does.

C channels, H/W height/width of an image, h/w of a feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import MethodType
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.explore.traps.trap import Bench, Finding
from m2f_lab.model import Mask2Former
from m2f_lab.structures import IGNORE

Module = TypeVar("Module", bound=nn.Module)


def with_method(module: Module, part: type[nn.Module], name: str, method: Callable) -> Module:
    """Copy a module and give all its parts of one type another method. The module and the library stay as they are."""
    changed = copy.deepcopy(module)
    for each in changed.modules():
        if isinstance(each, part):
            setattr(each, name, MethodType(method, each))
    return changed


def mean_iou(bench: Bench, model: Mask2Former) -> Finding:
    """mIoU of a model, and its label map of the first street."""
    return mean_iou_of_maps(bench, [model.predict(sample.image).label_map for sample in bench.samples])


def mean_iou_of_maps(bench: Bench, label_maps: Sequence[np.ndarray]) -> Finding:
    """mIoU of predictions for all streets, and the first of them."""
    return Finding(bench.mean_iou(label_maps), bench.samples[0].image, label_maps[0], bench.streets.classes)


def mean_iou_with(part: type[nn.Module], name: str) -> Callable[[Bench, Callable], Finding]:
    """Make a measure: mIoU of the model in which the variant is a method of all parts of one type."""

    def measure(bench: Bench, variant: Callable) -> Finding:
        return mean_iou(bench, with_method(bench.model, part, name, variant))

    return measure


def distance(bench: Bench, expected: Tensor, got: Tensor) -> Finding:
    """Largest distance of features [1, C, h, w] from the library's, in percent of the largest feature, and its map."""
    apart = (got - expected).norm(dim=1)[0] / expected.norm(dim=1).max()  # (h, w)
    most = float(apart.max())
    return Finding(100 * most, bench.samples[0].image, inside_image(bench, (apart / max(most, 1)).numpy()))


def inside_image(bench: Bench, heat: np.ndarray) -> np.ndarray:
    """Cut a map [h, w] over the padded first street to the image; it may cover the last cell only in part."""
    height, width = bench.samples[0].image.shape[:2]
    padded_height, padded_width = (-(-edge // 32) * 32 for edge in (height, width))
    rows, columns = heat.shape
    return heat[: -(-height * rows // padded_height), : -(-width * columns // padded_width)]


def wrong_pixels(image: np.ndarray, truth: np.ndarray, found: np.ndarray, classes: Classes) -> Finding:
    """Share of pixels that bear another label than they should, in percent. Numbers of no class are drawn as nothing.

    Args:
        image: uint8 [H, W, 3]
        truth, found: labels, 255 for pixels to ignore. integers [H, W]
        classes: what they mean
    """
    picture = np.where(found < len(classes), found, IGNORE)
    return Finding(100 * float((truth != found).mean()), image, picture.astype(np.uint8), classes)
