"""Other layouts of images and labels, rewritten as the folder that `folder` and `instances` read.

    label_maps    images/ and labels/: ids 0…K-1 with 255 for unlabelled (--first-id 0), or 1…K with 0 (--first-id 1)
    colors        images/ and labels/ that show classes as the colours of a classes.txt
    binary        images/ and masks/: not 0 where the object is
    masks         x/images/x.png and x/masks/*.png for each image: a file for each instance
    yolo          images/ and labels/*.txt: in each line a class 0…K-1 and a polygon, x y x y …, in shares of the image

Nothing is drawn anew: images are copied, ids are renumbered, polygons become the pixels that COCO's rule gives them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from m2f_lab.data.dataset import DataError, abbreviate, files_below, image_files, read_image, read_label
from m2f_lab.data.folder import read_classes
from m2f_lab.data.segments import rasterized
from m2f_lab.structures import IGNORE

_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class Labelled:
    """What is written for one image.

    Attributes:
        name: of the files, without ending.
        image: the file to copy.
        read: gives the label map (0 unlabelled, 1…K; uint8 [H, W]) or None, and the masks of instances or None.
    """

    name: str
    image: Path
    read: Callable[[], tuple[np.ndarray | None, list[np.ndarray] | None]]


@dataclass(frozen=True)
class Source:
    """Where labels come from, and how they are to be understood; see the top of this file."""

    root: Path
    classes: Path | None = None  # a classes.txt
    first_id: int | None = None


def prepare(
    source: str | Path,
    out: str | Path,
    kind: str,
    split: str = "train",
    *,
    classes: str | Path | None = None,
    first_id: int | None = None,
) -> Path:
    """Write a data set's split as a folder that `open_dataset("folder", out, …)` reads.

    Images that are written already are passed over, so a call that was interrupted goes on.

    Args:
        source: the folder of images and labels
        out: the folder to write
        kind: "label_maps", "colors", "binary", "masks" or "yolo"
        split: which split they become, "train" or "val"
        classes: the classes.txt of the new folder; "colors" needs its colours
        first_id: of label maps, 0 or 1

    Returns:
        The folder.

    Raises:
        DataError: a label is missing or not as its kind must be; names the file.
        ValueError: the kind or the split does not exist, or an argument is missing.
    """
    if kind not in KINDS or split not in _FOLDERS:
        raise ValueError(f"kind is one of {tuple(KINDS)} and split of {tuple(_FOLDERS)}, got {kind!r} and {split!r}.")
    out = Path(out).expanduser()
    given = Source(Path(source).expanduser(), None if classes is None else Path(classes).expanduser(), first_id)
    if given.classes:
        read_classes(given.classes)  # before anything is written
    text = given.classes.read_text(encoding="utf-8-sig") if given.classes else _DEFAULT_CLASSES.get(kind)
    if text is None:
        raise ValueError(f"kind={kind!r} needs classes=, the classes.txt of the new folder: a name in each line.")
    items = list(KINDS[kind](given))
    if not items:
        raise DataError(
            f"There are no images of kind {kind!r} in {given.root}; m2f_lab.data.prepare shows the layouts."
        )
    _check_names(items)
    out.mkdir(parents=True, exist_ok=True)
    _write_classes(out / "classes.txt", text)
    for item in tqdm(items, desc=f"prepare {kind}", unit="image", disable=None):
        image = out / "images" / _FOLDERS[split] / f"{item.name}{item.image.suffix}"
        if not image.is_file():  # it is written last
            _write(item, image, out, _FOLDERS[split])
    return out


def _check_names(items: list[Labelled]) -> None:
    """Raise a DataError if the labels of two images would have one name."""
    first: dict[str, Path] = {}
    for item in items:
        other = first.setdefault(item.name, item.image)
        if other != item.image:
            raise DataError(f"{other} and {item.image} would share the label {item.name}.png; rename one of them.")


def _write_classes(path: Path, text: str) -> None:
    """Write the classes, which the splits of a folder share."""
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise DataError(
            f"{path} names other classes than those given, and the labels beside it hold their ids. Give the same "
            "classes for all splits, or choose another folder."
        )
    path.write_text(text, encoding="utf-8")


def _write(item: Labelled, image: Path, out: Path, split: str) -> None:
    label_map, masks = item.read()
    size = read_image(item.image).shape[:2]
    for found in [*([] if label_map is None else [label_map]), *(masks or [])]:
        if found.shape != size:
            raise DataError(
                f"{item.image} is {size[1]} × {size[0]} pixels, but its label is {found.shape[1]} × {found.shape[0]}. "
                "Labels must have the size of their image."
            )
    if label_map is not None:
        _save(label_map, out / "annotations" / split / f"{item.name}.png")
    if masks is not None:
        if masks and np.sum(masks, axis=0).max() > 1:  # what overlaps has a file each
            for number, mask in enumerate(masks, start=1):
                _save(255 * mask.astype(np.uint8), out / "instances" / split / item.name / f"{number:04d}.png")
        else:
            numbers = np.zeros(size, np.uint16)
            for number, mask in enumerate(masks, start=1):
                numbers[mask] = number
            _save(numbers, out / "instances" / split / f"{item.name}.png")
    image.parent.mkdir(parents=True, exist_ok=True)
    new = image.with_name(f".{image.name}")
    shutil.copyfile(item.image, new)
    os.replace(new, image)


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _pairs(source: Source, folder: str, suffix: str = ".png") -> Iterator[tuple[str, Path, Path]]:
    """Name, image and label of each image."""
    images = source.root / "images"
    for image in image_files(files_below(images)):
        name = image.relative_to(images).with_suffix("")
        label = source.root / folder / f"{name}{suffix}"  # not with_suffix, which cuts a name like photo.v2
        if not label.is_file():
            raise DataError(f"{image} has no label: there is no {label}. Add it, or take the image away.")
        yield str(name), image, label


def _label_maps(source: Source) -> Iterator[Labelled]:
    pairs = list(_pairs(source, "labels"))
    if source.first_id not in (0, 1):
        found = sorted({number for *_, label in pairs for number in np.unique(read_label(label)).tolist()})
        guess = 0 if IGNORE in found else 1
        raise ValueError(
            f"Say by first_id whether ids begin at 0 (255 is unlabelled) or at 1 (0 is unlabelled). The labels hold "
            f"{abbreviate(found, 12)}: first_id={guess}, by the look of it."
        )

    known = len(read_classes(source.classes).names) if source.classes else IGNORE - 1
    allowed = [*range(known), IGNORE] if source.first_id == 0 else list(range(known + 1))

    def read(label: Path) -> tuple[np.ndarray, None]:
        ids = read_label(label)
        unknown = np.setdiff1d(ids, allowed).tolist()
        if unknown:  # as 8 bits, 256 would be 0
            raise DataError(
                f"{label} holds the ids {abbreviate(unknown)}; with first_id={source.first_id}, {known} classes have "
                f"the ids {source.first_id}…{source.first_id + known - 1}. Is first_id right, and every class named?"
            )
        return (ids.astype(np.uint8) + np.uint8(1) if source.first_id == 0 else ids.astype(np.uint8)), None

    for name, image, label in pairs:
        yield Labelled(name, image, lambda label=label: read(label))


def _colors(source: Source) -> Iterator[Labelled]:
    if source.classes is None:
        raise ValueError("kind='colors' needs classes=, a classes.txt with the colour of each class.")
    colors = np.array(read_classes(source.classes).colors)
    keys = colors @ (65536, 256, 1)

    def read(label: Path) -> tuple[np.ndarray, None]:
        shown = read_image(label).astype(np.int64) @ (65536, 256, 1)
        label_map = np.zeros(shown.shape, np.uint8)
        for number, key in enumerate(keys.tolist(), start=1):
            label_map[shown == key] = number
        unknown = np.unique(shown[(label_map == 0) & (shown != 0)]).tolist()
        if unknown:
            names = abbreviate(f"#{key:06x}" for key in unknown)
            raise DataError(
                f"{label} has the colours {names}, which {source.classes} does not name; black is unlabelled."
            )
        return label_map, None

    for name, image, label in _pairs(source, "labels"):
        yield Labelled(name, image, lambda label=label: read(label))


def _binary(source: Source) -> Iterator[Labelled]:
    for name, image, label in _pairs(source, "masks"):
        yield Labelled(name, image, lambda label=label: (1 + (read_label(label) > 0).astype(np.uint8), None))


def _masks(source: Source) -> Iterator[Labelled]:
    for image in image_files(source.root.glob("*/images/*")):
        folder = image.parent.parent / "masks"
        if not folder.is_dir():
            raise DataError(
                f"{image} has no masks: there is no folder {folder}. Add it, empty if there is no instance."
            )
        files = image_files(folder.glob("*"))
        yield Labelled(image.stem, image, lambda files=files: (None, [read_label(file) > 0 for file in files]))


def _yolo(source: Source) -> Iterator[Labelled]:
    def read(image: Path, label: Path) -> tuple[np.ndarray, list[np.ndarray]]:
        height, width = read_image(image).shape[:2]
        label_map, masks = np.zeros((height, width), np.uint8), []
        for line, text in enumerate(label.read_text().splitlines(), start=1):
            try:
                kind, *numbers = text.split()
                ring = np.array(numbers, np.float64).reshape(-1, 2) * (width, height)
                number = int(kind) + 1
            except ValueError as error:
                raise DataError(
                    f"{label}, line {line}: expected a class and pairs of numbers, got {text!r}."
                ) from error
            mask = rasterized((ring,), (height, width))
            if not set(np.unique(label_map[mask]).tolist()) <= {0, number}:
                raise DataError(
                    f"{label}, line {line}: instances of several classes overlap, which a folder cannot say."
                )
            label_map[mask] = number
            masks.append(mask)
        return label_map, masks

    for name, image, label in _pairs(source, "labels", ".txt"):
        yield Labelled(name, image, lambda image=image, label=label: read(image, label))


KINDS = {"label_maps": _label_maps, "colors": _colors, "binary": _binary, "masks": _masks, "yolo": _yolo}
_DEFAULT_CLASSES = {"binary": "background\nobject\n", "masks": "object thing\n"}
