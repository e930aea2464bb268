"""The training transforms of the paper: resize, crop, jitter the colours, flip, pad; or large-scale jitter.

H/W height/width of the sample, h/w of the crop, T segments.

Same steps, order and odds as the official mappers (detectron2's ResizeShortestEdge, RandomCrop_CategoryAreaConstraint,
ColorAugSSDTransform and RandomFlip, then padding; for COCO RandomFlip, ResizeScale and FixedSizeCrop), with one
liberty: only the crop is resized, not the whole image, which may be ten times larger. The pixels are PyTorch's, which
differ from Pillow's by two grey levels at most (`crop_of_resized_image`).

Targets are those of the official mappers in every pixel. They read class maps at the corner of each new pixel, id maps
and masks at its centre, and keep polygons until the crop is drawn.

Everything random is drawn from the generator that is passed in, so a sample's fate depends on nothing else.

Source: Mask2Former, section 4.1 and the appendix on semantic segmentation; DeepLab's protocol before it; large-scale
jitter from Ghiasi et al., "Simple copy-paste", 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.data.dataset import Sample
from m2f_lab.data.jitter import ColorJitter
from m2f_lab.data.segments import NO_SEGMENT, Polygons, Segments, Shape, clipped
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import IGNORE, WIDE_IGNORE, Target

IMAGE_PADDING = 128  # before normalisation, close to the mean colour

_CROP_TRIES = 10

Box = tuple[int, int, int, int]
"""Top, left, height, width of a crop, in pixels of the resized image."""


@dataclass(frozen=True)
class Placement:
    """Where a training example lies in its image.

    Attributes:
        size: height and width that the image is resized to, in pixels
        box: of the crop, inside the resized image
        flip: left becomes right
        flip_first: before everything else, instead of after the crop; rounding tells the two apart
    """

    size: tuple[int, int]
    box: Box
    flip: bool = False
    flip_first: bool = False

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] → [h, w, 3]"""
        first, last = self._columns()
        return crop_of_resized_image(np.ascontiguousarray(image[:, first]), self.size, self.box)[:, last]

    def class_map(self, label_map: np.ndarray) -> np.ndarray:
        """Classes of pixels. [H, W] → [h, w]"""
        first, last = self._columns()
        return crop_of_resized_labels(label_map[:, first], self.size, self.box, corners=True)[:, last]

    def map(self, ids: np.ndarray) -> np.ndarray:
        """Ids or a mask. [H, W] → [h, w]"""
        first, last = self._columns()
        return crop_of_resized_labels(ids[:, first], self.size, self.box)[:, last]

    def polygons(self, polygons: Polygons, size: tuple[int, int]) -> Polygons:
        """Polygons of an image of `size` as polygons of the crop."""
        top, left, height, width = self.box
        scale = np.array([self.size[1] / size[1], self.size[0] / size[0]])
        mirrored = (_mirrored(ring, size[1]) if self.flip and self.flip_first else ring for ring in polygons)
        rings = clipped([ring * scale for ring in mirrored], (left, top, left + width, top + height))
        rings = [ring - (left, top) for ring in rings]
        return tuple(_mirrored(ring, width) if self.flip and not self.flip_first else ring for ring in rings)

    def segments(self, segments: Segments, size: tuple[int, int]) -> Segments:
        """Segments of the crop, padded at the bottom and right to `size`; polygons become masks."""
        if segments.id_map is not None:
            id_map = np.full(size, NO_SEGMENT, np.int32)
            id_map[: self.box[2], : self.box[3]] = self.map(segments.id_map)
            return replace(segments, size=size, id_map=id_map)

        def placed(shape: Shape) -> Shape:
            if isinstance(shape, tuple):
                return self.polygons(shape, segments.size)
            mask = np.zeros(size, bool)
            mask[: self.box[2], : self.box[3]] = self.map(shape)
            return mask

        return replace(segments, size=size, shapes=tuple(placed(shape) for shape in segments.shapes))

    def _columns(self) -> tuple[slice, slice]:
        """Columns in their order before the resize and after the crop."""
        order = slice(None, None, -1 if self.flip else 1)
        return (order, slice(None)) if self.flip_first else (slice(None), order)


def _mirrored(ring: np.ndarray, width: int) -> np.ndarray:
    return np.stack([width - ring[:, 0], ring[:, 1]], axis=1)


class TrainingTransform:
    """Make a training example of a sample.

    transform = TrainingTransform(recipe.data, recipe.task)
    image, target = transform(dataset[3], np.random.default_rng(0))
    """

    def __init__(self, config: DataConfig, task: str = "semantic") -> None:
        self.config, self.task = config, task

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Target]:
        """Draw one variant.

        Args:
            sample: image and labels, of any size
            rng: where every random choice comes from

        Returns:
            The image, uint8 [3, h, w], padded with 128 at the bottom and right where it is too small, and its
            target of size (h, w), ignored there.

        Raises:
            ValueError: the sample has no annotation for the task.
        """
        config = self.config
        if config.scale_range is not None:
            place, jitter = _large_scale_jitter(sample.image.shape[:2], config, rng), ColorJitter()
        else:
            shortest_edge = config.shortest_edges[rng.integers(len(config.shortest_edges))]
            size = resized_size(sample.image.shape[:2], shortest_edge, config.longest_edge)
            box = _draw_box(sample.label_map, size, config, rng)
            jitter = ColorJitter.draw(rng) if config.color_jitter else ColorJitter()
            place = Placement(size, box, flip=config.flip and rng.random() < 0.5)

        *_, height, width = place.box
        image = np.full((3, *config.crop_size), IMAGE_PADDING, np.uint8)
        image[:, :height, :width] = place.image(sample.image).transpose(2, 0, 1)
        jitter.apply(image[:, :height, :width])
        return torch.from_numpy(image), self.target(sample, place)

    def target(self, sample: Sample, place: Placement) -> Target:
        """Target of the crop at a place, padded to the size of the crop."""
        if (sample.label_map if self.task == "semantic" else sample.segments) is None:
            raise ValueError(
                f"{sample.name} has no annotation for task={self.task!r}; open its data set with "
                f"open_dataset(…, task={self.task!r})."
            )
        if self.task == "semantic":
            ignore = _ignored(sample.label_map)
            label_map = np.full(self.config.crop_size, ignore, sample.label_map.dtype)
            label_map[: place.box[2], : place.box[3]] = place.class_map(sample.label_map)
            return Target.from_label_map(label_map, ignore)
        segments = place.segments(sample.segments, self.config.crop_size)
        # Large-scale jitter of instances is the only official mapper that drops what the crop has lost.
        drops_empty = self.task == "instance" and self.config.scale_range is not None
        return segments.select(~segments.crowd & (segments.areas > 0)).target() if drops_empty else segments.target()


def _ignored(label_map: np.ndarray) -> int:
    """The label of pixels to ignore in a map of this type; see `Classes.label_dtype`."""
    return IGNORE if label_map.dtype.itemsize == 1 else WIDE_IGNORE


def _large_scale_jitter(size: tuple[int, int], config: DataConfig, rng: np.random.Generator) -> Placement:
    """Draw a scale and a place. The image is fitted into the scaled crop; one number places both of its axes."""
    flip = config.flip and rng.random() < 0.5
    scale = rng.uniform(*config.scale_range)
    fitted = min(scale * crop / edge for crop, edge in zip(config.crop_size, size, strict=True))
    resized = tuple(max(1, round(edge * fitted)) for edge in size)
    place = rng.random()
    height, width = np.minimum(config.crop_size, resized).tolist()
    top, left = (round((edge - kept) * place) for edge, kept in zip(resized, (height, width), strict=True))
    return Placement(resized, (top, left, height, width), flip, flip_first=True)


def resized_size(size: tuple[int, int], shortest_edge: int, longest_edge: int | None) -> tuple[int, int]:
    """The size at which the shorter edge is `shortest_edge`, or less if the longer would exceed `longest_edge`.

    Args:
        size: height and width in pixels
        shortest_edge, longest_edge: in pixels; None: no limit

    Returns:
        Height and width in pixels, at the same aspect.
    """
    height, width = size
    scale = shortest_edge / min(height, width)
    new_height, new_width = (shortest_edge, scale * width) if height < width else (scale * height, shortest_edge)
    if longest_edge is not None and max(new_height, new_width) > longest_edge:
        scale = longest_edge / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    # A very long image must not vanish.
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def crop_of_resized_image(image: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """Crop of the bilinearly resized (when shrinking, antialiased) image. uint8 [h, w, 3]

    An image is resized along x, then along y. This does the first for the rows that the crop will need and the second
    for its columns. PyTorch has a vectorised resize for bytes, two to four times as fast as Pillow's, whose weights it
    rounds to 16 bits: on photographs two values in a thousand come out a grey level off, in some sizes two in a hundred
    (of noise, four), and hardly any by two levels; none by more.
    """
    top, left, height, width = box
    scale = image.shape[0] / size[0]  # source rows per resized row
    reach = max(scale, 1) + 1  # a triangle filter reaches so many source rows; one more for rounding
    first = max(0, math.floor(top * scale - reach))
    last = min(image.shape[0], math.ceil((top + height) * scale + reach))
    columns = np.empty((image.shape[0], width, 3), np.uint8)  # rows out of reach stay undefined, and unused
    columns[first:last] = _resized(image[first:last], (last - first, size[1]))[:, left : left + width]
    return _resized(columns, (size[0], width))[top : top + height]


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] → [*size, 3]"""
    # A batch of one before the axes change places: this is how PyTorch sees that a pixel's channels lie together, and
    # takes and gives them so, which is twice as fast.
    pixels = torch.from_numpy(image[None]).permute(0, 3, 1, 2)
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def crop_of_resized_labels(label_map: np.ndarray, size: tuple[int, int], box: Box, corners: bool = False) -> np.ndarray:
    """The same crop of the labels, resized with nearest neighbours. [h, w]

    Args:
        corners: read at the upper left corner of each new pixel, as PyTorch's "nearest" does, instead of its centre,
            as Pillow does. The official code reads class maps so, half a pixel off the image
    """
    top, left, height, width = box
    nearest = _nearest_to_corners if corners else _nearest_to_centres
    rows = nearest(label_map.shape[0], size[0], top, height)
    columns = nearest(label_map.shape[1], size[1], left, width)
    return label_map[rows][:, columns]


def _nearest_to_centres(old: int, new: int, start: int, count: int) -> np.ndarray:
    """The old pixel that the centre of each new one lies in: floor((i + 1/2) * old / new), rounded as Pillow does."""
    steps = np.full(start + count, old / new)
    steps[0] /= 2
    return np.cumsum(steps)[start:].astype(int)  # a centre between two pixels falls to the side that Pillow's does


def _nearest_to_corners(old: int, new: int, start: int, count: int) -> np.ndarray:
    """The old pixel that the corner of each new one lies in: floor(i * old / new), rounded as PyTorch does."""
    return np.minimum(np.arange(start, start + count, dtype=np.float32) * np.float32(old / new), old - 1).astype(int)


def _draw_box(label_map: np.ndarray | None, size: tuple[int, int], config: DataConfig, rng: np.random.Generator) -> Box:
    """Draw where to crop; draw again, ten times at most, where one class leaves too little for the others."""
    height, width = np.minimum(config.crop_size, size).tolist()
    for _ in range(_CROP_TRIES):
        box = (int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1)), height, width)
        if config.single_category_max_area >= 1 or label_map is None:
            break
        crop = crop_of_resized_labels(label_map, size, box)
        counts = np.bincount(crop.ravel(), minlength=1)[: _ignored(label_map)]
        if counts.max() < counts.sum() * config.single_category_max_area:
            break
    return box
