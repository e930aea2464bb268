"""Errors by place: how far from an outline they are, and in regions of which size.

K classes, H/W height/width.

Pixels are compared as a picture shows them: of instances, those with a score of at least one half, and what no
instance covers is background. Everything here is counted in whole pixels, image by image, and added up.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from m2f_lab.data import Sample
from m2f_lab.evaluation.instance import AREAS
from m2f_lab.inference.files import label_map_of
from m2f_lab.structures import Prediction, ignored_label

DISTANCES = (1, 2, 4, 8, 16, 32)
"""Bands of distance end here, in pixels; one more band holds all that is farther away."""

NEAR = 4
"""Pixels at most so far from an outline are called near it."""

SIZES = {"small": AREAS["s"], "medium": AREAS["m"], "large": AREAS["l"]}
"""Sizes of regions, in pixels; the end of one is the beginning of the next, and belongs to the smaller one."""


class Breakdown:
    """Counts pixels, and those that are wrong, by distance and by size.

    Args:
        num_classes: K

    Attributes:
        distances: pixels, and wrong ones, of each band of `DISTANCES`. int64 [7, 2]
        regions: of true regions their number, pixels and right pixels; then the same of predicted regions, for each of
            `SIZES`. A region is what neighbours with an edge join. int64 [3, 6]
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.distances = np.zeros((len(DISTANCES) + 1, 2), np.int64)
        self.regions = np.zeros((len(SIZES), 6), np.int64)

    def update(self, prediction: Prediction, sample: Sample) -> float | None:
        """Count an image.

        Args:
            prediction: of any task
            sample: with the truth

        Returns:
            The share of wrong pixels among those near an outline, in percent; None if there are none.
        """
        predicted = label_map_of(prediction, ignore=ignored_label(self.num_classes))
        if prediction.task == "instance":  # whose label map, if there is one, ignores the background
            truth, known = _with_background(sample, self.num_classes)
            predicted = np.where(predicted < self.num_classes, predicted, self.num_classes)
        else:
            truth, known = sample.label_map, sample.label_map < self.num_classes
        right = (predicted == truth) & known
        if prediction.task == "semantic":
            self.regions[:, :3] += _by_size(truth, known, right)
            self.regions[:, 3:] += _by_size(predicted, known, right)
        single = sample.segments is not None and sample.segments.id_map is not None
        bands = distance_bands(sample.segments.id_map if single else truth)
        pairs = 2 * bands[known] + ~right[known]
        counts = np.bincount(pairs, minlength=2 * len(self.distances)).reshape(-1, 2)
        counts[:, 0] += counts[:, 1]
        self.distances += counts
        pixels, wrong = counts[: DISTANCES.index(NEAR) + 1].sum(0).tolist()
        return 100 * wrong / pixels if pixels else None

    def by_distance(self) -> list[dict]:
        """Of each band its first and last distance, "pixels", and "error", the share of wrong ones in percent."""
        ends = (*DISTANCES, None)
        starts = (1, *(end + 1 for end in DISTANCES))
        return [
            {"from": start, "to": end, "pixels": pixels, "error": 100 * wrong / pixels if pixels else None}
            for start, end, (pixels, wrong) in zip(starts, ends, self.distances.tolist(), strict=True)
        ]

    def by_size(self) -> list[dict]:
        """Of each size the number of true regions, and how many percent of their pixels were found ("recall"); the
        same of predicted regions, and how many percent of their pixels are right ("precision").
        """
        rows = []
        for size, (true, pixels, found, predicted, said, right) in zip(SIZES, self.regions.tolist(), strict=True):
            recall, precision = (100 * a / b if b else None for a, b in ((found, pixels), (right, said)))
            rows.append({"size": size, "true": true, "recall": recall, "predicted": predicted, "precision": precision})
        return rows


def distance_bands(truth: np.ndarray) -> np.ndarray:
    """The band of `DISTANCES` that each pixel is in.

    A pixel that touches one of another value has the distance 1, its eight neighbours have 2, and so on. Each band is
    the one before, moved by half of its end to all sides: a few steps over the picture, whatever the distances.

    Args:
        truth: classes or ids of segments. integers [H, W]

    Returns:
        uint8 [H, W]
    """
    near = np.zeros(truth.shape, bool)
    for pixels, edge in ((truth, near), (truth.T, near.T)):
        differs = pixels[1:] != pixels[:-1]
        edge[1:] |= differs
        edge[:-1] |= differs
    bands = (~near).astype(np.uint8)
    for end in DISTANCES[1:]:
        near = _spread(_spread(near, end // 2).T, end // 2).T
        bands += ~near
    return bands


def _spread(mask: np.ndarray, by: int) -> np.ndarray:
    """A mask, with itself moved up and down."""
    spread = mask.copy()
    spread[by:] |= mask[:-by]
    spread[:-by] |= mask[by:]
    return spread


def _by_size(labels: np.ndarray, known: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Number of regions, their known pixels and those that are right. int64 [3, 3]"""
    begins = np.ones(labels.shape, bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    starts = np.flatnonzero(begins)
    numbers = (np.cumsum(begins, dtype=np.int32) - 1).reshape(labels.shape)  # of runs of equal pixels in a row
    touch = labels[1:] == labels[:-1]
    touch[:, 1:] &= begins[1:, 1:] | begins[:-1, 1:]  # two runs need to be told once
    above, below = numbers[:-1][touch], numbers[1:][touch]
    graph = coo_matrix((np.ones(above.size, np.int8), (above, below)), shape=(starts.size, starts.size))
    _, region = connected_components(graph, directed=False)
    of_runs = [
        np.diff(starts, append=labels.size),
        *(np.add.reduceat(m.ravel(), starts, dtype=np.int64) for m in (known, right)),
    ]
    area, pixels, good = (np.bincount(region, weights).astype(np.int64) for weights in of_runs)
    counted = pixels > 0
    size = np.searchsorted([end for _, end in SIZES.values()][:-1], area[counted])
    of_regions = (np.ones(size.size), pixels[counted], good[counted])
    return np.stack([np.bincount(size, values, len(SIZES)).astype(np.int64) for values in of_regions], axis=1)


def _with_background(sample: Sample, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class of each pixel, K where no instance is; and False where crowd is. [H, W] each"""
    segments = sample.segments
    labels = segments.label_map(ignored_label(num_classes))
    known = np.ones(segments.size, bool)
    for number in np.flatnonzero(segments.crowd).tolist():
        known &= ~segments.mask(number)
    return np.where(labels < num_classes, labels, num_classes), known
