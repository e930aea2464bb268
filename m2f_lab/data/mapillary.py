"""Mapillary Vistas 1.2: streets of the whole world, 65 classes, 37 of them things.

    root/training/images/….jpg                          18 000 images; validation/: 2 000
    root/training/labels/….png                          0…64 are the classes, 65 is unlabelled and ignored
    root/training/panoptic/panoptic_2018.json, ….png    see `coco`; category ids 1…65
    root/config.json                                    or config_v1.2.json: names and colours

Source: Neuhold et al., "The Mapillary Vistas dataset for semantic understanding of street scenes", ICCV 2017.
"""

from __future__ import annotations

from pathlib import Path

from m2f_lab.data.coco import open_panoptic, read_json
from m2f_lab.data.dataset import Classes, DataError, Dataset, check_layout, check_pairs, check_split, image_files
from m2f_lab.structures import IGNORE

_FOLDERS = {"train": "training", "val": "validation"}
_CONFIGS = ("config.json", "config_v1.2.json")
_UNLABELED = "void--unlabeled"


def open_mapillary(root: str | Path, split: str, strict: bool = True, task: str = "semantic") -> Dataset:
    """Open the folder that holds training and validation, or one above called mapillary_vistas.

    For arguments and errors see `open_dataset`.
    """
    check_split(split)
    root = Path(root).expanduser()
    root = root / "mapillary_vistas" if (root / "mapillary_vistas").is_dir() else root
    images, labels = (root / _FOLDERS[split] / kind for kind in ("images", "labels"))
    pictures = root / _FOLDERS[split] / "panoptic"
    needed = labels if task == "semantic" else pictures
    layout = f"  {images}/*.jpg\n  {needed}/*.png\n  {root}/{_CONFIGS[0]}"
    check_layout("Mapillary Vistas", root, [images, needed], layout)
    classes = _classes(root)
    if task != "semantic":
        source = pictures / "panoptic_2018.json"
        options = {"split": split, "name": "mapillary", "root": root, "task": task, "classes": classes}
        return open_panoptic(images, source, pictures, strict=strict, **options)
    pairs = [(image, labels / f"{image.stem}.png") for image in image_files(images.iterdir())]
    check_pairs(f"mapillary {split} split", pairs, images, strict)
    return Dataset(
        name="mapillary",
        root=root,
        split=split,
        classes=classes,
        image_paths=tuple(image for image, _ in pairs),
        label_paths=tuple(label for _, label in pairs),
        train_ids={label: label for label in range(len(classes))} | {len(classes): IGNORE},
    )


def _classes(root: Path) -> Classes:
    """Classes of the release's own configuration, whose last entry is unlabelled."""
    path = next((root / name for name in _CONFIGS if (root / name).is_file()), root / _CONFIGS[0])
    labels = read_json(path, ("labels",))["labels"]
    if labels[-1]["name"] != _UNLABELED:
        raise DataError(
            f"{path}: the last label is {labels[-1]['name']!r}, expected {_UNLABELED!r}. Is it version 1.2?"
        )
    labels = labels[:-1]
    return Classes(
        names=tuple(label["readable"].lower() for label in labels),
        colors=tuple(tuple(label["color"]) for label in labels),
        things=frozenset(number for number, label in enumerate(labels) if label["instances"]),
    )
