"""What single ideas are worth in a training step: the step of `benchmarks.training_step` without one of them at a time.

    python -m benchmarks.ablation

Float32 on a CPU. The step with everything and the one without an idea are processes of their own that take turns, call
by call (see `benchmarks.peers`): the ratio is the median over the rounds, memory the peak of the process. Numbers do
not change, whichever idea is missing: the loss is that after a step. Appends the table to
benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from operator import truediv
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from benchmarks import peers
from benchmarks.report import Table
from benchmarks.training_step import our_step
from m2f_lab import products
from m2f_lab.model import deformable_attention, layers, pixel_decoder, swin
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.planning.memory import keep_freed_memory

CPU = torch.device("cpu")
WHOLE, GIVEN_BACK = "everything", "freed memory kept"


def nothing_recomputed() -> AbstractContextManager:
    stack = ExitStack()
    for module in (deformable_attention, pixel_decoder, swin):
        stack.enter_context(patch.object(module, "recomputed", lambda function, *arguments: function(*arguments)))
    return stack


WITHOUT: dict[str, Callable[[], AbstractContextManager]] = {
    "sampling by bags of rows (grid_sample instead)": lambda: patch.object(
        deformable_attention, "sample_by_bags", deformable_attention.sample_by_grid
    ),
    "linear maps by oneDNN": lambda: patch.object(products, "HAS_ONEDNN", False),
    "cheap and wide features computed twice": nothing_recomputed,
    "weight gradient of the 3 × 3 convolution by shifts": lambda: patch.object(
        layers.Convolution3x3, "forward", torch.nn.Conv2d.forward
    ),
    "softmax of few numbers": lambda: patch.object(
        deformable_attention, "softmax_of_few", lambda scores: scores.softmax(dim=-1)
    ),
    "perceptrons in strips": lambda: patch.object(layers, "STRIP", 2**62),
    GIVEN_BACK: nullcontext,
}


def measure(name: str, folder: Path, small: bool) -> dict:
    """A step without the idea, in this process, in turns: seconds of each step, MiB, and the loss after one step."""
    options = argparse.Namespace(device="cpu", small=small, folder=folder, precision="float32")
    losses = []
    with WITHOUT.get(name, nullcontext)(), nullcontext() if name == GIVEN_BACK else keep_freed_memory(CPU):
        step = our_step(options)
        times = peers.times_in_turn(lambda: losses.append(step()), "cpu")
    with peers.turn():
        return {"times": times, "peak": 1024 * peak_memory(CPU), "loss": losses[1]}


def measure_beside(name: str, folder: Path, small: bool) -> list[dict]:
    """The step with everything, and the one without the idea.

    Raises:
        RuntimeError: one of them failed.
    """
    flags = ["--folder", str(folder), *(["--small"] if small else [])]
    both = peers.in_turn([["benchmarks.ablation", "--measure", each, *flags] for each in (WHOLE, name)])
    for took in both:
        if "failed" in took:
            raise RuntimeError(f"The step without {name} or the one with it failed: {took['failed']}")
    return both


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--measure", choices=(WHOLE, *WITHOUT), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.small)))
        return
    columns = ("a training step without", "s", "s with it", "ratio", "MiB", "MiB with it", "loss", "loss with it")
    table = Table("ablation", columns)
    with tempfile.TemporaryDirectory() as folder:
        peers.save_peer(Path(folder), options.small)
        for name in WITHOUT:
            whole, without = measure_beside(name, Path(folder), options.small)
            table.add(
                name,
                f"{median(without['times']):.2f}", f"{median(whole['times']):.2f}",
                f"{median(map(truediv, without['times'], whole['times'])):.2f}",
                f"{without['peak']:.0f}", f"{whole['peak']:.0f}",
                f"{without['loss']:.2f}", f"{whole['loss']:.2f}",
            )  # fmt: skip
    table.finish()


if __name__ == "__main__":
    main()
