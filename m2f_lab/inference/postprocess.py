"""From the queries' last prediction to the result: semantic, panoptic and instance segmentation.

B batch, Q queries, K classes, N chosen queries, H/W height/width.

The formulas are those of the official implementation (Mask2Former, Cheng et al. 2022, section 3.1; the semantic and
panoptic ones come from MaskFormer, Cheng et al. 2021, section 3.4). What differs is that no [Q, H, W] at the size of
the image exists at any time: see `rows.Rows`. All of it is computed in float32, also under autocast.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.inference.rows import Rows
from m2f_lab.structures import IGNORE, Output, PackedMasks, Prediction, Segment

ORDERS = ("combine_first", "resize_first")


@torch.no_grad()
def semantic(
    output: Output,
    index: int = 0,
    size: tuple[int, int] | None = None,
    *,
    order: str = "combine_first",
    return_scores: bool = False,
    rows_per_strip: int | None = None,
) -> Prediction:
    """The class of every pixel: the queries vote with class probability × mask probability.

    Args:
        output: what the model returned; only its last prediction is used
        index: which image of the batch
        size: height and width of the result; by default that of the image the model saw
        order: "combine_first" turns masks into class scores at the size the model saw and resizes the scores, as the
            official semantic models do. "resize_first" resizes the mask logits and then combines, as the official
            panoptic and instance models do. They agree where nothing is resized
        return_scores: whether to keep the class scores; without them, [K, H, W] is never stored
        rows_per_strip: rows computed at a time; by default as many as suit the device. It changes no result

    Returns:
        A Prediction with `label_map` [H, W], uint8 (int64 for more than 255 classes), and, if asked for, `scores`
        [K, H, W]; they need not sum to one.
    """
    scores = semantic_rows(output, index, size, order=order)
    return read_prediction(scores, return_scores=return_scores, rows_per_strip=rows_per_strip)


def semantic_rows(
    output: Output, index: int = 0, size: tuple[int, int] | None = None, *, order: str = "combine_first"
) -> Rows:
    """Class scores, computed row by row. [K, H, W]; arguments as in `semantic`."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}.")
    size = _checked_size(output, size)
    class_probabilities = _class_probabilities(output, index)[:, :-1]  # (Q, K)

    def combine(mask_logits: Tensor) -> Tensor:
        """(Q, h, W) → (K, h, W)"""
        return _product(class_probabilities.T, mask_logits.sigmoid())

    masks = mask_rows(output, index)
    if order == "combine_first":
        return masks.map(combine).resized(size)
    return masks.resized(size).map(combine)


def mask_rows(output: Output, index: int = 0, queries: Tensor | None = None) -> Rows:
    """Mask logits of the last prediction at the size of the image the model saw, computed row by row. [Q, H, W]

    They are resized to the padded size first and cropped afterwards: the padding takes part in the resizing.

    Args:
        queries: which ones, all by default. [N]
    """
    masks = output.masks[-1]
    embeddings = masks.embeddings[index]  # (Q, C)
    if queries is not None:
        embeddings = embeddings[queries]
    coarse = _product(embeddings, masks.features[index])  # (Q, H/4, W/4)
    return Rows.of(coarse).resized(output.padded_size).cropped(output.image_size)


def read_prediction(scores: Rows, *, return_scores: bool = False, rows_per_strip: int | None = None) -> Prediction:
    """Find the best class of every pixel, strip by strip. [K, H, W] → `semantic`'s result"""
    labels, kept = None, None
    for rows, strip in scores.strips(rows_per_strip):
        if labels is None:
            dtype = torch.uint8 if len(strip) <= IGNORE else torch.int64  # 255 must not be a class
            labels = torch.empty(scores.size, dtype=dtype, device=scores.device)
            kept = torch.empty(len(strip), *scores.size, device=scores.device) if return_scores else None
        labels[rows] = strip.max(0).indices  # as argmax(0), in a third of its time on a CPU
        if kept is not None:
            kept[:, rows] = strip
    return Prediction("semantic", label_map=_numpy(labels), scores=None if kept is None else _numpy(kept))


@torch.no_grad()
def panoptic(
    output: Output,
    index: int = 0,
    size: tuple[int, int] | None = None,
    *,
    things: Collection[int] | None,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    rows_per_strip: int | None = None,
) -> Prediction:
    """One segment per pixel: confident queries compete, and those that keep too little of their mask are dropped.

    Args:
        output, index, size, rows_per_strip: as in `semantic`
        things: the classes whose instances are told apart; segments of any other class are merged into one.
            None: every class
        object_mask_threshold: queries need a larger class probability than this
        overlap_threshold: queries must win at least this share of their own mask

    Returns:
        A Prediction with `segments_map` int32 [H, W], 0 where no segment is, and its `segments`.
    """
    size = _checked_size(output, size)
    things = range(output.num_classes) if things is None else things
    scores, labels = _class_probabilities(output, index).max(-1)  # (Q,)
    queries = torch.nonzero((labels != output.num_classes) & (scores > object_mask_threshold)).flatten()  # (N,)
    count = len(queries)
    if count == 0:
        return Prediction("panoptic", segments_map=torch.zeros(size, dtype=torch.int32).numpy())

    scores, labels = scores[queries], labels[queries]
    winner = torch.empty(size, dtype=torch.int64, device=scores.device)
    inside = torch.empty(size, dtype=torch.bool, device=scores.device)  # whether the winner's own mask is there
    own_area = torch.zeros(count, dtype=torch.int64, device=scores.device)
    masks = mask_rows(output, index, queries).resized(size).map(torch.sigmoid)
    for rows, strip in masks.strips(rows_per_strip):
        winner[rows] = (scores[:, None, None] * strip).max(0).indices
        inside[rows] = strip.gather(0, winner[rows][None])[0] >= 0.5
        own_area += (strip >= 0.5).sum((1, 2))

    areas = torch.stack(
        [torch.bincount(winner.flatten(), minlength=count), torch.bincount(winner[inside], minlength=count), own_area]
    )
    segment_of, segments = _number_segments(
        queries.tolist(), labels.tolist(), scores.tolist(), areas.tolist(), frozenset(things), overlap_threshold
    )
    number = torch.tensor(segment_of, dtype=torch.int32, device=winner.device)[winner]
    return Prediction("panoptic", segments_map=_numpy(number * inside), segments=segments)


def _number_segments(
    queries: list[int],
    labels: list[int],
    scores: list[float],
    areas: list[list[int]],
    things: frozenset[int],
    overlap_threshold: float,
) -> tuple[list[int], tuple[Segment, ...]]:
    """Give the queries that keep enough of their mask a segment; stuff of one class shares a segment.

    Args:
        areas: per query, pixels it won, pixels it won inside its own mask, pixels of its own mask. 3 × N

    Returns:
        The segment of each query, 0 for none [N], and the segments.
    """
    segment_of = [0] * len(queries)
    segments: dict[int, Segment] = {}
    stuff: dict[int, int] = {}  # class → segment
    for k, (query, label, score, won, seen, own) in enumerate(zip(queries, labels, scores, *areas, strict=True)):
        if seen == 0 or won / own < overlap_threshold:
            continue
        is_thing = label in things
        number = len(segments) + 1 if is_thing else stuff.setdefault(label, len(segments) + 1)
        merged = segments[number].area if number in segments else 0
        first = segments.get(number, Segment(number, label, is_thing, score, query, 0))
        segments[number] = Segment(number, label, is_thing, first.score, first.query, merged + seen)
        segment_of[k] = number
    return segment_of, tuple(segments.values())


@torch.no_grad()
def instance(
    output: Output,
    index: int = 0,
    size: tuple[int, int] | None = None,
    *,
    things: Collection[int] | None = None,
    top_k: int = 100,
    score_threshold: float = 0.0,
    rows_per_strip: int | None = None,
) -> Prediction:
    """The best pairs of query and class, each with a mask of its own; masks may overlap, and a query may appear twice.

    Args:
        output, index, size, rows_per_strip: as in `semantic`
        things: keep only these classes, after choosing the best; by default every class is a thing
        top_k: how many pairs are considered
        score_threshold: leave out segments below this score

    Returns:
        A Prediction with `masks` [N, H, W] and its `segments`, best first. Their score is class probability
        × mean mask probability inside the mask.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be positive, got {top_k}.")
    size = _checked_size(output, size)
    class_scores = _class_probabilities(output, index)[:, :-1].flatten()  # (Q * K,)
    scores, pairs = class_scores.topk(min(top_k, len(class_scores)))
    if score_threshold > 0:  # the quality of its mask can only lower a score
        hopeful = scores >= score_threshold
        scores, pairs = scores[hopeful], pairs[hopeful]
    queries, labels = pairs // output.num_classes, pairs % output.num_classes
    if things is not None:
        is_thing = torch.isin(labels, torch.tensor(sorted(things), dtype=labels.dtype, device=labels.device))
        scores, queries, labels = scores[is_thing], queries[is_thing], labels[is_thing]
    chosen, which = queries.unique(return_inverse=True)  # a query with two classes has one mask

    bits = torch.empty(len(chosen), size[0], -(-size[1] // 8), dtype=torch.uint8, device=scores.device)
    area = torch.zeros(len(chosen), dtype=torch.int64, device=scores.device)
    total = torch.zeros(len(chosen), device=scores.device)  # of the mask probabilities inside the mask
    if len(chosen):
        for rows, strip in mask_rows(output, index, chosen).resized(size).strips(rows_per_strip):
            inside = strip > 0
            bits[:, rows] = _packed(inside)
            area += inside.sum((1, 2))
            total += (strip.sigmoid() * inside).sum((1, 2))
    scores = scores * (total / (area + 1e-6))[which]

    best_first = scores.argsort(descending=True, stable=True)
    best_first = best_first[scores[best_first] >= score_threshold]
    which = which[best_first]
    columns = (labels[best_first], scores[best_first], chosen[which], area[which])
    segments = tuple(
        Segment(number, label, True, score, query, pixels)
        for number, (label, score, query, pixels) in enumerate(
            zip(*(c.tolist() for c in columns), strict=True), start=1
        )
    )
    return Prediction("instance", masks=PackedMasks(_numpy(bits[which]), size[1]), segments=segments)


def _packed(masks: Tensor) -> Tensor:
    """Eight pixels to a byte, the first in the highest bit. bool [N, h, W] → uint8 [N, h, ⌈W / 8⌉]"""
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=masks.device)
    eights = F.pad(masks, (0, -masks.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights * weights).sum(-1, dtype=torch.uint8)


def _class_probabilities(output: Output, index: int) -> Tensor:
    """[Q, K+1], "no object" last."""
    return output.class_logits[-1][index].float().softmax(-1)


def _product(weights: Tensor, maps: Tensor) -> Tensor:
    """Combine channels in float32, also where autocast would choose less. [M, N] × [N, h, W] → [M, h, W]"""
    with torch.autocast(maps.device.type, enabled=False):
        return (weights.float() @ maps.float().flatten(1)).unflatten(1, maps.shape[1:])


def _checked_size(output: Output, size: tuple[int, int] | None) -> tuple[int, int]:
    height, width = output.image_size if size is None else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be a positive height and width in pixels, got {(height, width)}.")
    return int(height), int(width)


def _numpy(tensor: Tensor):
    return tensor.cpu().numpy()
