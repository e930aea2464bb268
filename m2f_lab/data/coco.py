"""COCO's two formats: panoptic pictures with a list of segments, and instances as polygons or run lengths.

    root/train2017/000000000009.jpg                  118 287 images; val2017/: 5 000
    root/annotations/panoptic_train2017.json         the segments of each image, and the classes
    root/annotations/panoptic_train2017/….png        their pixels: id = R + 256 G + 65536 B, 0 is void;
                                                     or in root/panoptic_train2017/
    root/annotations/instances_train2017.json        the instances of each image, and the classes

The classes are those the file itself lists, things first and each by category id: COCO's 80 things are 0…79 and its 53
kinds of stuff 80…132. `open_panoptic` and `open_instances` read files of other origins in the same formats.

Source: Lin et al., "Microsoft COCO", ECCV 2014; Kirillov et al., "Panoptic segmentation", CVPR 2019.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f_lab.data.colors import distinct_colors
from m2f_lab.data.dataset import (
    Classes,
    DataError,
    Dataset,
    SegmentDataset,
    abbreviate,
    check_layout,
    check_pairs,
    check_split,
    read_image,
)
from m2f_lab.data.segments import Segments, Shape


@dataclass(frozen=True)
class PanopticFiles(SegmentDataset):
    """Images with a panoptic picture each; `label_paths` are the pictures.

    Attributes:
        annotations: the dictionaries of "segments_info" of each image
        source: the JSON file they are from
    """

    annotations: tuple[list[dict], ...] = ()
    source: Path = Path()

    def segments(self, index: int) -> Segments:
        path, infos = self.label_paths[index], self.annotations[index]
        ids = segment_ids(read_image(path))
        unlisted = sorted(set(np.unique(ids).tolist()) - {0} - {info["id"] for info in infos})
        if unlisted:
            raise DataError(
                f"{path} holds the segments {abbreviate(unlisted)}, which {self.source} does not list for this image. "
                "Are both from one release, and is the picture R + 256 G + 65536 B?"
            )
        kept = [info for info in infos if self.train_ids[info["category_id"]] != self.classes.ignore]
        labels = [self.train_ids[info["category_id"]] for info in kept]
        crowd = [bool(info.get("iscrowd", 0)) for info in kept]
        return Segments.from_id_map(ids, [info["id"] for info in kept], labels, crowd)


@dataclass(frozen=True)
class InstanceFile(SegmentDataset):
    """Images with instances from one JSON file.

    Attributes:
        annotations: the dictionaries of each image's instances
        sizes: height and width of each image as the file has them
        source: the JSON file
    """

    annotations: tuple[list[dict], ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    source: Path = Path()

    def segments(self, index: int) -> Segments:
        found, size = self.annotations[index], self.sizes[index]
        shapes = tuple(_shape(annotation, size, self.source) for annotation in found)
        labels = np.array([self.train_ids[annotation["category_id"]] for annotation in found], np.int64)
        crowd = np.array([annotation.get("iscrowd", 0) for annotation in found], bool)
        return Segments(labels, crowd, size, shapes=shapes)


def open_coco(root: str | Path, split: str, strict: bool = True, task: str = "panoptic") -> Dataset:
    """Open the folder that holds train2017, val2017 and annotations, or one above called coco.

    Semantic segmentation reads the panoptic pictures. For arguments and errors see `open_dataset`.
    """
    check_split(split)
    root = Path(root).expanduser()
    root = root / "coco" if (root / "coco").is_dir() else root
    images, annotations = root / f"{split}2017", root / "annotations"
    kind = "instances" if task == "instance" else "panoptic"
    source = annotations / f"{kind}_{split}2017.json"
    layout = f"  {images}/*.jpg\n  {source}" + f"\n  {source.with_suffix('')}/*.png" * (kind == "panoptic")
    check_layout("COCO", root, [images, annotations], layout)
    if task == "instance":
        return open_instances(images, source, split=split, name="coco", root=root, strict=strict)
    pictures = source.with_suffix("")
    pictures = pictures if pictures.is_dir() else root / pictures.name
    return open_panoptic(images, source, pictures, split=split, name="coco", root=root, strict=strict)


def open_panoptic(
    images: Path,
    source: Path,
    pictures: Path,
    *,
    split: str,
    name: str = "panoptic",
    root: Path | None = None,
    task: str = "panoptic",
    classes: Classes | None = None,
    strict: bool = True,
) -> PanopticFiles:
    """Open files of COCO's panoptic format.

    Args:
        images: the folder of images.
        source: the JSON file with "images", "annotations" and "categories".
        pictures: the folder of PNGs.
        split, name, root: as in `Dataset`.
        task: "instance" keeps the things only.
        classes: of the categories by ascending id; by default those of the file, things first.
        strict: refuse images and pictures that are missing.

    Raises:
        DataError: files are missing, or the JSON names an unknown category or image.
    """
    content = read_json(source, ("images", "annotations", "categories"))
    classes, train_ids = _classes(content["categories"], source, classes)
    if task == "instance":
        things, classes = sorted(classes.things), classes.only_things()
        train_ids = {raw: things.index(k) if k in things else classes.ignore for raw, k in train_ids.items()}
    by_image = {annotation["image_id"]: annotation for annotation in content["annotations"]}
    known = _known_images(content, source)
    _check_known(by_image, known, "image", source)
    _check_known(
        {info["category_id"] for a in by_image.values() for info in a["segments_info"]}, train_ids, "category", source
    )
    rows = sorted((known[image]["file_name"], annotation) for image, annotation in by_image.items())
    pairs = [
        (_image_file(images, file), pictures / annotation.get("file_name", f"{Path(file).stem}.png"))
        for file, annotation in rows
    ]
    _check_images(f"{name} {split} split", pairs, images, strict)
    check_pairs(f"{name} {split} split", pairs, images, strict)
    return PanopticFiles(
        name=name,
        root=root or source.parent,
        split=split,
        classes=classes,
        image_paths=tuple(image for image, _ in pairs),
        label_paths=tuple(picture for _, picture in pairs),
        train_ids=train_ids,
        annotations=tuple(annotation["segments_info"] for _, annotation in rows),
        source=source,
    )


def open_instances(
    images: Path, source: Path, *, split: str, name: str = "instances", root: Path | None = None, strict: bool = True
) -> InstanceFile:
    """Open a file of COCO's instance format.

    Images to train on without an instance that is no crowd are left out, as in the official loader.

    Args:
        images: the folder of images.
        source: the JSON file with "images", "annotations" and "categories".
        split, name, root: as in `Dataset`.
        strict: refuse images that are missing.

    Raises:
        DataError: files are missing, or the JSON names an unknown category or image.
    """
    content = read_json(source, ("images", "annotations", "categories"))
    categories = [{**category, "isthing": 1} for category in content["categories"]]
    classes, train_ids = _classes(categories, source)
    known = _known_images(content, source)
    _check_known({annotation["image_id"] for annotation in content["annotations"]}, known, "image", source)
    _check_known({annotation["category_id"] for annotation in content["annotations"]}, train_ids, "category", source)
    by_image: dict[int, list[dict]] = {image: [] for image in known}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    if split == "train":
        by_image = {k: found for k, found in by_image.items() if any(not a.get("iscrowd", 0) for a in found)}
    order = sorted(by_image, key=lambda image: known[image]["file_name"])
    paths = tuple(_image_file(images, known[image]["file_name"]) for image in order)
    title = f"{name} {split} split"
    _check_images(title, [(path, source) for path in paths], images, strict)
    check_pairs(title, [(path, path) for path in paths], images, strict)
    return InstanceFile(
        name=name,
        root=root or source.parent,
        split=split,
        classes=classes,
        image_paths=paths,
        train_ids=train_ids,
        annotations=tuple(by_image[image] for image in order),
        sizes=tuple((known[image]["height"], known[image]["width"]) for image in order),
        source=source,
    )


def segment_ids(picture: np.ndarray) -> np.ndarray:
    """Ids of a panoptic picture: R + 256 G + 65536 B. uint8 [H, W, 3] → int32 [H, W]"""
    return picture.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def panoptic_picture(ids: np.ndarray) -> np.ndarray:
    """The picture that holds these ids. integers [H, W] → uint8 [H, W, 3]"""
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], -1).astype(np.uint8)


def read_json(path: Path, keys: Sequence[str]) -> dict:
    """Read a JSON file that holds an object with these keys.

    Raises:
        DataError: it is not there, no JSON, or lacks a key.
    """
    if not path.is_file():
        raise DataError(
            f"There is no {path}. data/README.md says where each data set comes from and how it is laid out."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Copy or download it again.") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise DataError(f"{path} lacks {', '.join(map(repr, missing))}, so it is not an annotation in COCO's format.")
    return content


def _classes(categories: list[dict], source: Path, expected: Classes | None = None) -> tuple[Classes, dict[int, int]]:
    """Classes and train ids of the categories of a file."""
    if expected is not None:
        order = sorted(categories, key=lambda category: category["id"])
        if len(order) != len(expected):
            raise DataError(f"{source} lists {len(order)} categories, expected {len(expected)}.")
        return expected, {category["id"]: label for label, category in enumerate(order)}
    order = sorted(categories, key=lambda category: (not category.get("isthing", 1), category["id"]))
    if not order:
        raise DataError(f"{source} lists no categories.")
    made_up = distinct_colors(len(order))
    classes = Classes(
        names=tuple(category["name"] for category in order),
        colors=tuple(tuple(c.get("color", color)) for c, color in zip(order, made_up, strict=True)),
        things=frozenset(label for label, category in enumerate(order) if category.get("isthing", 1)),
    )
    return classes, {category["id"]: label for label, category in enumerate(order)}


def _known_images(content: dict, source: Path) -> dict[int, dict]:
    known = {image["id"]: image for image in content["images"]}
    if len(known) != len(content["images"]):
        raise DataError(f"{source} lists {len(content['images'])} images under {len(known)} ids; each needs its own.")
    return known


def _check_known(used, known, noun: str, source: Path) -> None:
    unknown = sorted(set(used) - set(known))
    if unknown:
        raise DataError(
            f"{source}: annotations name the {noun} ids {abbreviate(unknown)}, which the file does not list. List "
            "them, or take those annotations away."
        )


def _image_file(folder: Path, name: str) -> Path:
    """The image of this name; panoptic files of other origins name the PNG or no ending."""
    path = folder / name
    return path if path.suffix.lower() in (".jpg", ".jpeg") or path.is_file() else path.with_suffix(".jpg")


def _check_images(title: str, pairs: list[tuple[Path, Path]], folder: Path, strict: bool) -> None:
    missing = [image.name for image, _ in pairs if not image.is_file()]
    if strict and missing:
        raise DataError(
            f"{title}: {len(missing)} of {len(pairs)} images are not in {folder}: {abbreviate(missing)}. Add them, or "
            "open with strict=False to see what is there."
        )


def _shape(annotation: dict, size: tuple[int, int], source: Path) -> Shape:
    """Polygons, or the mask of run lengths, compressed or not."""
    shape, where = annotation.get("segmentation"), f"{source}: annotation {annotation.get('id')}"
    if isinstance(shape, list):
        if any(len(ring) % 2 for ring in shape):
            raise DataError(f"{where} (category {annotation['category_id']}): a polygon has an odd number of values.")
        return tuple(np.array(ring, np.float64).reshape(-1, 2) for ring in shape)
    if not isinstance(shape, dict) or "counts" not in shape:
        raise DataError(
            f'{where} (category {annotation["category_id"]}) has neither polygons nor run lengths under "segmentation".'
        )
    if tuple(shape["size"]) != tuple(size):
        raise DataError(f"{where}: run lengths of {shape['size']}, but the image is {list(size)} (height, width).")
    from faster_coco_eval.core import mask as coco

    runs = coco.frPyObjects(shape, *size) if isinstance(shape["counts"], list) else shape
    return coco.decode(runs).astype(bool)
