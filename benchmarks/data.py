"""Training examples that one process on one core makes per second, beside the data mapper of the official Mask2Former.

    python -m benchmarks.data [--root DIR] [--images 40] [--rounds 5]

Reads a folder with a classes.txt (by default, drawn rooms of 360 × 480 pixels), and trains on it as the ADE20K recipes
with crop 512 do. Both sides make the same examples: the same scales, crops, flips and colours, drawn from the same
generators. That is checked first; then they take turns. Appends the table to benchmarks/results/data.json. Needs
OpenCV, with which the official mapper changes colours: pip install opencv-python-headless
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import published_mapper as published
from benchmarks.report import Table
from m2f_lab import recipes
from m2f_lab.data import Dataset, Sample, TrainingTransform, open_dataset, resized_size
from m2f_lab.data.jitter import ColorJitter
from m2f_lab.data.transforms import crop_of_resized_image, crop_of_resized_labels
from m2f_lab.recipes import DataConfig
from m2f_lab.scenes import write_ade20k
from m2f_lab.structures import Target

Both = tuple[Callable[[int], object], Callable[[int], object]]
"""Our work on the image of this number, and that of the published mapper."""


class Pairs:
    """The same examples twice: ours, and as published."""

    def __init__(self, dataset: Dataset, config: DataConfig, count: int, folder: Path) -> None:
        self.dataset, self.config = dataset, config
        self.samples = [dataset[index] for index in range(min(count, len(dataset)))]
        self.label_paths = [folder / f"{sample.name}.png" for sample in self.samples]
        for sample, path in zip(self.samples, self.label_paths, strict=True):
            Image.fromarray(sample.label_map).save(path)  # train ids, as the official preparation script writes them

    def ours(self, index: int, **changes) -> tuple[Tensor, Target]:
        transform = TrainingTransform(replace(self.config, **changes))
        return transform(self.dataset[index], np.random.default_rng(index))

    def theirs(self, index: int, **changes) -> tuple[Tensor, Tensor, Tensor]:
        paths = self.dataset.image_paths[index], self.label_paths[index]
        return published.published_example(*paths, replace(self.config, **changes), np.random.default_rng(index))

    def check(self, index: int) -> None:
        """Raise an AssertionError unless both make the same, but for what we say that we do otherwise.

        Pixels may be rounded otherwise, by one or two grey levels, and by a few more where colours are changed,
        because the published mapper rounds hues to two degrees. Labels may be half a pixel off.
        """
        for jitter, largest, mean in ((False, 2, 0.05), (True, 16, 1.5)):
            image, target = self.ours(index, color_jitter=jitter)
            their_image, classes, masks = self.theirs(index, color_jitter=jitter)
            difference = (image.int() - their_image.int()).abs()
            assert difference.max() <= largest, f"image {index} differs by {difference.max()} levels"
            assert difference.float().mean() <= mean, f"image {index} differs by {difference.float().mean()} on average"
        ours, theirs = (
            (masks * (labels + 1)[:, None, None]).sum(0)
            for labels, masks in ((target.labels, target.dense()), (classes, masks))
        )
        assert (ours != theirs).float().mean() < 0.1, f"the labels of image {index} differ"

    def work(self) -> dict[str, Both]:
        """All that there is to do, alone and together."""
        crops = [self.ours(index, color_jitter=False)[0].numpy() for index in range(len(self.samples))]
        their_crops = [np.ascontiguousarray(crop.transpose(1, 2, 0)) for crop in crops]
        label_maps = [crop_of_resized_labels(s.label_map, (512, 512), (0, 0, 512, 512)) for s in self.samples]
        their_label_maps = [label_map.astype("long") for label_map in label_maps]
        jitters = [ColorJitter.draw(np.random.default_rng(index)) for index in range(len(self.samples))]
        return {
            "read image and labels": (self.dataset.__getitem__, self._read_as_published),
            "resize and crop": (self._resize, self._resize_as_published),
            "change colours": (
                lambda i: jitters[i].apply(crops[i].copy()),
                lambda i: published.jittered(their_crops[i], jitters[i]),
            ),
            "make the target": (
                lambda i: Target.from_label_map(torch.from_numpy(label_maps[i])),
                lambda i: published.instances(their_label_maps[i]),
            ),
            "the whole example": (self.ours, self.theirs),
        }

    def _read_as_published(self, index: int) -> None:
        published.read(self.dataset.image_paths[index], "RGB")
        published.read(self.label_paths[index]).astype("double")

    def _resize(self, index: int) -> None:
        sample, size, box = self._drawn(index)
        crop_of_resized_image(sample.image, size, box)
        crop_of_resized_labels(sample.label_map, size, box)

    def _resize_as_published(self, index: int) -> None:
        sample, size, (top, left, height, width) = self._drawn(index)
        image = published.resized_image(sample.image, size)
        labels = published.resized_labels(sample.label_map.astype("double"), size)
        for whole in (image, labels):
            whole[top : top + height, left : left + width].copy()

    def _drawn(self, index: int) -> tuple[Sample, tuple[int, int], tuple[int, int, int, int]]:
        """A sample, the size it comes to, and a crop."""
        rng, sample = np.random.default_rng(index), self.samples[index]
        edge = self.config.shortest_edges[rng.integers(len(self.config.shortest_edges))]
        size = resized_size(sample.label_map.shape, edge, self.config.longest_edge)
        height, width = np.minimum(size, self.config.crop_size).tolist()
        return sample, size, ((size[0] - height) // 2, (size[1] - width) // 2, height, width)


def compare(pairs: Pairs, rounds: int) -> None:
    """Time all work in turn, and print the table."""
    count = len(pairs.samples)
    table = Table(
        "data", (f"ms per image, {count} images of {pairs.dataset.name}", "ours", "published", "times faster")
    )
    for name, both in pairs.work().items():
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for make, spent in zip(both, seconds, strict=True):
                start = time.perf_counter()
                for index in range(count):
                    make(index)
                spent.append((time.perf_counter() - start) / count)
        ours, theirs = map(median, seconds)
        table.add(name, f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{theirs / ours:.2f}")
    table.add("images per second", f"{1 / ours:.0f}", f"{1 / theirs:.0f}", f"{theirs / ours:.2f}")
    (image, target), (_, classes, masks) = pairs.ours(0), pairs.theirs(0)
    ours = (image.nbytes + target.id_map.nbytes + target.labels.nbytes) / 2**20
    theirs = (image.nbytes + masks.nbytes + masks[0].nbytes * 8 + classes.nbytes) / 2**20  # and sem_seg, as int64
    table.add("MiB from a worker per image", f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}")
    table.finish()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time the making of training examples.")
    parser.add_argument("--root", type=Path, help="a folder with a classes.txt; without it, rooms are drawn")
    parser.add_argument("--images", type=int, default=40, help="how many make a round")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.root:
            dataset = open_dataset("folder", options.root, "train")
        else:
            root = write_ade20k(Path(folder, "rooms"), options.images, num_val=1, size=(360, 480))
            dataset = open_dataset("ade20k", root, "train")
        pairs = Pairs(dataset, recipes.ade20k_swin_tiny().data, options.images, Path(folder))
        for index in range(len(pairs.samples)):
            pairs.check(index)
        compare(pairs, options.rounds)


if __name__ == "__main__":
    main()
