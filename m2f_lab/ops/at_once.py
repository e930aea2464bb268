"""Sizes of what the loss works on at once: small on a CPU, for its caches; large on a GPU, for few launches."""

from __future__ import annotations

import torch

IMAGES_ON_CPU = 1
POINTS_ON_CPU = 4096
NUMBERS_ON_GPU = 2**26
"""Bounds the largest tables of mask logits on a GPU: 256 MiB in float32."""


def images_at_once(num_images: int, numbers_per_image: int, device: torch.device) -> list[slice]:
    """Images of a batch whose masks are compared together.

    Args:
        num_images: in the batch
        numbers_per_image: numbers in the largest table that an image needs
        device: on which they are compared
    """
    at_once = IMAGES_ON_CPU if device.type == "cpu" else max(NUMBERS_ON_GPU // max(numbers_per_image, 1), 1)
    return [slice(first, min(first + at_once, num_images)) for first in range(0, num_images, at_once)]


def points_at_once(num_masks: int, device: torch.device) -> int:
    """Points at which a number of masks is multiplied out together."""
    return POINTS_ON_CPU if device.type == "cpu" else max(NUMBERS_ON_GPU // max(num_masks, 1), 1)
