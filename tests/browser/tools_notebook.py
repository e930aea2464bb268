"""A notebook with every tool in a cell of its own, and the same tools in the test's process: their twins."""

from __future__ import annotations

from typing import Any

SETUP = """\
import json
from dataclasses import replace

import ipywidgets
import numpy as np
import torch

from m2f_lab import recipes
from m2f_lab.data import Classes
from m2f_lab.explore import (
    BiographyCollector, BiographyGallery, CounterfactualExplorer, MatchingExplorer, PixelExplorer, QueryExplorer,
    SamplingExplorer
)
from m2f_lab.model import build_model

rows, columns = np.mgrid[:90, :150]
image = np.stack([columns, 2 * rows, 255 - columns], axis=-1).astype(np.uint8)
truth = np.zeros((90, 150), np.uint8)
for label, (top, left, height, width, color) in enumerate(
    [(20, 30, 40, 40, (200, 60, 30)), (50, 90, 35, 50, (30, 160, 60))], start=1
):
    image[top : top + height, left : left + width] = color
    truth[top : top + height, left : left + width] = label

names = ("road", "house", "sky", "tree", "car")
colors = ((128, 64, 128), (190, 153, 90), (70, 130, 180), (60, 140, 60), (200, 40, 60))

def made_with(seed):
    # Untrained, but surer than a fresh model: masks have edges, one query can change the result, and every place of
    # every layer reads at points of its own.
    torch.manual_seed(seed)
    small = replace(recipes.debug_tiny(num_classes=5).model, num_queries=12, num_encoder_layers=2)
    model = build_model(small).eval()
    model.classes = Classes(names, colors)
    with torch.no_grad():
        model.transformer_decoder.class_head.weight *= 12
        model.transformer_decoder.class_head.bias[-1] -= 5  # no object
        model.transformer_decoder.mask_head[-1].weight *= 100
        for name, weight in model.pixel_decoder.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                weight.normal_(std=0.2)
    return model

model, other = made_with(11), made_with(6)"""

CELLS = {
    "pixel-ledger": """\
ledger = PixelExplorer(model, image)
ledger""",
    "query-explorer": """\
explorer = QueryExplorer(model, image, width=480)
explorer""",
    "counterfactuals": """\
counterfactuals = CounterfactualExplorer(model, image)
counterfactuals""",
    "matching-inspector": """\
inspector = MatchingExplorer({"early": other, "late": model}, image, truth)
inspector""",
    "sampling-viewer": """\
sampling = SamplingExplorer({"before": other, "after": model}, image)
sampling""",
    "biography-gallery": """\
collector = BiographyCollector()
for shift in range(0, 90, 30):
    picture = np.roll(image, shift, axis=1)
    with torch.no_grad():
        collector.add(model(torch.from_numpy(picture).permute(2, 0, 1)[None]), picture)
gallery = BiographyGallery(collector.result(model.classes))
gallery""",
}
"""The tools by the CSS class that each has after m2f-. A cell's last line is the tool."""


def made_here(*names: str) -> dict[str, Any]:
    """What the cells of these tools leave behind: the tools, by CSS class, and `model`, `other`, `image`, `truth`."""
    space: dict[str, Any] = {}
    exec(SETUP, space)
    for name in names:
        exec(CELLS[name], space)
        space[name] = space[CELLS[name].splitlines()[-1]]
    return space
