"""The training loss: classification of every query, and the masks of the matched ones, in all predictions.

B images, L predictions, Q queries, K classes, C mask feature channels, M matched pairs of all images and predictions,
P points, H/W height/width of the mask features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor

from m2f_lab import ops
from m2f_lab.loss import terms
from m2f_lab.loss.matcher import Matcher
from m2f_lab.loss.points import shared_points
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Matching, Output, Target, segments_at

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}
"""The paper's weights, in matching and in the loss."""

FUSED = {"mask": terms.mask, "dice": terms.dice}
"""The terms for which `ops.mask_and_dice` stands in."""


class Divisors(NamedTuple):
    """Numbers by which the sums of a prediction are divided.

    Attributes:
        queries: sum of the class weights of all queries, for the class term
        segments: number of segments, at least 1, for all other terms
    """

    queries: Tensor | float
    segments: Tensor | float


@dataclass(frozen=True)
class Criterion:
    """Weighted sum of a class term and any other terms, over all predictions.

    Attributes:
        num_classes: K, without "no object"
        terms: by name; see `m2f_lab.loss.terms` for what a term takes and returns
        weights: of the terms in the loss; "class", "mask" and "dice" also weigh the costs of matching. Names that are
            left out keep the paper's weights.
        class_term: (logits [N, K+1], classes [N]) → [N]
        no_object_weight: weight of queries without a segment in the class term
        class_weights: of those with a segment, by its class. K numbers; None: 1 for every class
        num_points: P, at which masks are compared, in matching and in the loss
        oversample_ratio: candidates per point from which the uncertain ones are chosen
        importance_sample_ratio: share of the points that is chosen by uncertainty

    Source: Mask2Former (Cheng et al. 2022), sections 3.3 and 4.1.
    """

    num_classes: int
    terms: Mapping[str, Callable[..., Tensor]] = field(default_factory=lambda: dict(mask=terms.mask, dice=terms.dice))
    weights: Mapping[str, float] = field(default_factory=dict)
    class_term: Callable[[Tensor, Tensor], Tensor] = field(default_factory=lambda: terms.cross_entropy)
    no_object_weight: float = 0.1
    class_weights: tuple[float, ...] | None = None
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", WEIGHTS | dict(self.weights))
        for name, sound, expected in (
            ("num_classes", self.num_classes >= 1, "at least 1"),
            ("num_points", self.num_points >= 1, "at least 1"),
            ("oversample_ratio", self.oversample_ratio >= 1, "at least 1"),
            ("importance_sample_ratio", 0 <= self.importance_sample_ratio <= 1, "in [0, 1]"),
            ("no_object_weight", self.no_object_weight > 0, "positive, or an image without segments has no loss"),
            ("class_weights", *self._sound_class_weights()),
            ("terms", not {"class", "total"} & set(self.terms), 'without "class" and "total"; see class_term'),
        ):
            if not sound:
                raise ValueError(f"Criterion.{name} must be {expected}, got {getattr(self, name)!r}.")
        known, weighted = {*WEIGHTS, *self.terms}, set(self.weights)
        if known != weighted:
            problem = "a term without a weight" if known - weighted else "a weight without a term"
            wrong = sorted(known - weighted or weighted - known)
            raise ValueError(f"Criterion: {problem}: {wrong}. Terms: {sorted(known)}.")

    def _sound_class_weights(self) -> tuple[bool, str]:
        weights = self.class_weights
        sound = weights is None or (len(weights) == self.num_classes and all(0 <= w < math.inf for w in weights))
        return sound, f"a finite number of at least 0 for each of {self.num_classes} classes, or None"

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms of each prediction: "class" first."""
        return ("class", *self.terms)

    @property
    def matcher(self) -> Matcher:
        return Matcher(self.num_points, *(self.weights[name] for name in WEIGHTS))

    def __call__(
        self, output: Output, targets: Sequence[Target], divisors: Divisors | None = None
    ) -> dict[str, Tensor]:
        """Match queries with segments, then compare.

        Args:
            output: predictions for B images
            targets: ground truth of each image, on the same device
            divisors: of the whole batch, if these images are a part of it; otherwise they are the whole batch

        Returns:
            "total", the weighted sum, to call backward on; and "l.class", "l.mask", … of every prediction l, one for
            each of `term_names`, unweighted. Scalars in float32, under autocast too.

        Raises:
            NonFiniteError: a prediction holds NaN or infinity; names image, prediction and term.
            ValueError: output and targets do not belong together, or a label is no class.
        """
        output = output.float()
        match = self.matcher.start(output, targets)
        drawn = self.draw(output, targets) if self.pointwise else None  # while a GPU works on these, the CPU assigns
        return self.losses(output, targets, match(), drawn, divisors)

    def losses(
        self,
        output: Output,
        targets: Sequence[Target],
        matching: Matching,
        points: Tensor | Sequence[ops.PairGroup] | None = None,
        divisors: Divisors | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a given matching; returns what a call returns.

        Args:
            output, targets, divisors: as in a call
            matching: M pairs
            points: what `draw` returned; or where to compare each pair, (x, y) in [0, 1] of the padded image
                [M, P, 2]; or None, to draw
        """
        if output.num_classes != self.num_classes:
            raise ValueError(
                f"The output has {output.num_classes} classes (and no-object), the criterion {self.num_classes}; "
                "build both from the same recipe."
            )
        output = output.float()
        device = output.class_logits[0].device
        with torch.autocast(device.type, enabled=False):
            class_sum, weight = self.class_sums(output, targets, matching)  # (L,), (L,)
            divisors = divisors or Divisors(weight, average_num_masks(targets, device))
            losses = {"class": class_sum / divisors.queries}
            sums = self.pointwise_sums(output, targets, matching, points) if self.pointwise else {}
            for name, term in self.terms.items():
                values = sums[name] if name in sums else term(output, targets, matching)  # (L,)
                ops.check_shape(name, values, output.num_predictions, "the sum over pairs of each prediction")
                losses[name] = values / divisors.segments
            total = sum(self.weights[name] * values for name, values in losses.items()).sum()
        result = {"total": total}
        for name, values in losses.items():
            result |= {f"{prediction}.{name}": value for prediction, value in enumerate(values.unbind())}
        return result

    def class_sums(self, output: Output, targets: Sequence[Target], matching: Matching) -> tuple[Tensor, Tensor]:
        """Weighted class term summed over all queries, and the sum of the weights. [L], [L]

        A query without a segment learns "no object", with its weight.
        """
        logits = torch.stack(output.class_logits)  # (L, B, Q, K+1)
        _, batch, num_queries, _ = logits.shape
        query = (matching.prediction * batch + matching.image) * num_queries + matching.query  # among those of all
        first = torch.tensor([0] + [target.num_segments for target in targets[:-1]]).cumsum(0)  # (B,)
        query, segment = ops.to_device([query, first[matching.image] + matching.segment], logits.device)
        classes = torch.full((logits[..., 0].numel(),), self.num_classes, device=logits.device)  # (L*B*Q,)
        classes[query] = torch.cat([target.labels for target in targets]).long()[segment]

        weight = logits.new_ones(self.num_classes + 1)
        weight[self.num_classes :] = self.no_object_weight
        if self.class_weights is not None:
            (weight[:-1],) = ops.to_device([torch.tensor(self.class_weights)], weight.device)
        weight = weight[classes].view(len(logits), -1)  # (L, B*Q)
        losses = self.class_term(logits.flatten(0, 2), classes).view_as(weight)
        return (losses * weight).sum(1), weight.sum(1)

    def weight_of_queries(self, targets: Sequence[Target], num_queries: int) -> float:
        """Sum of the class weights of all queries in a prediction, known before they are matched.

        Where an image has more segments than queries, those of an average one stand for the segments that are left out.
        """
        total = 0.0
        for target in targets:
            matched = min(target.num_segments, num_queries)
            total += matched + self.no_object_weight * (num_queries - matched)
            if self.class_weights is not None and matched:
                weights = torch.tensor(self.class_weights)[target.labels.long().cpu()]
                total += matched * (weights.mean().item() - 1)
        return total

    @property
    def pointwise(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """The terms that compare each pair at points; the others see the whole output."""
        return {name: term for name, term in self.terms.items() if not getattr(term, "sees_output", False)}

    def pointwise_sums(
        self,
        output: Output,
        targets: Sequence[Target],
        matching: Matching,
        points: Tensor | Sequence[ops.PairGroup] | None = None,
    ) -> dict[str, Tensor]:
        """Compare all pairs at points, and add up those of each prediction; arguments of `losses`. {name: [L]}"""
        if isinstance(points, Tensor):  # of each pair its own
            drawn, place = [], torch.arange(len(points))
            for image, own in zip(matching.image.tolist(), points.unsqueeze(1), strict=True):
                truth = segments_at([targets[image]], own, output.padded_size)
                drawn.append(ops.PairGroup(slice(image, image + 1), own, truth))
        else:
            drawn, place = points or self.draw(output, targets), matching.image
        predictions = torch.arange(output.num_predictions, device=output.masks[0].features.device)[:, None]  # (L, 1)
        sums = dict.fromkeys(self.pointwise, 0)
        for shared in output.groups():
            pairs = shared.pairs(matching)  # (m,)
            groups = ops.with_pairs(drawn, place[pairs], matching.segment[pairs])
            rows, of_prediction = shared.rows(matching, pairs), matching.prediction[pairs]
            rows, of_prediction = ops.to_device([rows, of_prediction], shared.features.device)
            embeddings = shared.embeddings.flatten(0, 2).index_select(0, rows)  # (m, C)
            if self.pointwise == FUSED and not ops.is_plain("mask_and_dice"):
                losses = dict(zip(FUSED, ops.mask_and_dice(shared.features, embeddings, groups), strict=True))
            else:
                losses = ops.compare_pairs(self.pointwise, shared.features, embeddings, groups)
            belongs = (of_prediction == predictions).to(shared.features)  # (L, m)
            sums = {name: sums[name] + belongs @ of_pairs for name, of_pairs in losses.items()}
        return sums

    @torch.no_grad()
    def draw(self, output: Output, targets: Sequence[Target]) -> list[ops.PairGroup]:
        """Draw points for each image, and read its segments there; groups without pairs, as these are not known yet."""
        features, most = output.masks[0].features, max(target.num_segments for target in targets)
        options = self.num_points, self.oversample_ratio, self.importance_sample_ratio
        points, *numbers = shared_points(len(targets), *options, like=features)
        num_pairs = output.num_predictions * min(most, output.masks[0].num_queries)
        return [
            ops.PairGroup(at, points[at], segments_at(targets[at], points[at], output.padded_size), *numbers)
            for at in ops.images_at_once(len(targets), num_pairs * points.shape[1], features.device)
        ]


def average_num_masks(targets: Sequence[Target], device: torch.device) -> Tensor | int:
    """Segments per process, at least 1, so that a process with few of them does not count for more."""
    num_masks = sum(target.num_segments for target in targets)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return max(num_masks, 1)
    total = torch.full((), float(num_masks), device=device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).clamp(min=1)


def build_criterion(recipe: Recipe) -> Criterion:
    """The paper's criterion with the settings of a recipe."""
    loss = recipe.loss
    return Criterion(
        recipe.model.num_classes,
        weights={"class": loss.class_weight, "mask": loss.mask_weight, "dice": loss.dice_weight},
        no_object_weight=loss.no_object_weight,
        class_weights=loss.class_weights,
        num_points=loss.num_points,
        oversample_ratio=loss.oversample_ratio,
        importance_sample_ratio=loss.importance_sample_ratio,
    )
