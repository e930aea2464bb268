"""Points at which masks are compared, instead of all pixels.

P points, N candidates among them, k of which a mask keeps, R points that follow the candidates.

Points are (x, y) in [0, 1] of the padded image everywhere in this package: mask logits cover the padded image, and
ground truth, which may end earlier, is read as if it were padded with "no segment".
"""

from __future__ import annotations

import torch
from torch import Tensor


def random_points(num_sets: int, num_points: int, like: Tensor) -> Tensor:
    """Uniform points from torch's global generator, on the device and in the type of `like`. [num_sets, P, 2]"""
    return torch.rand(num_sets, num_points, 2, device=like.device, dtype=like.dtype)


def shared_points(
    num_sets: int, num_points: int, oversample_ratio: float, importance_sample_ratio: float, like: Tensor
) -> tuple[Tensor, int, int]:
    """Draw the points from which all pairs of an image choose, a set for each image; most where a mask is undecided.

    `oversample_ratio` times too many points are candidates. Each mask takes the share `importance_sample_ratio` of its
    points from them, those whose logits are nearest to 0, and then all points that follow the candidates.

    PointRend draws candidates for each mask. Here all pairs of an image share them: each pair still keeps the least
    certain of uniform candidates, so its loss has the same distribution, and masks and ground truth are read once.

    Returns:
        Candidates and the rest, [num_sets, N + R, 2]; N, the number of candidates; k, how many of them a mask keeps.

    Source: PointRend (Kirillov et al. 2020), section 3.1, "Training"; Mask2Former, section 3.3.
    """
    num_uncertain = int(num_points * importance_sample_ratio)
    num_candidates = int(num_points * oversample_ratio) if num_uncertain else 0
    points = random_points(num_sets, num_candidates + num_points - num_uncertain, like)
    return points, num_candidates, num_uncertain
