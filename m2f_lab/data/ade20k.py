"""ADE20K as the SceneParsing challenge published it: 150 classes, indoors and outdoors.

    root/images/training/ADE_train_00000001.jpg         20 210 images; validation/ADE_val_….jpg: 2 000
    root/annotations/training/ADE_train_00000001.png    0 is "other" and ignored, 1…150 are the classes
    root/annotations_instance/training/….png            red is the class, 1…100 among the things; green the instance
    root/ade20k_panoptic_train.json, and _train/….png   see `coco`; …_val

Source: Zhou et al., "Scene parsing through ADE20K dataset", CVPR 2017. Colours are those of the published pictures
(road and skyscraper share one); things and stuff are told apart as in the panoptic challenge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from m2f_lab.data.coco import open_panoptic
from m2f_lab.data.dataset import DataError, Dataset, SegmentDataset, abbreviate, check_layout, check_pairs, read_image
from m2f_lab.data.folder import open_layout, parse_classes
from m2f_lab.data.segments import Segments

_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class ADE20KInstances(SegmentDataset):
    """Images with things; `label_paths` are those of annotations_instance."""

    def segments(self, index: int) -> Segments:
        path = self.label_paths[index]
        kinds, numbers, _ = np.moveaxis(read_image(path), -1, 0)
        pairs = np.unique(np.stack([numbers, kinds], -1)[numbers > 0], axis=0).tolist()
        ids = [number for number, _ in pairs]
        unknown = sorted({kind for _, kind in pairs} - set(self.train_ids))
        if unknown:
            raise DataError(f"{path} holds the class ids {abbreviate(unknown)}; things are 1…{len(self.classes)}.")
        if len(set(ids)) < len(ids):
            twice = next(number for number in ids if ids.count(number) > 1)
            kinds = [kind for number, kind in pairs if number == twice]
            raise DataError(f"{path}: instance {twice} has pixels of the class ids {abbreviate(kinds)}, expected one.")
        return Segments.from_id_map(numbers, ids, [self.train_ids[kind] for _, kind in pairs])


def open_ade20k(root: str | Path, split: str, strict: bool = True, task: str = "semantic") -> Dataset:
    """Open ADEChallengeData2016, or the folder that holds it. For arguments and errors see `open_dataset`."""
    root = Path(root).expanduser()
    inner = root / "ADEChallengeData2016"
    root = inner if inner.is_dir() else root
    if task == "semantic":
        return open_layout("ade20k", root, split, CLASSES, strict)
    found = open_layout("ade20k", root, split, CLASSES, strict, has_labels=False)
    images = root / "images" / _FOLDERS[split]
    if task == "panoptic":
        source = root / f"ade20k_panoptic_{split}.json"
        options = {"split": split, "name": "ade20k", "root": root, "classes": CLASSES, "strict": strict}
        return open_panoptic(images, source, source.with_suffix(""), **options)
    labels = root / "annotations_instance" / _FOLDERS[split]
    layout = f"  {images}/*.jpg\n  {labels}/*.png with the same names; red is the class, green the instance"
    check_layout("instances of ade20k", root, [labels], layout)
    pairs = [(image, labels / f"{image.stem}.png") for image in found.image_paths]
    check_pairs(f"ade20k {split} split", pairs, images, strict)
    things = CLASSES.only_things()
    return ADE20KInstances(
        name="ade20k",
        root=root,
        split=split,
        classes=things,
        image_paths=found.image_paths,
        label_paths=tuple(label for _, label in pairs),
        train_ids={label + 1: label for label in range(len(things))},
    )


# As in a classes.txt: line n is the class with id n in the labels.
CLASSES = parse_classes(
    """\
wall #787878
building #b47878
sky #06e6e6
floor #503232
tree #04c803
ceiling #787850
road #8c8c8c
bed #cc05ff thing
windowpane #e6e6e6 thing
grass #04fa07
cabinet #e005ff thing
sidewalk #ebff07
person #96053d thing
earth #787846
door #08ff33 thing
table #ff0652 thing
mountain #8fff8c
plant #ccff04
curtain #ff3307 thing
chair #cc4603 thing
car #0066c8 thing
water #3de6fa
painting #ff0633 thing
sofa #0b66ff thing
shelf #ff0747 thing
house #ff09e0
sea #0907e6
mirror #dcdcdc thing
rug #ff095c
field #7009ff
armchair #08ffd6 thing
seat #07ffe0 thing
fence #ffb806 thing
desk #0aff47 thing
rock #ff290a
wardrobe #07ffff thing
lamp #e0ff08 thing
bathtub #6608ff thing
railing #ff3d06 thing
cushion #ffc207 thing
base #ff7a08
box #00ff14 thing
column #ff0829 thing
signboard #ff0599 thing
chest of drawers #0633ff thing
counter #eb0cff thing
sand #a09614
sink #00a3ff thing
skyscraper #8c8c8c
fireplace #fa0a0f thing
refrigerator #14ff00 thing
grandstand #1fff00
path #ff1f00
stairs #ffe000 thing
runway #99ff00
case #0000ff thing
pool table #ff4700 thing
pillow #00ebff thing
screen door #00adff thing
stairway #1f00ff
river #0bc8c8
bridge #ff5200
bookcase #00fff5 thing
blind #003dff
coffee table #00ff70 thing
toilet #00ff85 thing
flower #ff0000 thing
book #ffa300 thing
hill #ff6600
bench #c2ff00 thing
countertop #008fff thing
stove #33ff00 thing
palm #0052ff thing
kitchen island #00ff29 thing
computer #00ffad thing
swivel chair #0a00ff thing
boat #adff00 thing
bar #00ff99
arcade machine #ff5c00 thing
hovel #ff00ff
bus #ff00f5 thing
towel #ff0066 thing
light #ffad00 thing
truck #ff0014 thing
tower #ffb8b8
chandelier #001fff thing
awning #00ff3d thing
streetlight #0047ff thing
booth #ff00cc thing
television #00ffc2 thing
airplane #00ff52 thing
dirt track #000aff
apparel #0070ff thing
pole #3300ff thing
land #00c2ff
bannister #007aff thing
escalator #00ffa3
ottoman #ff9900 thing
bottle #00ff0a thing
buffet #ff7000
poster #8fff00
stage #5200ff
van #a3ff00 thing
ship #ffeb00 thing
fountain #08b8aa thing
conveyer belt #8500ff
canopy #00ff5c
washer #b800ff thing
plaything #ff001f thing
swimming pool #00b8ff
stool #00d6ff thing
barrel #ff0070 thing
basket #5cff00 thing
waterfall #00e0ff
tent #70e0ff
bag #46b8a0 thing
minibike #a300ff thing
cradle #9900ff
oven #47ff00 thing
ball #ff00a3 thing
food #ffcc00 thing
step #ff008f thing
tank #00ffeb
trade name #85ff00 thing
microwave #ff00eb thing
pot #f500ff thing
animal #ff007a thing
bicycle #fff500 thing
lake #0abed4
dishwasher #d6ff00 thing
screen #00ccff thing
blanket #1400ff
sculpture #ffff00 thing
hood #0099ff thing
sconce #0029ff thing
vase #00ffcc thing
traffic light #2900ff thing
tray #29ff00 thing
ashcan #ad00ff thing
fan #00f5ff thing
pier #4700ff
crt screen #7a00ff
plate #00ffb8 thing
monitor #005cff thing
bulletin board #b8ff00 thing
shower #0085ff
radiator #ffd600 thing
glass #19c2c2 thing
clock #66ff00 thing
flag #5c00ff thing
""",
    "The classes of ADE20K",
)
