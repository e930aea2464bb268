"""Instance segmentation: average precision over a whole data set, as COCO counts it.

K classes, D predicted instances of a class in an image, T true ones, U = 10 overlaps asked for, A = 4 ranges of area,
H/W height/width.

For each class, overlap and range of area on its own: the predicted instances of an image take, best score first, the
true instance that they overlap most, if it is still free and their intersection over union (IoU) is large enough.
Over all images, in the order of scores, precision is the share of those that took one, recall the share of true
instances that were taken; average precision (AP) is the mean, at 101 values of recall, of the best precision at this
recall or a larger one. Average recall (AR) is the recall with so many instances in each image.

Crowds, and what lies outside the range of area, may be taken but count neither as found nor as missed.

Libraries that count this want all masks at once. Here an image is matched when it comes, and all that stays of it is
some 30 bytes for each predicted instance; the figures are those of pycocotools to the last digits.

Source: Microsoft COCO (Lin et al. 2014) and its evaluation code, pycocotools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from m2f_lab.data import Segments
from m2f_lab.structures import Prediction

OVERLAPS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
"""Ranges of area in pixels, both ends included, by the letter that figures have for them."""

_BITS = 1 << np.arange(len(OVERLAPS), dtype=np.uint16)


@dataclass(frozen=True)
class _Matched:
    """Predicted instances of one class in one image, best first.

    Attributes:
        image: number of the image, by which equal scores of several images are ordered.
        scores: float64 [D]
        found, ignored: bit u says of overlap u whether the instance took a true one, and whether it counts at all.
            uint16 [A, D]
        num_true: instances that can be found. int64 [A]
    """

    image: int
    scores: np.ndarray
    found: np.ndarray
    ignored: np.ndarray
    num_true: np.ndarray


class InstanceEvaluator:
    """Matches instances image by image, and computes AP and AR.

    Args:
        num_classes: K
        class_names: for the table; by default the numbers. K × str
        max_detections: only so many of each class and image count, those of the highest score. COCO's figures have
            100; images with more instances than that need more

    Attributes:
        num_images: how many were counted.
    """

    def __init__(
        self, num_classes: int, class_names: Sequence[str] | None = None, *, max_detections: int = 100
    ) -> None:
        if num_classes < 1 or max_detections < 1:
            raise ValueError(f"num_classes = {num_classes} and max_detections = {max_detections} must be positive.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"There are {num_classes} classes but {len(class_names)} names.")
        self.num_classes, self.max_detections = num_classes, max_detections
        self.class_names = tuple(map(str, range(num_classes) if class_names is None else class_names))
        self.num_images = 0
        self._matched: list[list[_Matched]] = [[] for _ in range(num_classes)]

    def update(
        self,
        prediction: Prediction,
        truth: Segments,
        *,
        areas: Sequence[float] | None = None,
        image: int | None = None,
    ) -> None:
        """Match the instances of one image.

        Args:
            prediction: of the instance task
            truth: its instances
            areas: of the true instances in pixels, by which they are small, medium or large; by default as many as
                their masks have. COCO's files give those of the polygons. T
            image: number of the image: of equal scores, those of the lower number come first. By default images are
                numbered as they come

        Raises:
            ValueError: the prediction is of another task, the sizes differ, or a class does not exist.
        """
        self._check(prediction, truth)
        image = self.num_images if image is None else image
        self.num_images += 1
        labels = np.array([segment.label for segment in prediction.segments], np.int64)
        scores = np.array([segment.score for segment in prediction.segments], np.float64)
        areas = truth.areas if areas is None else np.asarray(areas, np.float64)
        for label in np.union1d(labels, truth.labels).tolist():
            of_class = np.flatnonzero(labels == label)
            best = of_class[np.argsort(-scores[of_class], kind="stable")][: self.max_detections]
            true = truth.select(truth.labels == label)
            masks = np.zeros((0, *truth.size), bool) if prediction.masks is None else prediction.masks
            shared, sizes = _intersections(masks, best, true)
            found, ignored, num_true = _match(shared, sizes, true, areas[truth.labels == label])
            self._matched[label].append(_Matched(image, scores[best], found, ignored, num_true))

    def merge(self, other: InstanceEvaluator) -> None:
        """Add what another evaluator matched, on other images."""
        if (other.num_classes, other.max_detections) != (self.num_classes, self.max_detections):
            raise ValueError(
                f"Cannot merge instances of {other.num_classes} classes, {other.max_detections} in an image, into "
                f"those of {self.num_classes} classes, {self.max_detections} in an image."
            )
        for own, others in zip(self._matched, other._matched, strict=True):
            own += others
        self.num_images += other.num_images

    def all_reduce(self) -> None:
        """Gather the matches of all processes of `torch.distributed`; afterwards each holds all."""
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (self._matched, self.num_images))
        self._matched = [[match for part, _ in everyone for match in part[label]] for label in range(self.num_classes)]
        self.num_images = sum(count for _, count in everyone)

    def state(self) -> dict:
        """What was matched so far, as tensors and numbers that a file can hold."""
        rows = [(label, match) for label, matches in enumerate(self._matched) for match in matches]
        bits = np.zeros((len(AREAS), 0), np.int16)  # for torch, which hardly knows uint16
        arrays = {
            "rows": np.array([(label, match.image, match.scores.size) for label, match in rows], np.int64),
            "num_true": np.array([match.num_true for _, match in rows], np.int64),
            "scores": np.concatenate([np.zeros(0), *(match.scores for _, match in rows)]),
            "found": np.concatenate([bits, *(match.found.view(np.int16) for _, match in rows)], axis=1),
            "ignored": np.concatenate([bits, *(match.ignored.view(np.int16) for _, match in rows)], axis=1),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"num_images": self.num_images}

    def load_state(self, state: dict) -> None:
        """Go on from what `state` returned."""
        arrays = {name: value.numpy() for name, value in state.items() if name != "num_images"}
        self.num_images = state["num_images"]
        self._matched = [[] for _ in range(self.num_classes)]
        start = 0
        for (label, image, count), num_true in zip(arrays["rows"].tolist(), arrays["num_true"], strict=True):
            part = slice(start, start + count)
            flags = (arrays[name][:, part].view(np.uint16) for name in ("found", "ignored"))
            self._matched[label].append(_Matched(image, arrays["scores"][part], *flags, num_true))
            start += count

    def result(self) -> dict:
        """Compute the figures so far, in percent.

        Returns:
            "AP", over overlaps of 50 to 95 %, "AP50", "AP75", and "APs", "APm", "APl" by area; "AR1", "AR10" and
            "AR100" (or as many as `max_detections`), with so many instances in an image, and "ARs", "ARm", "ARl";
            means over the classes that occur, or None where none does. "num_images", and "classes": one dict per class
            with "name", "AP", "AP50", "AR" and "instances", the number of true ones.
        """
        precision = np.full((self.num_classes, len(AREAS), len(OVERLAPS), len(RECALLS)), np.nan)
        limits = (1, 10, self.max_detections)
        recall = np.full((self.num_classes, len(AREAS), len(limits), len(OVERLAPS)), np.nan)
        num_true = np.zeros((self.num_classes, len(AREAS)), np.int64)
        for label, matches in enumerate(self._matched):
            ordered = sorted(matches, key=lambda match: match.image)
            num_true[label] = sum((match.num_true for match in ordered), start=num_true[label])
            for area in np.flatnonzero(num_true[label]).tolist():
                for place, limit in enumerate(limits):
                    curve, reached = _curve(ordered, area, limit, num_true[label, area])
                    recall[label, area, place] = reached
                precision[label, area] = curve  # of the largest limit
        names = dict(enumerate(AREAS))
        figures = {"AP": precision[:, 0], "AP50": precision[:, 0, 0], "AP75": precision[:, 0, 5]}
        figures |= {f"AP{names[area]}": precision[:, area] for area in (1, 2, 3)}
        figures |= {f"AR{limit}": recall[:, 0, place] for place, limit in enumerate(limits)}
        figures |= {f"AR{names[area]}": recall[:, area, -1] for area in (1, 2, 3)}
        classes = [
            {
                "name": name,
                "AP": _percent(precision[label, 0]),
                "AP50": _percent(precision[label, 0, 0]),
                "AR": _percent(recall[label, 0, -1]),
                "instances": int(num_true[label, 0]),
            }
            for label, name in enumerate(self.class_names)
        ]
        return {name: _percent(of) for name, of in figures.items()} | {
            "num_images": self.num_images,
            "classes": classes,
        }

    def curves(self) -> list[dict]:
        """Precision over recall of each class, in fractions.

        Returns:
            Of each class "name", "precision50" and "precision75", the precision at each of `RECALLS` with an overlap
            of 50 and 75 % asked for, and "best": the "score" from which on instances have the highest F1 at an overlap
            of 50 %, and their "precision" and "recall". None where the truth has no instance, and "best" where none
            was found.
        """
        rows = []
        for name, matches in zip(self.class_names, self._matched, strict=True):
            row = {"name": name, "precision50": None, "precision75": None, "best": None}
            ordered = sorted(matches, key=lambda match: match.image)
            num_true = sum(int(match.num_true[0]) for match in ordered)
            if num_true:
                curve, _ = _curve(ordered, 0, self.max_detections, num_true)
                row |= {"precision50": curve[0].tolist(), "precision75": curve[5].tolist()}
                row["best"] = _best(*_ranked(ordered, 0, self.max_detections), num_true)
            rows.append(row)
        return rows

    def _check(self, prediction: Prediction, truth: Segments) -> None:
        if not isinstance(prediction, Prediction) or prediction.task != "instance":
            raise ValueError(
                f'Expected a Prediction of task="instance", got {getattr(prediction, "task", prediction)!r}.'
            )
        if prediction.masks is not None and len(prediction.masks) and prediction.masks.shape[1:] != truth.size:
            raise ValueError(
                f"The prediction is {list(prediction.masks.shape[1:])}, the truth {list(truth.size)}: they are "
                "compared at the size of the truth."
            )
        for name, labels in (
            ("prediction", [segment.label for segment in prediction.segments]),
            ("truth", truth.labels.tolist()),
        ):
            outside = sorted({label for label in labels if not 0 <= label < self.num_classes})
            if outside:
                raise ValueError(
                    f"The {name} has instances of the classes {outside}, but there are {self.num_classes}."
                )


def _percent(values: np.ndarray) -> float | None:
    """Mean of what is not NaN."""
    measured = values[~np.isnan(values)]
    return 100 * float(measured.mean()) if measured.size else None


def _best(scores: np.ndarray, right: np.ndarray, wrong: np.ndarray, num_true: int) -> dict | None:
    """Score, precision and recall of the highest F1 at the smallest overlap. Equal scores come and go together."""
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) if scores.size else np.zeros(0, np.int64)
    right, wrong = right[0, ends], wrong[0, ends]
    if not right.any():
        return None
    place = int(np.argmax(right / (right + wrong + num_true)))
    precision = right[place] / (right[place] + wrong[place])
    return {"score": float(scores[ends[place]]), "precision": precision, "recall": right[place] / num_true}


def _intersections(masks: np.ndarray, chosen: np.ndarray, true: Segments) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that chosen predicted masks share with true instances [D, T], and that they have [D]."""
    if true.id_map is None:
        from faster_coco_eval.core import mask as coco

        ours = coco.encode(np.asfortranarray(masks[chosen].transpose(1, 2, 0).astype(np.uint8)))
        theirs = coco.encode(np.asfortranarray(true.masks().transpose(1, 2, 0).astype(np.uint8)))
        sizes = coco.area(ours).astype(np.float64) if len(chosen) else np.zeros(0)
        if not len(chosen) or not len(true):
            return np.zeros((len(chosen), len(true))), sizes
        shares = coco.iou(ours, theirs, [True] * len(true))  # of a crowd: the share of the predicted mask
        return np.rint(shares * sizes[:, None]), sizes
    shared, sizes = np.zeros((len(chosen), len(true))), np.zeros(len(chosen))
    for place, number in enumerate(chosen.tolist()):
        mask = masks[number]
        rows = np.flatnonzero(mask.any(1))
        if rows.size:
            box = slice(rows[0], rows[-1] + 1)
            inside = true.id_map[box][mask[box]]
            sizes[place] = inside.size
            shared[place] = np.bincount(inside + 1, minlength=len(true) + 1)[1:]  # -1: no instance
    return shared, sizes


def _match(
    shared: np.ndarray, sizes: np.ndarray, true: Segments, areas: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give predicted instances, best first, true ones.

    Args:
        shared: pixels that they share. [D, T]
        sizes: pixels of the predicted ones. [D]
        true: of one class. T
        areas: by which the true ones are small, medium or large. [T]

    Returns:
        `found` and `ignored` [A, D] and `num_true` [A] as in `_Matched`.
    """
    union = np.where(true.crowd, sizes[:, None], sizes[:, None] + true.areas - shared)
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    low, high = np.array(list(AREAS.values())).T[:, :, None]  # (A, 1)
    passed_over = true.crowd | (areas < low) | (areas > high)  # (A, T)
    out_of_range = (sizes < low) | (sizes > high)  # (A, D)
    least = np.minimum(OVERLAPS, 1 - 1e-10)
    taken = np.zeros((len(AREAS), len(OVERLAPS), len(true)), bool)
    found, ignored = (np.zeros((len(AREAS), len(sizes)), np.uint16) for _ in range(2))
    for number, overlaps in enumerate(iou):
        near = np.flatnonzero(overlaps >= least[0])
        near = near[np.argsort(overlaps[near], kind="stable")]  # the last one wins: the largest, of equal ones the last
        free = ~taken[:, :, near] | true.crowd[near]
        fits = free & (overlaps[near] >= least[:, None])  # (A, U, n)
        better = fits & ~passed_over[:, None, near]
        fits = np.where(better.any(2, keepdims=True), better, fits)  # what counts goes before what does not
        for area, overlap in zip(*np.nonzero(fits.any(2)), strict=True):
            chosen = near[np.flatnonzero(fits[area, overlap])[-1]]
            taken[area, overlap, chosen] = True
            found[area, number] |= _BITS[overlap]
            if passed_over[area, chosen]:
                ignored[area, number] |= _BITS[overlap]
        ignored[:, number] |= np.where(out_of_range[:, number], ~found[:, number], 0).astype(np.uint16)
    return found, ignored, (~passed_over).sum(1)


def _ranked(matches: list[_Matched], area: int, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, best first [N], and how many right and wrong instances there are up to each. float64 [U, N] both"""
    scores = np.concatenate([match.scores[:limit] for match in matches])
    order = np.argsort(-scores, kind="stable")

    def flags(name: str) -> np.ndarray:
        """bool [U, N]"""
        bits = np.concatenate([getattr(match, name)[area, :limit] for match in matches])[order]
        return (bits & _BITS[:, None]) > 0

    found, counts = flags("found"), ~flags("ignored")
    right = np.cumsum(found & counts, axis=1, dtype=np.float64)
    wrong = np.cumsum(~found & counts, axis=1, dtype=np.float64)
    return scores[order], right, wrong


def _curve(matches: list[_Matched], area: int, limit: int, num_true: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision at each of `RECALLS` [U, 101], and the recall that is reached [U], with `limit` instances an image."""
    scores, right, wrong = _ranked(matches, area, limit)
    if not scores.size:
        return np.zeros((len(OVERLAPS), len(RECALLS))), np.zeros(len(OVERLAPS))
    recall = right / num_true
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    curve = np.zeros((len(OVERLAPS), len(RECALLS)))
    for overlap in range(len(OVERLAPS)):
        places = np.searchsorted(recall[overlap], RECALLS)
        reached = places < scores.size
        curve[overlap, reached] = precision[overlap, places[reached]]
    return curve, recall[:, -1]
