"""The matcher's choice of a query for each segment, in every prediction, with runners-up and margins.

Costs and pairs are those of the criterion's own matcher. The runner-up is added: were a segment denied the query it
got, the matcher would find the next best assignment of all segments. The query that the segment gets there is its
runner-up, and the rise of the total cost is its margin.

L predictions, Q queries, K classes, T segments, P points, H/W height/width, h/w of a grid over the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f_lab.explore.parts.reading import grid_size, nearest, read_masks
from m2f_lab.loss import Matcher
from m2f_lab.structures import Output, Target

NONE = -1  # in place of a query, where a segment has none: there are more segments than queries


@dataclass(frozen=True)
class MatchingTrace:
    """Costs and pairs of one image.

    Attributes:
        terms: the matcher's costs by name, with their weights, such as "class", "mask" and "dice"; their sum is
            minimised. {term: float32 [L, Q, T]}
        chosen: the query of each segment, or NONE. int64 [L, T]
        runner_up: the query it would get were its own denied to it, or NONE. int64 [L, T]
        margin: by how much the total cost of all segments would rise then. Infinite where nothing else is possible (one
            query, one segment), NaN where the segment has no query to lose. float64 [L, T]
        moved: how many other segments would get another query then. int64 [L, T]
        labels: class of each segment. int64 [T]
    """

    terms: dict[str, np.ndarray]
    chosen: np.ndarray
    runner_up: np.ndarray
    margin: np.ndarray
    moved: np.ndarray
    labels: np.ndarray

    @property
    def cost(self) -> np.ndarray:
        """Cost of every pair. float32 [L, Q, T]"""
        return sum(self.terms.values())

    @property
    def num_predictions(self) -> int:
        return len(self.chosen)

    @property
    def num_queries(self) -> int:
        return self.cost.shape[1]

    @property
    def num_segments(self) -> int:
        return len(self.labels)

    def total(self, prediction: int) -> float:
        """The cost of all pairs of a prediction."""
        return _total(self.cost[prediction].astype(np.float64), self.chosen[prediction])

    def candidates(self, prediction: int, segment: int, count: int = 6) -> list[int]:
        """The cheapest queries of a segment, cheapest first; its choice and its runner-up are always among them."""
        order = np.argsort(self.cost[prediction, :, segment], kind="stable").tolist()
        wanted = {self.chosen[prediction, segment], self.runner_up[prediction, segment], *order[:count]}
        return [query for query in order if query in wanted]


def seeded_points(num_points: int, seed: int = 0) -> Tensor:
    """Points of one image that are the same whenever they are asked for; no other random number is disturbed.

    Returns:
        (x, y) in [0, 1] of the padded image. float32 [1, P, 2]
    """
    return torch.rand(1, num_points, 2, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def trace_matching(output: Output, target: Target, matcher: Matcher, points: Tensor | None = None) -> MatchingTrace:
    """Read the matcher's costs and choices.

    Args:
        output: of one image.
        target: its ground truth, at the size at which the model saw the image.
        matcher: as training has it, `criterion.matcher`.
        points: where masks are compared, (x, y) in [0, 1] of the padded image; by default those of `seeded_points`,
            so that the same call shows the same numbers. [1, P, 2]

    Raises:
        NonFiniteError: a prediction holds NaN or infinity.
        ValueError: output and target do not belong together, or a label is no class.
    """
    device = output.masks[0].features.device
    points = (seeded_points(matcher.num_points) if points is None else points).to(device)
    target = target.to(device)
    matching = matcher(output, [target], points)
    (costs,) = matcher.costs(output, [target], points)
    terms = {name: cost.cpu().numpy() for name, cost in costs.items()}
    chosen = np.full((output.num_predictions, target.num_segments), NONE)
    for prediction, queries in enumerate(chosen):
        query, segment = matching.of(prediction)
        queries[segment.numpy()] = query.numpy()
    cost = sum(terms.values())
    found = [runners_up(cost[prediction], queries) for prediction, queries in enumerate(chosen)]
    runner_up, margin, moved = (np.stack(parts) for parts in zip(*found, strict=True))
    return MatchingTrace(terms, chosen, runner_up, margin, moved, target.labels.cpu().numpy())


def runners_up(cost: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deny each segment the query it got, and solve again.

    Args:
        cost: of every pair. [Q, T]
        chosen: the query of each segment in the optimum, or NONE. [T]

    Returns:
        Runner-up, margin and the number of other segments that move, as `MatchingTrace` describes them. [T] each
    """
    cost = cost.astype(np.float64)
    optimum = _total(cost, chosen)
    runner_up, moved = np.full(len(chosen), NONE), np.zeros(len(chosen), int)
    margin = np.full(len(chosen), np.nan)
    for segment in np.flatnonzero(chosen != NONE):
        if cost.shape == (1, 1):
            margin[segment] = np.inf
            continue
        denied = cost.copy()
        denied[chosen[segment], segment] = np.inf
        queries = np.full(len(chosen), NONE)
        rows, columns = linear_sum_assignment(denied)
        queries[columns] = rows
        runner_up[segment] = queries[segment]
        margin[segment] = max(_total(cost, queries) - optimum, 0.0)  # equals may differ in the last digit
        moved[segment] = (queries != chosen).sum() - 1
    return runner_up, margin, moved


def checked_target(target: Target | np.ndarray, image: np.ndarray) -> Target:
    """Ground truth of an image as segments, from a label map where it is one. integers [H, W], uint8 [H, W, 3]

    Raises:
        ValueError: it is no label map, has another size than the image, or holds no segment.
    """
    target = target if isinstance(target, Target) else Target.from_label_map(target)
    if target.size != image.shape[:2]:
        raise ValueError(
            f"The target is {target.size[0]} × {target.size[1]} pixels, but the image {image.shape[0]} × "
            f"{image.shape[1]} (height × width). Give the ground truth at the image's own size; both are resized alike."
        )
    if not target.num_segments:
        raise ValueError("The target holds no segment, so there is nothing to match; choose another image.")
    return target


def resize_target(target: Target, size: tuple[int, int]) -> Target:
    """Ground truth at another size. [H, W] → [*size]"""
    if target.size == tuple(size):
        return target
    name = "masks" if target.id_map is None else "id_map"
    return Target(target.labels, **{name: torch.from_numpy(nearest(getattr(target, name).cpu().numpy(), size))})


@dataclass(frozen=True)
class MatchedMasks:
    """Masks on a grid over the image, to lay queries over segments.

    Attributes:
        queries: whether the mask probability is at least one half. bool [L, Q, h, w]
        segments: the ground truth. bool [T, h, w]
    """

    queries: np.ndarray
    segments: np.ndarray

    def agreement(self, queries: np.ndarray) -> np.ndarray:
        """Lay a query, or NONE, over each segment: 0 both, 1 only the segment, 2 only the query, 255 neither.

        [L, T] → uint8 [L, T, h, w]
        """
        parts = np.array([[255, 2], [1, 0]], np.uint8)  # neither, only the query; only the segment, both
        masks = self.queries[np.arange(len(queries))[:, None], queries] & (queries != NONE)[..., None, None]
        return parts[self.segments.astype(int), masks.astype(int)]


@torch.no_grad()
def matched_masks(output: Output, target: Target, max_cells: int = 72 * 72) -> MatchedMasks:
    """Read all masks of an output of one image, and its segments, on a grid of at most so many cells."""
    size = grid_size(output.image_size, max_cells)
    return MatchedMasks(
        queries=(read_masks(output, 0, size) >= 0.5).cpu().numpy(),
        segments=nearest(target.dense().cpu().numpy(), size),
    )


def _total(cost: np.ndarray, queries: np.ndarray) -> float:
    segments = np.flatnonzero(queries != NONE)
    return float(cost[queries[segments], segments].sum())
