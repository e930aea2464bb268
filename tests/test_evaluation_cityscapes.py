"""IoU, iIoU and AP as Cityscapes' scripts count them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_lab.data import cityscapes as reader
from m2f_lab.evaluation import CityscapesInstanceEvaluator, CityscapesPixelEvaluator
from m2f_lab.evaluation.cityscapes import _AVERAGE_SIZE, _CATEGORIES, CATEGORIES, EVALUATED, NAMES, OVERLAPS, THINGS

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "cityscapes_eval"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference vectors are not there")
PERSON, RIDER, CAR, CARAVAN = 24, 25, 26, 29


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path))


def golden_images() -> list[tuple]:
    """Of each image the arguments of both evaluators."""
    images = []
    for path in sorted(GOLDEN.glob("gtFine/val/*/*_labelIds.png")):
        name = path.name.removesuffix("_gtFine_labelIds.png")
        instances = read(path.with_name(f"{name}_gtFine_instanceIds.png"))
        lines = (GOLDEN / f"predictions/instance/{name}_pred.txt").read_text().splitlines()
        rows = [line.split() for line in lines]
        masks = [read(GOLDEN / "predictions/instance" / mask) for mask, _, _ in rows]
        pixels = (read(GOLDEN / f"predictions/semantic/{name}_pred.png"), read(path), instances)
        images.append((pixels, (masks, [int(r[1]) for r in rows], [float(r[2]) for r in rows], instances)))
    return images


def assert_equal(found, expected) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, abs=1e-12)


def test_labels_are_those_of_the_reader():
    assert [NAMES[label] for label, train in reader.TRAIN_IDS.items() if train != 255] == list(reader.CLASSES.names)
    assert np.flatnonzero(EVALUATED).tolist() == [label for label, train in reader.TRAIN_IDS.items() if train != 255]
    assert tuple(NAMES[label] for label in THINGS) == reader.THINGS.names


@needs_golden
def test_every_number_of_pixels_is_that_of_the_scripts():
    evaluator = CityscapesPixelEvaluator()
    for pixels, _ in golden_images():
        evaluator.update(*pixels)
    expected = json.loads((GOLDEN / "expected.json").read_text())["pixel"]
    confusion = expected.pop("confusion")["matrix"]
    assert_equal(evaluator.scores(), expected)
    np.testing.assert_array_equal(evaluator.matrix, confusion)


@needs_golden
def test_every_number_of_instances_is_that_of_the_scripts():
    evaluator = CityscapesInstanceEvaluator()
    for _, instances in golden_images():
        evaluator.update(*instances)
    expected = json.loads((GOLDEN / "expected.json").read_text())["instance"]
    assert_equal(evaluator.scores(), expected["averages"])
    np.testing.assert_array_equal(OVERLAPS, expected["overlaps"])
    table = np.array(expected["resultApMatrix"][0], float)
    np.testing.assert_allclose(evaluator.precisions(), table, rtol=0, atol=1e-12)


# Random images against the definitions, pair by pair


def random_truth(rng: np.random.Generator, kind: str, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """Instance ids: a road, with rectangles of groups, void, things and labels that do not count."""
    ids = np.full(size, 7 if kind != "void" else int(rng.integers(7)), np.int32)
    num = {"empty": 0, "plain": 8, "crowded": 40, "void": 6}[kind]
    for number in range(num):
        label = int(rng.choice([PERSON, RIDER, CAR, CARAVAN, 33]))
        single = rng.random() < (0.5 if kind == "crowded" else 0.8)
        what = rng.choice([1000 * label + number if single else label, *range(7)], p=[0.65, *[0.05] * 7])
        y, x, h, w = rng.integers((0, 0, 2, 2), (35, 55, 25, 30))
        ids[y : y + h, x : x + w] = what
    return ids


def random_instances(rng: np.random.Generator, ids: np.ndarray, count: int) -> tuple[list, list, list]:
    """True instances that are cut and shifted, doubles, and rectangles anywhere; few different scores."""
    masks, labels, scores = [], [], []
    things = [value for value in np.unique(ids).tolist() if value >= 24]
    for _ in range(count):
        label = int(rng.choice([*THINGS[:3], 33, CARAVAN, 7]))
        mask = np.zeros(ids.shape, bool)
        if things and rng.random() < 0.7:
            value = int(rng.choice(things))
            label = value // 1000 if value >= 1000 else value
            mask = np.roll(ids == value, int(rng.integers(-2, 3)), axis=1)
        elif rng.random() < 0.9:
            y, x, h, w = rng.integers((0, 0, 2, 2), (35, 55, 30, 30))
            mask[y : y + h, x : x + w] = True
        masks.append(mask.astype(np.uint8) * 200)
        labels.append(label)
        scores.append(float(rng.integers(0, 5)) / 4)
    return masks, labels, scores


def naive_precision(images: list, label: int, overlap: float) -> float | None:
    """AP of one class and overlap as `facts` state it, in loops over pairs."""
    verdicts, num_true = [], 0
    void = [number for number in range(len(NAMES)) if not EVALUATED[number]]
    for (masks, labels, scores), ids in images:
        regions = {v: ids == v for v in np.unique(ids).tolist() if v == label or v // 1000 == label}
        ignored = {v for v, region in regions.items() if v < 1000 or region.sum() < 100}
        num_true += sum(1 for v in regions if v >= 1000 and regions[v].sum() >= 100)
        own = [(m != 0, s) for m, k, s in zip(masks, labels, scores, strict=True) if k == label and m.any()]
        finders = {value: [] for value in regions if value not in ignored}
        for mask, score in own:
            hits = [v for v, r in regions.items() if (mask & r).sum() / (mask | r).sum() > overlap]
            for value in hits:
                if value in finders:
                    finders[value].append(score)
            if not hits:
                share = (mask & np.isin(ids, void)).sum()
                for value in ignored:
                    times = int(value < 1000) + int(regions[value].sum() < 100)
                    share += times * (mask & regions[value]).sum()
                if share / mask.sum() <= overlap:
                    verdicts.append((score, False))
        for found in finders.values():
            verdicts += [(score, place == 0) for place, score in enumerate(sorted(found, reverse=True))]
    if not num_true:
        return None
    points = []
    for threshold in sorted({score for score, _ in verdicts}):
        taken = [right for score, right in verdicts if score >= threshold]
        points.append((sum(taken) / num_true, sum(taken) / len(taken)))
    if not points:
        return 0.0
    points.append((0.0, points[-1][1]))
    recalls = [points[0][0], *(recall for recall, _ in points), 0.0]
    return sum(p * (recalls[i] - recalls[i + 2]) / 2 for i, (_, p) in enumerate(points))


@pytest.mark.parametrize("kind", ["empty", "plain", "crowded", "void"])
@pytest.mark.parametrize("seed", range(4))
def test_random_instances_agree_with_the_definition_pair_by_pair(kind, seed):
    rng = np.random.default_rng(seed)
    evaluator, images = CityscapesInstanceEvaluator(), []
    for _ in range(3):
        ids = random_truth(rng, kind)
        said = random_instances(rng, ids, int(rng.integers(0, 14)))
        images.append((said, ids))
        evaluator.update(*said, ids)
    table = evaluator.precisions()
    for row, label in zip(table, THINGS, strict=True):
        for overlap in (0, 3, 9):
            expected = naive_precision(images, label, OVERLAPS[overlap])
            assert row[overlap] == pytest.approx(np.nan if expected is None else expected, abs=1e-12, nan_ok=True)


def naive_pixels(images: list) -> tuple[dict, dict]:
    """IoU and iIoU of classes and, in capitals, categories: sky is both. In loops."""
    category = {name: group.upper() for group, names in _CATEGORIES.items() for name in names}
    groups = [name.upper() for name in CATEGORIES]
    counts = {name: [0, 0, 0, 0.0, 0.0] for name in (*NAMES, *groups)}  # TP, FN, FP, weighted TP and FN
    extra = dict.fromkeys(groups, 0)
    for predicted, truth, ids in images:
        for said, true in zip(predicted.ravel().tolist(), truth.ravel().tolist(), strict=True):
            if EVALUATED[true]:
                counts[NAMES[true]][0 if said == true else 1] += 1
                counts[NAMES[said]][2] += said != true
                group, other = category[NAMES[true]], category[NAMES[said]]
                counts[group][0 if group == other and EVALUATED[said] else 1] += 1
                if group != other:
                    counts[other][2] += bool(EVALUATED[said])
                    extra[other] += not EVALUATED[said]
        for value in np.unique(ids[ids > 1000]).tolist():
            name = NAMES[value // 1000]
            if name in _AVERAGE_SIZE:
                inside = predicted[ids == value].tolist()
                weight = _AVERAGE_SIZE[name] / len(inside)
                for said in inside:
                    counts[name][3 if said == value // 1000 else 4] += weight
                    counts[category[name]][3 if category[NAMES[said]] == category[name] else 4] += weight
    plain = {name: tp / (tp + fn + fp) if tp + fn + fp else None for name, (tp, fn, fp, _, _) in counts.items()}
    weighted = {}
    for name, (_, _, fp, tp, fn) in counts.items():
        total = tp + fn + fp + extra.get(name, 0)
        weighted[name] = tp / total if total else None
    return plain, weighted


@pytest.mark.parametrize("kind", ["empty", "plain", "crowded", "void"])
def test_random_pixels_agree_with_the_definition_pixel_by_pixel(kind):
    rng = np.random.default_rng(len(kind))
    evaluator, images = CityscapesPixelEvaluator(), []
    for _ in range(3):
        ids = random_truth(rng, kind)
        truth = np.where(ids >= 1000, ids // 1000, ids)
        noise = rng.choice([PERSON, CAR, CARAVAN, 7, 8, 9, 0], truth.shape)
        images.append((np.where(rng.random(truth.shape) < 0.3, noise, truth), truth, ids))
        evaluator.update(*images[-1])
    scores = evaluator.scores()
    plain, weighted = naive_pixels(images)
    for label, name in enumerate(NAMES):
        assert_equal(scores["classScores"][name], plain[name] if EVALUATED[label] else None)
        assert_equal(scores["classInstScores"][name], weighted[name] if label in THINGS else None)
    for name in CATEGORIES:
        expected = weighted[name.upper()] if name in ("human", "vehicle") else None
        assert_equal(scores["categoryScores"][name], plain[name.upper()])
        assert_equal(scores["categoryInstScores"][name], expected)


# Parts, types and errors


def counted(images: list[tuple]) -> tuple[CityscapesPixelEvaluator, CityscapesInstanceEvaluator]:
    pixel, instance = CityscapesPixelEvaluator(), CityscapesInstanceEvaluator()
    for said, ids in images:
        pixel.update(np.full_like(ids, 7), np.where(ids >= 1000, ids // 1000, ids), ids)
        instance.update(*said, ids)
    return pixel, instance


def random_images(count: int) -> list[tuple]:
    rng = np.random.default_rng(3)
    truths = [random_truth(rng, "plain") for _ in range(count)]
    return [(random_instances(rng, ids, 8), ids) for ids in truths]


def test_merging_parts_in_any_order_equals_counting_in_one_place():
    images = random_images(5)
    whole, first, second = counted(images), counted(images[3:]), counted(images[:3])
    for one, other, all_at_once in zip(first, second, whole, strict=True):
        one.merge(other)
        assert_equal(one.scores(), all_at_once.scores())
        assert one.num_images == 5


def _count_in_process(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images = random_images(5)
    for part, whole in zip(counted(images[rank::2]), counted(images), strict=True):
        part.all_reduce()
        assert_equal(part.scores(), whole.scores())
        assert part.num_images == 5
    torch.distributed.destroy_process_group()


def test_all_processes_end_up_with_everything(tmp_path):
    torch.multiprocessing.spawn(_count_in_process, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.int64, torch.int32])
def test_any_integers_are_accepted(kind):
    def given(ids):
        return torch.from_numpy(ids).to(kind) if isinstance(kind, torch.dtype) else ids.astype(kind)

    (masks, labels, scores), ids = random_images(1)[0]
    expected = counted([((masks, labels, scores), ids)])
    pixel, instance = CityscapesPixelEvaluator(), CityscapesInstanceEvaluator()
    truth = np.where(ids >= 1000, ids // 1000, ids)
    pixel.update(given(np.full_like(ids, 7)), given(truth), given(ids))
    instance.update([torch.from_numpy(mask) for mask in masks], labels, scores, given(ids))
    assert_equal(pixel.scores(), expected[0].scores())
    assert_equal(instance.scores(), expected[1].scores())


def test_a_perfect_prediction_has_100_percent():
    ids = np.full((40, 40), 7, np.int32)
    ids[:20, :20], ids[25:, 25:] = 24001, 26003
    truth = np.where(ids >= 1000, ids // 1000, ids)
    pixel, instance = CityscapesPixelEvaluator(), CityscapesInstanceEvaluator()
    pixel.update(truth, truth, ids)
    instance.update([ids == 24001, ids == 26003], [PERSON, CAR], [0.4, 0.9], ids)
    result = pixel.result()
    assert {result[name] for name in ("IoU", "iIoU", "IoU_categories", "iIoU_categories")} == {100.0}
    assert instance.result()["AP"] == instance.result()["AP50"] == 100.0
    assert [row["instances"] for row in instance.result()["classes"]] == [1, 0, 1, 0, 0, 0, 0, 0]


def test_without_instance_ids_there_is_no_instance_iou():
    evaluator = CityscapesPixelEvaluator()
    truth = np.full((4, 4), PERSON)
    evaluator.update(truth, truth, truth * 1000 + 1)
    evaluator.update(truth, truth)
    assert evaluator.result()["IoU"] == 100
    assert evaluator.result()["iIoU"] is None


def test_nothing_to_find_is_not_a_number_and_not_a_crash():
    evaluator = CityscapesInstanceEvaluator()
    assert evaluator.result()["AP"] is None
    evaluator.update([np.ones((4, 4))], [CAR], [0.5], np.full((4, 4), 7))
    assert evaluator.result()["AP"] is None


ROAD = np.full((4, 6), 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROAD.T, ROAD), r"prediction is \[6, 4\], the truth \[4, 6\]"),
        ((ROAD + 248, ROAD), r"prediction holds the ids \[255\], expected 0…33: labelIds \(road is 7\), not trainIds"),
        ((ROAD, ROAD - 8), r"truth holds the ids \[-1\]"),
        ((ROAD, ROAD, ROAD * 10000), r"truth holds the ids \[70000\], expected 0…33999"),
        ((ROAD, ROAD, ROAD * 1000 + 1), r"instances \[7001\], but road has no instances"),
        ((ROAD / 1, ROAD), r"prediction is float64 \[4, 6\], expected integer ids"),
    ],
)
def test_pixels_that_cannot_be_compared_are_refused(arguments, message):
    evaluator = CityscapesPixelEvaluator()
    with pytest.raises(ValueError, match=message):
        evaluator.update(*arguments)
    assert evaluator.num_images == 0
    assert not evaluator.matrix.any()


@pytest.mark.parametrize(
    ("mask", "label", "score", "message"),
    [
        (ROAD.T, CAR, 0.5, r"prediction is \[6, 4\], the truth \[4, 6\]"),
        (ROAD, 99, 0.5, "Instance 0 is of labelId 99"),
        (ROAD, CAR, float("nan"), "Instance 0 has the confidence nan"),
    ],
)
def test_instances_that_cannot_be_compared_are_refused(mask, label, score, message):
    evaluator = CityscapesInstanceEvaluator()
    with pytest.raises(ValueError, match=message):
        evaluator.update([mask], [label], [score], ROAD)
    assert evaluator.num_images == 0
