"""Figures of result files of any origin, under the names of the benchmarks' own evaluation code.

    score_coco("instances_val2017.json", "results.json")                AP, AP50, …, AR1, …
    score_panoptic("panoptic_val2017.json", "predictions.json")         PQ, SQ, RQ, PQ_things, …
    score_cityscapes("gtFine/val", "results")                           IoU, iIoU, AP, AP50, …

Figures are fractions, as in these benchmarks; None where there is nothing to measure, where pycocotools says -1 and
Cityscapes' scripts NaN. `python -m m2f_lab score` prints them as JSON.

Source: pycocotools, panopticapi and cityscapesscripts, whose numbers these are.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from m2f_lab.data.coco import segment_ids
from m2f_lab.data.dataset import DataError, abbreviate, read_image, read_label
from m2f_lab.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesPixelEvaluator
from m2f_lab.evaluation.panoptic import PanopticEvaluator

COCO_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def score_coco(truth: str | Path, results: str | Path) -> dict:
    """Average precision and recall of instances, as pycocotools computes them.

    Masks are compared if the results have a "segmentation", and their area decides whether they are small, medium or
    large; boxes otherwise.

    Args:
        truth: a JSON file with "images", "annotations" and "categories"
        results: a JSON file with a list of {"image_id", "category_id", "segmentation" or "bbox", "score"}

    Returns:
        The twelve figures of `COCO_NAMES`, "num_images", and "classes": a dict per category with "name", "AP", "AP50"
        and "instances".

    Raises:
        DataError: a file is not as it must be, or names an image or a category that the truth does not have.
        ImportError: faster-coco-eval is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError("Scoring COCO's results needs faster-coco-eval: pip install faster-coco-eval.") from error
    truth, results = Path(truth), Path(results)
    annotated = _truth(truth, "annotations")
    kind, found = _checked_results(results, annotated, truth)
    with contextlib.redirect_stdout(io.StringIO()):  # the library reports its progress there
        known = COCO()
        known.dataset = annotated
        known.createIndex()
        if found:
            claimed = known.loadRes(found)
        else:
            claimed = COCO()
            claimed.dataset = {**annotated, "annotations": []}
            claimed.createIndex()
        evaluation = COCOeval_faster(known, claimed, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]  # [U, 101, K]
    counted = [a["category_id"] for a in annotated["annotations"] if not a.get("iscrowd", 0)]
    classes = [
        {
            "name": known.cats[category]["name"],
            "AP": _mean_of_known(precision[:, :, place]),
            "AP50": _mean_of_known(precision[0, :, place]),
            "instances": counted.count(category),
        }
        for place, category in enumerate(evaluation.params.catIds)
    ]
    stats = zip(COCO_NAMES, evaluation.stats[: len(COCO_NAMES)], strict=True)
    figures = {name: None if value < 0 else float(value) for name, value in stats}
    return figures | {"num_images": len(annotated["images"]), "classes": classes}


def score_panoptic(
    truth: str | Path,
    prediction: str | Path,
    truth_pictures: str | Path | None = None,
    prediction_pictures: str | Path | None = None,
) -> dict:
    """Panoptic quality, as panopticapi computes it.

    The areas of true segments are those of the pictures; panopticapi believes "area", which is the same in sound files.

    Args:
        truth, prediction: JSON files in COCO's panoptic format
        truth_pictures, prediction_pictures: the folders of their PNGs; by default called like the JSON files, without
            their suffix

    Returns:
        "PQ", "SQ", "RQ" and "n", the number of classes that occur; the same with "_things" and "_stuff"; "num_images",
        and "classes": a dict per category with "name", "PQ", "SQ", "RQ", "TP", "FP" and "FN".

    Raises:
        DataError: a file is not as it must be, a prediction is missing, or an image, a category or a segment unknown.
    """
    truth, prediction = Path(truth), Path(prediction)
    folders = [
        Path(given) if given is not None else source.with_suffix("")
        for source, given in ((truth, truth_pictures), (prediction, prediction_pictures))
    ]
    annotated = _truth(truth, "annotations")
    claimed = _json(prediction)
    if not isinstance(claimed, dict) or not isinstance(claimed.get("annotations"), list):
        raise DataError(f'{prediction} has no list "annotations". Is it in COCO\'s panoptic format?')
    label = {category["id"]: number for number, category in enumerate(annotated["categories"])}
    things = [label[category["id"]] for category in annotated["categories"] if category.get("isthing", 0)]
    names = [category.get("name", str(category["id"])) for category in annotated["categories"]]
    by_image = {_key(annotation, "image_id", prediction): annotation for annotation in claimed["annotations"]}
    images = {_key(annotation, "image_id", truth): annotation for annotation in annotated["annotations"]}
    unknown = [image for image in by_image if image not in images]
    if unknown:
        raise DataError(f"{prediction} has the images {abbreviate(unknown)}, which {truth} does not have.")
    missing = [image for image in images if image not in by_image]
    if missing:
        raise DataError(f"{prediction} has no prediction for the images {abbreviate(missing)} of {truth}.")
    # One class more, without segments that count: of several crowds of a category, panopticapi sees the last only.
    evaluator = PanopticEvaluator(len(label) + 1, things, [*names, "further crowds"])
    for image, annotation in images.items():
        true_ids, labels, crowd = _segments(annotation, folders[0], label, truth)
        last = {labels[number]: number for number in crowd}
        labels |= {number: len(label) for number in crowd if last[labels[number]] != number}
        said_ids, said, _ = _segments(by_image[image], folders[1], label, prediction)
        try:
            evaluator.update((said_ids, said), true_ids, labels, crowd)
        except ValueError as error:
            path = folders[1] / by_image[image]["file_name"]
            raise DataError(f"{path}, against {folders[0] / annotation['file_name']}: {error}") from None
    result = evaluator.result()
    classes = result["classes"][:-1]
    counts = {"": classes, "_things": [classes[k] for k in things]}
    counts["_stuff"] = [row for k, row in enumerate(classes) if k not in things]
    figures = {}
    for group, rows in counts.items():
        figures |= {name + group: _fraction(result[name + group]) for name in ("PQ", "SQ", "RQ")}
        figures["n" + group] = sum(row["PQ"] is not None for row in rows)
    rows = [row | {name: _fraction(row[name]) for name in ("PQ", "SQ", "RQ")} for row in classes]
    return figures | {"num_images": evaluator.num_images, "classes": rows}


def score_cityscapes(truth: str | Path, results: str | Path) -> dict:
    """Figures of Cityscapes' benchmark, as its scripts compute them.

    Results are recognised by their files, in any folder below `results`: `<image>*.txt` lists masks of instances,
    a line "mask.png labelId confidence" each; a `<image>*.png` that is no such mask is a map of labelIds.

    Args:
        truth: a folder, searched to the bottom, of `*_gtFine_labelIds.png` and `*_gtFine_instanceIds.png`
        results: semantic results, instances, or both

    Returns:
        Of semantic results "IoU", "iIoU", "IoU_categories" and "iIoU_categories", of instances "AP" and "AP50"; the
        same and all their parts under the names of the scripts: "averageScoreClasses", "classScores", …, "allAp",
        "allAp50%", "classes"; and "num_images".

    Raises:
        DataError: there is no truth, no result, or none for an image; sizes differ, or an id does not exist.
    """
    truth, results = Path(truth), Path(results)
    ends = {kind: f"_gtFine_{kind}.png" for kind in ("labelIds", "instanceIds")}
    files = {
        kind: {path.name.removesuffix(end): path for path in sorted(truth.rglob("*" + end))}
        for kind, end in ends.items()
    }
    names = sorted(files["labelIds"] | files["instanceIds"])
    if not names:
        raise DataError(f"{truth} holds no *{ends['labelIds']} and no *{ends['instanceIds']}, in no folder below it.")
    lists = {path: _listed_masks(path, results) for path in sorted(results.rglob("*.txt"))}
    masks = {mask for rows in lists.values() for mask, _, _ in rows}
    pictures = [
        path
        for path in sorted(results.rglob("*.png"))
        if path.resolve() not in masks and not path.stem.endswith(("_panoptic", "_color"))
    ]
    semantic, instances = _by_image(pictures, names), _by_image(lists, names)
    if not semantic and not instances:
        raise DataError(
            f"{results} holds no results for the {len(names)} images of {truth}, such as {names[0]}: expected "
            f"{names[0]}*.png with labelIds, or {names[0]}*.txt with a list of masks, in any folder below it."
        )
    figures = {"num_images": len(names)}
    if semantic:
        _check_complete("labelIds", files["labelIds"], names, semantic, results, truth)
        if files["instanceIds"]:  # without any there is no iIoU
            _check_complete("instanceIds", files["instanceIds"], names, semantic, results, truth)
        figures |= _pixel_figures(files["labelIds"], files["instanceIds"], semantic)
    if instances:
        _check_complete("instanceIds", files["instanceIds"], names, instances, results, truth)
        figures |= _instance_figures(files["instanceIds"], instances, lists)
    return figures


def _pixel_figures(truth: dict[str, Path], instances: dict[str, Path], results: dict[str, Path]) -> dict:
    evaluator = CityscapesPixelEvaluator()
    for name, path in truth.items():
        ids = read_label(instances[name]) if instances else None
        with _naming(results[name], path):
            evaluator.update(read_label(results[name]), read_label(path), ids)
    scores = evaluator.scores()
    return {
        "IoU": scores["averageScoreClasses"],
        "iIoU": scores["averageScoreInstClasses"],
        "IoU_categories": scores["averageScoreCategories"],
        "iIoU_categories": scores["averageScoreInstCategories"],
    } | scores


def _instance_figures(
    truth: dict[str, Path], results: dict[str, Path], lists: dict[Path, list[tuple[Path, int, float]]]
) -> dict:
    evaluator = CityscapesInstanceEvaluator()
    for name, path in truth.items():
        rows = lists[results[name]]
        with _naming(results[name], path):
            evaluator.update(
                (_mask(mask) for mask, _, _ in rows), [row[1] for row in rows], [row[2] for row in rows],
                read_label(path),
            )  # fmt: skip
    scores = evaluator.scores()
    return {"AP": scores["allAp"], "AP50": scores["allAp50%"]} | scores


@contextlib.contextmanager
def _naming(result: Path, truth: Path):
    """Say of what files an error is."""
    try:
        yield
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{result}, against {truth}: {error}") from None


def _listed_masks(path: Path, root: Path) -> list[tuple[Path, int, float]]:
    """Masks, labelIds and confidences that a text file lists; of a mask listed twice, the last line counts."""
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            name, label, score = words
            label, score = int(float(label)), float(score)
        except ValueError:
            raise DataError(f'{path}, line {number}: expected "mask.png labelId confidence", got {line!r}.') from None
        mask = (path.parent / name).resolve()
        if Path(name).is_absolute() or not mask.is_relative_to(root.resolve()):
            raise DataError(f"{path}, line {number}: {name} must be a relative path that stays in {root}.")
        if not mask.is_file():
            raise DataError(f"{path}, line {number}: there is no mask {mask}.")
        rows[mask] = (mask, label, score)
    return list(rows.values())


def _mask(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L")) != 0
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"{path} cannot be read as a mask: {error}.") from error


def _by_image(paths: Iterable[Path], names: list[str]) -> dict[str, Path]:
    """The file of each image: that of its name, or of its name, an underscore and more."""
    known, found = set(names), {}
    for path in paths:
        stem = path.stem
        while stem not in known and "_" in stem:
            stem = stem.rpartition("_")[0]
        if stem in known:
            if stem in found:
                raise DataError(f"There are two results for {stem}: {found[stem]} and {path}. Take one away.")
            found[stem] = path
    return found


def _check_complete(
    kind: str, truth: dict[str, Path], names: list[str], found: dict[str, Path], results: Path, root: Path
) -> None:
    without_truth = [name for name in names if name not in truth]
    if without_truth:
        raise DataError(f"{root} has no *_gtFine_{kind}.png for {abbreviate(without_truth)}.")
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{results} has no prediction for {abbreviate(missing)} of {root}. Predict all of its images, or name the "
            "folder of one split, such as gtFine/val."
        )


def _json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}.") from None


def _truth(path: Path, *parts: str) -> dict:
    """An annotation file in one of COCO's formats, with something in each of its lists."""
    content = _json(path)
    for part in ("images", "categories", *parts):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise DataError(f'{path} has no list "{part}": it is no annotation file in a format of COCO.')
        if not content[part]:
            raise DataError(f'{path} is empty: its list "{part}" has no entry, so there is nothing to measure.')
    return content


def _key(entry: dict, key: str, path: Path):
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f'{path}: an entry lacks "{key}": {str(entry)[:120]}.')
    return entry[key]


def _checked_results(path: Path, truth: dict, truth_path: Path) -> tuple[str, list[dict]]:
    """Results that pycocotools would take, and whether they are compared by "segm" or "bbox"."""
    results = _json(path)
    if not isinstance(results, list):
        raise DataError(
            f"{path} holds {type(results).__name__} at its top, expected a list of results: "
            '[{"image_id": …, "category_id": …, "segmentation": …, "score": …}, …].'
        )
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for source, entries in ((truth_path, truth["annotations"]), (path, results)):
        for key, known in (("image_id", sizes), ("category_id", categories)):
            unknown = sorted({_key(entry, key, source) for entry in entries} - set(known), key=str)
            if unknown:
                raise DataError(f"{source} has the {key} {abbreviate(unknown)}, which {truth_path} does not list.")
    for entry in truth["annotations"]:
        _key(entry, "area", truth_path)
        entry.setdefault("iscrowd", 0)
    for entry in results:
        score = _key(entry, "score", path)
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f"{path}: a result of image {entry['image_id']} has the score {score}, expected a number.")
    kinds = {"segm" if "segmentation" in entry else "bbox" for entry in results}
    if len(kinds) > 1:
        raise DataError(f'{path}: some results have a "segmentation" and others only a "bbox"; choose one.')
    if kinds == {"bbox"}:
        for entry in results:
            _key(entry, "bbox", path)
        return "bbox", results
    shaped = [_with_run_lengths(entry, sizes[entry["image_id"]], path) for entry in results]
    return "segm", shaped


def _with_run_lengths(entry: dict, size: tuple[int, int], path: Path) -> dict:
    """A result whose mask is compressed, without the box that would decide about its size."""
    from faster_coco_eval.core import mask as coco

    shape = entry["segmentation"]
    if isinstance(shape, dict) and tuple(shape.get("size", ())) != size:
        raise DataError(
            f"{path}: a mask of image {entry['image_id']} has the size {shape.get('size')}, but the image has "
            f"{list(size)} (height, width)."
        )
    try:
        if isinstance(shape, list):
            shape = coco.merge(coco.frPyObjects(shape, *size))
        elif isinstance(shape["counts"], list):
            shape = coco.frPyObjects(shape, *size)
    except Exception as error:  # of C code, on whatever the file holds
        raise DataError(f"{path}: a mask of image {entry['image_id']} cannot be read: {error}.") from error
    return {key: value for key, value in entry.items() if key != "bbox"} | {"segmentation": shape}


def _segments(
    annotation: dict, folder: Path, label: dict[int, int], source: Path
) -> tuple[np.ndarray, dict[int, int], list[int]]:
    """Ids of a picture [H, W], the class of each, and those that are crowd."""
    path = folder / _key(annotation, "file_name", source)
    labels, crowd = {}, []
    for info in _key(annotation, "segments_info", source):
        number, category = _key(info, "id", source), _key(info, "category_id", source)
        if category not in label:
            raise DataError(f"{source}: segment {number} of {path.name} is of the unknown category {category}.")
        labels[number] = label[category]
        if info.get("iscrowd", 0):
            crowd.append(number)
    return segment_ids(read_image(path)), labels, crowd


def _mean_of_known(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _fraction(percent: float | None) -> float | None:
    return None if percent is None else percent / 100


SCORES: dict[str, Callable[..., dict]] = {
    "coco": score_coco,
    "panoptic": score_panoptic,
    "cityscapes": score_cityscapes,
}
"""Benchmarks by their name on the command line."""
