"""A data set and a recipe so small that a training run takes a second; for the tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from m2f_lab import recipes
from m2f_lab.recipes import Recipe
from m2f_lab.training import Run

CLASSES = ("ground", "box", "ball")


def write_toy_data(root: Path, num_train: int = 6, num_val: int = 2) -> Path:
    """Bright rectangles and dark discs on a noisy ground, 64 × 96 pixels, in ADE20K's layout, with instances."""
    (root / "images").mkdir(parents=True)
    lines = ("ground #606060 stuff", "box #e6c83c thing", "ball #1e28a0 thing")
    (root / "classes.txt").write_text("\n".join(lines) + "\n")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :96]
    for split, count in (("training", num_train), ("validation", num_val)):
        for kind in ("images", "annotations", "instances"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            label = np.ones((64, 96), np.uint8)
            top, left = rng.integers(0, 30), rng.integers(0, 50)
            label[top : top + 24, left : left + 32] = 2
            if i % 2:  # images differ in their number of segments
                label[np.hypot(y - rng.integers(10, 54), x - rng.integers(10, 86)) < 12] = 3
            label[:2] = 0
            instances = np.where(label > 1, label - 1, 0).astype(np.uint16)
            image = np.array([[90, 90, 90], [90, 120, 90], [230, 200, 60], [30, 40, 160]])[label]
            image = (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{split}_{i}.png")
            Image.fromarray(label).save(root / "annotations" / split / f"{split}_{i}.png")
            Image.fromarray(instances).save(root / "instances" / split / f"{split}_{i}.png")
    return root


def toy_recipe(backbone: str = "test_resnet", **optimization) -> Recipe:
    """Six steps of two images; evaluated every three, checkpoint every two."""
    settings = dict(max_iterations=6, batch_size=2, log_every=1, evaluate_every=3, checkpoint_every=2)
    return recipes.debug_tiny(num_classes=len(CLASSES), dataset="folder").vary(
        name="toy",
        model=dict(
            backbone=backbone,
            num_queries=6,
            hidden_dim=32,
            mask_dim=32,
            num_decoder_layers=2,
            pixel_mean=recipes.IMAGENET_MEAN,
            pixel_std=recipes.IMAGENET_STD,
        ),
        data=dict(crop_size=(64, 96), shortest_edges=(64, 80), longest_edge=200),
        loss=dict(num_points=64),
        optimization=settings | optimization,
    )


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights, their average, and optimiser."""
    from safetensors.torch import load_file

    files = {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.rglob("*.safetensors"))}
    return {f"{stem}.{k}": v for stem, file in files.items() for k, v in load_file(file).items()}


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ, first {different[:3]}"


def timeless(rows: list[dict]) -> list[dict]:
    """Rows of metrics without what the clock and the machine decide."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second", "memory_gib")} for row in rows]


def assert_same_run(run: Run, whole: Run) -> None:
    for which in ("last", "best"):
        assert_same_tensors(all_tensors(run.checkpoint(which)), all_tensors(whole.checkpoint(which)))
    assert timeless(run.metrics) == timeless(whole.metrics)


class Recorder:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.events, self.rows = [], []

    def on_start(self, run: Run) -> None:
        self.events.append(("start", run.iteration))

    def on_step(self, row: dict) -> None:
        self.events.append(("step", row["iteration"]))
        self.rows.append(row)

    def on_evaluation(self, row: dict) -> None:
        self.events.append(("evaluation", row["iteration"]))

    def on_end(self, run: Run) -> None:
        self.events.append(("end", run.iteration))


class StopAt(Recorder):
    """Raises after some step, as a machine that dies would stop the run."""

    def __init__(self, iteration: int, error: BaseException) -> None:
        super().__init__()
        self.iteration, self.error = iteration, error

    def on_step(self, row: dict) -> None:
        super().on_step(row)
        if row["iteration"] == self.iteration:
            raise self.error


def fixed_points(num_sets: int, num_points: int, like: torch.Tensor) -> torch.Tensor:
    """The same points for everyone, in place of random ones."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(1, num_points, 2, generator=generator).to(like).expand(num_sets, -1, -1)
