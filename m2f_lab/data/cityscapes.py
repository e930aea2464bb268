"""Cityscapes: streets of fifty cities, 19 classes.

    root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png      2 975 images; val: 500
    root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png       one of 34 labelIds per pixel
    root/gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png    labelId * 1000 + n, or a bare labelId

Semantic segmentation reads labelIds, panoptic and instance segmentation instanceIds alone: a bare labelId of a thing is
a group whose members were not told apart, a crowd.

The labels name 34 classes by labelId. Only 19 are trained and evaluated, under trainIds; the evaluation server wants
labelIds back, which `Dataset.to_raw` gives.

Source: Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016, and the labels.py
of its scripts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f_lab.data.dataset import (
    Classes,
    DataError,
    Dataset,
    SegmentDataset,
    check_layout,
    check_pairs,
    check_split,
    image_files,
)
from m2f_lab.data.segments import Segments
from m2f_lab.structures import IGNORE

_IMAGE = "_leftImg8bit"
_LABEL, _INSTANCE = "_gtFine_labelIds.png", "_gtFine_instanceIds.png"

# labelId, name, colour, thing. Position in the list is the trainId.
_TRAINED = (
    (7, "road", (128, 64, 128), False),
    (8, "sidewalk", (244, 35, 232), False),
    (11, "building", (70, 70, 70), False),
    (12, "wall", (102, 102, 156), False),
    (13, "fence", (190, 153, 153), False),
    (17, "pole", (153, 153, 153), False),
    (19, "traffic light", (250, 170, 30), False),
    (20, "traffic sign", (220, 220, 0), False),
    (21, "vegetation", (107, 142, 35), False),
    (22, "terrain", (152, 251, 152), False),
    (23, "sky", (70, 130, 180), False),
    (24, "person", (220, 20, 60), True),
    (25, "rider", (255, 0, 0), True),
    (26, "car", (0, 0, 142), True),
    (27, "truck", (0, 0, 70), True),
    (28, "bus", (0, 60, 100), True),
    (31, "train", (0, 80, 100), True),
    (32, "motorcycle", (0, 0, 230), True),
    (33, "bicycle", (119, 11, 32), True),
)

CLASSES = Classes(
    names=tuple(name for _, name, _, _ in _TRAINED),
    colors=tuple(color for _, _, color, _ in _TRAINED),
    things=frozenset(train_id for train_id, (*_, thing) in enumerate(_TRAINED) if thing),
)

TRAIN_IDS: dict[int, int] = dict.fromkeys(range(34), IGNORE) | {
    label_id: train_id for train_id, (label_id, *_) in enumerate(_TRAINED)
}
"""labelId → trainId; the 15 that are not trained are 255."""


THINGS = CLASSES.only_things()
"""Classes of instance segmentation."""

THING_IDS: dict[int, int] = dict.fromkeys(range(34), IGNORE) | {
    label_id: number for number, label_id in enumerate(label_id for label_id, *_, thing in _TRAINED if thing)
}
"""labelId → class of instance segmentation; 255 for all that is stuff or not trained."""


@dataclass(frozen=True)
class CityscapesSegments(SegmentDataset):
    """Streets with segments: `label_paths` are instanceIds."""

    def segments(self, index: int) -> Segments:
        ids = self.raw_label(index)
        try:
            label_ids, _ = split_instance_ids(ids)
        except DataError as error:
            raise DataError(f"{self.label_paths[index]}: {error}") from None
        found, first = np.unique(ids, return_index=True)
        labels = [self.train_ids[label_id] for label_id in label_ids.ravel()[first].tolist()]
        kept = [(number, label) for number, label in zip(found.tolist(), labels, strict=True) if label != IGNORE]
        crowd = [number < 1000 and label in self.classes.things for number, label in kept]
        return Segments.from_id_map(ids, [number for number, _ in kept], [label for _, label in kept], crowd)


def open_cityscapes(root: str | Path, split: str, strict: bool = True, task: str = "semantic") -> Dataset:
    """Open the folder that holds leftImg8bit and gtFine, or one above called cityscapes.

    For arguments and errors see `open_dataset`.
    """
    root = Path(root).expanduser()
    root = root / "cityscapes" if (root / "cityscapes").is_dir() else root
    check_split(split)
    images, labels = root / "leftImg8bit" / split, root / "gtFine" / split
    title = f"cityscapes {split} split"
    ending = _LABEL if task == "semantic" else _INSTANCE
    layout = f"  {images}/<city>/*{_IMAGE}.png\n  {labels}/<city>/*{ending}"
    check_layout(title, root, [images, labels], layout)
    found = [path for path in image_files(images.glob("*/*")) if path.stem.endswith(_IMAGE)]
    pairs = [(path, labels / path.parent.name / (path.stem.removesuffix(_IMAGE) + ending)) for path in found]
    check_pairs(title, pairs, images, strict)
    kind = Dataset if task == "semantic" else CityscapesSegments
    return kind(
        name="cityscapes",
        root=root,
        split=split,
        classes=THINGS if task == "instance" else CLASSES,
        image_paths=tuple(image for image, _ in pairs),
        label_paths=tuple(label for _, label in pairs),
        train_ids=THING_IDS if task == "instance" else TRAIN_IDS,
    )


def split_instance_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Take gtFine_instanceIds apart.

    Args:
        ids: labelId * 1000 + n for the n-th instance of a thing; a bare labelId for stuff and for groups whose
            members could not be told apart. integers [H, W]

    Returns:
        labelIds, uint8 [H, W], and instance numbers n, -1 where there is none, int32 [H, W].

    Raises:
        DataError: an id belongs to no labelId.
    """
    single = ids >= 1000
    label_ids = np.where(single, ids // 1000, ids)
    unknown = np.unique(ids[(label_ids < 0) | (label_ids > max(TRAIN_IDS))])
    if unknown.size:
        raise DataError(
            f"The instance ids {unknown[:8].tolist()} belong to no labelId (0–{max(TRAIN_IDS)}). Is this a "
            "gtFine_instanceIds.png (labelId * 1000 + n)?"
        )
    return label_ids.astype(np.uint8), np.where(single, ids % 1000, -1).astype(np.int32)
