"""A changed loss: a term that weighs a mask's errors by their distance from the segment's outline.

    from examples.boundary_loss import with_boundary
    run = train(recipes.debug_tiny(), "data/scenes", "runs/boundary", criterion=with_boundary)

    m2f-lab train debug_tiny --criterion examples/boundary_loss.py:with_boundary …

L predictions, N pairs of a prediction of one image, T segments, H/W height/width of the mask features.

Source: Boundary loss for highly unbalanced segmentation (Kervadec et al. 2019), equation 5.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from m2f_lab.loss import Criterion, Matching, build_criterion, sees_output
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Output, Target


@sees_output
def boundary(output: Output, targets: list[Target], matching: Matching) -> Tensor:
    """Mean of probability × signed distance, summed over the matched pairs of each prediction. [L]"""
    sums = [masks.features.new_zeros(()) for masks in output.masks]
    for image, target in enumerate(targets):
        for prediction, masks in enumerate(output.masks):
            query, segment = matching.of(prediction, image)
            distances = signed_distances(target, output.padded_size, masks.size)[segment]  # (N, H, W)
            logits = torch.einsum("nc,chw->nhw", masks.embeddings[image, query], masks.features[image])
            sums[prediction] = sums[prediction] + (logits.sigmoid() * distances.to(logits)).mean(dim=(1, 2)).sum()
    return torch.stack(sums)


def signed_distances(target: Target, padded_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Distance of every cell from the outline of each segment, as a share of the map's diagonal. [T, H, W]

    Negative inside a segment, zero where a segment has no outline at all.
    """
    padding = (0, padded_size[1] - target.size[1], 0, padded_size[0] - target.size[0])
    masks = F.interpolate(F.pad(target.dense(), padding)[None].float(), size=size, mode="area")[0] > 0.5
    diagonal = float(np.hypot(*size))
    distances = torch.zeros(masks.shape)
    for distance, mask in zip(distances, masks.cpu().numpy(), strict=True):
        if mask.any() and not mask.all():
            signed = distance_transform_edt(~mask) - distance_transform_edt(mask)
            distance.copy_(torch.from_numpy(signed / diagonal))
    return distances


def with_boundary(recipe: Recipe) -> Criterion:
    """The paper's criterion and the boundary term."""
    paper = build_criterion(recipe)
    return replace(paper, terms={**paper.terms, "boundary": boundary}, weights={**paper.weights, "boundary": 2.0})
