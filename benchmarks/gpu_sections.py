"""Sections of `benchmarks.gpu`, each a generator of rows of text."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import compiled, deformable_attention, peers
from benchmarks.report import Table
from m2f_lab import ops, recipes
from m2f_lab.loss import build_criterion
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Matching
from m2f_lab.training.determinism import deterministic_algorithms
from m2f_lab.training.loop import model_to_train, peak_memory
from m2f_lab.training.planning import probe

ROOT = Path(__file__).resolve().parents[1]
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where and how large to measure.

    Attributes:
        folder: the peer's files
    """

    device: str
    small: bool
    folder: Path

    @property
    def images(self) -> int:
        """Of a training step."""
        return 16 if self.device == "cuda" else 2

    def recipe(self, **optimization: object) -> Recipe:
        side = 64 if self.small else peers.SIDE
        return recipes.ade20k_swin_tiny().vary(
            model=dict(
                backbone_weights=None, drop_path_rate=peers.DROP_PATH, **(peers.SMALL["ours"] if self.small else {})
            ),
            data=dict(crop_size=(side, side)),
            loss=dict(num_points=256 if self.small else 12544),
            optimization=dict(batch_size=self.images, precision="bfloat16") | optimization,
        )


def kernel(place: Place) -> Iterator[Cells]:
    """The largest error of the output and of each gradient, in parts of the largest number of float64's."""
    levels = [(2, 3), (4, 6), (8, 12)] if place.small else deformable_attention.LEVEL_SIZES
    for batch, sizes in ((2, levels), (1, [(h + 3, w + 1) for h, w in levels])):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            inputs = deformable_attention.inputs_of_a_layer(batch, sizes, place.device, dtype)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            results = []
            for context, tensors in ((nullcontext(), inputs), (ops.plain("deformable_sampling"), exact)):
                with context:
                    run = deformable_attention.forward_and_backward
                    results.append(run(ops.deformable_sampling, sizes, tensors))
            title = f"{str(dtype).removeprefix('torch.')}, {batch} × {sum(h * w for h, w in sizes)} positions"
            yield title, *(error(a, b) for a, b in zip(*results, strict=True))


def error(found: Tensor, exact: Tensor) -> str:
    return f"{((found.double() - exact.double()).abs().max() / exact.double().abs().max()).item():.1e}"


def autocast(place: Place) -> Iterator[Cells]:
    """The same of the model and its loss, with the pairs that float64 matches."""
    exact, matching = outputs_of(place, torch.float64)
    for title, dtype, product in (
        ("float32", torch.float32, "highest"),
        ("float32, products in TF32", torch.float32, "high"),
        ("bfloat16 autocast", torch.bfloat16, "highest"),
        ("bfloat16 autocast, the loss's products in TF32", torch.bfloat16, "high"),
    ):
        torch.set_float32_matmul_precision(product)
        found, _ = outputs_of(place, dtype, matching)
        torch.set_float32_matmul_precision("highest")
        yield title, *(error(a, b) for a, b in zip(found, exact, strict=True))


def outputs_of(
    place: Place, dtype: torch.dtype, matching: Matching | None = None
) -> tuple[tuple[Tensor, ...], Matching]:
    """Class and mask logits of the first and the last prediction, the loss, the norm of each gradient; the matching.

    The first prediction precedes all attention masks, each of which a logit near 0 may flip.
    """
    recipe = place.recipe(batch_size=1).vary(model=dict(drop_path_rate=0.0))
    is_exact = dtype == torch.float64
    torch.manual_seed(0)
    model = model_to_train(recipe, torch.device(place.device)).train()
    model = model.double() if is_exact else model
    targets = probe.noise(recipe).to(place.device).targets
    criterion = build_criterion(recipe)
    with ops.plain() if is_exact else nullcontext():
        with peers.autocast("bfloat16" if dtype == torch.bfloat16 else "float32", place.device):
            output = model(peers.random_images(1, place.small).to(place.device))
        matching = matching or criterion.matcher(output.float(), targets)
        pairs = len(matching.query)
        points = torch.rand(1, criterion.num_points, 2, generator=torch.Generator().manual_seed(0))
        points = points.expand(pairs, -1, -1).to(place.device, output.float().masks[0].features.dtype)
        total = criterion.losses(output, targets, matching, points)["total"]
        total.backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters()])
    first, last = output.masks[0].dense(), output.masks[-1].dense()
    return (output.class_logits[0], first, output.class_logits[-1], last, total, norms), matching


def repeats(place: Place) -> Iterator[Cells]:
    """The largest difference of a weight after three steps from the same seed, and the seconds of a step."""
    for exact in (False, True):
        runs, times = [], []
        for _ in range(2):
            torch.manual_seed(0)
            recipe = place.recipe(deterministic=exact)
            learner = probe.learner_for(recipe, torch.device(place.device))
            batch = probe.noise(recipe).to(place.device)
            with deterministic_algorithms(exact):
                for iteration in range(3):
                    times.append(peers.seconds_of(partial(learner.step, batch, iteration), place.device, 0))
            runs.append(torch.cat([p.detach().flatten() for p in learner.model.parameters()]))
        difference = (runs[0] - runs[1]).abs().max().item()
        yield f"deterministic={exact}", "yes" if difference == 0 else "no", f"{difference:.1e}", f"{min(times):.3f}"


def tests(place: Place) -> Iterator[Cells]:
    """The last line of pytest, and what failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--tb=line", "tests"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip().splitlines()
    yield "pytest -m gpu", lines[-1].strip("= ") if lines else "nothing"
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield tuple(f"{line} ".split(" ", 1))


def beside_the_peer(module: str, place: Place) -> Iterator[Cells]:
    """Both sides call by call in turn, as `benchmarks.training_step` and `benchmarks.inference` measure them."""
    for precision in ("bfloat16", "float32"):
        ours, theirs = peers.measure_in_turn(f"benchmarks.{module}", place.folder, precision, place.device, place.small)
        cells = peers.compared(ours, theirs)  # raises where ours has failed
        fine = [f"{1000 * median(side['times']):.1f}" for side in (ours, theirs) if "times" in side]
        yield (precision, *fine, *cells[len(fine) : 3], f"{1000 * ours['floor']:.1f}", *cells[4:])


def sampling(place: Place) -> Iterator[Cells]:
    """The rows of `benchmarks.deformable_attention`."""
    levels = [(2, 3), (4, 6)] if place.small else deformable_attention.LEVEL_SIZES
    on_gpu = place.device == "cuda"
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if on_gpu else (torch.float32,):
        table = Table("", COLUMNS["sampling"])
        deformable_attention.compare(table, place.device, place.images, dtype, levels)
        yield from table.rows


def ideas(place: Place) -> Iterator[Cells]:
    """A step with an operation plain, in turn with one that has everything."""
    recipe = place.recipe()
    learner = probe.learner_for(recipe, torch.device(place.device))
    batch = probe.noise(recipe).to(place.device)

    def measured(context: Callable[[], AbstractContextManager]) -> tuple[float, float]:
        """Seconds, and MiB at the peak."""
        if place.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with context():
            seconds = peers.seconds_of(lambda: learner.step(batch, 0), place.device, 0)
        return seconds, 1024 * peak_memory(torch.device(place.device))

    for name in (*ops.OPERATIONS, "all operations"):
        plain = partial(ops.plain, *([name] if name in ops.OPERATIONS else []))
        rounds = [(measured(plain), measured(nullcontext)) for _ in range(2 if place.small else 6)][1:]
        without, whole = zip(*rounds, strict=True)
        ratio = median(truediv(a[0], b[0]) for a, b in rounds)
        yield (
            name,
            *(f"{median(seconds for seconds, _ in side):.3f}" for side in (without, whole)),
            f"{ratio:.2f}",
            *(f"{max(peak for _, peak in side):.0f}" for side in (without, whole)),
        )


def under_compile(place: Place) -> Iterator[Cells]:
    """The rows of `benchmarks.compiled`."""
    for kind in (compiled.forward, compiled.training):
        yield kind.__name__, *compiled.compare(kind, "bfloat16", place.device, place.small)


SECTIONS: dict[str, tuple[Callable[[Place], Iterator[Cells]], int]] = {
    "kernel": (kernel, 60),
    "autocast": (autocast, 60),
    "step": (partial(beside_the_peer, "training_step"), 120),
    "image": (partial(beside_the_peer, "inference"), 90),
    "sampling": (sampling, 60),
    "ideas": (ideas, 90),
    "repeats": (repeats, 60),
    "tests": (tests, 90),
    "compiled": (under_compile, 150),
}
"""Section → the function that measures it, and the seconds that it may take on a GPU."""

ENVIRONMENT = {"repeats": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}}
"""Variables that a section must start with."""

BESIDE = ("ours ms", "peer ms", "ratio", "floor ms", *peers.COLUMNS[4:])
COLUMNS: dict[str, Cells] = {
    "kernel": ("error against float64", "output", "gradient of values", "of places", "of weights"),
    "autocast": (
        "error against float64",
        "first classes",
        "first masks",
        "last classes",
        "last masks",
        "loss",
        "gradient norms",
    ),
    "step": ("training step", *BESIDE),
    "image": ("image to label map", *BESIDE),
    "sampling": ("sampling", "ours ms", "grid_sample ms", "ratio", "floor ms", "share of floor"),
    "ideas": ("plain", "s", "s with it", "ratio", "MiB", "MiB with it"),
    "repeats": ("two runs of three steps", "bit by bit", "largest difference", "s per step"),
    "tests": ("tests", "result"),
    "compiled": ("torch.compile, bfloat16", *compiled.COLUMNS),
}
