"""Predictions for files and folders, written as evaluation servers and other tools read them.

    out/label_maps/x.png     semantic: the class of each pixel, 0…K-1
    out/panoptic/x.png       panoptic: ids as colours, R + 256 G + 65536 B, 0 where no segment is
    out/panoptic.json        panoptic: the segments of each picture, in COCO's format
    out/instances.json       instance: COCO's results: class, run lengths and score of each instance
    out/overlays/x.jpg       for the eye, if asked for

What was predicted for an image is kept in out/images/x.json until all are done, so a call that was interrupted goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from m2f_lab.data import Classes, overlay
from m2f_lab.data.dataset import files_below, image_files
from m2f_lab.inference.images import as_rgb
from m2f_lab.inference.predict import Model, predict
from m2f_lab.structures import IGNORE, Prediction


def predict_files(
    model: Model,
    sources: Sequence[str | Path],
    out: str | Path,
    task: str = "semantic",
    *,
    classes: Classes,
    overlays: bool = False,
    overwrite: bool = False,
    **options,
) -> Path:
    """Predict images and write the results.

    Args:
        model, task, options: as `predict` takes them
        sources: image files, and folders whose images are taken, with those of their subfolders
        out: the folder to write; images that it has a result for are passed over
        classes: names and colours of the model's classes
        overlays: also write pictures of the results
        overwrite: predict again what is there

    Returns:
        The file or folder that holds the results of the task.

    Raises:
        FileNotFoundError: a source is not there, or a folder holds no image.
        ValueError: two images would have the same result, or one cannot be read.
    """
    out = Path(out).expanduser()
    names = _named(sources)
    for name, path in tqdm(names.items(), desc=f"predict {task}", unit="image", disable=None):
        record = out / "images" / f"{name}.json"
        if record.is_file() and not overwrite:
            continue
        image = as_rgb(path)
        prediction = predict(model, image, task, classes=classes, **options)
        content = _WRITERS[task](prediction, out, name)
        if overlays:
            target = _made(out / "overlays" / f"{name}.jpg")
            Image.fromarray(overlay(image, label_map_of(prediction, ignore=classes.ignore), classes)).save(target)
        _write_json(record, {"file_name": path.name, "height": image.shape[0], "width": image.shape[1]} | content)
    return _JOINERS[task](out, list(names), classes)


def _named(sources: Sequence[str | Path]) -> dict[str, Path]:
    """Files by the name of their result, without ending."""
    names: dict[str, Path] = {}
    for source in map(Path, sources):
        source = source.expanduser()
        if not source.exists():
            raise FileNotFoundError(f"There is no {source} (looked in {Path.cwd()}).")
        found = image_files(files_below(source)) if source.is_dir() else [source]
        if not found:
            raise FileNotFoundError(f"{source} holds no images that can be read.")
        for path in found:
            name = str((path.relative_to(source) if source.is_dir() else Path(path.name)).with_suffix(""))
            if name in names:
                raise ValueError(f"{names[name]} and {path} would both be written as {name}; predict them separately.")
            names[name] = path
    return names


def _write_semantic(prediction: Prediction, out: Path, name: str) -> dict:
    label_map = prediction.label_map
    pixels = label_map if label_map.dtype == np.uint8 else label_map.astype(np.uint16)
    Image.fromarray(pixels).save(_made(out / "label_maps" / f"{name}.png"))
    return {}


def _write_panoptic(prediction: Prediction, out: Path, name: str) -> dict:
    ids = prediction.segments_map
    picture = np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=-1).astype(np.uint8)
    Image.fromarray(picture).save(_made(out / "panoptic" / f"{name}.png"))
    rows = [{"id": s.id, "category_id": s.label, "score": s.score, "area": s.area} for s in prediction.segments]
    return {"segments_info": rows}


def _write_instances(prediction: Prediction, out: Path, name: str) -> dict:
    from faster_coco_eval.core import mask as coco

    rows = []
    for mask, segment in zip(prediction.masks, prediction.segments, strict=True):
        runs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts = runs["counts"]
        counts = counts.decode() if isinstance(counts, bytes) else counts
        shape = {"size": list(mask.shape), "counts": counts}
        rows.append({"category_id": segment.label, "segmentation": shape, "score": segment.score})
    return {"instances": rows}


def _join_semantic(out: Path, names: list[str], classes: Classes) -> Path:
    return out / "label_maps"


def _join_panoptic(out: Path, names: list[str], classes: Classes) -> Path:
    images, annotations = [], []
    for number, name, record in _records(out, names):
        annotations.append(
            {"image_id": number, "file_name": f"{name}.png", "segments_info": record.pop("segments_info")}
        )
        images.append({"id": number} | record)
    categories = [
        {"id": k, "name": name, "isthing": int(k in classes.things), "color": list(classes.colors[k])}
        for k, name in enumerate(classes.names)
    ]
    return _write_json(out / "panoptic.json", {"images": images, "annotations": annotations, "categories": categories})


def _join_instances(out: Path, names: list[str], classes: Classes) -> Path:
    rows = [
        {"image_id": number, "file_name": record["file_name"]} | instance
        for number, _, record in _records(out, names)
        for instance in record["instances"]
    ]
    return _write_json(out / "instances.json", rows)


_WRITERS = {"semantic": _write_semantic, "panoptic": _write_panoptic, "instance": _write_instances}
_JOINERS = {"semantic": _join_semantic, "panoptic": _join_panoptic, "instance": _join_instances}


def _records(out: Path, names: Iterable[str]) -> Iterator[tuple[int, str, dict]]:
    for number, name in enumerate(names, start=1):
        yield number, name, json.loads((out / "images" / f"{name}.json").read_text())


def label_map_of(prediction: Prediction, score: float = 0.5, ignore: int = IGNORE) -> np.ndarray:
    """The class of each pixel for the eye, `ignore` where nothing was found. [H, W]

    Args:
        prediction: of any task; of instances that overlap, the best is shown
        score: least score of an instance that is shown
        ignore: more than any class; see `Classes.ignore`
    """
    if prediction.label_map is not None:
        return prediction.label_map
    kind = np.uint8 if ignore == IGNORE else np.uint16
    if prediction.segments_map is not None:
        table = np.full(1 + max((s.id for s in prediction.segments), default=0), ignore, kind)
        for segment in prediction.segments:
            table[segment.id] = segment.label
        return table[prediction.segments_map]
    labels = np.full(prediction.masks.shape[1:], ignore, kind)
    for number in reversed(range(len(prediction.segments))):
        if prediction.segments[number].score >= score:
            labels[prediction.masks[number]] = prediction.segments[number].label
    return labels


def _write_json(path: Path, content: dict | list) -> Path:
    """Write a file at once: an interrupt leaves none that is half written."""
    new = _made(path).with_suffix(".new")
    new.write_text(json.dumps(content))
    os.replace(new, path)
    return path


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
