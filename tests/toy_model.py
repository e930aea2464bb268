"""A model whose label maps change when one of its queries does; nothing is trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from m2f_lab import recipes
from m2f_lab.data import Classes
from m2f_lab.model import Mask2Former, build_model

CLASSES = Classes(("road", "sky", "car", "tree"), ((128, 64, 128), (70, 130, 180), (0, 0, 142), (107, 142, 35)))
IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)  # padded to 64 × 96
QUERIES, LAYERS = 8, 4


def sure_model() -> Mask2Former:
    """Surer than a fresh one, with some masks that are empty; in training mode."""
    torch.manual_seed(2)
    config = replace(
        recipes.debug_tiny(num_classes=4).model, num_queries=QUERIES, num_decoder_layers=LAYERS,
        pixel_mean=recipes.IMAGENET_MEAN, pixel_std=recipes.IMAGENET_STD,
    )  # fmt: skip
    model = build_model(config)
    model.classes = CLASSES
    with torch.no_grad():
        model.transformer_decoder.class_head.weight *= 12
        model.transformer_decoder.mask_head[-1].weight *= 100
    return model
