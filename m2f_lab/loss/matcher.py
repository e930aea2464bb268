"""Bipartite matching of queries and segments, in every prediction by itself.

B images, L predictions, Q queries, K classes, C mask feature channels, T segments of an image, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from m2f_lab.loss.points import random_points
from m2f_lab.ops import PointSampler, images_at_once, mask_costs, sample_points, to_cpu
from m2f_lab.structures import Matching, NonFiniteError, Output, Target, segments_at

TERMS = ("class", "mask", "dice")
"""Of the costs; the weighted sum of these is a cost."""


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
        return self.start(output, targets, points)()

    @torch.no_grad()
    def start(self, output: Output, targets: Sequence[Target], points: Tensor | None = None) -> Callable[[], Matching]:
        """Begin as a call does; the function returned waits for the costs and assigns. Meanwhile a GPU can work on."""
        output = output.float()
        costs = self._costs(output, targets, points)
        labels = torch.cat([target.labels for target in targets])
        arrive = to_cpu([costs.sum(0), labels, *output.finite()])

        def finish() -> Matching:
            total, labels, classes, masks = arrive()
            _check_labels(labels, targets, output.num_classes)
            if not (classes.all() and masks.all() and total.isfinite().all()):
                raise NonFiniteError(_culprits(costs, classes.bool(), masks.bool()))
            return _assign([cost[..., : target.num_segments] for cost, target in zip(total, targets, strict=True)])

        return finish

    def costs(self, output: Output, targets: Sequence[Target], points: Tensor | None = None) -> list[dict[str, Tensor]]:
        """The weighted terms "class", "mask" and "dice" of each image; their sum is the cost. B × {term: [L, Q, T]}

        Takes the same arguments as a call. Float32 even under autocast.
        """
        by_image = self._costs(output, targets, points).unbind(1)
        return [
            dict(zip(TERMS, costs[..., : target.num_segments], strict=True))
            for costs, target in zip(by_image, targets, strict=True)
        ]

    @torch.no_grad()
    def _costs(self, output: Output, targets: Sequence[Target], points: Tensor | None) -> Tensor:
        """The same in one table, T that of the largest target, zero beyond a target's own. [3, B, L, Q, T]"""
        output = output.float()
        output.check_targets(targets)
        class_logits, groups = torch.stack(output.class_logits, dim=1), output.groups()  # (B, L, Q, K+1)
        if points is None:
            points = random_points(len(targets), self.num_points, like=output.masks[0].features)
        per_image = points.shape[1] * output.masks[0].features.shape[1]
        most = max(target.num_segments for target in targets)
        table = class_logits.new_zeros(len(TERMS), *class_logits.shape[:3], most)
        with torch.autocast(class_logits.device.type, enabled=False):
            for images in images_at_once(len(targets), per_image, class_logits.device):
                # An invalid label would trigger a device-side assert. Clamp here, report after the transfer.
                labels = pad_sequence([target.labels for target in targets[images]], batch_first=True)  # (b, T)
                labels = labels.long().clamp(0, output.num_classes - 1)[:, None, None]
                probability = class_logits[images].softmax(-1)
                likely = probability.gather(3, labels.expand(-1, *probability.shape[1:3], -1))  # (b, L, Q, T)
                truth = segments_at(targets[images], points[images], output.padded_size)  # (b, T, P)
                compared = []
                for group in groups:
                    # Sampling commutes with the product: features are read once for all masks over them.
                    sampler = PointSampler(points[images], tuple(group.features.shape[2:]))
                    nearby = sample_points(group.features[images].flatten(2).mT, sampler)  # (b, P, C)
                    embeddings = group.embeddings[images]  # (b, l, Q, C)
                    costs = mask_costs(embeddings.flatten(1, 2), nearby, truth)
                    compared.append([cost.unflatten(1, embeddings.shape[1:3]) for cost in costs])
                mask, dice = map(output.in_order, zip(*compared, strict=True))
                weighted = (-self.class_weight * likely, self.mask_weight * mask, self.dice_weight * dice)
                table[:, images, ..., : labels.shape[-1]] = torch.stack(weighted)
        return table


def _assign(costs: list[Tensor]) -> Matching:
    """Solve one assignment problem for each prediction of each image. Costs on the CPU: B × [L, Q, T]"""
    pairs = []
    for image, image_costs in enumerate(costs):
        for prediction, cost in enumerate(image_costs.numpy()):
            query, segment = linear_sum_assignment(cost)
            pairs.append(np.stack([np.full_like(query, image), np.full_like(query, prediction), query, segment]))
    return Matching(*torch.from_numpy(np.concatenate(pairs, axis=1)))


def _check_labels(labels: Tensor, targets: Sequence[Target], num_classes: int) -> None:
    for image, own in enumerate(labels.split([target.num_segments for target in targets])):
        if len(unknown := own[(own < 0) | (own >= num_classes)]):
            raise ValueError(
                f"The target of image {image} has labels {unknown.long().unique().tolist()}, but the model knows "
                f"classes 0…{num_classes - 1}. Map raw ids to classes first and leave ignored pixels out, or build the "
                "model with the data set's number of classes."
            )


def _culprits(costs: Tensor, classes: Tensor, masks: Tensor) -> list[tuple[int, int, str]]:
    """Name what is not finite, in the costs [3, B, L, Q, T] or in the predictions: (image, prediction, term)."""
    finite = torch.stack([classes, masks, masks]) & costs.isfinite().flatten(3).all(3).cpu()  # (term, B, L)
    return [
        (image, prediction, TERMS[term]) for image, prediction, term in (~finite).permute(1, 2, 0).nonzero().tolist()
    ]
