"""Bipartite matching of queries and segments, in every prediction by itself.

B images, L predictions, Q queries, K classes, C mask feature channels, T segments of an image, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from m2f_lab.loss.points import random_points
from m2f_lab.ops import PointSampler, mask_costs, sample_points
from m2f_lab.structures import Matching, NonFiniteError, Output, Target


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
        output = output.float()
        terms = self.costs(output, targets, points)
        labels = torch.cat([target.labels for target in targets])
        costs = [sum(of_image.values()) for of_image in terms]
        *costs, labels, classes, masks = _to_cpu([*costs, labels, *output.finite()], dtype=costs[0].dtype)
        _check_labels(labels, targets, output.num_classes)
        if not (classes.all() and masks.all() and all(cost.isfinite().all() for cost in costs)):
            raise NonFiniteError(_culprits(terms, classes.bool(), masks.bool()))
        return _assign(costs)

    @torch.no_grad()
    def costs(self, output: Output, targets: Sequence[Target], points: Tensor | None = None) -> list[dict[str, Tensor]]:
        """The weighted terms "class", "mask" and "dice" of each image; their sum is the cost. B × {term: [L, Q, T]}

        Takes the same arguments as a call. Float32 even under autocast.
        """
        output = output.float()
        output.check_targets(targets)
        if points is None:
            points = random_points(len(targets), self.num_points, like=output.masks[0].features)
        groups = output.groups()
        class_logits = torch.stack(output.class_logits, dim=1)  # (B, L, Q, K+1)
        terms = []
        with torch.autocast(class_logits.device.type, enabled=False):
            for image, target in enumerate(targets):
                # An invalid label would trigger a device-side assert. Clamp here, report after the transfer.
                labels = target.labels.long().clamp(0, output.num_classes - 1)
                class_cost = -self.class_weight * class_logits[image].softmax(-1)[..., labels]  # (L, Q, T)
                mask_cost, dice_cost = torch.empty_like(class_cost), torch.empty_like(class_cost)
                truth = target.at(points[image], output.padded_size)  # (T, P)
                for group in groups:
                    # Sampling commutes with the product: features are read once for all masks over them.
                    sampler = PointSampler(points[image], tuple(group.features.shape[2:]))
                    nearby = sample_points(group.features[image].flatten(1).T, sampler).T  # (C, P)
                    cross_entropy, dice = mask_costs(group.embeddings[image], nearby, truth)
                    mask_cost[group.predictions] = self.mask_weight * cross_entropy
                    dice_cost[group.predictions] = self.dice_weight * dice
                terms.append({"class": class_cost, "mask": mask_cost, "dice": dice_cost})
        return terms


def _to_cpu(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Move tensors to the CPU in one piece, which takes one synchronisation instead of one for each."""
    pieces = torch.cat([tensor.flatten().to(dtype) for tensor in tensors]).cpu().split([t.numel() for t in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


def _assign(costs: list[Tensor]) -> Matching:
    """Solve one assignment problem for each prediction of each image. Costs on the CPU: B × [L, Q, T]"""
    pairs = []
    for image, image_costs in enumerate(costs):
        for prediction, cost in enumerate(image_costs.numpy()):
            query, segment = map(torch.from_numpy, linear_sum_assignment(cost))
            image_of, prediction_of = torch.full_like(query, image), torch.full_like(query, prediction)
            pairs.append(torch.stack([image_of, prediction_of, query, segment]))
    return Matching(*torch.cat(pairs, dim=1))


def _check_labels(labels: Tensor, targets: Sequence[Target], num_classes: int) -> None:
    for image, own in enumerate(labels.split([target.num_segments for target in targets])):
        unknown = own[(own < 0) | (own >= num_classes)]
        if len(unknown):
            raise ValueError(
                f"The target of image {image} has labels {unknown.long().unique().tolist()}, but the model knows "
                f"classes 0…{num_classes - 1}. Map raw ids to classes first and leave ignored pixels out, or build the "
                "model with the data set's number of classes."
            )


def _culprits(terms: list[dict[str, Tensor]], classes: Tensor, masks: Tensor) -> list[tuple[int, int, str]]:
    """Name what is not finite, in the costs or in the predictions: (image, prediction, term)."""
    finite = torch.stack([classes, masks, masks], dim=2)  # (B, L, term)
    for of_image, costs in zip(finite, terms, strict=True):
        for term, cost in enumerate(costs.values()):
            of_image[:, term] &= cost.isfinite().flatten(1).all(1).cpu()
    names = list(terms[0])
    return [(image, prediction, names[term]) for image, prediction, term in (~finite).nonzero().tolist()]
