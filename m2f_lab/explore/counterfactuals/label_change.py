"""Comparison of two label maps of one image: pixels that changed, from which class to which, and the change of IoU.

K classes, H/W height/width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m2f_lab.evaluation import SemanticEvaluator


@dataclass(frozen=True)
class LabelChange:
    """Pixels that each class gained and lost.

    Attributes:
        before, after: label maps. integers [H, W]
        moved: pixels by class before (row) and after (column). int64 [K, K]
        iou_before, iou_after: in percent, per class; None for a class that the truth never holds. K, or None where no
            truth was given
    """

    before: np.ndarray
    after: np.ndarray
    moved: np.ndarray
    iou_before: tuple[float | None, ...] | None = None
    iou_after: tuple[float | None, ...] | None = None

    @property
    def changed(self) -> np.ndarray:
        """bool [H, W]"""
        return self.before != self.after

    @property
    def num_changed(self) -> int:
        """Pixels."""
        return int(self.moved.sum() - np.trace(self.moved))

    @property
    def share_changed(self) -> float:
        """Of all pixels, 0…1."""
        return self.num_changed / int(self.moved.sum())

    @property
    def pixels_before(self) -> np.ndarray:
        """int64 [K]"""
        return self.moved.sum(axis=1)

    @property
    def pixels_after(self) -> np.ndarray:
        """int64 [K]"""
        return self.moved.sum(axis=0)

    def flows(self) -> list[tuple[int, int, int]]:
        """Pixels that one class took from another: class before, class after, pixels; the largest first."""
        pairs = np.argwhere(self.moved * ~np.eye(len(self.moved), dtype=bool)).tolist()
        return sorted(((old, new, int(self.moved[old, new])) for old, new in pairs), key=lambda flow: -flow[2])

    def __repr__(self) -> str:
        return f"LabelChange({self.num_changed} of {self.moved.sum()} pixels, {100 * self.share_changed:.1f} %)"


def compare_label_maps(
    before: np.ndarray, after: np.ndarray, num_classes: int, truth: np.ndarray | None = None
) -> LabelChange:
    """Compare two label maps of an image.

    Args:
        before, after: classes 0…K-1. integers [H, W]
        num_classes: K.
        truth: the true label map; 255 for pixels that do not count. [H, W]

    Raises:
        ValueError: the maps or the truth differ in size, or hold a number that is no class.
    """
    if before.shape != after.shape or before.ndim != 2:
        raise ValueError(f"Two label maps [H, W] of one size are compared, got {before.shape} and {after.shape}.")
    for name, label_map in (("before", before), ("after", after)):
        if label_map.min() < 0 or label_map.max() >= num_classes:
            raise ValueError(
                f"The label map {name} holds {label_map.min()}…{label_map.max()}, but classes are 0…{num_classes - 1}."
            )
    pairs = before.astype(np.int64) * num_classes + after
    moved = np.bincount(pairs.ravel(), minlength=num_classes**2).reshape(num_classes, num_classes)
    if truth is not None and truth.shape != before.shape:
        raise ValueError(
            f"The truth is {list(truth.shape)}, but the label maps are {list(before.shape)}: give it as [H, W], at the "
            "image's own size."
        )
    if truth is None:
        return LabelChange(before, after, moved)
    return LabelChange(before, after, moved, _iou(before, num_classes, truth), _iou(after, num_classes, truth))


def _iou(label_map: np.ndarray, num_classes: int, truth: np.ndarray) -> tuple[float | None, ...]:
    evaluator = SemanticEvaluator(num_classes)
    evaluator.update(label_map, truth)
    return tuple(row["IoU"] for row in evaluator.result()["classes"])
