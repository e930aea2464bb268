"""What flows between the parts: targets in, factored masks and predictions out.

B batch, Q queries, K classes, C mask feature channels, L predictions, T targets, P points, H/W height/width.

A predicted mask is a dot product, `mask[q, y, x] = embedding[q] · features[:, y, x]`. Resizing and point
sampling are linear in the pixels, so both commute with that product. `MaskLogits` therefore keeps the two
factors apart and multiplies only what is asked for: a coarser grid, a few points, a few queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.ops import kept, sample_segments

IGNORE = 255
"""The label of pixels that belong to no class: they are neither learned nor evaluated."""

WIDE_IGNORE = 65535
"""The same beside more classes than a byte holds: label maps have 16 bits then."""


def ignored_label(num_classes: int) -> int:
    """IGNORE, or WIDE_IGNORE where IGNORE is a class."""
    return IGNORE if num_classes <= IGNORE else WIDE_IGNORE


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Read maps at continuous positions.

    Args:
        maps: any number of channels per image. [B, C, H, W]
        points: (x, y) in [0, 1]; (0, 0) is the top-left corner of the image, not the centre of its first
            pixel. [B, P, 2]

    Returns:
        Bilinear samples, zero outside the image. [B, C, P]

    Source: PointRend (Kirillov et al. 2020), section 3.2.
    """
    grid = 2 * points.to(maps.dtype).unsqueeze(2) - 1  # (B, P, 1, 2)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False).squeeze(3)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps bilinearly with half-pixel centres, without antialiasing. [B, C, H, W] → [B, C, *size]

    In the type of the maps, under autocast too, which would cast all of them to float32; sums are kept in float32.
    """
    if maps.shape[-2:] == tuple(size):
        return maps
    with torch.autocast(maps.device.type, enabled=False):
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@kept(6)  # three levels of two sizes of image
def cell_centres(size: tuple[int, int], device: torch.device) -> Tensor:
    """(x, y) in [0, 1] of the centre of every cell of a feature map, row by row. [H * W, 2]"""
    height, width = size
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    return torch.stack([x[None, :].expand(size), y[:, None].expand(size)], dim=2).flatten(0, 1)


@dataclass(frozen=True)
class MaskLogits:
    """The mask logits of Q queries, kept as two factors.

    Attributes:
        embeddings: one mask embedding per query. [B, Q, C]
        features: the per-pixel mask features, usually at stride 4. [B, C, H, W]
    """

    embeddings: Tensor
    features: Tensor

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 3 or self.features.ndim != 4:
            raise ValueError(
                f"MaskLogits needs embeddings [B, Q, C] and features [B, C, H, W], got {tuple(self.embeddings.shape)} "
                f"and {tuple(self.features.shape)}."
            )
        batch, _, channels = self.embeddings.shape
        if self.features.shape[:2] != (batch, channels):
            raise ValueError(
                f"MaskLogits: embeddings {tuple(self.embeddings.shape)} and features {tuple(self.features.shape)} "
                "differ in batch size or channels."
            )

    @property
    def num_queries(self) -> int:
        return self.embeddings.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the mask features."""
        return self.features.shape[2], self.features.shape[3]

    def dense(self) -> Tensor:
        """Multiply everything out. [B, Q, H, W]"""
        return torch.einsum("bqc,bchw->bqhw", self.embeddings, self.features)

    def resize_features(self, size: tuple[int, int]) -> MaskLogits:
        """The same masks over features of another size; still factored."""
        return replace(self, features=resize(self.features, size))

    def resized(self, size: tuple[int, int]) -> Tensor:
        """Mask logits at `size`, equal to resizing `dense()` bilinearly. [B, Q, *size]"""
        return self.resize_features(size).dense()

    def at(self, points: Tensor) -> Tensor:
        """Mask logits at points that all queries of an image share.

        Args:
            points: (x, y) in [0, 1] of the area the features cover. [B, P, 2]

        Returns:
            Logits. [B, Q, P]
        """
        return self.embeddings @ sample_points(self.features, points)

    def select(self, batch: Tensor, query: Tensor) -> Tensor:
        """Multiply out chosen queries only.

        Args:
            batch: image index of each chosen query, non-decreasing. [M]
            query: query index of each. [M]

        Returns:
            Logits. [M, H, W]
        """
        chosen = self.embeddings[batch, query]  # (M, C)
        counts = torch.bincount(batch, minlength=self.embeddings.shape[0]).tolist()
        parts = chosen.split(counts)
        return torch.cat([torch.einsum("mc,chw->mhw", e, f) for e, f in zip(parts, self.features, strict=True)])

    def float(self) -> MaskLogits:
        return MaskLogits(self.embeddings.float(), self.features.float())

    def detach(self) -> MaskLogits:
        return MaskLogits(self.embeddings.detach(), self.features.detach())


@dataclass(frozen=True)
class Target:
    """The ground truth of one image: T segments, each with a class and a mask.

    Masks are given either as booleans [T, H, W], which may overlap, or as one map of segment numbers [H, W],
    which is a hundred times smaller and is all that semantic and panoptic training needs.

    Attributes:
        labels: class of each segment, 0…K-1. [T]
        masks: boolean masks. [T, H, W], or None where `id_map` is given
        id_map: 0…T-1 per pixel; where no segment is, 255 in bytes and -1 in wider integers. [H, W], or None where
            `masks` is given
    """

    labels: Tensor
    masks: Tensor | None = None
    id_map: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.labels.is_floating_point():
            raise ValueError(f"Target.labels must be integers [T], got {self.labels.dtype} {tuple(self.labels.shape)}.")
        if (self.masks is None) == (self.id_map is None):
            raise ValueError("A Target has either masks [T, H, W] or an id_map [H, W]; see Target.from_id_map.")
        if self.masks is not None:
            if self.masks.dtype != torch.bool or self.masks.ndim != 3 or len(self.masks) != len(self.labels):
                raise ValueError(
                    f"Target.masks must be boolean [T, H, W] with T = {len(self.labels)} labels, "
                    f"got {self.masks.dtype} {tuple(self.masks.shape)}."
                )
        elif self.id_map.ndim != 2 or self.id_map.is_floating_point():
            raise ValueError(
                f"Target.id_map must be integers [H, W], got {self.id_map.dtype} {tuple(self.id_map.shape)}."
            )

    @classmethod
    def from_id_map(cls, id_map: Tensor, labels: Tensor) -> Target:
        """A target that never builds masks.

        Args:
            id_map: segment number 0…T-1 of each pixel; where there is none, -1, or 255 if there are no more than 255
                segments. [H, W]
            labels: class of each segment. [T]

        Raises:
            ValueError: the map holds a number that is no segment.
        """
        none = id_map < 0
        if len(labels) <= IGNORE:
            none |= id_map == IGNORE
        unknown = torch.unique(id_map[~none & (id_map >= len(labels))])
        if len(unknown):
            raise ValueError(
                f"The id map holds {unknown.tolist()}, but there are only {len(labels)} labels (0…{len(labels) - 1}); "
                f"pixels without a segment are -1, or {IGNORE} beside at most {IGNORE} segments."
            )
        if len(labels) <= IGNORE:
            return cls(labels=labels, id_map=id_map.masked_fill(none, IGNORE).to(torch.uint8))
        return cls(labels=labels, id_map=id_map.to(torch.int16 if len(labels) < 2**15 else torch.int32))

    @classmethod
    def from_label_map(cls, label_map: Tensor | np.ndarray, ignore: int = IGNORE) -> Target:
        """Semantic ground truth: one segment per class that occurs.

        Args:
            label_map: class 0…K-1 of each pixel, or `ignore`. integers or booleans [H, W]
            ignore: what pixels to ignore hold, more than any class; see `ignored_label`

        Raises:
            ValueError: it is no such map.
        """
        if isinstance(label_map, np.ndarray) and label_map.dtype == np.uint16:
            label_map = label_map.astype(np.int32)  # PyTorch hardly computes with uint16
        label_map = torch.as_tensor(label_map)
        if label_map.ndim != 2 or label_map.is_floating_point() or label_map.is_complex():
            raise ValueError(f"A label map is integers [H, W], got {label_map.dtype} {list(label_map.shape)}.")
        if label_map.dtype != torch.uint8:
            label_map = label_map.long()
            if label_map.numel() and not 0 <= label_map.min() <= label_map.max() <= ignore:
                raise ValueError(
                    f"A label map holds classes from 0 and {ignore} for ignored pixels, but this one holds "
                    f"{int(label_map.min())}…{int(label_map.max())}. Map other ids to these first."
                )
        # Counting is four times as fast as torch.unique, which sorts every pixel.
        found = torch.bincount(label_map.flatten()).nonzero().flatten()
        labels = found[found != ignore]
        kind, none = (torch.uint8, IGNORE) if len(labels) <= IGNORE else (torch.int16, -1)
        number = torch.full((ignore + 1,), none, dtype=kind, device=label_map.device)
        number[labels] = torch.arange(len(labels), dtype=kind, device=label_map.device)
        # Four times as fast as number[label_map.long()], which reads eight bytes of index for every pixel.
        id_map = number.index_select(0, label_map.flatten().int()).view_as(label_map)
        return cls(labels=labels, id_map=id_map)

    @property
    def num_segments(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the ground truth in pixels."""
        height, width = (self.masks if self.id_map is None else self.id_map).shape[-2:]
        return height, width

    def dense(self) -> Tensor:
        """Boolean masks. [T, H, W]"""
        if self.masks is not None:
            return self.masks
        return self.id_map == torch.arange(self.num_segments, device=self.id_map.device)[:, None, None]

    def at(self, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
        """Share of each segment at points of the padded image, in [0, 1]; bilinear, as mask logits are read.

        Args:
            points: (x, y) in [0, 1] of the padded image. [P, 2]
            padded_size: its height and width in pixels.

        Returns:
            [T, P]
        """
        return segments_at([self], points.unsqueeze(0), padded_size)[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return Target(*(None if t is None else t.to(device, non_blocking=non_blocking) for t in self._tensors))

    def pin_memory(self) -> Target:
        return Target(*(None if t is None else t.pin_memory() for t in self._tensors))

    @property
    def _tensors(self) -> tuple[Tensor | None, ...]:
        return self.labels, self.masks, self.id_map


def segments_at(targets: Sequence[Target], points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Shares of the segments of several images at points; see `Target.at`.

    Args:
        targets: ground truth of B images
        points: (x, y) in [0, 1] of the padded images. [B, P, 2]
        padded_size: their height and width in pixels

    Returns:
        [B, T, P]; T is that of the target with the most segments, and what others have beyond their own means nothing.
    """
    num_segments = max(target.num_segments for target in targets)
    if all(target.id_map is not None for target in targets):
        maps = [target.id_map for target in targets]
        if len({each.dtype for each in maps}) > 1:  # more segments in some image than bytes tell apart
            maps = [each.int().masked_fill(each == IGNORE, -1) if each.dtype == torch.uint8 else each for each in maps]
    else:
        maps = [target.dense() for target in targets]
    if len(maps) == 1:
        maps = maps[0].unsqueeze(0)
    else:
        none = 0 if maps[0].dtype == torch.bool else torch.iinfo(maps[0].dtype).max
        largest = [max(sizes) for sizes in zip(*(each.shape for each in maps), strict=True)]
        maps = torch.stack([_grow(each, largest, none) for each in maps])
    return sample_segments(maps, num_segments, points, padded_size)


def _grow(maps: Tensor, size: Sequence[int], value: int) -> Tensor:
    """Pad at the end of each axis to a size."""
    missing = [wanted - have for wanted, have in zip(size, maps.shape, strict=True)]
    return F.pad(maps, [n for each in reversed(missing) for n in (0, each)], value=value) if any(missing) else maps


class DecoderState(NamedTuple):
    """State of a transformer decoder after one prediction; S cells of the level that the layer attended to.

    Attributes:
        queries: query features. [B, Q, C]
        class_logits: the last class is "no object". [B, Q, K+1]
        embeddings: mask embeddings. [B, Q, mask_dim]
        positions: learned, added wherever queries are compared. [Q, C] or [B, Q, C]
        level: number of the level that the layer attended to, in the order of `Output.level_sizes`; None for the
            learned queries, which precede all layers
        blocked: True where the layer hid a cell from a query. bool [B, Q, S]
        opened: True where a query's mask was empty, so that it attended everywhere. bool [B, Q]
        cross_attention: softmax weights of queries over cells, kept on request. [B, heads, Q, S]
        self_attention: softmax weights of queries over queries, kept on request. [B, heads, Q, Q]
    """

    queries: Tensor
    class_logits: Tensor
    embeddings: Tensor
    positions: Tensor | None = None
    level: int | None = None
    blocked: Tensor | None = None
    opened: Tensor | None = None
    cross_attention: Tensor | None = None
    self_attention: Tensor | None = None

    def rows(self, queries: Tensor | slice) -> DecoderState:
        """What the next layer needs of some queries, as if there were no others."""
        return DecoderState(
            self.queries[:, queries],
            self.class_logits[:, queries],
            self.embeddings[:, queries],
            None if self.positions is None else self.positions[..., queries, :],
        )


class DecoderMemory(NamedTuple):
    """Everything that all layers of a decoder share: features at strides 32, 16, 8, and the caller's wishes.

    S cells of a level.

    Attributes:
        sizes: height and width of each level.
        features: with their level embedding. [B, S, C] each
        keys: features plus sine embeddings, added once for all layers. [B, S, C] each
        mask_features: [B, mask_dim, H/4, W/4]
        small_mask_features: detached, at the size of each level, for attention masks. [B, mask_dim, h, w] each
        targets: ground truth of each image, in training; None otherwise
        keep_attention: whether states keep attention weights
        edit_attention: changes what a layer hides: (index of the layer, `blocked`, `opened`) → the two
    """

    sizes: list[tuple[int, int]]
    features: list[Tensor]
    keys: list[Tensor]
    mask_features: Tensor
    small_mask_features: list[Tensor]
    targets: Sequence[Target] | None = None
    keep_attention: bool = False
    edit_attention: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Matching:
    """Matched pairs of queries and segments of a batch, on the CPU, ordered by image, then prediction, then query.

    Every prediction of an image has the same number of pairs, min(Q, T).

    Attributes:
        image: [M]
        prediction: [M]
        query: [M]
        segment: 0…T-1, the segment assigned to the query. [M]
    """

    image: Tensor
    prediction: Tensor
    query: Tensor
    segment: Tensor

    def of(self, prediction: int, image: int = 0) -> tuple[Tensor, Tensor]:
        """Queries and the segments they are matched with, in one prediction of one image. [N], [N]"""
        here = (self.image == image) & (self.prediction == prediction)
        return self.query[here], self.segment[here]


class PredictionGroup(NamedTuple):
    """Predictions that share their mask features.

    Attributes:
        predictions: numbers of l of them, in ascending order, on the CPU. [l]
        embeddings: [B, l, Q, C]
        features: [B, C, H, W]
    """

    predictions: Tensor
    embeddings: Tensor
    features: Tensor

    def pairs(self, matching: Matching) -> Tensor:
        """The pairs of these predictions, as indices into a matching. [m]"""
        return torch.isin(matching.prediction, self.predictions).nonzero().squeeze(1)

    def rows(self, matching: Matching, pairs: Tensor) -> Tensor:
        """Places of the queries of these pairs among all of `embeddings`, flattened. [m]"""
        num_predictions, num_queries = self.embeddings.shape[1:3]
        place = torch.searchsorted(self.predictions, matching.prediction[pairs])
        return (matching.image[pairs] * num_predictions + place) * num_queries + matching.query[pairs]


@dataclass(frozen=True)
class Output:
    """All predictions of one forward pass: the learned queries' first, then one after every decoder layer.

    Predictions mostly share one tensor of mask features; they need not.

    Attributes:
        class_logits: per prediction; the last class is "no object". L × [B, Q, K+1]
        masks: per prediction, over the padded image. L × MaskLogits
        image_size: height and width of the images as they came in, in pixels
        padded_size: height and width after padding bottom and right, in pixels
        states: the decoder after every prediction, for explorers; empty where an architecture has no such decoder
        level_sizes: height and width of each level that the decoder attends to, in cells
    """

    class_logits: list[Tensor]
    masks: list[MaskLogits]
    image_size: tuple[int, int]
    padded_size: tuple[int, int]
    states: tuple[DecoderState, ...] = ()
    level_sizes: tuple[tuple[int, int], ...] = ()

    @property
    def num_predictions(self) -> int:
        return len(self.class_logits)

    @property
    def num_classes(self) -> int:
        """K, without "no object"."""
        return self.class_logits[-1].shape[-1] - 1

    def check_targets(self, targets: Sequence[Target]) -> None:
        """Raise a ValueError if targets cannot be those of these images: another number, or larger ones."""
        batch = len(self.class_logits[0])
        if len(targets) != batch:
            raise ValueError(
                f"The output holds {batch} images, but there are {len(targets)} targets; give one per image."
            )
        for image, target in enumerate(targets):
            if any(have > limit for have, limit in zip(target.size, self.padded_size, strict=True)):
                raise ValueError(
                    f"The target of image {image} is {target.size}, larger than the padded image {self.padded_size}. "
                    "Ground truth must have the pixels of the image that went into the model: resize and crop both "
                    "alike."
                )

    def float(self) -> Output:
        """The same in float32, or float64 if it was that; features that predictions share stay shared."""
        dtype = torch.promote_types(self.masks[0].features.dtype, torch.float32)
        features = {id(masks.features): masks.features.to(dtype) for masks in self.masks}
        return replace(
            self,
            class_logits=[logits.to(dtype) for logits in self.class_logits],
            masks=[MaskLogits(masks.embeddings.to(dtype), features[id(masks.features)]) for masks in self.masks],
        )

    def groups(self) -> list[PredictionGroup]:
        """Predictions by their tensor of mask features: one group for Mask2Former, L for encoder-only models."""
        numbers: dict[int, list[int]] = {}
        for prediction, masks in enumerate(self.masks):
            numbers.setdefault(id(masks.features), []).append(prediction)
        return [
            PredictionGroup(
                torch.tensor(predictions),
                torch.stack([self.masks[prediction].embeddings for prediction in predictions], dim=1),
                self.masks[predictions[0]].features,
            )
            for predictions in numbers.values()
        ]

    def finite(self) -> tuple[Tensor, Tensor]:
        """True where all class logits, and where all mask logits, of a prediction are finite. [B, L], [B, L]

        No mask is multiplied out for it: by Cauchy and Schwarz, |e · f| ≤ ‖e‖ ‖f‖.
        """
        class_logits = torch.stack(self.class_logits, dim=1)  # (B, L, Q, K+1)
        bounds = []
        for group in self.groups():
            # As they lie: flattened, the features would be copied.
            lengths = torch.linalg.vector_norm(group.features, dim=(1, 2, 3))
            bounds.append(group.embeddings.flatten(2).norm(dim=2) * lengths.unsqueeze(1))
        return class_logits.isfinite().flatten(2).all(2), self.in_order(bounds).isfinite()

    def in_order(self, of_groups: Sequence[Tensor]) -> Tensor:
        """Put what was computed for each of `groups` into the order of predictions. [B, l, …] each → [B, L, …]"""
        if len(of_groups) == 1:
            return of_groups[0]
        numbers = torch.cat([group.predictions for group in self.groups()]).tolist()
        columns = [column for values in of_groups for column in values.unbind(1)]
        return torch.stack([column for _, column in sorted(zip(numbers, columns, strict=True), key=itemgetter(0))], 1)


class NonFiniteError(FloatingPointError):
    """A prediction holds NaN or infinity.

    Attributes:
        culprits: (image, prediction, term) of everything that is affected; term is "class", "mask" or "dice"
    """

    def __init__(self, culprits: list[tuple[int, int, str]]) -> None:
        self.culprits = culprits
        named = [f"image {image}, prediction {prediction}: {term}" for image, prediction, term in culprits]
        more = f"; and {len(named) - 6} more" if len(named) > 6 else ""
        super().__init__(
            f"The loss would not be finite ({'; '.join(named[:6])}{more}): the class logits (class) or mask logits "
            "(mask, dice) hold NaN or infinity. The image is its index in the batch, the prediction counts from 0, the "
            "learned queries. Lower the learning rate or the clipping norm; under float16 take bfloat16 or float32; if "
            "it happens at the first step, look for NaN in the image or in the loaded weights."
        )


@dataclass(frozen=True)
class Segment:
    """One thing or one stuff region of a panoptic or instance prediction.

    Attributes:
        id: its number in `Prediction.segments_map`; 0 is void
        label: class 0…K-1
        is_thing: whether instances of the class are told apart
        score: confidence in [0, 1]
        query: the query that predicted it; for merged stuff the first one
        area: pixels
    """

    id: int
    label: int
    is_thing: bool
    score: float
    query: int
    area: int


class PackedMasks(np.lib.mixins.NDArrayOperatorsMixin):
    """Masks with eight pixels to a byte, which act as the array bool [N, H, W] that they stand for.

    A hundred masks of a street of 1024 × 2048 pixels take 25 MiB instead of 200. `masks[i]` unpacks one; whatever else
    an array can do unpacks all.

    Attributes:
        bits: as `np.packbits` gives them along rows. uint8 [N, H, ⌈W / 8⌉]
        shape: N, H and W.
    """

    dtype, ndim = np.dtype(bool), 3

    def __init__(self, bits: np.ndarray, width: int) -> None:
        self.bits = bits
        self.shape = (*bits.shape[:2], width)

    @classmethod
    def empty(cls, count: int, size: tuple[int, int]) -> PackedMasks:
        """Masks without a pixel, to be filled: `masks[i] = mask`."""
        return cls(np.zeros((count, size[0], -(-size[1] // 8)), np.uint8), size[1])

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index) -> np.ndarray:
        first, *rest = index if isinstance(index, tuple) else (index,)
        if first is Ellipsis or first is None:
            return np.asarray(self)[index]
        dense = np.unpackbits(self.bits[first], axis=-1, count=self.shape[2]).view(bool)
        if not rest:
            return dense
        return dense[tuple(rest)] if dense.ndim == 2 else dense[(slice(None), *rest)]

    def __setitem__(self, number: int, mask: np.ndarray) -> None:
        self.bits[number] = np.packbits(mask, axis=-1)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        dense = self[:]
        return dense if dtype is None else dense.astype(dtype)

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        dense = (np.asarray(value) if isinstance(value, PackedMasks) else value for value in inputs)
        return getattr(ufunc, method)(*dense, **options)

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("bits", "shape"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)


@dataclass(frozen=True)
class Prediction:
    """What `Mask2Former.predict` returns, at the image's own size.

    Attributes:
        task: "semantic", "panoptic" or "instance"
        label_map: class of every pixel, for the semantic task. uint8 or int64 [H, W]
        scores: class scores of every pixel, if they were asked for. float32 [K, H, W]
        segments_map: segment id of every pixel, 0 where there is none, for the panoptic task. int32 [H, W]
        segments: the segments of the panoptic and instance tasks
        masks: one mask per segment, for the instance task; they may overlap. [N, H, W]
    """

    task: str
    label_map: np.ndarray | None = None
    scores: np.ndarray | None = None
    segments_map: np.ndarray | None = None
    segments: tuple[Segment, ...] = ()
    masks: PackedMasks | np.ndarray | None = None
