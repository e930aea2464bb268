"""What the loss must be before anything is learned; notebook 03 derives the same ranges.

A first loss elsewhere means a sum in place of a mean, a missing normalisation or another initialisation than the
published one.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from m2f_lab import build_model, recipes
from m2f_lab.data.cityscapes import TRAIN_IDS
from m2f_lab.loss import build_criterion
from m2f_lab.recipes import ModelConfig
from m2f_lab.scenes import draw_street
from m2f_lab.structures import Output, Target

RECIPE = recipes.debug_tiny()
CLASS_STD = math.sqrt(1 / 3)  # a linear layer with weights and biases of variance 1 / (3 d) on normalised queries


def mask_std(config: ModelConfig) -> float:
    """Root mean square of a fresh mask logit: three linear layers, two ReLUs, times features of mean square 1/2."""
    variance = 1.0
    for mean_square in (1.0, 0.5, 0.5):
        variance = variance * mean_square / 3 + 1 / (3 * config.hidden_dim)
    return math.sqrt(config.mask_dim * variance / 2)


def expected_ranges(config: ModelConfig, areas: Tensor) -> dict[str, tuple[float, float]]:
    """Where each loss lies.

    Masks: between logits one standard deviation on the right and on the wrong side of 0. Classes: the matcher may pick
    queries that are right by chance, of two dozen at most two standard deviations.

    Args:
        config: of the fresh model
        areas: share of its image that each segment covers. [T]
    """
    s = mask_std(config)
    right, wrong = 1 / (1 + math.exp(-s)), 1 / (1 + math.exp(s))
    low, high = (
        (1 - 2 * inside * areas / (inside * areas + outside * (1 - areas) + areas)).mean().item()
        for inside, outside in ((right, wrong), (wrong, right))
    )
    middle = math.log(config.num_classes + 1) + CLASS_STD**2 / 2
    return {
        "class": (middle - 2 * CLASS_STD, middle + CLASS_STD),
        "mask": (-math.log(right), -math.log(wrong)),
        "dice": (low, high),
    }


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, list[Target]]:
    train_ids = np.full(256, 255, np.uint8)
    train_ids[list(TRAIN_IDS)] = list(TRAIN_IDS.values())
    scenes = [draw_street(seed, (64, 96)) for seed in (1, 2)]
    images = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in scenes])
    return images, [Target.from_label_map(torch.from_numpy(train_ids[scene.class_ids])) for scene in scenes]


@pytest.fixture(params=range(4))
def fresh(request: pytest.FixtureRequest, batch: tuple[Tensor, list[Target]]) -> Output:
    torch.manual_seed(request.param)
    with torch.no_grad():
        return build_model(RECIPE.model)(batch[0])


def test_every_loss_of_every_prediction_is_where_theory_says(fresh: Output, batch) -> None:
    targets = batch[1]
    areas = torch.cat([target.dense().flatten(1).float().mean(1) for target in targets])
    losses = build_criterion(RECIPE)(fresh, targets)
    ranges = expected_ranges(RECIPE.model, areas)
    outside = {
        name: (round(loss.item(), 3), ranges[name.split(".")[1]])
        for name, loss in losses.items()
        if name != "total" and not ranges[name.split(".")[1]][0] < loss < ranges[name.split(".")[1]][1]
    }
    assert outside == {}
    weights = RECIPE.loss.class_weight, RECIPE.loss.mask_weight, RECIPE.loss.dice_weight
    low, high = (
        fresh.num_predictions * sum(w * bounds[i] for w, bounds in zip(weights, ranges.values(), strict=True))
        for i in (0, 1)
    )
    assert low < losses["total"] < high


def test_fresh_logits_are_as_wide_as_theory_says(fresh: Output) -> None:
    for class_logits, masks in zip(fresh.class_logits, fresh.masks, strict=True):
        assert class_logits.std().item() == pytest.approx(CLASS_STD, rel=0.3)
        assert masks.dense().square().mean().sqrt().item() == pytest.approx(mask_std(RECIPE.model), rel=0.5)


def test_the_paper_s_width() -> None:
    """The class logits do not depend on the width, the mask logits grow with its root."""
    paper = recipes.ade20k_swin_tiny().model
    assert mask_std(paper) == pytest.approx(1.18, abs=0.01)
    low, high = expected_ranges(paper, torch.tensor([0.1]))["class"]
    assert low < math.log(151) < high
