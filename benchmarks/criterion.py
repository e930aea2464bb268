"""Cost of matching and losses, beside the published way of computing them (`benchmarks.naive`).

    python -m benchmarks.criterion            16 images, 10 predictions, 100 queries, 150 classes, 8…20 segments
    python -m benchmarks.criterion --small    a miniature, to see that everything runs

Mask features of 256 channels at 128 × 128, 12544 points, ground truth of 512 × 512: id maps for ours, the boolean masks
that it needs for the naive path. Each side gets the features in the layout in which its own pixel decoder leaves them:
ours channels last, the published one channels first. Forward and backward to class logits, mask embeddings and mask
features. The product of embeddings and features is part of both: the published model makes dense masks of every
prediction. First, matched pairs, losses and gradients are compared at the same points; the timed runs draw their own,
so that their losses agree only within the noise of sampling (the table shows both).

Each side runs in a process of its own: the median of seven runs after a first one, and the peak of all of them above
what was there before. Ours keeps freed memory on a CPU, as `train` does (`training.planning.memory`); the published
code does not, but the table shows it with memory kept, too. Appends to benchmarks/results/criterion.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import naive, peers
from benchmarks.report import Table
from m2f_lab.loss import Criterion
from m2f_lab.structures import MaskLogits, Output, Target
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.planning.memory import keep_freed_memory


@dataclass(frozen=True)
class Size:
    images: int = 16
    predictions: int = 10
    queries: int = 100
    classes: int = 150
    segments: tuple[int, int] = (8, 20)
    channels: int = 256
    side: int = 512
    points: int = 12544


SMALL = Size(images=2, predictions=2, queries=9, classes=5, segments=(2, 4), channels=8, side=64, points=128)
LAYOUTS = {"ours": torch.channels_last, "naive": torch.contiguous_format}


class Problem:
    """Random outputs and targets; what is to be differentiated are leaves."""

    def __init__(self, size: Size, device: str, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        batch, stride_4 = size.images, size.side // 4
        # Smooth features with some noise: masks with insides and outlines, as trained ones have.
        smooth = torch.randn(batch, size.channels, stride_4 // 4, stride_4 // 4, device=device)
        smooth = torch.nn.functional.interpolate(smooth, scale_factor=4, mode="bilinear")
        noisy = smooth + 0.1 * torch.randn_like(smooth)
        features = noisy.contiguous(memory_format=LAYOUTS[name]).requires_grad_()
        shape = (batch, size.queries)
        self.output = Output(
            [torch.randn(*shape, size.classes + 1, device=device, requires_grad=True) for _ in range(size.predictions)],
            [
                MaskLogits((0.1 * torch.randn(*shape, size.channels, device=device)).requires_grad_(), features)
                for _ in range(size.predictions)
            ],
            (size.side, size.side),
            (size.side, size.side),
        )
        fewest, most = size.segments
        self.targets = []
        for image in range(batch):
            count = fewest + image * (most - fewest) // max(batch - 1, 1)
            cells = torch.randint(0, count, (16, 16), dtype=torch.uint8)
            cells.view(-1)[:count] = torch.arange(count)
            id_map = cells.repeat_interleave(size.side // 16, 0).repeat_interleave(size.side // 16, 1)
            self.targets.append(Target.from_id_map(id_map, torch.randperm(size.classes)[:count]).to(device))
        self.labels = [target.labels for target in self.targets]
        self.criterion = Criterion(size.classes, num_points=size.points)

    @property
    def leaves(self) -> list[Tensor]:
        masks = self.output.masks
        return [*self.output.class_logits, *(each.embeddings for each in masks), masks[0].features]

    def step(self) -> Callable[[], float]:
        """Forward and backward of this side; returns the loss."""
        truths = [target.dense() for target in self.targets] if self.name == "naive" else []

        def run() -> float:
            for leaf in self.leaves:
                leaf.grad = None
            if self.name == "ours":
                loss = self.criterion(self.output, self.targets)["total"]
            else:
                loss = naive.total(self.output, self.labels, truths, self.criterion)
            loss.backward()
            return loss.item()

        return run


def check_equal(problem: Problem) -> None:
    """The same pairs, losses and gradients where both sides are given the same points.

    Raises:
        AssertionError: they differ.
    """
    output, targets = problem.output, problem.targets
    truths = [target.dense() for target in targets]
    # Without uncertain points, the fast path compares all pairs of an image at the points it draws for the image.
    uniform = replace(problem.criterion, importance_sample_ratio=0.0)
    device = output.masks[0].features.device
    points = torch.rand(len(targets), uniform.num_points, 2, device=device)
    matching = uniform.matcher(output, targets, points)
    torch.manual_seed(1)
    drawn = torch.cat([torch.rand(1, uniform.num_points, 2, device=device) for _ in targets])
    torch.manual_seed(1)
    ours = uniform.losses(output, targets, matching)["total"]
    theirs = 0.0
    for prediction, (class_logits, masks) in enumerate(zip(output.class_logits, output.masks, strict=True)):
        arguments = (class_logits, masks.dense(), problem.labels, truths)
        pairs = naive.match(*arguments, uniform, points)
        for image, (query, segment) in enumerate(pairs):
            torch.testing.assert_close((query, segment), matching.of(prediction, image))
        own = torch.cat([drawn[i].expand(len(query), -1, -1) for i, (query, _) in enumerate(pairs)])
        theirs = theirs + naive.losses(*arguments, pairs, uniform, own)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, problem.leaves) for loss in (ours, theirs)]
    for our, their in zip(*gradients, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-6)


def measure(name: str, size: Size, device: str, keep: bool) -> dict[str, float]:
    """One side in this process: seconds, the median; peak above what was there before, MiB; the loss."""
    run = Problem(size, device, name).step()
    torch_device = torch.device(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Problem(SMALL, device, name).step()()  # load libraries and start threads
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_memory(torch_device)
    with keep_freed_memory(torch_device) if keep else nullcontext():
        seconds, loss = peers.median_seconds(run, device), run()
    return {"seconds": seconds, "extra": 1024 * (peak_memory(torch_device) - before), "loss": loss}


def measure_alone(name: str, device: str, small: bool, keep: bool) -> dict[str, float]:
    flags = [*(["--small"] if small else []), *(["--keep"] if keep else [])]
    command = [sys.executable, "-m", "benchmarks.criterion", "--measure", name, "--device", device, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def add_rows(table: Table, device: str, small: bool) -> None:
    """Time and memory of both sides; on a CPU, also with memory that the naive side may keep, too."""
    check_equal(Problem(replace(SMALL, segments=(3, 5)), device, "ours"))
    ours = measure_alone("ours", device, small, keep=True)
    for keep in (False, True)[: 2 if device == "cpu" else 1]:
        theirs = measure_alone("naive", device, small, keep)
        where = f"{device}, naive with kept memory, too" if keep else device
        faster, leaner = theirs["seconds"] / ours["seconds"], theirs["extra"] / max(ours["extra"], 1)
        table.add(f"{where}: time", f"{ours['seconds']:.2f} s", f"{theirs['seconds']:.2f} s", f"{faster:.1f}×")
        table.add(f"{where}: peak memory", f"{ours['extra']:.0f} MiB", f"{theirs['extra']:.0f} MiB", f"{leaner:.1f}×")
    table.add(f"{device}: loss, each with its own points", f"{ours['loss']:.2f}", f"{theirs['loss']:.2f}", "")


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a miniature that runs anywhere in a second")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default the CPU, and the GPU if there is one")
    parser.add_argument("--measure", choices=tuple(LAYOUTS), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.measure:
        size = SMALL if options.small else Size()
        print(json.dumps(measure(options.measure, size, options.device, options.keep)))
        return
    table = Table("criterion", ("forward and backward", "ours", "naive", "ratio"))
    for device in [options.device] if options.device else ["cpu", "cuda"]:
        if device == "cuda" and not torch.cuda.is_available():
            table.add("cuda: time", "not measured", "not measured", "")
        else:
            add_rows(table, device, options.small)
    table.finish()


if __name__ == "__main__":
    main()
