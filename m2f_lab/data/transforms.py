"""The training transforms of the paper: resize, crop, jitter the colours, flip, pad.

H/W height/width of the sample, h/w of the crop.

Same steps, order and odds as the official mapper for semantic segmentation (detectron2's ResizeShortestEdge,
RandomCrop_CategoryAreaConstraint, ColorAugSSDTransform and RandomFlip, then padding), with two liberties:
- Only the crop is resized, not the whole image, which may be ten times larger. The pixels are PyTorch's, which differ
  from Pillow's by two grey levels at most (`crop_of_resized_image`).
- Labels are read at the centre of each new pixel, as the image is. The official code reads them at its corner, half a
  pixel off.

Everything random is drawn from the generator that is passed in, so a sample's fate depends on nothing else.

Source: Mask2Former, section 4.1 and the appendix on semantic segmentation; DeepLab's protocol before it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.data.dataset import Sample
from m2f_lab.data.jitter import ColorJitter
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import IGNORE, Target

IMAGE_PADDING = 128  # before normalisation, close to the mean colour

_CROP_TRIES = 10


class TrainingTransform:
    """Make a training example of a sample.

    transform = TrainingTransform(recipe.data)
    image, target = transform(dataset[3], np.random.default_rng(0))
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config

    def __call__(self, sample: Sample, rng: np.random.Generator) -> tuple[Tensor, Target]:
        """Draw one variant.

        Args:
            sample: image and labels, of any size
            rng: where every random choice comes from

        Returns:
            The image, uint8 [3, h, w], padded with 128 at the bottom and right where it is too small, and its
            target of size (h, w), ignored there.
        """
        config = self.config
        shortest_edge = config.shortest_edges[rng.integers(len(config.shortest_edges))]
        size = resized_size(sample.label_map.shape, shortest_edge, config.longest_edge)
        box = _draw_box(sample.label_map, size, config, rng)
        jitter = ColorJitter.draw(rng) if config.color_jitter else ColorJitter()
        columns = slice(None, None, -1 if config.flip and rng.random() < 0.5 else 1)

        *_, height, width = box
        image = np.full((3, *config.crop_size), IMAGE_PADDING, np.uint8)
        label_map = np.full(config.crop_size, IGNORE, np.uint8)
        crop = crop_of_resized_image(sample.image, size, box)
        image[:, :height, :width] = crop[:, columns].transpose(2, 0, 1)
        label_map[:height, :width] = crop_of_resized_labels(sample.label_map, size, box)[:, columns]
        jitter.apply(image[:, :height, :width])
        return torch.from_numpy(image), Target.from_label_map(torch.from_numpy(label_map))


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


Box = tuple[int, int, int, int]
"""Top, left, height, width of a crop, in pixels of the resized image."""


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


def crop_of_resized_labels(label_map: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """The same crop of the labels, resized with nearest neighbours. [h, w]"""
    top, left, height, width = box
    rows = _nearest(label_map.shape[0], size[0], top, height)
    columns = _nearest(label_map.shape[1], size[1], left, width)
    return label_map[rows][:, columns]


def _nearest(old: int, new: int, start: int, count: int) -> np.ndarray:
    """In which old pixel the centres of `count` new pixels lie: floor((i + 1/2) * old / new), in whole numbers."""
    return (2 * np.arange(start, start + count) + 1) * old // (2 * new)


def _draw_box(label_map: np.ndarray, size: tuple[int, int], config: DataConfig, rng: np.random.Generator) -> Box:
    """Draw where to crop; draw again, ten times at most, where one class leaves too little for the others."""
    height, width = np.minimum(config.crop_size, size).tolist()
    for _ in range(_CROP_TRIES):
        box = (int(rng.integers(size[0] - height + 1)), int(rng.integers(size[1] - width + 1)), height, width)
        if config.single_category_max_area >= 1:
            break
        crop = crop_of_resized_labels(label_map, size, box)
        counts = np.bincount(crop.ravel(), minlength=IGNORE + 1)[:IGNORE]
        if counts.max() < counts.sum() * config.single_category_max_area:
            break
    return box
