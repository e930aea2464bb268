"""What single ideas are worth in a training step: the step of `benchmarks.training_step` without one of them at a time.

    python -m benchmarks.ablation

Float32 on a CPU. Each row runs in a process of its own: the median time of a step, and the peak memory of the process.
The whole runs first and last, which shows how far the machine drifted meanwhile. Numbers do not change, whichever idea
is missing. Appends the table to benchmarks/results/ablation.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import peers
from benchmarks.report import Table
from benchmarks.training_step import our_step
from m2f_lab import products
from m2f_lab.model import deformable_attention, layers, pixel_decoder, swin
from m2f_lab.training.loop import peak_memory
from m2f_lab.training.memory import kept_memory

CPU = torch.device("cpu")
WHOLE, LAST, GIVEN_BACK = "everything", "everything, once more", "freed memory kept"


def nothing_recomputed() -> AbstractContextManager:
    stack = ExitStack()
    for module in (deformable_attention, pixel_decoder, swin):
        stack.enter_context(patch.object(module, "recomputed", lambda function, *arguments: function(*arguments)))
    return stack


WITHOUT: dict[str, Callable[[], AbstractContextManager]] = {
    WHOLE: nullcontext,
    "sampling by bags of rows (grid_sample instead)": lambda: patch.object(
        deformable_attention, "sample_by_bags", deformable_attention.sample_by_grid
    ),
    "linear maps by oneDNN": lambda: patch.object(products, "HAS_ONEDNN", False),
    "cheap and wide features computed twice": nothing_recomputed,
    "softmax of few numbers": lambda: patch.object(
        deformable_attention, "softmax_of_few", lambda scores: scores.softmax(dim=-1)
    ),
    "perceptrons in strips": lambda: patch.object(layers, "STRIP", 2**62),
    GIVEN_BACK: nullcontext,
    LAST: nullcontext,
}


def measure(name: str, folder: Path, small: bool) -> dict[str, float]:
    """A step without the idea, in this process: seconds, MiB, and the loss of the first step."""
    options = argparse.Namespace(device="cpu", small=small, folder=folder, precision="float32")
    with WITHOUT[name](), nullcontext() if name == GIVEN_BACK else kept_memory(CPU):
        torch.manual_seed(0)
        step = our_step(options)
        loss = step()
        return {"seconds": peers.median_seconds(step, "cpu"), "peak": 1024 * peak_memory(CPU), "loss": loss}


def measure_alone(name: str, folder: Path, small: bool) -> dict[str, float]:
    flags = ["--measure", name, "--folder", str(folder), *(["--small"] if small else [])]
    command = [sys.executable, "-m", "benchmarks.ablation", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--measure", choices=tuple(WITHOUT), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.small)))
        return
    table = Table("ablation", ("a training step without", "s", "to everything", "MiB", "more", "loss"))
    with tempfile.TemporaryDirectory() as folder:
        peers.save_peer(Path(folder), options.small)
        whole = None
        for name in WITHOUT:
            took = measure_alone(name, Path(folder), options.small)
            whole = whole or took
            table.add(
                f"({name})" if name in (WHOLE, LAST) else name,
                f"{took['seconds']:.2f}", f"{took['seconds'] / whole['seconds']:.2f}×",
                f"{took['peak']:.0f}", f"{took['peak'] - whole['peak']:+.0f}", f"{took['loss']:.3f}",
            )  # fmt: skip
    table.finish()


if __name__ == "__main__":
    main()
