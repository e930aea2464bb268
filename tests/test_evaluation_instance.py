"""AP and AR as pycocotools counts them."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.numpy import load_file

from m2f_lab.data import Segments
from m2f_lab.evaluation import InstanceEvaluator
from m2f_lab.structures import Prediction, Segment

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "instance_ap"
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference vectors are not there")


def prediction(masks: np.ndarray, labels: list[int], scores: list[float]) -> Prediction:
    segments = [
        Segment(i + 1, label, True, score, i, int(mask.sum()))
        for i, (mask, label, score) in enumerate(zip(masks, labels, scores, strict=True))
    ]
    return Prediction("instance", segments=tuple(segments), masks=masks)


def golden_images(results: list[dict]) -> tuple[list[str], list]:
    """Names of the classes, and per image its number, prediction, truth and areas."""
    truth = json.loads((GOLDEN / "ground_truth.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(GOLDEN / "ground_truth.json"))
    number = {category["id"]: i for i, category in enumerate(truth["categories"])}
    images = []
    for image in truth["images"]:
        size = image["height"], image["width"]
        annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
        shapes = tuple(coco_mask.decode(coco.annToRLE(annotation)).astype(bool) for annotation in annotations)
        crowd = np.array([annotation["iscrowd"] for annotation in annotations], bool)
        segments = Segments(
            np.array([number[annotation["category_id"]] for annotation in annotations], np.int64),
            crowd,
            size,
            shapes=shapes,
        )
        own = [result for result in results if result["image_id"] == image["id"]]
        masks = np.array([coco_mask.decode(result["segmentation"]) for result in own], bool).reshape(-1, *size)
        said = prediction(masks, [number[r["category_id"]] for r in own], [r["score"] for r in own])
        images.append((image["id"], said, segments, [annotation["area"] for annotation in annotations]))
    return [category["name"] for category in truth["categories"]], images


def evaluated(results: list[dict], parts: int = 1) -> dict:
    names, images = golden_images(results)
    evaluators = [InstanceEvaluator(len(names), names) for _ in range(parts)]
    for place, (image, said, segments, areas) in enumerate(images):
        evaluators[-1 - place % parts].update(said, segments, areas=areas, image=image)
    for other in evaluators[1:]:
        evaluators[0].merge(other)
    return evaluators[0].result()


@needs_golden
@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("all", lambda results: results),
        ("results_in_reverse_order", lambda results: results[::-1]),
        ("without_detections_on_image_12", lambda results: [r for r in results if r["image_id"] != 12]),
    ],
)
def test_golden_figures(case, change):
    results = json.loads((GOLDEN / "results.json").read_text())
    figures, expected = evaluated(change(results)), json.loads((GOLDEN / "expected.json").read_text())[case]
    for name in NAMES:
        assert figures[name] == pytest.approx(100 * expected[name], abs=1e-9), name


@needs_golden
def test_golden_figures_of_each_class():
    results = json.loads((GOLDEN / "results.json").read_text())
    expected = json.loads((GOLDEN / "expected.json").read_text())["per_category"]
    for row in evaluated(results)["classes"]:
        wanted = expected[row["name"]]
        assert row["instances"] == wanted["gt"]
        for name, reference in (("AP", "AP"), ("AP50", "AP50"), ("AR", "AR100")):
            value = wanted[reference]
            assert row[name] == (None if value is None else pytest.approx(100 * value, abs=1e-9))


@needs_golden
def test_golden_curves():
    from m2f_lab.evaluation.instance import _curve

    expected = load_file(GOLDEN / "expected.safetensors")
    names, images = golden_images(json.loads((GOLDEN / "results.json").read_text()))
    evaluator = InstanceEvaluator(len(names), names)
    for image, said, segments, areas in images:
        evaluator.update(said, segments, areas=areas, image=image)
    for label, matches in enumerate(evaluator._matched):
        num_true = sum(match.num_true[0] for match in matches)
        if num_true:
            curve, _ = _curve(sorted(matches, key=lambda match: match.image), 0, 100, num_true)
            np.testing.assert_allclose(curve, expected["precision"][:, :, label], atol=1e-9)


@needs_golden
def test_merging_changes_nothing():
    results = json.loads((GOLDEN / "results.json").read_text())
    assert evaluated(results, parts=3) == evaluated(results)


def blobs(rng: np.random.Generator, count: int, size: tuple[int, int]) -> np.ndarray:
    """Rectangles of all sizes that overlap, some of them empty. bool [count, *size]"""
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        top, left = rng.integers(0, size[0] - 4), rng.integers(0, size[1] - 4)
        height, width = rng.integers(0, (size[0], size[1]))
        mask[top : top + height, left : left + width] = True
    return masks


def noisy(rng: np.random.Generator, masks: np.ndarray) -> np.ndarray:
    return np.array([np.roll(mask, rng.integers(-3, 4, 2), (0, 1)) for mask in masks], bool).reshape(masks.shape)


def random_images(seed: int, as_map: bool) -> list[tuple[Prediction, Segments]]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(6):
        size = tuple(rng.integers(24, 160, 2).tolist())
        count = int(rng.integers(0, 9))
        labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.2
        masks = blobs(rng, count, size)
        if as_map:
            id_map = np.full(size, -1, np.int32)
            for number, mask in enumerate(masks):
                id_map[mask] = number
            truth = Segments(labels, crowd, size, id_map=id_map)
            masks = truth.masks()
        else:
            truth = Segments(labels, crowd, size, shapes=tuple(masks))
        said = np.concatenate([noisy(rng, masks), noisy(rng, masks), blobs(rng, 3, size)])
        said_labels = np.concatenate([labels, labels, rng.integers(0, 3, 3)]).tolist()
        scores = (rng.integers(0, 6, len(said)) / 5).tolist()  # many are equal
        images.append((prediction(said, said_labels, scores), truth))
    return images


def by_pycocotools(images: list[tuple[Prediction, Segments]]) -> dict[str, float]:
    def run_length(mask: np.ndarray) -> dict:
        return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))

    annotations, results = [], []
    for image, (said, truth) in enumerate(images):
        for number in range(len(truth)):
            mask = truth.mask(number)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": int(truth.labels[number]),
                 "segmentation": run_length(mask), "area": int(mask.sum()), "iscrowd": int(truth.crowd[number]),
                 "bbox": [0, 0, 1, 1]}
            )  # fmt: skip
        for mask, segment in zip(said.masks, said.segments, strict=True):
            results.append(
                {"image_id": image, "category_id": segment.label, "segmentation": run_length(mask),
                 "score": segment.score}
            )  # fmt: skip
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "height": t.size[0], "width": t.size[1]} for i, (_, t) in enumerate(images)],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(3)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats.tolist(), strict=True))


@pytest.mark.parametrize("as_map", [True, False], ids=["id map", "masks"])
@pytest.mark.parametrize("seed", range(6))
def test_equal_to_pycocotools_on_random_images(seed, as_map):
    images = random_images(seed, as_map)
    evaluator = InstanceEvaluator(3)
    for said, truth in images:
        evaluator.update(said, truth)
    figures = evaluator.result()
    for name, value in by_pycocotools(images).items():
        assert figures[name] == (None if value == -1 else pytest.approx(100 * value, abs=1e-9)), name


def test_nothing_to_find_has_no_figure():
    evaluator = InstanceEvaluator(2)
    empty = Segments(np.zeros(0, np.int64), np.zeros(0, bool), (8, 8), id_map=np.full((8, 8), -1, np.int32))
    evaluator.update(prediction(np.ones((1, 8, 8), bool), [1], [0.5]), empty)
    figures = evaluator.result()
    assert figures["AP"] is None
    assert figures["AR100"] is None
    assert figures["num_images"] == 1


def test_more_detections_than_coco_counts():
    id_map = np.arange(16 * 16, dtype=np.int32).reshape(16, 16)
    truth = Segments(np.zeros(256, np.int64), np.zeros(256, bool), (16, 16), id_map=id_map)
    said = prediction(truth.masks(), [0] * 256, [0.5] * 256)
    recalls = {}
    for limit in (100, 300):
        evaluator = InstanceEvaluator(1, max_detections=limit)
        evaluator.update(said, truth)
        recalls |= {limit: evaluator.result()[f"AR{limit}"]}
    assert recalls == {100: pytest.approx(100 * 100 / 256), 300: 100}


def test_errors_say_what_is_wrong():
    truth = Segments(np.array([2]), np.zeros(1, bool), (8, 8), id_map=np.zeros((8, 8), np.int32))
    said = prediction(np.ones((1, 8, 8), bool), [0], [0.5])
    with pytest.raises(ValueError, match=r"truth has instances of the classes \[2\], but there are 2"):
        InstanceEvaluator(2).update(said, truth)
    with pytest.raises(ValueError, match=r"\[4, 4\], the truth \[8, 8\]"):
        InstanceEvaluator(3).update(prediction(np.ones((1, 4, 4), bool), [0], [0.5]), truth)
    with pytest.raises(ValueError, match="task=\"instance\", got 'semantic'"):
        InstanceEvaluator(3).update(Prediction("semantic"), truth)
    with pytest.raises(ValueError, match="100 in an image, into"):
        InstanceEvaluator(3, max_detections=5).merge(InstanceEvaluator(3))
