"""Sampling points of deformable attention, for every position of the pixel decoder, as plain arrays.

N encoder layers, S positions of strides 32, 16 and 8 together, L levels, P points per head and level, H/W
height/width. Levels are in the order of the pixel decoder: strides 32, 16, 8.

Source: Deformable DETR (Zhu et al. 2021), section 4.1; Mask2Former (Cheng et al. 2022), section 3.2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from m2f_lab.explore.parts.reading import AnyImage, Model
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import look
from m2f_lab.model.deformable_attention import DeformableAttention
from m2f_lab.ops.deformable_sampling import SamplingPlan
from m2f_lab.structures import cell_centres

STRIDES = (32, 16, 8)


@dataclass(frozen=True)
class SamplingPoints:
    """Points that one position reads, in every encoder layer.

    Attributes:
        stride: of the level the position belongs to, in pixels.
        cell: row and column of the position on that level.
        location: (x, y) of the position's centre, in 0…1 of the image. [2]
        points: (x, y) in 0…1 of the image; others lie beyond it. float32 [N, heads, L, P, 2]
        weights: they add up to 1 for each layer and head. float32 [N, heads, L, P]
        image_size: height and width of the image as the model saw it, in pixels.
    """

    stride: int
    cell: tuple[int, int]
    location: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    image_size: tuple[int, int]

    @property
    def level_shares(self) -> np.ndarray:
        """Share of the weight on each level. [N, heads, L]"""
        return self.weights.sum(axis=3)

    @property
    def distances(self) -> np.ndarray:
        """Mean distance of a head's points, by weight, in pixels. [N, heads]"""
        height, width = self.image_size
        return _mean_distance((self.points - self.location) * np.array([width, height], np.float32), self.weights)

    @property
    def outside(self) -> np.ndarray:
        """The share of a head's points that lie beyond the image, in its padding or beyond that. [N, heads]"""
        beyond = ((self.points < 0) | (self.points > 1)).any(axis=-1)
        return beyond.mean(axis=(2, 3), dtype=np.float32)


@dataclass(frozen=True)
class SamplingTrace:
    """The sampling points of all positions of one image.

    Kept as offsets: half precision rounds an offset of 100 pixels by a thirtieth of a pixel at most, but a place in 0…1
    of 2048 pixels by half a pixel.

    Attributes:
        offsets: from the position's centre, (x, y) in pixels. floating point [N, S, heads, L, P, 2]
        weights: floating point [N, S, heads, L, P]
        level_sizes: height and width of each level. L
        image_size: height and width of the image as the model saw it, in pixels.
        padded_size: and with its padding; the levels span it.
    """

    offsets: np.ndarray
    weights: np.ndarray
    level_sizes: tuple[tuple[int, int], ...]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]

    @property
    def num_layers(self) -> int:
        return self.weights.shape[0]

    @property
    def num_heads(self) -> int:
        return self.weights.shape[2]

    def distance_maps(self, layer: int, stride: int = STRIDES[-1]) -> np.ndarray:
        """Mean distance of the points of each position of a level, by weight, in pixels; over the padded image.

        Layers count from 1, the level has stride 32, 16 or 8. [heads, h, w]
        """
        level = level_of(stride)
        first, last = (sum(height * width for height, width in self.level_sizes[:end]) for end in (level, level + 1))
        offsets, weights = self.offsets[layer - 1, first:last], self.weights[layer - 1, first:last]
        distances = _mean_distance(offsets.astype(np.float32), weights)
        return distances.T.reshape(self.num_heads, *self.level_sizes[level])

    def at(self, place: tuple[float, float], stride: int = STRIDES[-1]) -> SamplingPoints:
        """The points of the position whose cell a place lies in.

        Args:
            place: (x, y) in 0…1 of the image. For pixel (column, row): (column + 0.5) / W, (row + 0.5) / H.
            stride: which level asks: 32, 16 or 8.

        Raises:
            ValueError: the place is outside the image, or there is no such level.
        """
        if not all(0 <= coordinate <= 1 for coordinate in place):
            raise ValueError(
                f"A place is (x, y) in 0…1 of the image, got {tuple(place)}. For pixel (column, row) pass "
                "((column + 0.5) / width, (row + 0.5) / height)."
            )
        level = level_of(stride)
        rows, columns = self.level_sizes[level]
        image, padded = (np.array(size[::-1], float) for size in (self.image_size, self.padded_size))  # width, height
        cells = np.array(place) * image / padded * (columns, rows)
        # A place on the far edge of an image without padding lies on the edge of the last cell.
        column, row = np.minimum(cells, (columns - 1, rows - 1)).astype(int)
        position = sum(height * width for height, width in self.level_sizes[:level]) + row * columns + column
        centre = np.array([column + 0.5, row + 0.5]) / (columns, rows) * padded  # in pixels
        return SamplingPoints(
            stride=stride,
            cell=(int(row), int(column)),
            location=(centre / image).astype(np.float32),
            points=((centre + self.offsets[:, position]) / image).astype(np.float32),
            weights=self.weights[:, position].astype(np.float32),
            image_size=self.image_size,
        )


def trace_sampling(
    model: Model,
    image: AnyImage,
    *,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    dtype: torch.dtype = torch.float16,
) -> SamplingTrace:
    """Run a model on an image and keep the sampling points of its deformable attention.

    Args:
        model: a module whose pixel decoder attends with `DeformableAttention` over strides 32, 16 and 8.
        image: a path, a PIL image or RGB uint8 [H, W, 3].
        shortest_edge, longest_edge: resize the image to this before the model sees it, in pixels.
        dtype: of the arrays. float16 takes 149 MB for 1024 × 2048 pixels, 6 layers, 8 heads and 4 points.

    Raises:
        ValueError: the model has no such attention.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    encoder = [module for module in modules if isinstance(module, DeformableAttention)]
    if not encoder:
        raise ValueError(
            "Sampling points are those of a pixel decoder with deformable attention, which this "
            f"{type(model).__name__} does not have; use QueryExplorer or PixelExplorer."
        )
    read: list[tuple[Tensor, Tensor]] = []  # locations and weights of each layer

    def keep(module: nn.Module, given: tuple, result: tuple[Tensor, SamplingPlan]) -> None:
        _, points = result
        read.append((points.locations[0].to("cpu"), points.weights[0].to("cpu", dtype)))

    handles = [module.register_forward_hook(keep) for module in encoder]
    try:
        output = look(model, as_rgb(image), shortest_edge, longest_edge)
    finally:
        for handle in handles:
            handle.remove()
    padded_height, padded_width = output.padded_size
    sizes = tuple((padded_height // stride, padded_width // stride) for stride in STRIDES)
    centres = torch.cat([cell_centres(size, "cpu") for size in sizes])[:, None, None, None]  # (S, 1, 1, 1, 2)
    expected = (len(centres), len(STRIDES))
    found = {(locations.shape[0], locations.shape[2]) for locations, _ in read}
    if found != {expected}:
        raise ValueError(
            f"Sampling points are read over strides {', '.join(map(str, STRIDES))}, {expected[0]} positions here, but "
            f"this model's attention has {sorted(found)} positions and levels."
        )
    pixels = torch.tensor([padded_width, padded_height])
    return SamplingTrace(
        offsets=torch.stack([((locations - centres) * pixels).to(dtype) for locations, _ in read]).numpy(),
        weights=torch.stack([weights for _, weights in read]).numpy(),
        level_sizes=sizes,
        image_size=output.image_size,
        padded_size=output.padded_size,
    )


def level_of(stride: int) -> int:
    """The place of a level among `STRIDES`.

    Raises:
        ValueError: there is no such level.
    """
    if stride not in STRIDES:
        raise ValueError(f"stride must be one of {', '.join(map(str, STRIDES))}, got {stride}.")
    return STRIDES.index(stride)


def _mean_distance(offsets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean length of offsets [..., L, P, 2] by weight [..., L, P]. float32 [...]"""
    return (np.linalg.norm(offsets, axis=-1) * weights).sum(axis=(-2, -1), dtype=np.float32)
