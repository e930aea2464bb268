"""Panoptic quality: the COCO API's numbers, its definition segment by segment, hand-worked cases, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from m2f_lab.evaluation import PanopticEvaluator
from m2f_lab.structures import Prediction, Segment

GOLDEN = Path(__file__).parent / "golden" / "panoptic_quality"
QUALITIES = [name + group for group in ("", "_things", "_stuff") for name in ("PQ", "SQ", "RQ")]
NO_PIXEL = np.zeros((0, 4), np.uint8)
THINGS = {1}  # in the cases by hand, class 0 is stuff and class 1 things


def measure(*images, num_classes=2, things=THINGS) -> dict:
    """Result for images of (predicted map, its labels, true map, its labels, crowd); a row of pixels is a map."""
    evaluator = PanopticEvaluator(num_classes, things)
    for predicted, predicted_labels, truth, labels, *crowd in images:
        evaluator.update((np.atleast_2d(predicted), predicted_labels), np.atleast_2d(truth), labels, *crowd)
    return evaluator.result()


def tallies(result: dict) -> list[tuple[int, int, int]]:
    return [(c["TP"], c["FP"], c["FN"]) for c in result["classes"]]


# Against the COCO API


def read_golden(part: str) -> list[tuple[np.ndarray, list[dict]]]:
    """Segment ids [H, W] and segments_info of every image."""
    images = []
    for annotation in json.loads((GOLDEN / f"{part}.json").read_text())["annotations"]:
        with Image.open(GOLDEN / part / annotation["file_name"]) as picture:
            ids = np.asarray(picture.convert("RGB")).astype(np.int32) @ np.array([1, 256, 256**2], np.int32)
        images.append((ids, annotation["segments_info"]))
    return images


def test_the_numbers_are_those_of_the_coco_api():
    categories = json.loads((GOLDEN / "gt.json").read_text())["categories"]
    number = {category["id"]: k for k, category in enumerate(categories)}
    evaluator = PanopticEvaluator(
        len(categories), {k for k, c in enumerate(categories) if c["isthing"]}, [c["name"] for c in categories]
    )
    for (truth, segments), (predicted, predicted_segments) in zip(read_golden("gt"), read_golden("pred"), strict=True):
        labels, predicted_labels = (
            {s["id"]: number[s["category_id"]] for s in each} for each in (segments, predicted_segments)
        )
        crowd = [s["id"] for s in segments if s["iscrowd"]]
        evaluator.update((predicted, predicted_labels), truth, labels, crowd)
    result = evaluator.result()
    expected = json.loads((GOLDEN / "expected.json").read_text())
    assert result["num_images"] == 12
    for group, suffix in (("All", ""), ("Things", "_things"), ("Stuff", "_stuff")):
        for name in ("PQ", "SQ", "RQ"):
            assert result[name + suffix] == pytest.approx(100 * expected[group][name.lower()], rel=1e-12), name + suffix
    for category, found in zip(categories, result["classes"], strict=True):
        assert found["name"] == category["name"]
        for name in ("PQ", "SQ", "RQ"):
            reference = expected["per_class"][str(category["id"])][name.lower()]
            assert found[name] == pytest.approx(100 * reference, rel=1e-12), (category, name)


def api_counts(predicted, predicted_labels, truth, labels, crowd, num_classes: int) -> np.ndarray:
    """TP, FP, FN and the sum of IoUs per class [K, 4], as the COCO API goes about it: pair by pair."""
    counts = np.zeros((num_classes, 4))
    true = {i: truth == i for i in (0, *labels)}
    said = {j: predicted == j for j in predicted_labels}
    matched = set()
    for i, label in labels.items():
        if i in crowd:
            continue
        for j in predicted_labels:
            intersection = (true[i] & said[j]).sum()
            union = true[i].sum() + said[j].sum() - intersection - (true[0] & said[j]).sum()
            if label == predicted_labels[j] and union and intersection / union > 0.5:
                assert not matched & {("true", i), ("said", j)}
                matched |= {("true", i), ("said", j)}
                counts[label] += (1, 0, 0, intersection / union)
        counts[label, 2] += ("true", i) not in matched
    for j, label in predicted_labels.items():
        excused = true[0] | np.isin(truth, [i for i in crowd if labels[i] == label])
        counts[label, 1] += ("said", j) not in matched and (excused & said[j]).sum() / said[j].sum() <= 0.5
    return counts


def random_image(rng: np.random.Generator) -> tuple:
    """Columns of random widths, moved and renamed a little in the prediction."""
    truth = np.sort(rng.integers(0, 9, 60))[None].repeat(4, 0)
    truth[rng.random(truth.shape) < 0.1] = 0
    predicted = np.roll(truth, rng.integers(0, 4), axis=1) + 100 * (rng.random(truth.shape) < 0.05)
    predicted = np.where(predicted % 100 == 0, 0, 65536 * predicted + 3)
    labels = {int(i): int(rng.integers(3)) for i in np.unique(truth) if i}
    predicted_labels = {
        int(i): int(rng.integers(3)) if rng.random() < 0.2 else labels.get(int(i) // 65536 % 100, 0)
        for i in np.unique(predicted)
        if i
    }
    crowd = {i for i in labels if rng.random() < 0.3}
    return predicted, predicted_labels, truth, labels, crowd


@pytest.mark.parametrize("seed", range(5))
def test_random_images_agree_with_the_definition_pair_by_pair(seed):
    rng = np.random.default_rng(seed)
    for _ in range(6):
        image = random_image(rng)
        evaluator = PanopticEvaluator(3, range(3))
        evaluator.update(image[:2], *image[2:])
        np.testing.assert_allclose(evaluator.counts.numpy(), api_counts(*image, num_classes=3), rtol=1e-12)


# By hand


def test_a_perfect_prediction_has_100_whatever_its_ids():
    result = measure(([7, 7, 5, 9], {5: 1, 7: 0, 9: 1}, [1, 1, 2, 3], {1: 0, 2: 1, 3: 1}))
    assert {name: value for name, value in result.items() if "Q" in name} == dict.fromkeys(QUALITIES, 100)
    assert tallies(result) == [(1, 0, 0), (2, 0, 0)]
    assert result["num_images"] == 1
    assert result["classes"][1] == {"name": "1", "PQ": 100, "SQ": 100, "RQ": 100, "TP": 2, "FP": 0, "FN": 0}


def test_found_invented_and_missed_by_hand():
    """Of two things one is found, 3 of 4 pixels, and one missed; one is invented on the stuff, found with 4 of 6."""
    truth = [4, 4, 4, 4, 5, 6, 6, 6, 6, 6, 6]
    predicted = [1, 1, 1, 0, 0, 2, 3, 3, 0, 3, 3]
    result = measure((predicted, {1: 1, 2: 1, 3: 0}, truth, {4: 1, 5: 1, 6: 0}))
    assert tallies(result) == [(1, 0, 0), (1, 1, 1)]
    assert [result[f"{name}_things"] for name in ("PQ", "SQ", "RQ")] == pytest.approx([37.5, 75, 50])
    assert [result[f"{name}_stuff"] for name in ("PQ", "SQ", "RQ")] == pytest.approx([200 / 3, 200 / 3, 100])
    assert result["PQ"] == pytest.approx((37.5 + 200 / 3) / 2), "a mean over classes"


@pytest.mark.parametrize(
    ("predicted", "counts"),
    [
        ([1, 1, 0, 0, 0, 0], (0, 1, 1)),  # IoU 2/4
        ([0, 1, 1, 1, 1, 1], (0, 1, 1)),  # 3/6
        ([0, 1, 1, 1, 1, 0], (1, 0, 0)),  # 3/5
    ],
)
def test_an_iou_of_exactly_one_half_is_no_match(predicted, counts):
    result = measure((predicted, {1: 1}, [1, 1, 1, 1, 2, 2], {1: 1, 2: 0}))
    assert tallies(result)[1] == counts


def test_the_same_place_but_another_class_is_a_mistake_twice():
    result = measure(([1, 1], {1: 0}, [1, 1], {1: 1}))
    assert tallies(result) == [(0, 1, 0), (0, 0, 1)]
    assert [result[name] for name in ("PQ", "SQ", "RQ")] == [0, 0, 0]


def test_predicted_pixels_on_void_are_not_part_of_the_union():
    """Of six predicted pixels four are void: the other two are the segment, to the pixel."""
    assert measure(([1] * 6, {1: 1}, [5, 5, 0, 0, 0, 0], {5: 1}))["PQ"] == 100
    missing = measure(([1, 0, 0, 0, 0, 0], {1: 1}, [5] * 6, {5: 1}))
    assert tallies(missing)[1] == (0, 1, 1), "void of the prediction is no excuse"


@pytest.mark.parametrize(("num_void", "invented"), [(3, 1), (4, 0)])
def test_a_segment_mostly_on_void_is_not_invented(num_void, invented):
    """Six pixels, the rest of them on stuff: half is not enough."""
    truth = [0] * num_void + [2] * (12 - num_void)
    result = measure(([1] * 6 + [3] * 6, {1: 1, 3: 0}, truth, {2: 0}))
    assert tallies(result)[1] == (0, invented, 0)


@pytest.mark.parametrize(
    ("truth", "labels", "crowd", "counts"),
    [
        ([4, 4, 4, 4], {4: 1}, [4], (0, 0, 0)),  # neither missed nor invented, though it fits to the pixel
        ([4, 4, 4, 2], {4: 1, 2: 0}, [4], (0, 0, 0)),
        ([4, 4, 2, 2], {4: 1, 2: 0}, [4], (0, 1, 0)),  # half is not enough
        ([4, 4, 0, 2], {4: 1, 2: 0}, [4], (0, 0, 0)),  # void and crowd together
        ([4, 5, 5, 2], {4: 1, 5: 1, 2: 0}, [4, 5], (0, 0, 0)),  # two regions together
        ([4, 4, 4, 2], {4: 0, 2: 0}, [4], (0, 1, 0)),  # crowd of another class is no excuse
        ([4, 4, 4, 5], {4: 1, 5: 1}, [5], (1, 0, 0)),  # unlike void, crowd is part of the union: 3/4
    ],
)
def test_crowd_is_not_to_be_found_and_excuses_its_own_class(truth, labels, crowd, counts):
    result = measure(([1, 1, 1, 1], {1: 1}, truth, labels, crowd))
    assert tallies(result)[1] == counts
    if sum(counts):
        assert result["SQ_things"] == (75 if counts[0] else 0)


def test_a_class_that_is_only_predicted_counts_as_zero_and_one_that_is_nowhere_does_not():
    result = measure(([1, 1, 2], {1: 0, 2: 1}, [1, 1, 1], {1: 0}), num_classes=3, things={1, 2})
    assert [c["PQ"] for c in result["classes"]] == [pytest.approx(200 / 3), 0, None]
    assert tallies(result) == [(1, 0, 0), (0, 1, 0), (0, 0, 0)]
    assert result["PQ"] == pytest.approx(100 / 3)
    assert result["PQ_things"] == 0
    assert json.loads(json.dumps(result, allow_nan=False)) == result, "goes into a JSON file as it is"


def test_no_segment_at_all_is_not_a_number_and_not_a_crash():
    for result in (measure(), measure(([0, 0], {}, [0, 0], {})), measure((NO_PIXEL, {}, NO_PIXEL, {}))):
        assert {name: value for name, value in result.items() if "Q" in name} == dict.fromkeys(QUALITIES)
        assert tallies(result) == [(0, 0, 0)] * 2
    assert measure(([0, 0], {}, [1, 1], {1: 1}))["PQ"] == 0, "nothing found is a number"


def test_a_true_segment_without_a_pixel_is_missed():
    assert tallies(measure(([1], {1: 1}, [1], {1: 1, 2: 1})))[1] == (1, 0, 1)


# Over the data set


def test_segments_are_counted_over_the_data_set_not_figures_averaged():
    """Three things found in one image, one missed in the other: 3 / 3.5, not the mean of 1 and 0."""
    result = measure(([1, 2, 3], {1: 1, 2: 1, 3: 1}, [1, 2, 3], {1: 1, 2: 1, 3: 1}), ([0], {}, [1], {1: 1}))
    assert result["PQ"] == pytest.approx(100 * 3 / 3.5)


def counted(images: list) -> PanopticEvaluator:
    evaluator = PanopticEvaluator(3, {1, 2})
    for image in images:
        evaluator.update(image[:2], *image[2:])
    return evaluator


def random_images(count: int) -> list:
    rng = np.random.default_rng(0)
    return [random_image(rng) for _ in range(count)]


def test_merging_two_halves_equals_counting_everything_in_one_place():
    images = random_images(6)
    whole, left, right = counted(images), counted(images[:3]), counted(images[3:])
    left.merge(right)
    torch.testing.assert_close(left.counts, whole.counts, rtol=1e-12, atol=0)
    assert left.num_images == whole.num_images == 6
    assert left.result()["PQ"] == pytest.approx(whole.result()["PQ"], rel=1e-12)
    with pytest.raises(ValueError, match=r"4 classes with the things \[\] into those of 3 with the things \[1, 2\]"):
        left.merge(PanopticEvaluator(4, ()))
    with pytest.raises(ValueError, match="classes must be the same"):
        left.merge(PanopticEvaluator(3, {0, 1}))


def _count_in_process(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images = random_images(5)
    here, whole = counted(images[rank::2]), counted(images)
    here.all_reduce()
    torch.testing.assert_close(here.counts, whole.counts, rtol=1e-12, atol=0)
    assert here.num_images == 5
    torch.distributed.destroy_process_group()


def test_all_processes_end_up_with_the_sum(tmp_path):
    torch.multiprocessing.spawn(_count_in_process, (str(tmp_path / "store"),), nprocs=2)


# What is accepted, and errors


def test_predictions_tensors_and_arrays_of_any_layout_are_accepted():
    (predicted, predicted_labels, *truth), expected = random_images(1)[0], counted(random_images(1)).result()
    segments = tuple(Segment(i, label, True, 1.0, 0, 1) for i, label in predicted_labels.items())
    frozen = predicted.copy()
    frozen.flags.writeable = False
    for given in (
        Prediction("panoptic", segments_map=predicted.astype(np.int32), segments=segments),
        (torch.from_numpy(predicted), predicted_labels),
        (np.asfortranarray(predicted).astype(np.uint32), predicted_labels),
        (frozen, predicted_labels),
    ):
        evaluator = PanopticEvaluator(3, {1, 2})
        evaluator.update(given, truth[0].astype(np.uint8), *truth[1:])
        assert evaluator.result() == expected
    turned = PanopticEvaluator(3, {1, 2})
    turned.update((predicted[:, ::-1], predicted_labels), truth[0][:, ::-1], *truth[1:])
    assert turned.result()["PQ"] == pytest.approx(expected["PQ"], rel=1e-12)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int64, np.uint64])
def test_maps_of_any_integers_are_counted_alike(kind):
    (predicted, predicted_labels, truth, *rest), expected = random_images(1)[0], counted(random_images(1)).result()
    ids = [0, *predicted_labels]  # numbered from 1, as uint8 holds no large ones
    predicted = sum(number * (predicted == identity) for number, identity in enumerate(ids))
    predicted_labels = {number: predicted_labels[ids[number]] for number in range(1, len(ids))}
    for said in (predicted.astype(kind), torch.from_numpy(predicted.astype(kind))):
        evaluator = PanopticEvaluator(3, {1, 2})
        evaluator.update((said, predicted_labels), truth.astype(kind), *rest)
        assert evaluator.result() == expected


GOOD = np.array([[1, 1, 2]])
CLASSES = {1: 0, 2: 1}


@pytest.mark.parametrize(
    ("prediction", "truth", "message"),
    [
        ((GOOD.T, CLASSES), (GOOD, CLASSES), r"prediction is \[3, 1\], the truth \[1, 3\].*Resize the mask logits"),
        ((GOOD, {1: 0}), (GOOD, CLASSES), r"map of the prediction holds the ids \[2\], .* segments are \[1\]\. Add"),
        ((GOOD, CLASSES), (GOOD + 7, CLASSES), r"map of the truth holds the ids \[8, 9\]"),
        ((-GOOD, CLASSES), (GOOD, CLASSES), r"holds the ids \[-2, -1\], which have no class"),
        ((GOOD, CLASSES | {3: 1}), (GOOD, CLASSES), r"segments \[3\] without a pixel; leave them out"),
        ((GOOD, {1: 0, 2: 2}), (GOOD, CLASSES), r"Segment 2 of the prediction is of class 2, but there are 2 classes"),
        (
            (GOOD, CLASSES),
            (GOOD, {1: 255, 2: 1}),
            r"Segment 1 of the truth is of class 255.*no class is void",
        ),
        ((GOOD - 1, {0: 0, 1: 1}), (GOOD, CLASSES), r"prediction has a segment 0\. 0 is void: number segments from 1"),
        ((GOOD, CLASSES), (GOOD, CLASSES, [2, 5]), r"Segments \[5\] are called crowd, but labels has none such"),
        ((GOOD, CLASSES), (np.zeros((4, 6, 3), np.uint8), {}), r"truth is uint8 \[4, 6, 3\].*id = R \+ 256"),
        ((GOOD / 1, CLASSES), (GOOD, CLASSES), r"prediction is float64 \[1, 3\], expected a map of segment ids"),
        (Prediction("semantic", label_map=GOOD), (GOOD, CLASSES), 'task="semantic" has no segments_map'),
        (GOOD, (GOOD, CLASSES), "got ndarray: a map alone does not say"),
    ],
)
def test_what_cannot_be_compared_is_refused(prediction, truth, message):
    evaluator = PanopticEvaluator(2, THINGS)
    with pytest.raises(ValueError, match=message):
        evaluator.update(prediction, *truth)
    assert evaluator.num_images == 0
    assert not evaluator.counts.any(), "what was refused was not counted"


def test_impossible_classes_are_refused():
    with pytest.raises(ValueError, match="at least one class, got 0"):
        PanopticEvaluator(0, ())
    with pytest.raises(ValueError, match=r"things names the classes \[-1, 2\], but there are 2, 0…1"):
        PanopticEvaluator(2, [-1, 1, 2])
    with pytest.raises(ValueError, match="2 classes but 1 names"):
        PanopticEvaluator(2, THINGS, ["a"])
