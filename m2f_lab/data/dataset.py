"""Data sets: classes, and pairs of an image and a map of class ids.

K classes, H/W height/width.

On disk every data set numbers its classes in its own way. Those numbers are called raw ids here and become train ids,
0…K-1 or 255 for pixels to ignore, in exactly one place: `Dataset.to_label_map`.
"""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from m2f_lab.data.segments import Segments
from m2f_lab.structures import IGNORE, WIDE_IGNORE, ignored_label

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
SPLITS = ("train", "val")


class DataError(ValueError):
    """Something on disk is not as it must be. The message names the file, what was expected and the way out."""


@dataclass(frozen=True)
class Classes:
    """Names, colours and kinds of the K train ids.

    Attributes:
        names: one per class. K × str
        colors: red, green, blue in 0…255, for pictures. K × (r, g, b)
        things: the classes whose instances are told apart; all others are stuff
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    things: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < len(self.names) <= WIDE_IGNORE:
            raise ValueError(f"There must be 1 to {WIDE_IGNORE} classes, got {len(self.names)}.")
        if len(self.colors) != len(self.names):
            raise ValueError(f"There are {len(self.names)} class names but {len(self.colors)} colours.")
        outside = sorted(thing for thing in self.things if not 0 <= thing < len(self.names))
        if outside:
            raise ValueError(f"Classes {outside} are called things, but the last class is {len(self.names) - 1}.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ignore(self) -> int:
        """The label of pixels to ignore: 255, or 65535 beside more than 255 classes."""
        return ignored_label(len(self))

    @property
    def label_dtype(self) -> np.dtype:
        """Of label maps: uint8, or uint16 for more than 255 classes."""
        return np.dtype(np.uint8 if self.ignore == IGNORE else np.uint16)

    def only_things(self) -> Classes:
        """The things among them, in their order: the classes of instance segmentation."""
        kept = sorted(self.things)
        names, colors = (tuple(values[k] for k in kept) for values in (self.names, self.colors))
        return Classes(names, colors, frozenset(range(len(kept))))

    def to_json(self) -> dict:
        """Plain lists and numbers, as checkpoints hold them."""
        colors = [list(map(int, color)) for color in self.colors]
        return {"names": list(self.names), "colors": colors, "things": sorted(self.things)}

    @classmethod
    def from_json(cls, values: dict) -> Classes:
        """Rebuild what `to_json` returned."""
        return cls(tuple(values["names"]), tuple(map(tuple, values["colors"])), frozenset(values["things"]))


@dataclass(frozen=True)
class Sample:
    """One image and its annotation: a class for each pixel, segments, or both.

    Attributes:
        name: the image's file name without folder and ending
        image: red, green, blue. uint8 [H, W, 3]
        label_map: train ids 0…K-1, or `Classes.ignore`. uint8, or uint16 for more than 255 classes [H, W]; None for a
            data set of instances
        segments: with a class each; None for a data set of label maps
    """

    name: str
    image: np.ndarray
    label_map: np.ndarray | None = None
    segments: Segments | None = None


@dataclass(frozen=True)
class Dataset:
    """A list of samples that are read when they are asked for. Open one with `open_dataset`.

    Training and evaluation use the length, the items, `classes` and `str(dataset)` only; a subclass, or an object of
    another kind with these, may take its samples from anywhere.

    Attributes:
        name: "ade20k", "cityscapes", "folder", or a word of your own
        root: the folder that holds images and labels
        split: "train" or "val"
        classes: names, colours and things of the K train ids
        image_paths: one file per sample, sorted
        label_paths: the label of each image, in the same order
        train_ids: train id of every raw id there may be in a label; `classes.ignore` for those to ignore
        left_out: files beside the images and labels that belong to no sample; `audit` lists them
    """

    name: str
    root: Path
    split: str
    classes: Classes
    image_paths: tuple[Path, ...]
    label_paths: tuple[Path, ...] = ()
    train_ids: Mapping[int, int] = field(default_factory=dict)
    left_out: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.split} in {self.root}"

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its labels.

        Raises:
            DataError: a file is missing or unreadable, the sizes differ, or the label holds an unknown raw id.
        """
        image_path, label_path = self.image_paths[index], self.label_paths[index]
        image, raw = read_image(image_path), self.raw_label(index)
        check_same_size(image_path, image, label_path, raw)
        return Sample(self.sample_name(index), image, self.to_label_map(raw, source=str(label_path)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def sample_name(self, index: int) -> str:
        return self.image_paths[index].stem.removesuffix("_leftImg8bit")

    def raw_label(self, index: int) -> np.ndarray:
        """Read the ids as they are in the file. integers [H, W]"""
        path = self.label_paths[index]
        if not path.is_file():
            raise DataError(
                f"{self.image_paths[index]} has no label: there is no {path}. Add the label or take the image away."
            )
        return read_label(path)

    def to_label_map(self, raw: np.ndarray, source: str = "The label") -> np.ndarray:
        """Raw ids → train ids. Apply it once.

        Args:
            raw: ids as they are in the file. integers [H, W]
            source: what to call the label in an error; its file name, usually

        Returns:
            Train ids 0…K-1, `classes.ignore` for pixels to ignore. [H, W], of type `classes.label_dtype`

        Raises:
            DataError: an id is not one of `train_ids`.
        """
        table = self._table
        # One look-up does both jobs: unknown ids become -1. Ids beyond the table are clipped onto its last entry, -1.
        ids = raw if raw.dtype == np.uint8 else raw.astype(np.int64).clip(-1, len(table) - 1)
        label_map = table.take(ids, mode="wrap")
        if label_map.size and label_map.min() < 0:
            unknown = np.unique(raw[label_map < 0])
            raise DataError(
                f"{source} holds the {_count(len(unknown), 'unknown id')} {abbreviate(unknown.tolist())}. "
                f"{self.name} knows {_ranges(self.train_ids)}. Look at the whole data set with "
                f"print(audit(open_dataset({self.name!r}, {str(self.root)!r}, {self.split!r}))); it also says what the "
                "ids may mean."
            )
        return label_map.astype(self.classes.label_dtype)

    def to_raw(self, label_map: np.ndarray) -> np.ndarray:
        """Train ids → raw ids, as evaluation servers want them; those to ignore become 0. integers [H, W]

        uint8, or uint16 where a raw id needs it.
        """
        table = np.zeros(self.classes.ignore + 1, np.uint8 if max(self.train_ids) <= 255 else np.uint16)
        for raw_id, train_id in self.train_ids.items():
            if train_id != self.classes.ignore:
                table[train_id] = raw_id
        return table[label_map]

    @cached_property
    def _table(self) -> np.ndarray:
        """Train id of every raw id, -1 for unknown ones; the last entry belongs to no id."""
        kind = np.int16 if self.classes.ignore == IGNORE else np.int32
        table = np.full(max(256, max(self.train_ids) + 1) + 1, -1, kind)
        table[list(self.train_ids)] = list(self.train_ids.values())
        return table


class SegmentDataset(Dataset, ABC):
    """A data set of panoptic segments or instances: a subclass says how to read those of an image.

    Segments that lie in an id map have a label map as well, so that a panoptic data set also trains and measures
    semantic segmentation.
    """

    @abstractmethod
    def segments(self, index: int) -> Segments:
        """Segments of one image.

        Raises:
            DataError: its annotation is missing or not as it must be.
        """

    def __getitem__(self, index: int) -> Sample:
        """Read one image and its segments.

        Raises:
            DataError: a file is missing or unreadable, or image and annotation differ in size.
        """
        path, segments = self.image_paths[index], self.segments(index)
        image = read_image(path)
        if segments.size != image.shape[:2]:
            (h, w), (label_h, label_w) = image.shape[:2], segments.size
            raise DataError(
                f"{path} is {w} × {h} pixels, but its annotation is for {label_w} × {label_h}. Use the images that "
                "were annotated, or annotate these."
            )
        label_map = None if segments.id_map is None else segments.label_map(self.classes.ignore)
        return Sample(self.sample_name(index), image, label_map, segments)


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as red, green, blue, turned upright if its EXIF data says so. uint8 [H, W, 3]"""
    with _explaining_failure(path), Image.open(path) as image:
        return to_rgb(image, str(path))


def to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """A PIL image as a person sees it: upright (EXIF), without alpha channel. uint8 [H, W, 3]

    Training and prediction both go through here, so that the model sees the same pixels in both.

    Args:
        image: of any mode that holds colours or shades of grey; 16 bits per pixel are scaled down
        name: what to call it in an error; its file name, usually

    Raises:
        DataError: it has no pixels, or a mode of unknown range.
    """
    if 0 in image.size:
        raise DataError(f"{name} is empty: {image.width} × {image.height} pixels.")
    image.load()  # a PNG file may say how it is turned behind its pixels
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # only then, because it copies every image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would cut everything above 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise DataError(f"{name} has mode {image.mode}, numbers of unknown range; scale it to 0..255 (mode L) first.")
    with warnings.catch_warnings():
        # Palettes with transparency: PIL warns that their alpha channel is dropped, as is meant.
        warnings.simplefilter("ignore")
        try:
            pixels = image if image.mode == "RGB" else image.convert("RGB")
            return np.array(pixels)  # a copy: PyTorch warns of arrays it must not write to
        except ValueError as error:
            raise DataError(f"{name} has mode {image.mode}, which PIL cannot convert to RGB.") from error


def orientation(path: Path) -> int:
    """How EXIF says that a picture is turned, 1…8; 1 is upright, and what a file without EXIF has."""
    with _explaining_failure(path), Image.open(path) as image:
        image.load()  # a PNG file may say so behind its pixels
        return image.getexif().get(ExifTags.Base.Orientation, 1)


def read_label(path: str | Path) -> np.ndarray:
    """Read a file with one id per pixel (palettes are left alone), turned upright as images are. integers [H, W]"""
    with _explaining_failure(path), Image.open(path) as image:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        mode, ids = image.mode, np.asarray(image)
    if ids.ndim != 2 or ids.dtype.kind not in "uib":
        raise DataError(
            f"{path} is not a label: it has mode {mode}, but a label has one channel of class ids (8-bit greyscale or "
            "palette). If it shows classes as colours, translate the colours to ids first."
        )
    return ids.astype(np.uint8) if ids.dtype == bool else ids


def check_same_size(image_path: Path, image: np.ndarray, label_path: Path, label: np.ndarray) -> None:
    if image.shape[:2] != label.shape:
        (h, w), (label_h, label_w) = image.shape[:2], label.shape
        raise DataError(
            f"{label_path} is {label_w} × {label_h} pixels, but its image {image_path} is {w} × {h}. Labels must have "
            "the size of their image; export them again, or resize them with nearest neighbours."
        )


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}.")


def check_layout(title: str, root: Path, folders: Iterable[Path], layout: str) -> None:
    """Raise a DataError that shows the expected layout and what is there, unless all folders exist."""
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"No {title} here: there is no folder {folder}.\n"
                f"Expected:\n{layout}\nFound:\n  {describe_folder(root)}\n"
                "data/README.md says where each data set comes from and how it is laid out; "
                "m2f_lab.scenes.write_ade20k and write_cityscapes draw one to practise on."
            )


def check_pairs(title: str, pairs: list[tuple[Path, Path]], folder: Path, strict: bool) -> None:
    """Raise a DataError if there are no images, or, when `strict`, if labels are missing."""
    if not pairs:
        raise DataError(
            f"{title} is empty: no image ({', '.join(IMAGE_SUFFIXES)}) in {folder}. {describe_folder(folder)}"
        )
    shared = shared_labels(pairs)
    if strict and shared:
        raise DataError(f"{title}: {shared[0]}")
    missing = [(image, label) for image, label in pairs if not label.is_file()]
    if strict and missing:
        image, label = missing[0]
        raise DataError(
            f"{title}: {_count(len(missing), 'image')} of {len(pairs)} without a label. {image} would need {label}; "
            f"without one: {abbreviate([image.name for image, _ in missing])}. Add the labels or take the images away; "
            "open_dataset(…, strict=False) opens what is there, for audit."
        )


def shared_labels(pairs: Iterable[tuple[Path, Path]]) -> list[str]:
    """A sentence on each label that several images would have, because only their endings differ."""
    images = defaultdict(list)
    for image, label in pairs:
        images[label].append(image)
    return [
        f"{', '.join(image.name for image in found)} in {found[0].parent} would share the label {label}; rename or "
        "take away all but one."
        for label, found in images.items()
        if len(found) > 1
    ]


def files_below(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders, hidden ones left out; a link that leads back is not followed again."""
    found, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(path))
        folders[:] = sorted(
            name for name in folders if name[0] != "." and os.path.realpath(os.path.join(path, name)) not in seen
        )
        found += [Path(path) / name for name in names if name[0] != "."]
    return sorted(found)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are images, sorted; hidden files (macOS leaves ._name.jpg behind) are not."""
    return sorted(p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def describe_folder(folder: Path) -> str:
    """One line on what is in a folder, or on the nearest folder above it that exists."""
    if not folder.is_dir():
        above = next(parent for parent in folder.absolute().parents if parent.is_dir())
        return f"{folder} does not exist. {describe_folder(above)}"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return f"{folder} holds {abbreviate(names)}." if names else f"{folder} is empty."


@contextmanager
def _explaining_failure(path: str | Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{path} is larger than Pillow opens ({2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels). Cut it and its "
            "label into tiles; or, if you trust the file, set PIL.Image.MAX_IMAGE_PIXELS = None in your script."
        ) from error
    # Pillow raises OSError, SyntaxError, ValueError and others, depending on the format and on where it is broken.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as an image: {error}. It may be truncated or not an image at all; copy or download "
            "it again, or take it and its partner away."
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def abbreviate(items: Iterable, most: int | None = 8) -> str:
    """List the first items and count the rest: "a, b and 3 more"; all of them if `most` is None."""
    items = list(items)
    shown = ", ".join(map(str, items[:most]))
    return shown if most is None or len(items) <= most else f"{shown} and {len(items) - most} more"


def _ranges(numbers: Iterable[int]) -> str:
    """0, 1, 2, 5 → "0–2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}–{last}" if first != last else f"{first}" for first, last in runs)
