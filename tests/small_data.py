"""Tiny data sets on disk, in the real layouts, for the tests of m2f_lab.data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("sky", "road", "car", "tree")


def picture(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    """Noise. uint8 [H, W, 3]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def raw_label(height: int = 12, width: int = 16, num_ids: int = len(NAMES) + 1) -> np.ndarray:
    """Vertical stripes of the ids 0…num_ids-1. uint8 [H, W]"""
    return np.tile((np.arange(width) * num_ids // width).astype(np.uint8), (height, 1))


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_folder(root: Path, count: int = 3, label: np.ndarray | None = None, suffix: str = ".png") -> Path:
    """`count` training and one validation image in ADE20K's layout, with a classes.txt."""
    label = raw_label() if label is None else label
    for folder, number in (("training", count), ("validation", 1)):
        for index in range(number):
            write(root / "images" / folder / f"{index:03}{suffix}", picture(*label.shape, seed=index))
            write(root / "annotations" / folder / f"{index:03}.png", label)
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return root


def write_cityscapes(root: Path, label: np.ndarray, names: tuple[str, ...] = ("aachen_000000_000019",)) -> Path:
    for split in ("train", "val"):
        for name in names:
            city = name.split("_")[0]
            write(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", picture(*label.shape))
            write(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", label)
    return root
