"""Time from one image to its label map, beside Hugging Face's Mask2Former.

    python -m benchmarks.inference

Swin-T, 150 classes, 100 queries, 512 × 512, random weights, the same on both sides; see `benchmarks.peers`. Ours starts
from the uint8 picture (`model.predict`), theirs from the normalised tensor, and ends with
`post_process_semantic_segmentation`, which combines masks and classes at 384 × 384 whatever the image's size; ours
combines at the image's, and the last line says in how many pixels the label maps agree all the same. The floor is the
time that the matrix products in our forward pass would take at the rate of large matrix products here. Appends the
table to benchmarks/results/inference.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import OURS
from benchmarks.report import Table
from m2f_lab.training.loop import peak_memory


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side in this process: seconds of each image, and at best; MiB."""
    device, precision = options.device, options.precision
    images = peers.random_images(1, options.small)
    if options.measure == OURS:
        labeller = our_labeller(peers.load_ours(options.folder, options.small).to(device), images)
    else:
        labeller = their_labeller(peers.load_theirs(options.folder).to(device), (images.float() / 255 - 0.45) / 0.225)

    def label() -> np.ndarray:
        with peers.autocast(precision, device):
            return labeller()

    times, peak = peers.times_in_turn(label, device), 1024 * peak_memory(torch.device(device))
    return {"times": times, "peak": peak, "floor": peers.floor(label, precision, device)}


def our_labeller(model: nn.Module, images: Tensor) -> Callable[[], np.ndarray]:
    """Return a function that turns the first image, uint8 [B, 3, H, W], into its label map [H, W]."""
    model.eval().requires_grad_(False)
    picture = images[0].permute(1, 2, 0).contiguous().numpy()
    return lambda: model.predict(picture).label_map


def their_labeller(model: nn.Module, normalised: Tensor) -> Callable[[], np.ndarray]:
    """The same with the peer, from a normalised image [1, 3, H, W]."""
    from transformers import Mask2FormerImageProcessor

    model.eval().requires_grad_(False)
    processor = Mask2FormerImageProcessor()
    size = tuple(normalised.shape[2:])

    @torch.inference_mode()
    def label() -> np.ndarray:
        output = model(pixel_values=normalised.to(model.device))
        return processor.post_process_semantic_segmentation(output, [size])[0].cpu().numpy()

    return label


def add_agreement(table: Table, folder: Path, small: bool) -> None:
    """Say in what share of an image's pixels both sides give the same class, in float32."""
    ours, theirs, images = peers.load_ours(folder, small), peers.load_theirs(folder), peers.random_images(1, small)
    found, expected = our_labeller(ours, images)(), their_labeller(theirs, ours.preprocess(images))()
    table.add(f"the same class in {(found == expected).mean():.1%}", *["–"] * len(peers.COLUMNS))


def main(given: list[str] | None = None) -> None:
    peers.compare(__spec__.name, __doc__, "one image to its label map", measure, given, add_agreement)


if __name__ == "__main__":
    main()
