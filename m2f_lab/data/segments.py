"""Segments of one image: the annotation that semantic, panoptic and instance targets are views of.

T segments, K classes, H/W height/width of the image.

Data sets say in three ways where a segment is: one map of segment numbers, where none overlap (panoptic pictures,
instance ids); a mask each; or polygons each, which stay polygons until a crop of the resized image is drawn, as in the
official mappers.

Source: the mappers of the official implementation; COCO's panoptic and instance formats.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from m2f_lab.structures import IGNORE, Target

NO_SEGMENT = -1

Polygons = tuple[np.ndarray, ...]
"""Rings of one segment, (x, y) in pixels. float64 [N, 2] each"""

Shape = np.ndarray | Polygons
"""A segment's mask, bool [H, W], or its polygons."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one image, in the order of its annotation.

    Attributes:
        labels: class of each segment, 0…K-1. int64 [T]
        crowd: True for groups whose members were not told apart; they are no targets, and no errors. bool [T]
        size: height and width of the image in pixels.
        id_map: number of the segment of each pixel, 0…T-1, or -1 where there is none. int32 [H, W]; or None
        shapes: of each segment, which may overlap. T × Shape; or None
    """

    labels: np.ndarray
    crowd: np.ndarray
    size: tuple[int, int]
    id_map: np.ndarray | None = None
    shapes: tuple[Shape, ...] | None = None

    def __post_init__(self) -> None:
        if (self.id_map is None) == (self.shapes is None):
            raise ValueError("Segments lie in an id_map [H, W] or have a shape each; give one of the two.")
        if not len(self.labels) == len(self.crowd) == len(self.labels if self.shapes is None else self.shapes):
            raise ValueError(f"Each of {len(self.labels)} segments needs one label, one crowd flag and one shape.")

    @classmethod
    def from_id_map(
        cls, id_map: np.ndarray, ids: Sequence[int], labels: Sequence[int], crowd: Sequence[bool] | None = None
    ) -> Segments:
        """Segments of a map of ids.

        Args:
            id_map: id of the segment of each pixel; pixels of other ids belong to no segment. integers [H, W]
            ids: of the segments, in their order; they need not occur in the map. T
            labels: class of each. T
            crowd: by default no segment is crowd. T
        """
        found, place = np.unique(id_map, return_inverse=True)
        number = {identity: position for position, identity in enumerate(ids)}
        table = np.array([number.get(identity, NO_SEGMENT) for identity in found.tolist()], np.int32)
        crowd = np.zeros(len(ids), bool) if crowd is None else np.asarray(crowd, bool)
        return cls(np.array(labels, np.int64), crowd, id_map.shape, id_map=table[place].reshape(id_map.shape))

    def __len__(self) -> int:
        return len(self.labels)

    def mask(self, number: int) -> np.ndarray:
        """Pixels of one segment. bool [H, W]"""
        if self.id_map is not None:
            return self.id_map == number
        shape = self.shapes[number]
        return rasterized(shape, self.size) if isinstance(shape, tuple) else shape

    def masks(self) -> np.ndarray:
        """Pixels of all segments. bool [T, H, W]"""
        if self.id_map is not None:
            return self.id_map == np.arange(len(self), dtype=np.int32)[:, None, None]
        masks = np.zeros((len(self), *self.size), bool)
        for number, mask in enumerate(masks):
            mask[:] = self.mask(number)
        return masks

    @cached_property
    def areas(self) -> np.ndarray:
        """Pixels of each segment. int64 [T]"""
        if self.id_map is not None:
            return np.bincount(self.id_map[self.id_map >= 0], minlength=len(self))
        return np.array([self.mask(number).sum() for number in range(len(self))], np.int64)

    def select(self, kept: Collection[int] | np.ndarray) -> Segments:
        """Some of the segments, in the order given, by number or by a flag each."""
        kept = np.asarray(kept)
        kept = np.flatnonzero(kept) if kept.dtype == bool else kept.astype(np.int64)
        parts = {"labels": self.labels[kept], "crowd": self.crowd[kept]}
        if self.shapes is not None:
            return replace(self, **parts, shapes=tuple(self.shapes[number] for number in kept))
        table = np.full(len(self) + 1, NO_SEGMENT, np.int32)  # the last entry is that of -1
        table[kept] = np.arange(len(kept), dtype=np.int32)
        return replace(self, **parts, id_map=table[self.id_map])

    def label_map(self, ignore: int = IGNORE) -> np.ndarray:
        """Class of each pixel, `ignore` where no segment is; of segments that overlap, the later one.

        uint8, or uint16 if `ignore` needs it. [H, W]
        """
        kind = np.uint8 if ignore <= IGNORE else np.uint16
        if self.id_map is not None:
            return np.append(self.labels, ignore).astype(kind)[self.id_map]
        label_map = np.full(self.size, ignore, kind)
        for number, label in enumerate(self.labels.tolist()):
            label_map[self.mask(number)] = label
        return label_map

    def target(self) -> Target:
        """All segments but crowd, in order; those that no pixel is left of as well."""
        wanted = self.select(~self.crowd)
        labels = torch.from_numpy(wanted.labels)
        if wanted.id_map is None:
            return Target(labels, masks=torch.from_numpy(wanted.masks()))
        return Target.from_id_map(torch.from_numpy(wanted.id_map), labels)


def rasterized(polygons: Polygons, size: tuple[int, int]) -> np.ndarray:
    """Pixels inside polygons by COCO's rule. bool [*size]"""
    from faster_coco_eval.core import mask as coco

    height, width = size
    rings = [ring.ravel().tolist() for ring in polygons if len(ring) >= 3]
    if not rings:
        return np.zeros(size, bool)
    return coco.decode(coco.merge(coco.frPyObjects(rings, height, width))).astype(bool)


def clipped(rings: Sequence[np.ndarray], box: tuple[float, float, float, float]) -> Polygons:
    """Parts of polygons inside a box (left, top, right, bottom); holes are lost, as in the official code."""
    import shapely

    inside = shapely.box(*box)
    parts = []
    for ring in rings:
        if len(ring) < 3:
            continue
        polygon = shapely.Polygon(ring).buffer(0)  # mends rings that cross themselves
        parts += shapely.get_parts(polygon.intersection(inside)).tolist()
    return tuple(
        np.array(part.exterior.coords)[:-1] for part in parts if isinstance(part, shapely.Polygon) and not part.is_empty
    )
