"""Work that a training step and an image give a GPU, counted without one, beside Hugging Face's Mask2Former.

    python -m benchmarks.gpu_counts [--where 20] [--batch 16] [--small]

Kernel launches, host synchronisations and copies on an emulated device; `benchmarks.emulated_cuda` says what is counted
and what is not. Swin-T, 150 classes, 100 queries, 8 segments per image, 16 images a step, stochastic depth of 0.3,
bfloat16 autocast, fused AdamW, gradients clipped. The second step counts: the first one fills caches. A backward
operation belongs to whoever made its forward one. Both sides move their batch to the device within the step: ours
pinned id maps, theirs masks.

Steps are counted on images of 256 × 256 with 256 points in the loss: at 512 × 512 and with 12,544 points the counts are
the same. (At 64 × 64 some windows need no shift: 30 launches fewer.) Images are counted at 512 × 512. Ours is
`model.predict`, theirs ends with `post_process_semantic_segmentation`. Appends the table to
benchmarks/results/gpu_counts.json.

`--where N` adds the N places, files and operations that most comes from, for each side and each kind.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.emulated_cuda import Event, Kind, Log, emulated_cuda
from benchmarks.inference import our_labeller, their_labeller
from benchmarks.peers import OURS, THEIRS
from benchmarks.report import Table
from m2f_lab import ops, recipes
from m2f_lab.data.loading import transfer_ahead
from m2f_lab.recipes import Recipe
from m2f_lab.training.planning import probe

MODEL, CRITERION, REST = "model", "criterion", "optimiser"
"""Phases of a step: forward and backward of the model, of matching and losses; clipping, AdamW and all else."""

DEVICE = "cuda"
PRECISIONS = ("float32", "bfloat16")


class PhasedScaler(torch.amp.GradScaler):
    """Does nothing but tell the log that the criterion is done."""

    def __init__(self, log: Log) -> None:
        super().__init__(DEVICE, enabled=False)
        self.log = log

    def scale(self, outputs: torch.Tensor) -> torch.Tensor:
        self.log.phase = REST
        return super().scale(outputs)


def our_recipe(options: argparse.Namespace) -> Recipe:
    small = peers.SMALL["ours"] if options.small else {}
    return recipes.ade20k_swin_tiny().vary(
        model=dict(backbone_weights=None, drop_path_rate=peers.DROP_PATH, **small),
        data=dict(crop_size=(options.side, options.side)),
        optimization=dict(batch_size=options.batch, precision="bfloat16"),
        loss=dict(num_points=options.points),
    )


def count_our_step(recipe: Recipe, log: Log) -> None:
    """Take two steps of training as `train` takes them, and leave the second in the log."""
    learner = replace(probe.learner_for(recipe, torch.device(DEVICE, 0)), scaler=PhasedScaler(log))
    learner.model.register_forward_pre_hook(lambda *_: setattr(log, "phase", MODEL))
    learner.model.register_forward_hook(lambda *_: setattr(log, "phase", CRITERION))
    batches = transfer_ahead(itertools.repeat(probe.noise(recipe).pin_memory()), learner.world.device)
    for iteration in range(2):
        log.clear()
        log.phase = REST
        learner.step(next(batches), iteration)


def count_their_step(options: argparse.Namespace, log: Log) -> None:
    """The same of the peer."""
    model = peers.load_theirs(options.folder).train().to(DEVICE)
    model.config.train_num_points = model.criterion.num_points = options.points
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    model.criterion.register_forward_pre_hook(lambda *_: setattr(log, "phase", CRITERION))
    model.criterion.register_forward_hook(lambda *_: setattr(log, "phase", MODEL))
    images = torch.randn(options.batch, 3, options.side, options.side)
    stripes = torch.arange(options.side) * probe.NUM_SEGMENTS // options.side
    masks = (stripes == torch.arange(probe.NUM_SEGMENTS)[:, None, None]).float().expand(-1, options.side, -1)
    for _ in range(2):
        log.clear()
        log.phase = REST
        optimizer.zero_grad(set_to_none=True)
        inputs = dict(
            pixel_values=images.to(DEVICE),
            mask_labels=[masks.to(DEVICE) for _ in range(options.batch)],
            class_labels=[torch.arange(probe.NUM_SEGMENTS).to(DEVICE) for _ in range(options.batch)],
        )
        log.phase = MODEL
        with peers.autocast("bfloat16", DEVICE):
            loss = model(**inputs).loss
        log.phase = REST
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        loss.item()


def count_image(labeller: Callable[[], object], log: Log) -> None:
    """The second of two images to their label maps."""
    for _ in range(2):
        log.clear()
        with torch.no_grad():
            labeller()


def count_our_image(options: argparse.Namespace, precision: str, log: Log) -> None:
    model = peers.load_ours(options.folder, options.small).to(DEVICE)
    with ops.autocast(model, getattr(torch, precision), torch.device(DEVICE)):  # as evaluation does
        count_image(our_labeller(model, options.images), log)


def count_their_image(options: argparse.Namespace, precision: str, log: Log) -> None:
    model = peers.load_theirs(options.folder).to(DEVICE)
    with peers.autocast(precision, DEVICE):
        count_image(their_labeller(model, (options.images.float() / 255 - 0.45) / 0.225), log)


def add_rows(table: Table, title: str, ours: dict[str, int] | None, theirs: dict[str, int] | None) -> None:
    for name in ours or theirs:
        counts = [str(side[name]) if side else "not counted" for side in (ours, theirs)]
        ratio = f"{theirs[name] / ours[name]:.1f}" if ours and theirs and ours[name] else "–"
        table.add(f"{title}: {name}", *counts, ratio)


def counts_of(log: Log, phases: tuple[str, ...] = ()) -> dict[str, int]:
    """Rows of the table."""
    launches = {f"{Kind.LAUNCH.value}, {phase}": log.count(Kind.LAUNCH, phase) for phase in phases}
    return launches | {kind.value: log.count(kind) for kind in Kind}


def print_where(title: str, log: Log, limit: int) -> None:
    """Places, files and operations that most comes from."""
    views: dict[str, Callable[[Event], str]] = {
        "by file": lambda e: e.callers[0].rpartition(":")[0],
        "by file outside ops": lambda e: outside_ops(e).rpartition(":")[0],
        "by place": lambda e: f"{e.name:32} {' < '.join(e.callers[:3])}",
    }
    for kind in Kind:
        for view, by in views.items():
            print(f"\n{title}: {log.count(kind)} {kind.value} {view}")
            for place, count in log.top(kind, by)[:limit]:
                print(f"{count:6} {place}")


def outside_ops(event: Event) -> str:
    """The innermost caller that is no operation of ours."""
    return next((place for place in event.callers if not place.startswith("m2f_lab/ops/")), event.callers[0])


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model: whether all of it runs")
    parser.add_argument("--where", type=int, default=0, metavar="N", help="list the N places that most comes from")
    parser.add_argument("--batch", type=int, default=16, help="images of a step")
    parser.add_argument("--side", type=int, help="of a step's images, in pixels: 256, or 64 if small")
    parser.add_argument("--points", type=int, default=256, help="of a mask in the loss")
    parser.add_argument("--only", choices=(OURS, THEIRS), help="count one side")
    parser.add_argument("--no-images", action="store_true", help="count the step only")
    options = parser.parse_args(given)
    options.side = options.side or (64 if options.small else 256)
    return options


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    table = Table("gpu_counts", ("bfloat16, Swin-T", OURS, THEIRS, "ratio"))
    with tempfile.TemporaryDirectory() as folder:
        options.folder, options.images = Path(folder), peers.random_images(1, options.small)
        peers.save_peer(options.folder, options.small)
        works: dict[str, tuple[tuple[str, ...], Callable[[Log], None], Callable[[Log], None]]] = {
            f"a step on {options.batch} images": (
                (MODEL, CRITERION, REST),
                lambda log: count_our_step(our_recipe(options), log),
                lambda log: count_their_step(options, log),
            ),
        }
        for precision in () if options.no_images else PRECISIONS:
            works[f"an image to its label map, {precision}"] = (
                (),
                lambda log, p=precision: count_our_image(options, p, log),
                lambda log, p=precision: count_their_image(options, p, log),
            )
        for title, (phases, *sides) in works.items():
            counts: dict[str, dict[str, int]] = {}
            for side, count in zip((OURS, THEIRS), sides, strict=True):
                if options.only in (None, side):
                    with emulated_cuda() as log:
                        count(log)
                    if options.where:
                        print_where(f"{title}, {side}", log, options.where)
                    counts[side] = counts_of(log, phases)
            add_rows(table, title, counts.get(OURS), counts.get(THEIRS))
    table.finish()


if __name__ == "__main__":
    main()
