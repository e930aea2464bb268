"""Product of pixels and mask embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pixel_product(pixels: Tensor, embeddings: Tensor) -> Tensor:
    """Logits of every mask at every pixel, without a gradient: `pixels @ embeddings.T`. [P, C], [M, C] → [P, M]

    On a CPU it is written as the 1 × 1 convolution that it is: PyTorch gives convolutions to oneDNN, but products to
    MKL, which on an AMD CPU reaches half of oneDNN's rate here.
    """
    if (
        pixels.device.type != "cpu"
        or pixels.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
        or min(pixels.numel(), embeddings.numel()) == 0
    ):
        return pixels @ embeddings.T
    image = pixels.view(1, 1, *pixels.shape).permute(0, 3, 1, 2)  # (1, C, 1, P), channels last
    return F.conv2d(image, embeddings[:, :, None, None])[0, :, 0].T
