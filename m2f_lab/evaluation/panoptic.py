"""Panoptic segmentation: panoptic quality over a whole data set.

K classes, T true segments, P predicted segments, H/W height/width.

A true and a predicted segment of one class match if their intersection over union (IoU) exceeds one half; no segment
can do so twice. For each class, over the whole data set,

    SQ = sum of the matches' IoUs / TP          how well the segments that were found are outlined
    RQ = TP / (TP + FP / 2 + FN / 2)            how many were found, and how few invented
    PQ = SQ · RQ

with TP matches, FP predicted and FN true segments without a match. Void, and crowd (a true region whose
things are not told apart), are handled as in the COCO panoptic API, hence as in the published results:

- in the union, the pixels of a predicted segment that lie on void do not count;
- a predicted segment without a match is no mistake if more than half of it lies on void and crowd of its class;
- crowd matches nothing, and is not missed.

Source: Panoptic Segmentation (Kirillov et al. 2019), section 4.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from m2f_lab.evaluation.counts import summed_over_processes
from m2f_lab.structures import Prediction

SIZES = (32**2, 96**2, np.inf)
"""Pixels that small, medium and large segments have at most."""

SegmentsMap = np.ndarray | Tensor
"""The id of every pixel's segment, any integers, 0 for void. [H, W]"""


class PanopticEvaluator:
    """Counts segments by class: found, invented, missed.

    Args:
        num_classes: K
        things: the classes whose instances are told apart, as in `Classes.things`; the others are stuff
        class_names: for the table; by default the numbers. K × str

    Attributes:
        counts: TP, FP, FN, and the sum of the matches' IoUs. float64 [K, 4]
        counts_by_size: the same, by the area of the segment: that of the true one, or of the invented one, is at most
            each of `SIZES`. float64 [3, 4]
    """

    def __init__(self, num_classes: int, things: Collection[int], class_names: Sequence[str] | None = None) -> None:
        if num_classes < 1:
            raise ValueError(f"There must be at least one class, got {num_classes}.")
        unknown = sorted(set(things) - set(range(num_classes)))
        if unknown:
            raise ValueError(f"things names the classes {unknown}, but there are {num_classes}, 0…{num_classes - 1}.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"There are {num_classes} classes but {len(class_names)} names.")
        self.num_classes = num_classes
        self.things = frozenset(things)
        self.class_names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        self.counts = torch.zeros(num_classes, 4, dtype=torch.float64)
        self.counts_by_size = torch.zeros(len(SIZES), 4, dtype=torch.float64)
        self.num_images = 0

    def update(
        self,
        prediction: Prediction | tuple[SegmentsMap, Mapping[int, int]],
        segments_map: SegmentsMap,
        labels: Mapping[int, int],
        crowd: Collection[int] = (),
    ) -> None:
        """Match the segments of one image.

        Args:
            prediction: a panoptic Prediction, or its segments map and labels in the form of the truth's. Each of its
                segments has at least one pixel
            segments_map: the truth's segment ids, any positive integers, or 0 for void. [H, W]
            labels: the class 0…K-1 of each true segment. One without a pixel is missed. id → class
            crowd: the ids of the true segments that are crowd

        Raises:
            ValueError: the sizes differ, a map holds an id without a class, or a segment has an impossible id or class.
        """
        predicted_map, predicted_labels = _map_and_labels(prediction)
        predicted = _Segments("prediction", predicted_map, predicted_labels, self.num_classes)
        truth = _Segments("truth", segments_map, labels, self.num_classes)
        if truth.map.shape != predicted.map.shape:
            raise ValueError(
                f"The prediction is {list(predicted.map.shape)}, the truth {list(truth.map.shape)}: they are compared "
                "at the size of the truth. Resize the mask logits (not the ids) to it before segments are made."
            )
        if not set(crowd) <= set(labels):
            raise ValueError(f"Segments {sorted(set(crowd) - set(labels))} are called crowd, but labels has none such.")
        overlap = _overlap(truth, predicted)
        empty = predicted.ids[1:][overlap[:, 1:].sum(0) == 0].tolist()
        if empty:
            raise ValueError(f"The prediction has segments {empty} without a pixel; leave them out of its labels.")
        is_crowd = np.isin(truth.ids, list(crowd))
        by_class, by_size = _count(overlap, truth.classes, predicted.classes, is_crowd, self.num_classes)
        self.counts += torch.from_numpy(by_class)
        self.counts_by_size += torch.from_numpy(by_size)
        self.num_images += 1

    def merge(self, other: PanopticEvaluator) -> None:
        """Add what another evaluator counted, on other images."""
        if (other.num_classes, other.things) != (self.num_classes, self.things):
            raise ValueError(
                f"Cannot merge the counts of {other.num_classes} classes with the things {sorted(other.things)} into "
                f"those of {self.num_classes} with the things {sorted(self.things)}: the classes must be the same."
            )
        self.counts += other.counts
        self.counts_by_size += other.counts_by_size
        self.num_images += other.num_images

    def all_reduce(self) -> None:
        """Add up the counts of all processes of `torch.distributed`; afterwards each holds the sum."""
        both = torch.cat([self.counts, self.counts_by_size])
        both, self.num_images = summed_over_processes(both, self.num_images)
        self.counts, self.counts_by_size = both[: self.num_classes], both[self.num_classes :]

    def state(self) -> dict:
        """What was counted so far, as tensors and numbers that a file can hold."""
        return {"counts": self.counts, "by_size": self.counts_by_size, "num_images": self.num_images}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned."""
        self.counts, self.counts_by_size, self.num_images = state["counts"], state["by_size"], state["num_images"]

    def result(self) -> dict:
        """Compute the figures so far, in percent.

        Returns:
            "PQ", "SQ", "RQ", "PQ_things", … and "PQ_stuff", …, means over classes, "num_images", and "classes": one
            dict per class with "name", "PQ", "SQ", "RQ", and the numbers "TP", "FP", "FN". A class without any of the
            three has no quality (None) and is left out of the means. A mean over no class is None as well: images
            without a segment are not an error, and say nothing about quality.
        """
        found, invented, missed, iou = self.counts.unbind(1)
        segments = found + invented / 2 + missed / 2
        present = segments > 0
        # NaN where the class is not present
        columns = {"PQ": iou / segments, "SQ": iou / found.clamp(min=1), "RQ": found / segments}
        is_thing = torch.tensor([k in self.things for k in range(self.num_classes)])
        groups = {"": present, "_things": present & is_thing, "_stuff": present & ~is_thing}
        means = {
            name + group: 100 * values[chosen].mean().item() if chosen.any() else None
            for group, chosen in groups.items()
            for name, values in columns.items()
        }
        classes = [
            {"name": name} | _qualities(counts) for name, counts in zip(self.class_names, self.counts, strict=True)
        ]
        return means | {"num_images": self.num_images, "classes": classes}

    def by_size(self) -> list[dict]:
        """Of small, medium and large segments "size", "PQ", "SQ" and "RQ" in percent, all classes together, and the
        numbers "TP", "FP" and "FN".
        """
        return [
            {"size": size} | _qualities(counts)
            for size, counts in zip(("small", "medium", "large"), self.counts_by_size, strict=True)
        ]


def _qualities(counts: Tensor) -> dict:
    """PQ, SQ and RQ in percent, None without a segment; TP, FP, FN. [4] → …"""
    found, invented, missed, iou = counts.tolist()
    segments = found + invented / 2 + missed / 2
    # without a match, SQ is 0, as in the API
    values = (iou / segments, iou / max(found, 1), found / segments) if segments else None
    qualities = {name: values and 100 * values[place] for place, name in enumerate(("PQ", "SQ", "RQ"))}
    return qualities | {"TP": int(found), "FP": int(invented), "FN": int(missed)}


class _Segments:
    """One side of the comparison.

    Args:
        name: "truth" or "prediction", for errors

    Attributes:
        map: segment ids, 0 for void. [H, W]
        ids: of void and all segments, ascending. [N+1]
        classes: of void, which is -1, and all segments. [N+1]
    """

    def __init__(self, name: str, segments_map: SegmentsMap, labels: Mapping[int, int], num_classes: int) -> None:
        self.name = name
        self.map = segments_map.cpu().numpy() if isinstance(segments_map, Tensor) else np.asarray(segments_map)
        if self.map.ndim != 2 or self.map.dtype.kind not in "iu":
            raise ValueError(
                f"The {name} is {self.map.dtype} {list(self.map.shape)}, expected a map of segment ids, integers "
                "[H, W]. In COCO's pictures, id = R + 256 · G + 256² · B."
            )
        for number, label in labels.items():
            if number < 1:
                raise ValueError(f"The {name} has a segment {number}. 0 is void: number segments from 1.")
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"Segment {number} of the {name} is of class {label}, but there are {num_classes} classes, "
                    f"0…{num_classes - 1}. What is of no class is void: 0 in the map, and not in labels."
                )
        self.ids = np.array([0, *sorted(labels)], np.int64)
        self.classes = np.array([-1, *(labels[number] for number in sorted(labels))], np.int64)

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Find the places of ids in `self.ids`. [N]"""
        found = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        unknown = np.unique(ids[self.ids[found] != ids]).tolist()
        if unknown:
            raise ValueError(
                f"The map of the {self.name} holds the ids {unknown[:5]}, which have no class; its segments are "
                f"{self.ids[1:].tolist()}. Add them to the labels, or set their pixels to 0 for void."
            )
        return found


def _map_and_labels(
    prediction: Prediction | tuple[SegmentsMap, Mapping[int, int]],
) -> tuple[SegmentsMap, Mapping[int, int]]:
    if isinstance(prediction, tuple):
        return prediction
    if not isinstance(prediction, Prediction):
        raise ValueError(
            f"Expected a panoptic Prediction or (segments_map, labels), got {type(prediction).__name__}: a map alone "
            "does not say of what class its segments are."
        )
    if prediction.segments_map is None:
        raise ValueError(f'A prediction of task="{prediction.task}" has no segments_map; predict with task="panoptic".')
    return prediction.segments_map, {segment.id: segment.label for segment in prediction.segments}


def _overlap(truth: _Segments, predicted: _Segments) -> np.ndarray:
    """Pixels that a true and a predicted segment share; row and column 0 are void. float64 [T+1, P+1]

    Every pixel is only compared with the next. What follows handles runs of equal pixels, of which there are tens of
    times fewer: no pixel is sorted, and ids may be as large as COCO's, which are colours.
    """
    true, said = truth.map.ravel(), predicted.map.ravel()
    begins = np.ones(true.size, bool)
    np.not_equal(true[1:], true[:-1], out=begins[1:])
    begins[1:] |= said[1:] != said[:-1]
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=true.size)
    shape = len(truth.ids), len(predicted.ids)
    pairs = truth.positions(true[starts].astype(np.int64)) * shape[1]
    pairs += predicted.positions(said[starts].astype(np.int64))
    return np.bincount(pairs, lengths, shape[0] * shape[1]).reshape(shape)


def _count(
    overlap: np.ndarray, true: np.ndarray, predicted: np.ndarray, is_crowd: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Match segments. Whole numbers are compared, so that an IoU of exactly one half is no match.

    Args:
        overlap: pixels that a true and a predicted segment share; row and column 0 are void. [T+1, P+1]
        true, predicted: classes of the segments. [T+1] and [P+1]
        is_crowd: of the true segments. [T+1]

    Returns:
        TP, FP, FN and the sum of the matches' IoUs, by class [K, 4] and by size [3, 4].
    """
    on_void, true_area, predicted_area = overlap[0], overlap.sum(1), overlap.sum(0)
    union = true_area[:, None] + predicted_area - overlap - on_void  # (T+1, P+1)
    same = true[:, None] == predicted
    same[0, 0] = False  # void and void
    found = same & ~is_crowd[:, None] & (2 * overlap > union)
    # All crowd of the class; the API keeps one region per class and image, which is as many as the data sets have.
    on_crowd = (overlap * (same & is_crowd[:, None])).sum(0)
    invented = ~found.any(0) & (2 * (on_void + on_crowd) <= predicted_area)
    missed = ~found.any(1) & ~is_crowd
    rows, columns = np.nonzero(found)
    iou = overlap[rows, columns] / union[rows, columns]

    def counted(true: np.ndarray, predicted: np.ndarray, count: int) -> np.ndarray:
        columns = (
            (true[rows], None),
            (predicted[1:][invented[1:]], None),
            (true[1:][missed[1:]], None),
            (true[rows], iou),
        )
        return np.stack([np.bincount(groups, weights, count) for groups, weights in columns], axis=1)

    sizes = (np.searchsorted(SIZES, area) for area in (true_area, predicted_area))
    return counted(true, predicted, num_classes), counted(*sizes, len(SIZES))
