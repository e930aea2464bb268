"""Time and memory of a training step, beside Hugging Face's Mask2Former.

    python -m benchmarks.training_step

Swin-T, 150 classes, 100 queries, images of 512 × 512 with 8 segments each, two of them on a CPU and 16 on a GPU, random
weights, the same on both sides; see `benchmarks.peers`. Forward, matching and losses (each side its own, of all ten
predictions), backward, clipping, fused AdamW. Ours takes id maps, theirs needs masks. The floor is the time that the
matrix products of our step would take at the rate of large matrix products here. Memory is the peak of the whole
process (of the GPU, where one is used). Appends the table to benchmarks/results/training_step.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.peers import OURS
from m2f_lab.loss import Criterion
from m2f_lab.recipes import OptimizationConfig
from m2f_lab.structures import Target
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.optimizer import build_optimizer, clip_gradient, update_weights
from m2f_lab.training.planning.memory import keep_freed_memory

NUM_IMAGES, NUM_SEGMENTS = {"cpu": 2, "cuda": 16}, 8


def random_segments(count: int, small: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Eight stripes with wavy borders in each image: id maps [H, W] and labels [T]."""
    side = 64 if small else peers.SIDE
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    id_maps, labels = [], []
    for i in range(count):
        wave = x + (side / 20) * torch.sin(y * 6.28 * (i + 1) / side)
        id_maps.append((wave * NUM_SEGMENTS / side).long().clamp(0, NUM_SEGMENTS - 1).to(torch.uint8))
        labels.append(torch.arange(NUM_SEGMENTS) * 7 + i)
    return id_maps, labels


def our_step(options: argparse.Namespace) -> Callable[[], float]:
    """Everything of a step but the data; returns the loss."""
    device, small, count = options.device, options.small, NUM_IMAGES[options.device]
    model = peers.load_ours(options.folder, small).train().to(device)
    criterion = Criterion(peers.NUM_CLASSES, num_points=256 if small else 12544)
    config = OptimizationConfig(max_iterations=1)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device, enabled=False)
    images = peers.random_images(count, small).to(device)
    targets = [Target.from_id_map(*pair).to(device) for pair in zip(*random_segments(count, small), strict=True)]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with peers.autocast(options.precision, device):
            output = model(images)
        total = criterion(output, targets)["total"]
        total.backward()
        update_weights(optimizer, scaler, clip_gradient(optimizer, scaler, model, config.clip_norm).item())
        return total.item()

    return step


def their_step(options: argparse.Namespace) -> Callable[[], float]:
    device, small, count = options.device, options.small, NUM_IMAGES[options.device]
    model = peers.load_theirs(options.folder).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    normalised = ((peers.random_images(count, small).float() / 255 - 0.45) / 0.225).to(device)
    id_maps, labels = random_segments(count, small)
    masks = [(m == torch.arange(NUM_SEGMENTS)[:, None, None]).float().to(device) for m in id_maps]
    classes = [each.to(device) for each in labels]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with peers.autocast(options.precision, device):
            total = model(pixel_values=normalised, mask_labels=masks, class_labels=classes).loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        return total.item()

    return step


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One side in this process: seconds of each step, and at best; MiB."""
    is_ours = options.measure == OURS
    step = (our_step if is_ours else their_step)(options)
    device = torch.device(options.device)
    with keep_freed_memory(device) if is_ours else nullcontext():  # as `train` does
        times, peak = peers.times_in_turn(step, options.device), 1024 * peak_memory(device)
    return {"times": times, "peak": peak, "floor": peers.floor(step, options.precision, options.device)}


def main(given: list[str] | None = None) -> None:
    peers.compare(__spec__.name, __doc__, "two images (cuda: 16), 8 segments each", measure, given)


if __name__ == "__main__":
    main()
