"""How long one image takes to its label map, beside Hugging Face's Mask2Former.

    python -m benchmarks.inference

Swin-T, 150 classes, 100 queries, 512 × 512, random weights, the same on both sides; see `benchmarks.peers`. Ours starts
from the uint8 picture (`model.predict`), theirs from the normalised tensor, and ends with
`post_process_semantic_segmentation`, which combines masks and classes at 384 × 384 whatever the image's size; ours
combines at the image's. The floor is the time that the matrix products in our forward pass would take at the rate of
large matrix products here. Appends the table to benchmarks/results/inference.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import OURS
from benchmarks.report import Table


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side in this process: seconds per image, and at best; MiB."""
    device, precision = options.device, options.precision
    (image,) = images = peers.random_images(1, options.small)
    if options.measure == OURS:
        model = peers.load_ours(options.folder, options.small).eval().requires_grad_(False).to(device)
        picture = image.permute(1, 2, 0).contiguous().numpy()

        def label() -> np.ndarray:
            with peers.autocast(precision, device):
                return model.predict(picture).label_map
    else:
        from transformers import Mask2FormerImageProcessor

        model = peers.load_theirs(options.folder).eval().requires_grad_(False).to(device)
        processor = Mask2FormerImageProcessor()
        normalised = (images.float() / 255 - 0.45) / 0.225
        size = tuple(images.shape[2:])

        def label() -> Tensor:
            with torch.inference_mode(), peers.autocast(precision, device):
                output = model(pixel_values=normalised.to(device))
                return processor.post_process_semantic_segmentation(output, [size])[0].cpu()

    seconds, peak = peers.median_seconds(label, device), peers.peak_memory(device)
    rate = peers.matrix_product_rate(precision, device)
    return {"seconds": seconds, "peak": peak, "floor": peers.count_operations(label) / rate}


def main(given: list[str] | None = None) -> None:
    options = peers.arguments(__doc__, given)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    table = Table("inference", ("one image to its label map", *peers.COLUMNS))
    with tempfile.TemporaryDirectory() as folder:
        peers.both_sides(__spec__.name, Path(folder), options.small, table)
    table.finish()


if __name__ == "__main__":
    main()
