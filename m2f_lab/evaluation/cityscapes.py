"""Cityscapes: the figures of its benchmark, as its own scripts count them.

D predicted instances, T true ones, U = 10 overlaps asked for, H/W height/width.

Semantic segmentation has two figures, for classes and for categories (flat, construction, …). IoU counts pixels over
the whole data set. In iIoU, the pixels of a true instance weigh as much as those of an instance of average size: found
and missed pixels are multiplied by (average size of the class) / (size of this instance), invented ones are not.

Average precision (AP) is not COCO's. For each class and overlap, a predicted instance finds a true one if their
intersection over union exceeds the overlap. Of several that find the same one, that of the largest confidence is right
and the others are wrong. Groups, true instances below 100 pixels and void may be found but do not count; a
predicted instance that finds nothing is dropped if its share on them exceeds the overlap, and is wrong otherwise. The
curve has a point for each confidence that occurs; AP is the sum of the precisions, each times half the distance between
its neighbours' recalls. Instances of one image never depend on another: what stays of a predicted instance is its
confidence and two bits per overlap.

Pixels of labels that are not evaluated do not count as truth. Ids here are labelIds (road is 7), never trainIds.

Source: Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016, section 4, and its
scripts (cityscapesscripts 2.3.0, evalPixelLevelSemanticLabeling and evalInstanceLevelSemanticLabeling).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from m2f_lab.evaluation.counts import summed_over_processes

_CATEGORIES = {
    "void": ("unlabeled", "ego vehicle", "rectification border", "out of roi", "static", "dynamic", "ground"),
    "flat": ("road", "sidewalk", "parking", "rail track"),
    "construction": ("building", "wall", "fence", "guard rail", "bridge", "tunnel"),
    "object": ("pole", "polegroup", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"),
}
NAMES = tuple(name for names in _CATEGORIES.values() for name in names)
"""Names of the labelIds 0…33."""

CATEGORIES = tuple(_CATEGORIES)
_CATEGORY = np.array([number for number, names in enumerate(_CATEGORIES.values()) for _ in names])
_UNUSED = ("parking", "rail track", "guard rail", "bridge", "tunnel", "polegroup", "caravan", "trailer")
EVALUATED = np.array([name not in _CATEGORIES["void"] + _UNUSED for name in NAMES])
"""bool [34]: the 19 labels that count."""

THINGS = tuple(label for label in range(NAMES.index("person"), len(NAMES)) if EVALUATED[label])
"""labelIds of the eight classes that have instances and count."""

_WITH_INSTANCES = tuple(CATEGORIES.index(name) for name in ("human", "vehicle"))
_AVERAGE_SIZE = {
    "person": 3462.4756337644, "rider": 3930.4788056518, "car": 12794.0202738185, "truck": 27855.1264367816,
    "bus": 35732.1511111111, "train": 67583.7075812274, "motorcycle": 6298.7200839748, "bicycle": 4672.3249222261,
}  # fmt: skip
_SIZE = np.array([_AVERAGE_SIZE.get(name, np.nan) for name in NAMES])

OVERLAPS = np.arange(0.5, 1.0, 0.05)
_SMALLEST = 100
_IDS = 1000 * len(NAMES)  # instance ids are smaller
_BITS = 1 << np.arange(len(OVERLAPS), dtype=np.uint16)

IdMap = np.ndarray | Tensor
"""Any integers. [H, W]"""


class CityscapesPixelEvaluator:
    """Counts pixels: IoU and iIoU of classes and categories.

    Attributes:
        matrix: pixels of true labelId i that were predicted as labelId j. int64 [34, 34]
        weighted: found and missed pixels of instances by class [2, 34], then by category [2, 8], each in proportion to
            the size of its instance. float64 [84]
        without_instances: images that came without instance ids; if there are any, there is no iIoU.
    """

    def __init__(self) -> None:
        self.matrix = np.zeros((len(NAMES), len(NAMES)), np.int64)
        self.weighted = np.zeros(2 * (len(NAMES) + len(CATEGORIES)))
        self.without_instances = 0
        self.num_images = 0

    def update(self, prediction: IdMap, label_ids: IdMap, instance_ids: IdMap | None = None) -> None:
        """Count the pixels of one image.

        Args:
            prediction: labelIds. [H, W]
            label_ids: the truth, as in gtFine_labelIds. [H, W]
            instance_ids: the truth's instances, as in gtFine_instanceIds; needed for iIoU. [H, W]

        Raises:
            ValueError: the sizes differ, or an id does not exist.
        """
        predicted, truth = _checked("prediction", prediction, len(NAMES)), _checked("truth", label_ids, len(NAMES))
        _check_sizes(predicted, truth)
        pairs = np.bincount(truth.ravel() * len(NAMES) + predicted.ravel(), minlength=len(NAMES) ** 2)
        weighted = 0
        if instance_ids is not None:
            instances = _checked("truth", instance_ids, _IDS)
            _check_sizes(predicted, instances)
            weighted = _weighted_pixels(predicted, instances)
        self.matrix += pairs.reshape(self.matrix.shape)
        self.weighted += weighted
        self.without_instances += instance_ids is None
        self.num_images += 1

    def merge(self, other: CityscapesPixelEvaluator) -> None:
        """Add what another evaluator counted, on other images."""
        self.matrix += other.matrix
        self.weighted += other.weighted
        self.without_instances += other.without_instances
        self.num_images += other.num_images

    def all_reduce(self) -> None:
        """Add up the counts of all processes of `torch.distributed`; afterwards each holds the sum."""
        matrix, self.num_images = summed_over_processes(torch.from_numpy(self.matrix), self.num_images)
        weighted, self.without_instances = summed_over_processes(
            torch.from_numpy(self.weighted), self.without_instances
        )
        self.matrix, self.weighted = matrix.numpy(), weighted.numpy()

    def scores(self) -> dict:
        """Compute the figures under the names of Cityscapes' scripts: fractions, None where there is none."""
        found, missed = np.split(self.weighted[: 2 * len(NAMES)], 2)
        found_category, missed_category = np.split(self.weighted[2 * len(NAMES) :], 2)
        counted = self.matrix[EVALUATED]  # rows: pixels of other labels do not count
        categories = _CATEGORY[EVALUATED]
        classes, class_instances = {}, {}
        for label, name in enumerate(NAMES):
            right = int(self.matrix[label, label])
            invented = int(counted[:, label].sum()) - right
            classes[name] = _ratio(right, int(self.matrix[label].sum()) + invented) if EVALUATED[label] else None
            weighed = not self.without_instances and label in THINGS
            class_instances[name] = _ratio(found[label], found[label] + missed[label] + invented) if weighed else None
        of_category, category_instances = {}, {}
        for number, name in enumerate(CATEGORIES):
            own, rows = (number == _CATEGORY) & EVALUATED, categories == number
            true, right = int(counted[rows].sum()), int(counted[rows][:, own].sum())
            invented = int(counted[~rows][:, own].sum())
            of_category[name] = _ratio(right, true + invented)
            # the scripts add caravans and trailers here, which they do not above
            invented = int(counted[~rows][:, number == _CATEGORY].sum())
            total = found_category[number] + missed_category[number] + invented
            weighed = not self.without_instances and number in _WITH_INSTANCES
            category_instances[name] = _ratio(found_category[number], total) if weighed else None
        return {
            "averageScoreClasses": _mean(classes),
            "averageScoreInstClasses": _mean(class_instances),
            "averageScoreCategories": _mean(of_category),
            "averageScoreInstCategories": _mean(category_instances),
            "classScores": classes,
            "classInstScores": class_instances,
            "categoryScores": of_category,
            "categoryInstScores": category_instances,
        }

    def result(self) -> dict:
        """Compute the figures so far, in percent.

        Returns:
            "IoU", "iIoU", "IoU_categories", "iIoU_categories", means over what occurs; "num_images"; "classes", the 19
            that count, and "categories": dicts with "name", "IoU" and "iIoU". None where there is none.
        """
        scores = self.scores()

        def rows(names: Iterable[str], kind: str) -> list[dict]:
            iou, weighted = scores[f"{kind}Scores"], scores[f"{kind}InstScores"]
            return [{"name": name, "IoU": _percent(iou[name]), "iIoU": _percent(weighted[name])} for name in names]

        return {
            "IoU": _percent(scores["averageScoreClasses"]),
            "iIoU": _percent(scores["averageScoreInstClasses"]),
            "IoU_categories": _percent(scores["averageScoreCategories"]),
            "iIoU_categories": _percent(scores["averageScoreInstCategories"]),
            "num_images": self.num_images,
            "classes": rows((name for name, counts in zip(NAMES, EVALUATED, strict=True) if counts), "class"),
            "categories": rows(CATEGORIES[1:], "category"),
        }


class CityscapesInstanceEvaluator:
    """Matches instances image by image, and computes Cityscapes' AP."""

    def __init__(self) -> None:
        self.num_images = 0
        self._scores: dict[int, list[np.ndarray]] = {label: [] for label in THINGS}
        self._right: dict[int, list[np.ndarray]] = {label: [] for label in THINGS}  # a bit per overlap
        self._wrong: dict[int, list[np.ndarray]] = {label: [] for label in THINGS}
        self._num_true = np.zeros(len(NAMES), np.int64)

    def update(
        self, masks: Iterable[np.ndarray | Tensor], label_ids: Sequence[int], scores: Sequence[float], truth: IdMap
    ) -> None:
        """Match the instances of one image.

        Args:
            masks: of the predicted instances, which may overlap; what is not zero belongs to it. D × [H, W]
            label_ids: class of each. Labels without instances, and those that are not evaluated, are passed over. D
            scores: confidence of each. D
            truth: as in gtFine_instanceIds. [H, W]

        Raises:
            ValueError: the sizes differ, an id does not exist, or a score is not a number.
        """
        ids = _checked("truth", truth, _IDS)
        flat = ids.ravel()
        areas = np.bincount(flat, minlength=_IDS)
        shared, sizes, kept = [], [], []
        for number, (mask, label, score) in enumerate(zip(masks, label_ids, scores, strict=True)):
            if not 0 <= label < len(NAMES):
                raise ValueError(f"Instance {number} is of labelId {label}, expected 0…{len(NAMES) - 1}.")
            if not math.isfinite(score):
                raise ValueError(f"Instance {number} has the confidence {score}, expected a finite number.")
            mask = mask.cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
            _check_sizes(mask, ids)
            counts = np.bincount(flat[mask.ravel() != 0], minlength=_IDS)
            if label in THINGS and counts.any():
                shared.append(counts)
                sizes.append(counts.sum())
                kept.append(number)
        labels = np.array([label_ids[number] for number in kept], np.int64)
        confidences = np.array([scores[number] for number in kept], np.float64)
        shared = np.array(shared, np.int64).reshape(-1, _IDS)
        on_void = shared[:, : len(NAMES)][:, ~EVALUATED].sum(1)
        for label in THINGS:
            true = np.append(label, 1000 * label + np.flatnonzero(areas[1000 * label : 1000 * label + 1000]))
            self._num_true[label] += (areas[true[1:]] >= _SMALLEST).sum()
            own = labels == label
            if own.any():
                right, wrong = _match(
                    shared[own][:, true], np.array(sizes)[own], on_void[own], areas[true], confidences[own]
                )
                self._scores[label].append(confidences[own])
                self._right[label].append(right)
                self._wrong[label].append(wrong)
        self.num_images += 1

    def merge(self, other: CityscapesInstanceEvaluator) -> None:
        """Add what another evaluator matched, on other images."""
        for label in THINGS:
            self._scores[label] += other._scores[label]
            self._right[label] += other._right[label]
            self._wrong[label] += other._wrong[label]
        self._num_true += other._num_true
        self.num_images += other.num_images

    def all_reduce(self) -> None:
        """Gather the matches of all processes of `torch.distributed`; afterwards each holds all."""
        everyone = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, self)
        whole = CityscapesInstanceEvaluator()
        for other in everyone:
            whole.merge(other)
        vars(self).update(vars(whole))

    def precisions(self) -> np.ndarray:
        """Average precision by class and overlap, NaN for classes without true instances. float64 [8, U]"""
        table = np.full((len(THINGS), len(OVERLAPS)), np.nan)
        for row, label in zip(table, THINGS, strict=True):
            if self._num_true[label]:
                row[:] = 0.0
                if self._scores[label]:
                    scores, right, wrong = map(
                        np.concatenate, (self._scores[label], self._right[label], self._wrong[label])
                    )
                    for overlap, bit in enumerate(_BITS):
                        row[overlap] = _precision(scores, right & bit > 0, wrong & bit > 0, self._num_true[label])
        return table

    def scores(self) -> dict:
        """Compute the figures under the names of Cityscapes' scripts: fractions, None where there is none."""
        table = self.precisions()
        present = ~np.isnan(table[:, 0])

        def number(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        return {
            "allAp": float(table[present].mean()) if present.any() else None,
            "allAp50%": float(table[present, 0].mean()) if present.any() else None,
            "classes": {
                NAMES[label]: {"ap": number(row.mean()), "ap50%": number(row[0])}
                for label, row in zip(THINGS, table, strict=True)
            },
        }

    def result(self) -> dict:
        """Compute the figures so far, in percent.

        Returns:
            "AP", "AP50", "num_images", and "classes": one dict per class with "name", "AP", "AP50" and "instances", the
            number of true ones. None where there is no true instance.
        """
        scores = self.scores()
        return {
            "AP": _percent(scores["allAp"]),
            "AP50": _percent(scores["allAp50%"]),
            "num_images": self.num_images,
            "classes": [
                {
                    "name": NAMES[label],
                    "AP": _percent(scores["classes"][NAMES[label]]["ap"]),
                    "AP50": _percent(scores["classes"][NAMES[label]]["ap50%"]),
                    "instances": int(self._num_true[label]),
                }
                for label in THINGS
            ],
        }


def _checked(name: str, values: IdMap, limit: int) -> np.ndarray:
    """Ids as int64 [H, W], none of them outside 0…limit-1."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 2 or array.dtype.kind not in "iu":
        raise ValueError(f"The {name} is {array.dtype} {list(array.shape)}, expected integer ids [H, W].")
    if array.size and not 0 <= array.min() <= array.max() < limit:
        wrong = np.unique(array[(array < 0) | (array >= limit)])[:5].tolist()
        hint = "labelId * 1000 + n, or a bare labelId" if limit == _IDS else "labelIds (road is 7), not trainIds"
        raise ValueError(f"The {name} holds the ids {wrong}, expected 0…{limit - 1}: {hint}.")
    return array.astype(np.int64)


def _check_sizes(predicted: np.ndarray, truth: np.ndarray) -> None:
    if predicted.shape != truth.shape:
        raise ValueError(
            f"The prediction is {list(predicted.shape)}, the truth {list(truth.shape)}: they are compared at the size "
            "of the truth."
        )


def _weighted_pixels(predicted: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Found and missed pixels of the true instances, weighted by their sizes, as in `weighted`. [84]"""
    single = ids > 1000
    ids, predicted = ids[single], predicted[single]
    labels = ids // 1000
    sizes = np.bincount(ids, minlength=_IDS)
    found = np.bincount(ids[predicted == labels], minlength=_IDS)
    in_category = np.bincount(ids[_CATEGORY[predicted] == _CATEGORY[labels]], minlength=_IDS)
    instances = np.flatnonzero(sizes)
    label = instances // 1000
    stuff = instances[EVALUATED[label] & np.isnan(_SIZE[label])].tolist()
    if stuff:
        raise ValueError(f"The truth has the instances {stuff[:5]}, but {NAMES[stuff[0] // 1000]} has no instances.")
    instances, label = instances[EVALUATED[label]], label[EVALUATED[label]]
    weight = _SIZE[label] / sizes[instances]
    parts = []
    for pixels, groups, count in ((found, label, len(NAMES)), (in_category, _CATEGORY[label], len(CATEGORIES))):
        parts.append(np.bincount(groups, pixels[instances] * weight, count))
        parts.append(np.bincount(groups, (sizes - pixels)[instances] * weight, count))
    return np.concatenate(parts)


def _match(
    shared: np.ndarray, sizes: np.ndarray, on_void: np.ndarray, areas: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match predicted instances of one class and image.

    Args:
        shared: pixels shared with the group, which comes first, and the true instances. [D, 1 + T]
        sizes, on_void, scores: pixels of the predicted instances, those on void, and confidences. [D]
        areas: of the group and the true instances. [1 + T]

    Returns:
        Bit u of each instance says that it is right, or wrong, at overlap u; neither, if it does not count. uint16 [D]
    """
    iou = shared / (areas + sizes[:, None] - shared)
    finds = iou[..., None] > OVERLAPS  # [D, 1 + T, U]; at most one, as true instances share no pixels
    is_group, is_small = np.arange(len(areas)) == 0, areas < _SMALLEST
    order = np.argsort(-scores, kind="stable")
    claims = finds[order] & ~(is_group | is_small)[:, None]
    first = claims & (np.cumsum(claims, axis=0) == 1)
    right, doubled = np.empty((2, len(scores), len(OVERLAPS)), bool)
    right[order], doubled[order] = first.any(1), (claims & ~first).any(1)
    ignored = on_void + (shared * (is_group.astype(int) + is_small)).sum(1)  # a small group twice, as in the scripts
    dropped = (ignored / sizes)[:, None] > OVERLAPS
    wrong = doubled | (~finds.any(1) & ~dropped)
    return right @ _BITS, wrong @ _BITS


def _precision(scores: np.ndarray, right: np.ndarray, wrong: np.ndarray, num_true: int) -> float:
    """Area under the curve of one class and overlap; the order of equal confidences does not matter."""
    counts = right | wrong
    if not counts.any():
        return 0.0
    distinct, place = np.unique(scores[counts], return_inverse=True)
    at_score = np.stack([np.bincount(place, flags[counts], len(distinct)) for flags in (right, wrong)])
    found, invented = at_score[:, ::-1].cumsum(1)[:, ::-1]  # with at least this confidence
    precision = found / (found + invented)
    recall = np.concatenate([found[:1], found, [0, 0]]) / num_true
    widths = 0.5 * (recall[:-2] - recall[2:])
    return float(np.append(precision, precision[-1]) @ widths)


def _ratio(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _mean(values: dict[str, float | None]) -> float | None:
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
