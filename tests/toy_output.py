"""An Output of random numbers with everything that explorers look at; no model is needed to make it."""

from __future__ import annotations

import torch

from m2f_lab.structures import MaskLogits, Output

LEVELS = 3


def toy_output(
    image_size: tuple[int, int] = (64, 96),
    batch: int = 1,
    num_queries: int = 5,
    num_classes: int = 4,
    num_layers: int = 4,
    num_heads: int = 2,
) -> Output:
    """What a forward pass with `return_intermediates=True` gives: names and shapes as there, values at random.

    In every layer, query 0's mask is empty, so that the fallback opens its row.
    """
    height, width = (edge + -edge % 32 for edge in image_size)
    features = torch.randn(batch, 8, height // 4, width // 4)
    sizes = [(height // stride, width // stride) for stride in (32, 16, 8)]
    seen: dict = {"decoder.level_sizes": sizes}
    for layer in range(num_layers):
        level = layer % LEVELS
        cells = sizes[level][0] * sizes[level][1]
        opened = torch.zeros(batch, num_queries, dtype=torch.bool)
        opened[:, 0] = True
        blocked = torch.rand(batch, num_queries, cells) < 0.6
        blocked[..., 0] = False
        blocked &= ~opened[..., None]
        logits = torch.randn(batch, num_heads, num_queries, cells).masked_fill(blocked[:, None], float("-inf"))
        seen |= {
            f"decoder.layer.{layer}.level": level,
            f"decoder.layer.{layer}.attention_blocked": blocked,
            f"decoder.layer.{layer}.attention_opened": opened,
            f"decoder.layer.{layer}.cross_attention": logits.softmax(-1),
        }
    return Output(
        class_logits=[torch.randn(batch, num_queries, num_classes + 1) for _ in range(num_layers + 1)],
        masks=[MaskLogits(torch.randn(batch, num_queries, 8), features) for _ in range(num_layers + 1)],
        image_size=image_size,
        padded_size=(height, width),
        intermediates=seen,
    )
