"""Predictions in the form that a data set's evaluation server takes.

    cityscapes   semantic    x.png, labelIds
                 instance    x.txt, a line "masks/x_0.png labelId score" for each instance, and the masks
                 panoptic    panoptic.json and panoptic/x.png, categories are labelIds and images names
    ade20k       semantic    x.png, 1…150
    coco         instance    instances.json: image_id, category_id, run lengths and score
                 panoptic    panoptic.json and panoptic/x.png

A model numbers its classes 0…K-1, and so do the files of `predict_files`. The data sets' own numbers come back here,
and only here. A JSON file in COCO's format, such as image_info_test-dev2017.json, says those of any other data set.

Source: cityscapesscripts, the SceneParsing development kit, and cocodataset.org on the formats of results.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from m2f_lab.data import DataError
from m2f_lab.data.cityscapes import THING_IDS, TRAIN_IDS
from m2f_lab.data.coco import read_json
from m2f_lab.data.dataset import abbreviate, read_label
from m2f_lab.structures import IGNORE

COCO_THINGS = tuple(k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
COCO_STUFF = (
    92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145, 147, 148, 149, 151, 154, 155,
    156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181, *range(184, 201),
)  # fmt: skip
"""Category ids of the 80 things and 53 kinds of stuff of COCO's panoptic segmentation."""


def _raw(train_ids: dict[int, int]) -> tuple[int, ...]:
    by_class = {label: raw for raw, label in train_ids.items() if label != IGNORE}
    return tuple(by_class[label] for label in range(len(by_class)))


CLASS_IDS = {
    ("cityscapes", "semantic"): _raw(TRAIN_IDS),
    ("cityscapes", "panoptic"): _raw(TRAIN_IDS),
    ("cityscapes", "instance"): _raw(THING_IDS),
    ("ade20k", "semantic"): tuple(range(1, 151)),
    ("coco", "panoptic"): COCO_THINGS + COCO_STUFF,
    ("coco", "instance"): COCO_THINGS,
}
"""The data set's own number of each class, by data set and task."""


def write_submission(
    predictions: str | Path, out: str | Path, dataset: str, task: str, *, like: str | Path | None = None
) -> Path:
    """Rewrite predictions for a data set's server. Pack what is in the folder, and send it.

    Args:
        predictions: the folder that `predict_files` wrote
        out: the folder to write
        dataset: "cityscapes", "ade20k" or "coco"; any name with `like`
        task: of the predictions
        like: a JSON file of the data set in COCO's format, whose ids of categories and images are taken; images are
            found by the stem of their file name. Panoptic and instance only

    Returns:
        `out`.

    Raises:
        DataError: the data set has no form for the task, there are no predictions of it, two images have one name, a
            class is not one of the data set's, or an image has no id.
    """
    predictions, out = Path(predictions).expanduser(), Path(out).expanduser()
    ids, image_id = numbering(dataset, task, like)
    records = _records(predictions, task)
    out.mkdir(parents=True, exist_ok=True)
    if task == "instance" and dataset == "cityscapes" and like is None:
        _write_masks(records, out, ids)
    else:
        _WRITERS[task](predictions, records, out, ids, image_id)
    return out


def numbering(
    dataset: str, task: str, like: str | Path | None = None
) -> tuple[tuple[int, ...], Callable[[str], int | str]]:
    """The data set's own number of each class, and a function from an image's name to its id. See `write_submission`.

    Raises:
        DataError: there is no form of submission for these.
    """
    if like is None:
        if (dataset, task) not in CLASS_IDS:
            known = ", ".join(f"{name} {kind}" for name, kind in CLASS_IDS)
            raise DataError(
                f"There is no submission for {task} segmentation of {dataset}, only for {known}. With like=, a JSON "
                "file in COCO's format, there is one for panoptic and instance segmentation of any data set."
            )
        return CLASS_IDS[dataset, task], _number if dataset == "coco" else str
    if task == "semantic":
        raise DataError(f"Label maps hold no ids of images; write those of {dataset} without like={like}.")
    return _ids_of(Path(like).expanduser(), task, in_order=dataset == "ade20k")


def _ids_of(like: Path, task: str, in_order: bool) -> tuple[tuple[int, ...], Callable[[str], int | str]]:
    """Category ids of a file by class, and a function that says an image's id.

    Args:
        in_order: classes go by category id alone, as those of ADE20K do; else things come first.
    """
    content = read_json(like, ("images", "categories"))
    chosen = [c for c in content["categories"] if task == "panoptic" or c.get("isthing", 1)]
    chosen.sort(key=lambda category: (not (in_order or category.get("isthing", 1)), category["id"]))
    images = {Path(image["file_name"]).stem: image["id"] for image in content["images"]}

    def image_id(name: str) -> int | str:
        if name not in images:
            raise DataError(f"{like} lists no image {name}. Predict the images that it is about, and no others.")
        return images[name]

    return tuple(category["id"] for category in chosen), image_id


def _number(name: str) -> int:
    if not name.isdecimal():
        raise DataError(
            f"COCO's images are called by their number, but one is called {name}. Give like=, the JSON file that "
            "lists the images with their ids."
        )
    return int(name)


def _records(predictions: Path, task: str) -> dict[str, tuple[str, dict]]:
    """Of each image by its bare name: its name among the predictions, and what `predict_files` wrote of it."""
    found = sorted((predictions / "images").rglob("*.json"))
    if not found:
        raise DataError(f"{predictions} holds no predictions. Is it the folder that predict wrote?")
    records, twice = {}, []
    for path in found:
        name = path.relative_to(predictions / "images").with_suffix("")
        bare = name.name.removesuffix("_leftImg8bit")
        twice += [bare] if bare in records else []
        records[bare] = (str(name), json.loads(path.read_text()))
    if twice:
        raise DataError(f"{predictions} has several images called {abbreviate(twice)}; a server takes one of each.")
    key = {"panoptic": "segments_info", "instance": "instances"}.get(task)
    other = [
        name
        for name, record in records.values()
        if (key not in record if key else not (predictions / "label_maps" / f"{name}.png").is_file())
    ]
    if other:
        raise DataError(f"{predictions} has no {task} prediction of {abbreviate(other)}; predict with task={task!r}.")
    return records


def _raw_id(label: int, ids: Sequence[int], name: str) -> int:
    if not 0 <= label < len(ids):
        raise DataError(
            f"The prediction of {name} has class {label}, but the data set has {len(ids)} classes. Was another data "
            "set predicted?"
        )
    return ids[label]


def _write_label_maps(predictions: Path, records: dict, out: Path, ids: Sequence[int], image_id: Callable) -> None:
    table = np.array(ids, np.uint8)
    for bare, (name, _) in tqdm(records.items(), desc="write", unit="image", disable=None):
        label_map = read_label(predictions / "label_maps" / f"{name}.png")
        _raw_id(int(label_map.max()), ids, name)
        Image.fromarray(table[label_map]).save(out / f"{bare}.png")


def _write_panoptic(predictions: Path, records: dict, out: Path, ids: Sequence[int], image_id: Callable) -> None:
    (out / "panoptic").mkdir(exist_ok=True)
    annotations = []
    for bare, (name, record) in records.items():
        segments = [
            {"id": segment["id"], "category_id": _raw_id(segment["category_id"], ids, name)}
            for segment in record["segments_info"]
        ]
        annotations.append({"image_id": image_id(bare), "file_name": f"{bare}.png", "segments_info": segments})
        shutil.copyfile(predictions / "panoptic" / f"{name}.png", out / "panoptic" / f"{bare}.png")
    (out / "panoptic.json").write_text(json.dumps({"annotations": annotations}))


def _write_instances(predictions: Path, records: dict, out: Path, ids: Sequence[int], image_id: Callable) -> None:
    rows = [
        {"image_id": image_id(bare), **instance, "category_id": _raw_id(instance["category_id"], ids, name)}
        for bare, (name, record) in records.items()
        for instance in record["instances"]
    ]
    (out / "instances.json").write_text(json.dumps(rows))


def _write_masks(records: dict, out: Path, ids: Sequence[int]) -> None:
    """Instances as Cityscapes has them: a list for each image, also where there is none, and a picture for each."""
    from faster_coco_eval.core import mask as coco

    (out / "masks").mkdir(exist_ok=True)
    for bare, (name, record) in tqdm(records.items(), desc="write", unit="image", disable=None):
        lines = []
        for path in (out / "masks").glob(f"{bare}_*.png"):  # of an earlier call, which may have had more
            if path.stem.removeprefix(f"{bare}_").isdecimal():
                path.unlink()
        for number, instance in enumerate(record["instances"]):
            path = f"masks/{bare}_{number}.png"
            Image.fromarray(255 * coco.decode(instance["segmentation"])).save(out / path)
            lines.append(f"{path} {_raw_id(instance['category_id'], ids, name)} {instance['score']!r}\n")
        (out / f"{bare}.txt").write_text("".join(lines))


_WRITERS = {"semantic": _write_label_maps, "panoptic": _write_panoptic, "instance": _write_instances}
