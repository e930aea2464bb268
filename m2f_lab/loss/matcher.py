"""Bipartite matching of queries and segments, in every prediction by itself.

B images, L predictions, Q queries, K classes, C mask feature channels, T segments of an image, P points, M matched
pairs of all images and predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f_lab.loss.points import random_points, sample_segments, sort_by_row
from m2f_lab.ops import PointSampler, mask_costs, sample_points
from m2f_lab.structures import MaskLogits, Output, Target


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
class Matching:
    """The matched pairs of a batch, on the CPU, ordered by image, then prediction, then query.

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


@dataclass(frozen=True)
class Matcher:
    """Assigns to each segment the query that predicts it at the least cost, in every prediction by itself.

    Attributes:
        num_points: P, drawn once per image and shared by all queries, predictions and segments
        class_weight, mask_weight, dice_weight: weights of the three terms of the cost

    Source: Mask2Former (Cheng et al. 2022), section 3.3; DETR (Carion et al. 2020), section 3.1.
    """

    num_points: int = 12544
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0

    @torch.no_grad()
    def __call__(self, output: Output, targets: Sequence[Target], points: Tensor | None = None) -> Matching:
        """Match all predictions of all images.

        Args:
            output: what the model predicts for B images
            targets: ground truth of each image
            points: (x, y) in [0, 1] of the padded image, instead of random ones. [B, P, 2]

        Raises:
            NonFiniteError: a cost, or the loss of any of these predictions, would not be finite.
            ValueError: a label is no class of the model, or output and targets do not belong together.
        """
        output = in_float32(output)
        terms = self.costs(output, targets, points)
        costs = [sum(image_terms.values()) for image_terms in terms]
        labels = torch.cat([target.labels for target in targets])

        # Costs, labels and flags are packed into one tensor: one synchronisation per step.
        parts = [*costs, labels, *finite_predictions(output)]
        packed = torch.cat([part.flatten().to(terms[0]["class"].dtype) for part in parts]).cpu()
        *costs, labels, finite_class, finite_masks = (
            values.view(part.shape)
            for values, part in zip(packed.split([p.numel() for p in parts]), parts, strict=True)
        )

        _check_labels(labels, targets, output.num_classes)
        if not packed.isfinite().all() or not finite_class.all() or not finite_masks.all():
            raise NonFiniteError(_culprits(terms, finite_class, finite_masks))
        return _assign(costs)

    @torch.no_grad()
    def costs(self, output: Output, targets: Sequence[Target], points: Tensor | None = None) -> list[dict[str, Tensor]]:
        """The weighted terms "class", "mask" and "dice" of each image; their sum is the cost. B × {term: [L, Q, T]}

        Takes the same arguments as a call. Float32 even under autocast.
        """
        output = in_float32(output)
        _check_sizes(output, targets)
        if points is None:
            points = random_points(len(targets), self.num_points, like=output.masks[0].features)
            points = [sort_by_row(of_image) for of_image in points]
        groups = by_features(output)
        class_logits = torch.stack(output.class_logits, dim=1)  # (B, L, Q, K+1)
        terms = []
        with torch.autocast(class_logits.device.type, enabled=False):
            for image, target in enumerate(targets):
                # An invalid label would trigger a device-side assert. Clamp here, report after the transfer.
                labels = target.labels.long().clamp(0, output.num_classes - 1)
                truth = sample_segments(target, points[image], output.padded_size)  # (T, P)
                shape = (*class_logits.shape[1:3], target.num_segments)
                mask_cost, dice_cost = class_logits.new_empty(2, *shape)  # (L, Q, T), (L, Q, T)
                for group in groups:
                    # Sampling commutes with the product: features are read once for all masks over them.
                    sampler = PointSampler(points[image], tuple(group.features.shape[2:]))
                    nearby = sample_points(group.features[image].flatten(1).T, sampler).T  # (C, P)
                    costs = mask_costs(group.embeddings[image], nearby, truth)
                    mask_cost[group.predictions], dice_cost[group.predictions] = costs
                terms.append(
                    {
                        "class": -self.class_weight * class_logits[image].softmax(-1)[..., labels],
                        "mask": self.mask_weight * mask_cost,
                        "dice": self.dice_weight * dice_cost,
                    }
                )
        return terms


class SharedFeatures(NamedTuple):
    """Predictions that share their mask features.

    Attributes:
        predictions: l of them, in ascending order
        embeddings: [B, l, Q, C]
        features: [B, C, H, W]
    """

    predictions: list[int]
    embeddings: Tensor
    features: Tensor

    def embeddings_of(self, matching: Matching, rows: Tensor) -> Tensor:
        """Mask embeddings of some pairs, all of these predictions. [m] → [m, C]"""
        place = torch.searchsorted(torch.tensor(self.predictions), matching.prediction[rows])
        return self.embeddings[matching.image[rows], place, matching.query[rows]]


def by_features(output: Output) -> list[SharedFeatures]:
    """Group predictions by their tensor of mask features: one group for Mask2Former, L for encoder-only models."""
    groups: dict[int, list[int]] = {}
    for prediction, masks in enumerate(output.masks):
        groups.setdefault(id(masks.features), []).append(prediction)
    return [
        SharedFeatures(
            predictions,
            torch.stack([output.masks[p].embeddings for p in predictions], dim=1),
            output.masks[predictions[0]].features,
        )
        for predictions in groups.values()
    ]


def in_float32(output: Output) -> Output:
    """The same output with logits and factors in float32 (or float64); features that were shared stay shared."""
    dtype = torch.promote_types(output.masks[0].features.dtype, torch.float32)
    features = {id(masks.features): masks.features.to(dtype) for masks in output.masks}
    return replace(
        output,
        class_logits=[logits.to(dtype) for logits in output.class_logits],
        masks=[MaskLogits(masks.embeddings.to(dtype), features[id(masks.features)]) for masks in output.masks],
    )


def finite_predictions(output: Output) -> tuple[Tensor, Tensor]:
    """True where all class logits and all mask logits of a prediction are finite. [B, L], [B, L]

    No mask is multiplied out for it: by Cauchy and Schwarz, |e · f| ≤ ‖e‖ ‖f‖.
    """
    class_logits = torch.stack(output.class_logits, dim=1)  # (B, L, Q, K+1)
    bound = class_logits.new_empty(class_logits.shape[:2])
    for group in by_features(output):
        # As they lie: flattened, the features would be copied.
        lengths = torch.linalg.vector_norm(group.features, dim=(1, 2, 3))
        bound[:, group.predictions] = group.embeddings.flatten(2).norm(dim=2) * lengths.unsqueeze(1)
    return class_logits.isfinite().flatten(2).all(2), bound.isfinite()


def _assign(costs: list[Tensor]) -> Matching:
    """Solve one assignment problem for each prediction of each image. Costs on the CPU: B × [L, Q, T]"""
    pairs = []
    for image, image_costs in enumerate(costs):
        for prediction, cost in enumerate(image_costs.numpy()):
            query, segment = map(torch.from_numpy, linear_sum_assignment(cost))
            pairs.append(
                torch.stack([torch.full_like(query, image), torch.full_like(query, prediction), query, segment])
            )
    return Matching(*torch.cat(pairs, dim=1))


def _check_sizes(output: Output, targets: Sequence[Target]) -> None:
    batch = len(output.class_logits[0])
    if len(targets) != batch:
        raise ValueError(f"The output holds {batch} images, but there are {len(targets)} targets; give one per image.")
    for image, target in enumerate(targets):
        if any(have > limit for have, limit in zip(target.size, output.padded_size, strict=True)):
            raise ValueError(
                f"The target of image {image} is {target.size}, larger than the padded image {output.padded_size}. "
                "Ground truth must have the pixels of the image that went into the model: resize and crop both alike."
            )


def _check_labels(labels: Tensor, targets: Sequence[Target], num_classes: int) -> None:
    for image, own in enumerate(labels.split([target.num_segments for target in targets])):
        unknown = own[(own < 0) | (own >= num_classes)]
        if len(unknown):
            raise ValueError(
                f"The target of image {image} has labels {unknown.long().unique().tolist()}, but the model knows "
                f"classes 0…{num_classes - 1}. Map raw ids to classes first and leave ignored pixels out, or build the "
                "model with the data set's number of classes."
            )


def _culprits(terms: list[dict[str, Tensor]], finite_class: Tensor, finite_masks: Tensor) -> list[tuple[int, int, str]]:
    """Name what is not finite: (image, prediction, term)."""
    culprits = []
    for image, image_terms in enumerate(terms):
        for prediction in range(finite_class.shape[1]):
            sound = {name: bool(cost[prediction].isfinite().all()) for name, cost in image_terms.items()}
            sound["class"] &= bool(finite_class[image, prediction])
            sound["mask"] &= bool(finite_masks[image, prediction])
            sound["dice"] &= bool(finite_masks[image, prediction])
            culprits += [(image, prediction, name) for name, fine in sound.items() if not fine]
    return culprits
