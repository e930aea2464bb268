"""Your own images: any folder in ADE20K's layout, with a classes.txt that names the classes.

    root/classes.txt                    one class per line: line 1 names id 1, line 2 id 2, …
    root/images/training/*.jpg          or .png, .webp, .tif, .bmp, also in subfolders; validation/ beside it
    root/annotations/training/*.png     same names; 0 is unlabelled, 1…K the lines of classes.txt

A line of classes.txt is a name, and if you like a colour, and then, if you like, whether it is a thing:

    road
    traffic sign #dcdc00
    car #00008e thing
    person thing
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from m2f_lab.data.colors import distinct_colors
from m2f_lab.data.dataset import (
    Classes,
    DataError,
    Dataset,
    abbreviate,
    check_layout,
    check_pairs,
    check_split,
    files_below,
    image_files,
)
from m2f_lab.data.instances import with_instances
from m2f_lab.structures import WIDE_IGNORE

_SUBFOLDERS = {"train": "training", "val": "validation"}
_LINE = re.compile(r"(?P<name>.+?)(?:\s+(?P<color>#[0-9a-fA-F]{6}))?(?:\s+(?P<kind>thing|stuff))?")


def open_folder(root: str | Path, split: str, strict: bool = True, task: str = "semantic") -> Dataset:
    """Open a folder in ADE20K's layout, with instances as in `instances`. For arguments see `open_dataset`."""
    root = Path(root).expanduser()
    check_split(split)
    path = root / "classes.txt"
    check_layout("data set", root, [root], _layout(root, split))
    if not path.is_file():
        raise DataError(
            f"There is no {path}. Write one, with one class per line: line 1 names the class that has id 1 in the "
            f"labels, line 2 id 2, and so on; id 0 is unlabelled and has no line."
        )
    classes = read_classes(path)
    if task == "semantic":
        return open_layout("folder", root, split, classes, strict)
    has_labels = (root / "annotations" / _SUBFOLDERS[split]).is_dir()
    images = open_layout("folder", root, split, classes, strict, has_labels)
    return with_instances(images, _SUBFOLDERS[split], task, has_labels, strict)


def open_layout(name: str, root: Path, split: str, classes: Classes, strict: bool, has_labels: bool = True) -> Dataset:
    """Pair images/training/x.jpg with annotations/training/x.png, in which 0 is unlabelled and 1…K are classes."""
    check_split(split)
    images, labels = (root / kind / _SUBFOLDERS[split] for kind in ("images", "annotations"))
    title = f"{name} {split} split"
    check_layout(title, root, [images, labels] if has_labels else [images], _layout(root, split))
    files = files_below(images)
    pairs = [(image, (labels / image.relative_to(images)).with_suffix(".png")) for image in image_files(files)]
    check_pairs(title, pairs, images, strict and has_labels)
    unpaired = set(files_below(labels)) - {label for _, label in pairs} if has_labels else set()
    left_out = sorted((set(files) - {image for image, _ in pairs}) | unpaired)
    if left_out:
        names = abbreviate(path.relative_to(root) for path in left_out)
        logging.getLogger("m2f_lab").warning("%s: files that belong to no image with a label: %s", title, names)
    return Dataset(
        name=name,
        root=root,
        split=split,
        classes=classes,
        image_paths=tuple(image for image, _ in pairs),
        label_paths=tuple(label for _, label in pairs),
        train_ids={0: classes.ignore} | {train_id + 1: train_id for train_id in range(len(classes))},
        left_out=tuple(left_out),
    )


def read_classes(path: Path) -> Classes:
    """Read a classes.txt, with a byte order mark or without.

    Raises:
        DataError: it is not UTF-8, or as for `parse_classes`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f'{path} is not UTF-8 ({error}). Save it as UTF-8; an editor\'s "save as" offers it.'
        ) from error
    return parse_classes(text, str(path))


def parse_classes(text: str, source: str) -> Classes:
    """Read the lines of a classes.txt; see the top of this file.

    Args:
        text: the content
        source: the file's name, for errors

    Raises:
        DataError: a line is empty, a name occurs twice, or there are no classes, or more than 16 bits tell apart.
    """
    lines = text.rstrip().splitlines()
    names, colors, things = [], {}, set()
    for index, line in enumerate(lines):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise DataError(
                f"{source}, line {index + 1} is empty. Every line names one class, in the order of their ids, so an "
                "empty line would shift all that follow; take it away or name the class."
            )
        name, color, kind = match.group("name", "color", "kind")
        if name in names:
            raise DataError(f"{source}, line {index + 1}: {name!r} is already line {names.index(name) + 1}.")
        names.append(name)
        if color:
            colors[index] = tuple(bytes.fromhex(color[1:]))
        if kind == "thing":
            things.add(index)
    if not 0 < len(names) < WIDE_IGNORE:  # in a file, 0 is unlabelled
        raise DataError(f"{source} names {len(names)} classes; there must be 1 to {WIDE_IGNORE - 1}.")
    if len(colors) < len(names):
        colors = dict(enumerate(distinct_colors(len(names)))) | colors
    return Classes(tuple(names), tuple(colors[index] for index in range(len(names))), frozenset(things))


def _layout(root: Path, split: str) -> str:
    return (
        f"  {root}/images/{_SUBFOLDERS[split]}/*.jpg or *.png\n"
        f"  {root}/annotations/{_SUBFOLDERS[split]}/*.png with the same names; 0 is unlabelled, 1, 2, … are classes"
    )
