"""Worth of single operations in a training step: that of `benchmarks.training_step` with one of them plain at a time.

    python -m benchmarks.ablation

Float32 on a CPU. One row for each operation of `m2f_lab.ops`, one for all of them plain, and one for the memory that
training keeps instead of giving it back. The step with everything and the one without are processes of their own that
take turns, call by call (see `benchmarks.peers`): the ratio is the median over the rounds, memory the peak of the
process. The loss after a step says that both compute the same. Appends the table to benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import AbstractContextManager, nullcontext
from operator import truediv
from pathlib import Path
from statistics import median

import torch

from benchmarks import peers
from benchmarks.report import Table
from benchmarks.training_step import our_step
from m2f_lab import ops
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.planning.memory import keep_freed_memory

CPU = torch.device("cpu")
WHOLE, ALL_PLAIN, GIVEN_BACK = "everything", "all operations", "freed memory kept"
WITHOUT = (*ops.OPERATIONS, ALL_PLAIN, GIVEN_BACK)


def without(name: str) -> AbstractContextManager:
    """The context in which a step runs without an idea."""
    if name == ALL_PLAIN:
        return ops.plain()
    return ops.plain(name) if name in ops.OPERATIONS else nullcontext()


def measure(name: str, folder: Path, small: bool) -> dict:
    """A step without an idea, in this process, in turns: seconds of each step, MiB, and the loss after one step."""
    options = argparse.Namespace(device="cpu", small=small, folder=folder, precision="float32")
    losses = []
    with without(name), nullcontext() if name == GIVEN_BACK else keep_freed_memory(CPU):
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
    parser.add_argument("--only", choices=WITHOUT, nargs="+", default=WITHOUT, metavar="NAME", help="rows to measure")
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
        for name in options.only:
            whole, plain = measure_beside(name, Path(folder), options.small)
            table.add(
                name,
                f"{median(plain['times']):.2f}", f"{median(whole['times']):.2f}",
                f"{median(map(truediv, plain['times'], whole['times'])):.2f}",
                f"{plain['peak']:.0f}", f"{whole['peak']:.0f}",
                f"{plain['loss']:.2f}", f"{whole['loss']:.2f}",
            )  # fmt: skip
    table.finish()


if __name__ == "__main__":
    main()
