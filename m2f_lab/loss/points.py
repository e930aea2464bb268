"""Where masks are compared: at P points instead of all pixels.

B batch, T targets, M pairs of a prediction and a target, P points, H/W height/width.

Points are (x, y) in [0, 1] of the padded image, everywhere in this package: mask logits cover the padded image, and
ground truth, which may end earlier, is read as if it were padded with "no segment".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.structures import IGNORE, Target, sample_points


def rows_at_once(row_length: int, device: torch.device) -> int:
    """How many rows of a large table to work on in one go.

    A CPU is fastest while the numbers stay in its cache, a GPU in few large steps; both save memory: 4 MiB and 128 MiB
    per table in float32.
    """
    return max(1, 2 ** (20 if device.type == "cpu" else 25) // row_length)


def random_points(num_sets: int, num_points: int, like: Tensor) -> Tensor:
    """Uniform points from torch's global generator, on the device and in the type of `like`. [num_sets, P, 2]"""
    return torch.rand(num_sets, num_points, 2, device=like.device, dtype=like.dtype)


@torch.no_grad()
def uncertain_points(
    logits: Tensor, num_points: int, oversample_ratio: float = 3.0, importance_sample_ratio: float = 0.75
) -> Tensor:
    """Choose points for the loss: most where the mask is undecided, the rest anywhere.

    Draws `oversample_ratio` times too many points, keeps the share `importance_sample_ratio` of `num_points` whose
    logits are nearest to 0, and fills up with fresh uniform ones. Every mask gets its own points.

    Args:
        logits: predicted masks. [M, H, W]
        num_points: P
        oversample_ratio: how many candidates to draw per point, at least 1
        importance_sample_ratio: share of the points that is chosen by uncertainty, in [0, 1]

    Returns:
        Points (x, y) in [0, 1], the uncertain ones first, in no particular order. [M, P, 2]

    Source: PointRend (Kirillov et al. 2020), section 3.1, "Training"; Mask2Former, section 3.3.
    """
    num_candidates = int(num_points * oversample_ratio)
    num_uncertain = int(num_points * importance_sample_ratio)
    chosen = []
    for part in logits.split(rows_at_once(num_candidates, logits.device)):
        candidates = random_points(len(part), num_candidates, like=part)
        certainty = sample_points(part.unsqueeze(1), candidates).squeeze(1).abs_()  # (m, candidates)
        # Nobody needs them in order, and an unsorted selection takes less than half the time.
        keep = certainty.topk(num_uncertain, dim=1, largest=False, sorted=False).indices
        # Seen as one complex number, x and y move together.
        uncertain = torch.view_as_real(torch.view_as_complex(candidates).gather(1, keep))
        chosen.append(torch.cat([uncertain, random_points(len(part), num_points - num_uncertain, like=part)], dim=1))
    return torch.cat(chosen)


@torch.no_grad()
def sample_segments(target: Target, segments: Tensor, points: Tensor, padded_size: tuple[int, int]) -> Tensor:
    """Read ground-truth masks at points; the same as `sample_points` on padded float masks, which are never built.

    A bilinear sample is a weighted vote of four pixels. An id map answers each vote with a comparison: does this
    pixel bear the number of the segment?

    Args:
        target: ground truth of one image, as an id map or as boolean masks; at most `padded_size` large
        segments: which segments to read, 0…T-1. [M]
        points: (x, y) in [0, 1] of the padded image; one set for each segment or one for all. [M or 1, P, 2]
        padded_size: height and width of the padded image in pixels

    Returns:
        Share of each segment at each point, in [0, 1]. [M, P]
    """
    height, width = target.size
    # Pixel centres are at whole numbers. Whatever lies beyond the ground truth is read from the border around it.
    x = (points[..., 0] * padded_size[1] - 0.5).clamp(-1, width)
    y = (points[..., 1] * padded_size[0] - 0.5).clamp(-1, height)
    left, top = x.floor(), y.floor()
    x, y = x - left, y - top  # (M or 1, P), weights of the right and of the lower pixels

    border = (1, 2, 1, 2)  # one pixel before, and two behind, where the upper left pixel may already be outside
    stride = width + 3
    first = (top.int() + 1) * stride + (left.int() + 1)
    if target.id_map is not None:
        pixels = F.pad(target.id_map, border, value=IGNORE)
        wanted = segments.to(pixels.dtype).unsqueeze(1)  # (M, 1)
    else:
        pixels = F.pad(target.masks, border)
        first = first + segments.unsqueeze(1) * (stride * (height + 3))
        wanted = True
    pixels = pixels.flatten()

    def vote(offset: int) -> Tensor:
        return pixels[offset:].index_select(0, first.flatten()).view_as(first) == wanted

    return (
        (1 - y) * (1 - x) * vote(0)
        + (1 - y) * x * vote(1)
        + y * (1 - x) * vote(stride)
        + y * x * vote(stride + 1)
    )  # fmt: skip
