"""An Output of random numbers with everything that explorers look at; no model is needed to make it."""

from __future__ import annotations

import torch

from m2f_lab.structures import DecoderState, MaskLogits, Output

LEVELS = 3


def toy_output(
    image_size: tuple[int, int] = (64, 96),
    batch: int = 1,
    num_queries: int = 5,
    num_classes: int = 4,
    num_layers: int = 4,
    num_heads: int = 2,
) -> Output:
    """The result of a forward pass with `keep_attention=True`: shapes as there, values at random.

    In every layer, query 0's mask is empty, so that the fallback opens its row.
    """
    height, width = (edge + -edge % 32 for edge in image_size)
    features = torch.randn(batch, 8, height // 4, width // 4)
    sizes = [(height // stride, width // stride) for stride in (32, 16, 8)]
    class_logits = [torch.randn(batch, num_queries, num_classes + 1) for _ in range(num_layers + 1)]
    masks = [MaskLogits(torch.randn(batch, num_queries, 8), features) for _ in range(num_layers + 1)]
    queries = [torch.randn(batch, num_queries, 8) for _ in range(num_layers + 1)]
    states = [DecoderState(queries[0], class_logits[0], masks[0].embeddings)]
    for layer in range(num_layers):
        level = layer % LEVELS
        cells = sizes[level][0] * sizes[level][1]
        opened = torch.zeros(batch, num_queries, dtype=torch.bool)
        opened[:, 0] = True
        blocked = torch.rand(batch, num_queries, cells) < 0.6
        blocked[..., 0] = False
        blocked &= ~opened[..., None]
        logits = torch.randn(batch, num_heads, num_queries, cells).masked_fill(blocked[:, None], float("-inf"))
        states.append(
            DecoderState(
                queries[layer + 1],
                class_logits[layer + 1],
                masks[layer + 1].embeddings,
                level=level,
                blocked=blocked,
                opened=opened,
                cross_attention=logits.softmax(-1),
                self_attention=torch.randn(batch, num_heads, num_queries, num_queries).softmax(-1),
            )
        )
    return Output(
        class_logits=class_logits,
        masks=masks,
        image_size=image_size,
        padded_size=(height, width),
        states=tuple(states),
        level_sizes=tuple(sizes),
    )
