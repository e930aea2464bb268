"""Worth of single operations in a training step: that of `benchmarks.training_step` with one of them plain at a time.

    python -m benchmarks.ablation

Float32 on a CPU. One row for each operation of `m2f_lab.ops`, one for all of them plain, and one for the memory that
training keeps instead of giving it back. Operations of the loss have a second row: what they are worth in matching and
losses alone, on as many images. With everything and without are processes of their own that take turns, call by call
(see `benchmarks.peers`): the ratio is the median over the rounds, memory the peak of the process. The loss says that
both compute the same. Appends the table to benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from operator import truediv
from pathlib import Path
from statistics import median

import torch

from benchmarks import criterion, peers
from benchmarks.report import Table
from benchmarks.training_step import NUM_IMAGES, NUM_SEGMENTS, our_step
from m2f_lab import ops
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.planning.memory import keep_freed_memory

CPU = torch.device("cpu")
WHOLE, ALL_PLAIN, GIVEN_BACK = "everything", "all operations", "freed memory kept"
OF_THE_LOSS = ("mask_and_dice", "sample_points", "select_uncertain")
WITHOUT = (*ops.OPERATIONS, ALL_PLAIN, GIVEN_BACK)
STEP, LOSS = "a training step", "matching and losses"


def without(name: str) -> AbstractContextManager:
    """The context in which a step runs without an idea."""
    if name == ALL_PLAIN:
        return ops.plain()
    return ops.plain(name) if name in ops.OPERATIONS else nullcontext()


def loss_alone(small: bool) -> Callable[[], float]:
    """Forward and backward of matching and losses, on as many images and segments as a step has; returns the loss."""
    size = (
        criterion.SMALL if small else replace(criterion.Size(), images=NUM_IMAGES["cpu"], segments=2 * (NUM_SEGMENTS,))
    )
    return criterion.Problem(size, "cpu", "ours").step()


def measure(name: str, what: str, folder: Path, small: bool) -> dict:
    """Step or loss without an idea, in this process, in turns: seconds of each call, MiB, and the second loss."""
    options = argparse.Namespace(device="cpu", small=small, folder=folder, precision="float32")
    losses = []
    with without(name), nullcontext() if name == GIVEN_BACK else keep_freed_memory(CPU):
        step = our_step(options) if what == STEP else loss_alone(small)
        times = peers.times_in_turn(lambda: losses.append(step()), "cpu")
    with peers.turn():
        return {"times": times, "peak": 1024 * peak_memory(CPU), "loss": losses[1]}


def measure_beside(name: str, what: str, folder: Path, small: bool) -> list[dict]:
    """Step or loss with everything, and without the idea.

    Raises:
        RuntimeError: one of them failed.
    """
    flags = ["--what", what, "--folder", str(folder), *(["--small"] if small else [])]
    both = peers.in_turn([["benchmarks.ablation", "--measure", each, *flags] for each in (WHOLE, name)])
    for took in both:
        if "failed" in took:
            raise RuntimeError(f"{what} without {name} or with it failed: {took['failed']}")
    return both


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--only", choices=WITHOUT, nargs="+", default=WITHOUT, metavar="NAME", help="rows to measure")
    parser.add_argument("--measure", choices=(WHOLE, *WITHOUT), help=argparse.SUPPRESS)
    parser.add_argument("--what", choices=(STEP, LOSS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.measure:
        print(json.dumps(measure(options.measure, options.what, options.folder, options.small)))
        return
    columns = ("of", "without", "s", "s with it", "ratio", "MiB", "MiB with it", "loss", "loss with it")
    table = Table("ablation", columns)
    with tempfile.TemporaryDirectory() as folder:
        peers.save_peer(Path(folder), options.small)
        rows = [(STEP, name) for name in options.only] + [(LOSS, name) for name in options.only if name in OF_THE_LOSS]
        for what, name in rows:
            whole, plain = measure_beside(name, what, Path(folder), options.small)
            table.add(
                what, name,
                f"{median(plain['times']):.2f}", f"{median(whole['times']):.2f}",
                f"{median(map(truediv, plain['times'], whole['times'])):.2f}",
                f"{plain['peak']:.0f}", f"{whole['peak']:.0f}",
                f"{plain['loss']:.2f}", f"{whole['loss']:.2f}",
            )  # fmt: skip
    table.finish()


if __name__ == "__main__":
    main()
