"""Masks stay factored: no operation of a training step or of inference makes a map of all queries that nobody needs.

Every tensor that any operation returns, forward and backward, is looked at. A tensor holds a map of all queries if its
number of elements is a multiple of Q times the number of pixels; Q is a prime that no channel, head, class or batch of
the model has as a factor, and the sides of the image are 32 times different primes, so nothing else is one by chance.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2f_lab import build_model, recipes
from m2f_lab.inference.postprocess import semantic
from m2f_lab.loss import Criterion, Matcher
from m2f_lab.model import transformer_decoder
from m2f_lab.model.mask2former import Mask2Former
from m2f_lab.model.transformer_decoder import attention_blocked
from m2f_lab.structures import MaskLogits, Output, Target, resize

Q, K, B = 13, 4, 2
HEIGHT, WIDTH = 5 * 32, 7 * 32
STRIDE_4 = HEIGHT * WIDTH // 16
LAYERS = 2  # hence three predictions
SEGMENTS = 3


class MaskTables(TorchDispatchMode):
    """Notes every tensor that holds a map of at least `pixels` pixels for each of Q queries."""

    def __init__(self, pixels: int = STRIDE_4) -> None:
        super().__init__()
        self.pixels, self.found = pixels, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(returned.alias_info for returned in func._schema.returns):  # a view, or what was there before
            return result
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.numel() and tensor.numel() % (Q * self.pixels) == 0:
                self.found.append(f"{func.overloadpacket.__name__} {tuple(tensor.shape)}")
        return result


@pytest.fixture
def model() -> Mask2Former:
    config = recipes.debug_tiny(num_classes=K).vary(model=dict(num_queries=Q, num_decoder_layers=LAYERS)).model
    return build_model(config)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def train(model: Mask2Former) -> Output:
    """One step on two images, as the training loop makes it."""
    output = model(torch.randint(0, 255, (B, 3, HEIGHT, WIDTH), dtype=torch.uint8))
    id_map = torch.randint(0, SEGMENTS, (HEIGHT, WIDTH), dtype=torch.uint8)
    targets = [Target.from_id_map(id_map, torch.arange(SEGMENTS)) for _ in range(B)]
    Criterion(K, num_points=50)(output, targets)["total"].backward()
    return output


def test_the_watch_sees_masks_and_nothing_else(model):
    masks = MaskLogits(torch.randn(B, Q, 8), torch.randn(B, 8, HEIGHT // 4, WIDTH // 4))
    for make in (masks.dense, lambda: masks.resized((HEIGHT, WIDTH)), lambda: masks.dense().flatten().clone()):
        with MaskTables() as watch:
            make()
        assert watch.found
    with MaskTables() as watch:
        masks.resized((HEIGHT // 8, WIDTH // 8))
        masks.at(torch.rand(B, 100, 2))
        masks.select(torch.zeros(5, dtype=torch.long), torch.arange(5))
    assert watch.found == []


def test_training_never_makes_the_masks_of_all_queries(model):
    with MaskTables() as watch:
        train(model)
    assert watch.found == []
    assert all(p.grad is not None for p in model.parameters())


def test_inference_makes_the_last_masks_only_and_those_row_by_row(model, image):
    with MaskTables() as watch:
        model.predict(image, "semantic")
    assert len(watch.found) <= 1, watch.found  # at stride 4 the last prediction's masks may be multiplied out, once
    with MaskTables(pixels=HEIGHT * WIDTH) as watch:
        model.predict(image, "semantic")
    assert watch.found == []


# --- the watch would see it -------------------------------------------------------------------------------------------


def test_a_matcher_that_multiplies_out_is_caught(model, monkeypatch):
    start = Matcher.start

    def dense_costs(self, output, *arguments):
        output.masks[0].dense()
        return start(self, output, *arguments)

    monkeypatch.setattr(Matcher, "start", dense_costs)
    with MaskTables() as watch:
        train(model)
    assert watch.found


def test_an_attention_mask_at_stride_4_is_caught(model, image, monkeypatch):
    def dense_blocked(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        MaskLogits(embeddings, resize(features, (HEIGHT // 4, WIDTH // 4))).dense()
        return attention_blocked(embeddings, features)

    monkeypatch.setattr(transformer_decoder, "attention_blocked", dense_blocked)
    for use, allowed in ((lambda: train(model), 0), (lambda: model.predict(image, "semantic"), 1)):
        with MaskTables() as watch:
            use()
        assert len(watch.found) >= allowed + LAYERS


def test_one_strip_as_high_as_the_image_is_caught(model):
    with torch.no_grad():
        output = model(torch.zeros(1, 3, HEIGHT, WIDTH))
    for rows, caught in ((None, False), (HEIGHT, True)):
        with MaskTables(pixels=HEIGHT * WIDTH) as watch:
            semantic(output, rows_per_strip=rows)
        assert bool(watch.found) == caught
