"""The training loss: classification of every query, and the masks of the matched ones, in all predictions.

B images, L predictions, Q queries, K classes, C mask feature channels, M matched pairs of all images and predictions,
P points, H/W height/width of the mask features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.loss.matcher import Matcher, Matching, in_float32
from m2f_lab.loss.pairs import SharedPoints, pair_losses
from m2f_lab.loss.points import PointReader, sample_all_segments, sample_segments, shared_points
from m2f_lab.structures import MaskLogits, Output, Target, sample_points


@dataclass(frozen=True)
class Criterion:
    """Class, mask and dice loss of every prediction, added up with their weights.

    Attributes:
        num_classes: K, without "no object"
        num_points: P, at which masks are compared, in matching and in the loss
        oversample_ratio: candidates per point from which the uncertain ones are chosen
        importance_sample_ratio: share of the points that is chosen by uncertainty
        class_weight, mask_weight, dice_weight: weights of the terms, in matching and in the loss
        no_object_weight: weight of queries that are matched with nothing, in the cross-entropy

    Source: Mask2Former (Cheng et al. 2022), sections 3.3 and 4.1.
    """

    num_classes: int
    num_points: int = 12544
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1

    def __post_init__(self) -> None:
        for name, sound, expected in (
            ("num_classes", self.num_classes >= 1, "at least 1"),
            ("num_points", self.num_points >= 1, "at least 1"),
            ("oversample_ratio", self.oversample_ratio >= 1, "at least 1"),
            ("importance_sample_ratio", 0 <= self.importance_sample_ratio <= 1, "in [0, 1]"),
            ("no_object_weight", self.no_object_weight > 0, "positive, or an image without segments has no loss"),
        ):
            if not sound:
                raise ValueError(f"Criterion.{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def matcher(self) -> Matcher:
        return Matcher(self.num_points, self.class_weight, self.mask_weight, self.dice_weight)

    def __call__(self, output: Output, targets: Sequence[Target]) -> dict[str, Tensor]:
        """Match, then compare.

        Args:
            output: what the model predicts for B images
            targets: ground truth of each image, on the same device

        Returns:
            "total", the weighted sum, to call backward on; and "l.class", "l.mask", "l.dice" of every prediction l,
            unweighted. Scalars in float32, under autocast too.

        Raises:
            NonFiniteError: a prediction holds NaN or infinity; names image, prediction and term.
            ValueError: output and targets do not belong together, or a label is no class.
        """
        output = in_float32(output)
        return self.losses(output, targets, self.matcher(output, targets))

    def losses(
        self, output: Output, targets: Sequence[Target], matching: Matching, points: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of a given matching; returns what a call returns.

        Args:
            output, targets: as in a call
            matching: M pairs
            points: where to compare each pair, (x, y) in [0, 1] of the padded image, instead of drawing them. [M, P, 2]
        """
        if output.num_classes != self.num_classes:
            raise ValueError(
                f"The output has {output.num_classes} classes (and no-object), the criterion {self.num_classes}; "
                "build both from the same recipe."
            )
        output = in_float32(output)
        device = output.masks[0].features.device
        with torch.autocast(device.type, enabled=False):
            class_loss = self.class_loss(output, targets, matching)  # (L,)
            mask_loss, dice_loss = self.mask_losses(output, targets, matching, points)  # (L,), (L,)
            num_masks = average_num_masks(targets, device)
            mask_loss, dice_loss = mask_loss / num_masks, dice_loss / num_masks
            total = self.class_weight * class_loss + self.mask_weight * mask_loss + self.dice_weight * dice_loss
        result = {"total": total.sum()}
        for name, values in (("class", class_loss), ("mask", mask_loss), ("dice", dice_loss)):
            result.update({f"{prediction}.{name}": value for prediction, value in enumerate(values.unbind())})
        return result

    def class_loss(self, output: Output, targets: Sequence[Target], matching: Matching) -> Tensor:
        """Cross-entropy of all queries; those without a segment are to say "no object". [L]

        The mean is weighted: every term and the divisor carry the weight of the class to be predicted.
        """
        logits = torch.stack(output.class_logits)  # (L, B, Q, K+1)
        first = torch.tensor([0] + [target.num_segments for target in targets[:-1]]).cumsum(0)  # (B,)
        where = torch.stack(
            [matching.prediction, matching.image, matching.query, first[matching.image] + matching.segment]
        )
        *pairs, segment = where.to(logits.device, non_blocking=True)
        classes = torch.full(logits.shape[:-1], self.num_classes, device=logits.device)  # (L, B, Q)
        classes[tuple(pairs)] = torch.cat([target.labels for target in targets]).long()[segment]

        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.no_object_weight
        losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
        return losses.view(len(logits), -1).sum(1) / weight[classes].flatten(1).sum(1)

    def mask_losses(
        self, output: Output, targets: Sequence[Target], matching: Matching, points: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Binary cross-entropy and dice, summed over the matched pairs of each prediction. [L], [L]"""
        masks, queries = output.masks[0], output.masks[0].num_queries
        stacked = MaskLogits(torch.cat([m.embeddings for m in output.masks], dim=1), masks.features)
        query = matching.prediction * queries + matching.query
        pairs_per_image = torch.bincount(matching.image, minlength=len(targets)).tolist()
        segments = matching.segment.to(masks.features.device, non_blocking=True)
        if points is None:
            shared = [self.draw(target, output) for target in targets]
            own = stacked.embeddings[matching.image, query]  # (M, C)
            pairs = pair_losses(masks.features, own, segments, pairs_per_image, shared)
        else:
            truth = torch.cat(
                [
                    sample_segments(target, numbers, where, output.padded_size)
                    for target, numbers, where in zip(
                        targets, segments.split(pairs_per_image), points.split(pairs_per_image), strict=True
                    )
                ]
            )  # (M, P)
            dense = stacked.select(matching.image, query)  # (M, H, W)
            logits = sample_points(dense.unsqueeze(1), points).squeeze(1)  # (M, P)
            pairs = mask_loss(logits, truth), dice_loss(logits, truth)

        def per_prediction(losses: Tensor) -> Tensor:  # (M,) → (L,)
            predictions = output.num_predictions
            images = [part.view(predictions, len(part) // predictions) for part in losses.split(pairs_per_image)]
            return torch.cat(images, dim=1).sum(1)

        mask, dice = pairs
        return per_prediction(mask), per_prediction(dice)

    @torch.no_grad()
    def draw(self, target: Target, output: Output) -> SharedPoints:
        """Draw points for all pairs of an image: candidates, of which each pair keeps the least certain, and the rest.

        Source: PointRend (Kirillov et al. 2020), section 3.1, "Training"; Mask2Former, section 3.3.
        """
        features = output.masks[0].features
        points, *numbers = shared_points(
            self.num_points, self.oversample_ratio, self.importance_sample_ratio, like=features
        )
        read_truth = partial(sample_all_segments, target, points, output.padded_size)  # → (T, P)
        return SharedPoints(PointReader.at(points, output.masks[0].size), read_truth, *numbers)


def mask_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy of each pair, averaged over points. [M, P], [M, P] → [M]"""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss of each pair (Milletari et al. 2016), smoothed by 1. [M, P], [M, P] → [M]"""
    probability = logits.sigmoid()
    overlap = (probability * truth).sum(1)
    return 1 - (2 * overlap + 1) / (probability.sum(1) + truth.sum(1) + 1)


def average_num_masks(targets: Sequence[Target], device: torch.device) -> Tensor | int:
    """Segments per process, at least 1, so that a process with few of them does not count for more."""
    num_masks = sum(target.num_segments for target in targets)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return max(num_masks, 1)
    total = torch.full((), float(num_masks), device=device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).clamp(min=1)


def build_criterion(recipe):
    from dataclasses import asdict

    return Criterion(recipe.model.num_classes, **asdict(recipe.loss))


Criterion.term_names = property(lambda self: ("class", "mask", "dice"))
