"""mIoU and its relatives: by hand, against detectron2's formula, over the data set, and end to end."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from m2f_lab import recipes
from m2f_lab.data import DataError
from m2f_lab.evaluation import SemanticEvaluator, evaluate, format_table
from m2f_lab.structures import MaskLogits, Output, Prediction

CAMVID = Path(__file__).parents[2] / "shared" / "data" / "camvid"


def measure(num_classes: int, *pairs) -> dict:
    evaluator = SemanticEvaluator(num_classes)
    for predicted, truth in pairs:
        evaluator.update(np.array(predicted, np.uint8), np.array(truth, np.uint8))
    return evaluator.result()


def detectron2_result(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> dict:
    """The definitions of detectron2's SemSegEvaluator, class by class, without a matrix."""
    known = truth != 255
    iou, accuracy, weights = [], [], []
    for k in range(num_classes):
        true, said = (truth == k) & known, (predicted == k) & known
        if true.any():
            iou.append((true & said).sum() / (true | said).sum())
            accuracy.append((true & said).sum() / true.sum())
            weights.append(true.sum() / known.sum())
    return {
        "mIoU": 100 * np.mean(iou),
        "fwIoU": 100 * np.dot(iou, weights),
        "mACC": 100 * np.mean(accuracy),
        "pACC": 100 * (predicted == truth)[known].mean(),
    }


# By hand


def test_two_by_two_by_hand():
    """Class 0: one of two pixels right, none taken wrongly: 1/2. Class 1: both right, one taken wrongly: 2/3."""
    result = measure(2, ([[0, 1], [1, 1]], [[0, 0], [1, 1]]))
    assert result["mIoU"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert result["fwIoU"] == pytest.approx(100 * (1 / 2 * 1 / 2 + 1 / 2 * 2 / 3))
    assert result["mACC"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert result["pACC"] == pytest.approx(75)
    assert result["num_images"] == 1
    assert result["classes"] == [
        {"name": "0", "IoU": pytest.approx(50), "accuracy": pytest.approx(50), "share": pytest.approx(50)},
        {"name": "1", "IoU": pytest.approx(200 / 3), "accuracy": pytest.approx(100), "share": pytest.approx(50)},
    ]


def test_ignored_pixels_do_not_count_whatever_is_predicted_there():
    truth = [[0, 0], [255, 1]]
    for there in (0, 1, 2):
        result = measure(3, ([[0, 0], [there, 1]], truth))
        assert [result[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")] == [100] * 4


def test_a_class_that_is_nowhere_in_the_truth_is_left_out_of_the_means():
    """Class 2 is predicted by mistake: it lowers the IoU of class 0, and has none of its own."""
    result = measure(4, ([[0, 2], [1, 1]], [[0, 0], [1, 1]]))
    assert result["mIoU"] == pytest.approx((50 + 100) / 2)
    assert result["mACC"] == pytest.approx((50 + 100) / 2)
    assert [c["IoU"] for c in result["classes"]] == [pytest.approx(50), pytest.approx(100), None, None]
    assert [c["accuracy"] for c in result["classes"]] == [pytest.approx(50), pytest.approx(100), None, None]
    assert json.loads(json.dumps(result, allow_nan=False)) == result, "goes into a JSON file as it is"


def test_a_class_that_is_never_found_counts_as_zero():
    assert measure(2, ([[0, 0]], [[0, 1]]))["mIoU"] == pytest.approx((50 + 0) / 2)


@pytest.mark.parametrize("num_classes", [1, 3, 19, 150, 255])
def test_random_maps_agree_with_detectron2s_definitions(num_classes):
    rng = np.random.default_rng(num_classes)
    truth = rng.integers(0, num_classes, (40, 57), dtype=np.uint8)
    truth[truth == 1] = 0  # a class that is only predicted
    predicted = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, num_classes, truth.shape)).astype(
        np.uint8
    )
    truth[rng.random(truth.shape) < 0.1] = 255
    with pytest.warns(UserWarning, match="With one class") if num_classes == 1 else contextlib.nullcontext():
        result = measure(num_classes, (predicted, truth))
    for name, value in detectron2_result(predicted, truth, num_classes).items():
        assert result[name] == pytest.approx(value, rel=1e-9), name


# Over the data set


def test_counts_are_added_up_over_the_data_set_not_figures_averaged():
    """Class 1 covers one pixel of the first image, missed, and all of the second, found."""
    first = ([[0, 0, 0, 0]], [[0, 0, 0, 1]])
    second = ([[1, 1, 1, 1]], [[1, 1, 1, 1]])
    result = measure(2, first, second)
    assert result["mIoU"] == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    mean_of_images = (measure(2, first)["mIoU"] + measure(2, second)["mIoU"]) / 2
    assert mean_of_images == pytest.approx((37.5 + 100) / 2)
    assert abs(result["mIoU"] - mean_of_images) > 5


def test_the_order_of_truth_and_prediction_matters():
    evaluator = SemanticEvaluator(2)
    evaluator.update(np.array([[1, 1]], np.uint8), np.array([[0, 0]], np.uint8))
    assert evaluator.matrix.tolist() == [[0, 2], [0, 0]], "rows are the truth"


def random_pairs(count: int) -> list:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 4, (9, 11), dtype=np.uint8), rng.integers(0, 4, (9, 11), dtype=np.uint8)) for _ in range(count)
    ]


def test_merging_equals_counting_everything_in_one_place():
    pairs = random_pairs(5)
    parts = [SemanticEvaluator(4), SemanticEvaluator(4)]
    for i, pair in enumerate(pairs):
        parts[i % 2].update(*pair)
    parts[0].merge(parts[1])
    assert parts[0].result() == measure(4, *pairs)
    with pytest.raises(ValueError, match="5 classes into those of 4"):
        parts[0].merge(SemanticEvaluator(5))


def _count_in_process(rank: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    pairs = random_pairs(5)
    evaluator = SemanticEvaluator(4)
    for pair in pairs[rank::2]:
        evaluator.update(*pair)
    evaluator.all_reduce()
    assert evaluator.result() == measure(4, *pairs)
    torch.distributed.destroy_process_group()


def test_all_processes_end_up_with_the_sum(tmp_path):
    torch.multiprocessing.spawn(_count_in_process, (str(tmp_path / "store"),), nprocs=2)


def test_predictions_tensors_and_wide_integers_are_accepted():
    (predicted, truth), expected = random_pairs(1)[0], measure(4, *random_pairs(1))
    for given in (Prediction("semantic", label_map=predicted), torch.from_numpy(predicted), predicted.astype(np.int64)):
        evaluator = SemanticEvaluator(4)
        evaluator.update(given, truth.astype(np.int32))
        assert evaluator.result() == expected


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int16, np.uint32, np.int64, np.uint64])
def test_maps_of_any_integers_are_counted_alike(kind):
    (predicted, truth), expected = random_pairs(1)[0], measure(4, *random_pairs(1))
    labels = truth if kind == np.int8 else truth.astype(kind)  # int8 holds no 255
    for said, true in ((predicted.astype(kind), labels), (torch.from_numpy(predicted.astype(kind)), labels)):
        evaluator = SemanticEvaluator(4)
        evaluator.update(said, true)
        assert evaluator.result() == expected


def test_maps_of_other_types_and_shapes_are_refused_by_name():
    good = np.zeros((4, 6), np.uint8)
    for wrong, named in (
        (good / 1, r"float64 \[4, 6\]"),
        (good.astype(bool), r"bool \[4, 6\]"),
        (torch.zeros(4, 6), r"float32 \[4, 6\]"),
        (good[None], r"uint8 \[1, 4, 6\]"),
    ):
        with pytest.raises(ValueError, match=rf"The prediction is {named}, expected a map of classes, integers"):
            SemanticEvaluator(3).update(wrong, good)
        with pytest.raises(ValueError, match=rf"The truth is {named}, expected a map of classes, integers"):
            SemanticEvaluator(3).update(good, wrong)


def test_with_one_class_the_result_says_that_it_means_nothing():
    evaluator = SemanticEvaluator(1, ["cell"])
    evaluator.update(np.zeros((2, 2), np.uint8), np.array([[0, 255], [255, 255]], np.uint8))
    with pytest.warns(UserWarning, match=r'With one class \(cell\), any model has an mIoU of 100 %.*task="instance"'):
        assert evaluator.result()["mIoU"] == 100


def test_read_only_and_mirrored_arrays_are_accepted():
    (predicted, truth), expected = random_pairs(1)[0], measure(4, *random_pairs(1))
    truth.flags.writeable = False
    for view in (slice(None), slice(None, None, -1)):
        evaluator = SemanticEvaluator(4)
        evaluator.update(predicted[:, view], truth[:, view])
        assert evaluator.result() == expected


# Errors


def test_maps_that_cannot_be_compared_are_refused():
    evaluator = SemanticEvaluator(3)
    good = np.zeros((4, 6), np.uint8)
    with pytest.raises(ValueError, match=r"prediction is \[6, 4\], the truth \[4, 6\].*Resize the class scores"):
        evaluator.update(good.T, good)
    with pytest.raises(ValueError, match=r"The prediction holds \[3\], but there are 3 classes, 0…2\."):
        evaluator.update(good + 3, good)
    with pytest.raises(ValueError, match=r"The prediction holds \[255\]"):
        evaluator.update(good + 255, good)
    with pytest.raises(ValueError, match=r"The truth holds \[7\], .* \(and 255 for pixels to ignore\)"):
        evaluator.update(good, good + 7)
    with pytest.raises(ValueError, match="The truth holds -1…-1"):
        evaluator.update(good, good.astype(np.int64) - 1)
    with pytest.raises(ValueError, match="The prediction holds 256…256"):
        evaluator.update(good.astype(np.int64) + 256, good)
    with pytest.raises(ValueError, match='task="panoptic" has no label_map'):
        evaluator.update(Prediction("panoptic"), good)
    assert evaluator.num_images == 0
    assert not evaluator.matrix.any(), "what was refused was not counted"


def test_nothing_to_evaluate_has_no_figure():
    """A run whose validation images are unlabelled goes on; a NaN would not be JSON."""
    evaluator = SemanticEvaluator(3)
    evaluator.update(np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8))
    result = evaluator.result()
    assert [result[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")] == [None] * 4
    assert [c["IoU"] for c in result["classes"]] == [None] * 3
    assert "mIoU –" in format_table(result)
    json.dumps(result, allow_nan=False)


def test_impossible_numbers_of_classes_are_refused():
    for num_classes in (0, 65536):
        with pytest.raises(ValueError, match=f"got {num_classes}"):
            SemanticEvaluator(num_classes)
    with pytest.raises(ValueError, match="3 classes but 2 names"):
        SemanticEvaluator(3, ["a", "b"])


def test_the_table_shows_every_class_and_a_dash_where_there_is_none():
    evaluator = SemanticEvaluator(3, ["wall", "window pane", "sofa"])
    evaluator.update(np.array([[0, 0], [1, 1]], np.uint8), np.array([[0, 0], [0, 1]], np.uint8))
    lines = format_table(evaluator.result()).splitlines()
    assert lines[0].split() == ["class", "IoU", "%", "accuracy", "%", "pixels", "%"]
    assert lines[1].split() == ["wall", "66.67", "66.67", "75.00"]
    assert lines[2].split() == ["window", "pane", "50.00", "100.00", "25.00"]
    assert lines[3].split() == ["sofa", "–", "–", "0.00"]
    assert len({len(line) for line in lines[:4]}) == 1, "columns stand under each other"
    assert "mIoU 58.33 %" in lines[-1]
    assert "(1 images)" in lines[-1]


# End to end: a data set on disk whose images show their labels as colours, and a model that reads them


NUM_CLASSES = 4
SIZES = ((32, 64), (40, 36), (64, 32))


@pytest.fixture
def data_root(tmp_path) -> Path:
    """ADE20K's layout: vertical stripes of the classes, 8 pixels wide; label 0 is unlabelled, class k is k + 1."""
    (tmp_path / "classes.txt").write_text("asphalt\nbush\ncar\ndog\n")
    for split in ("training", "validation"):
        images, labels = tmp_path / "images" / split, tmp_path / "annotations" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i, (height, width) in enumerate(SIZES):
            classes = np.tile((np.arange(width) // 8 + i) % NUM_CLASSES, (height, 1)).astype(np.uint8)
            label = classes + 1
            label[:3] = 0
            Image.fromarray(np.dstack([40 * classes] * 3)).save(images / f"{i}.png")
            Image.fromarray(label).save(labels / f"{i}.png")
    return tmp_path


class ColorReader:
    """Query k finds the pixels of colour 40 k and is sure that they are class k; `mistake` renames a class."""

    def __init__(self, num_classes: int = NUM_CLASSES, mistake: dict | None = None) -> None:
        self.names = torch.eye(num_classes + 1)[:num_classes]
        for k, other in (mistake or {}).items():
            self.names[k] = self.names[other]
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, images: torch.Tensor) -> Output:
        height, width = images.shape[2:]
        self.sizes.append((height, width))
        padded = F.pad(images.float(), (0, -width % 32, 0, -height % 32), mode="replicate")
        value = F.avg_pool2d(padded[:, :1], 4)
        colors = 40.0 * torch.arange(len(self.names))[:, None, None]
        masks = 20 - (value - colors).abs()  # (1, K, h, w)
        identity = torch.eye(len(self.names))[None]
        return Output([20 * self.names[None]], [MaskLogits(identity, masks)], (height, width), tuple(padded.shape[2:]))


@pytest.fixture
def recipe() -> recipes.Recipe:
    return recipes.debug_tiny(num_classes=NUM_CLASSES, dataset="folder")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_perfect_model_scores_100(data_root, recipe, num_workers):
    recipe = recipe.vary(data=dict(num_workers=num_workers))
    model = ColorReader()
    result = evaluate(model, recipe, data_root)
    assert [result[name] for name in ("mIoU", "fwIoU", "mACC", "pACC")] == [100] * 4
    assert result["num_images"] == len(SIZES)
    assert model.sizes == list(SIZES), "in order, each at its own size"
    assert [c["name"] for c in result["classes"]] == ["asphalt", "bush", "car", "dog"]


def test_a_model_that_takes_dogs_for_cars(data_root, recipe):
    result = evaluate(ColorReader(mistake={3: 2}), recipe, data_root)
    iou = [c["IoU"] for c in result["classes"]]
    shares = [c["share"] for c in result["classes"]]
    assert iou == [100, 100, pytest.approx(100 * shares[2] / (shares[2] + shares[3])), 0]
    assert result["mIoU"] == pytest.approx(np.mean(iou))
    assert result["pACC"] == pytest.approx(100 - shares[3])


def test_the_recipe_says_how_large_the_model_sees_images(data_root, recipe):
    recipe = recipe.vary(evaluation=dict(shortest_edge=64, longest_edge=100))
    model = ColorReader()
    result = evaluate(model, recipe, data_root)
    assert model.sizes == [(50, 100), (71, 64), (100, 50)]
    assert result["pACC"] > 85
    pixels = sum((h - 3) * w for h, w in SIZES)
    evaluator_pixels = sum(c["share"] for c in result["classes"]) * pixels / 100
    assert evaluator_pixels == pytest.approx(pixels), "compared at the image's own size"


def test_the_multi_scale_figure_looks_at_all_its_sizes_mirrored(data_root, recipe):
    """A reader of single pixels sees its labels at any size."""
    recipe = recipe.vary(evaluation=dict(multi_scale_edges=(32, 64), multi_scale_longest_edge=100))
    model = ColorReader()
    assert evaluate(model, recipe, data_root, multi_scale=True, limit=1)["pACC"] > 85
    assert model.sizes == [(32, 64), (32, 64), (50, 100), (50, 100)]
    with pytest.raises(ValueError, match="no sizes for a multi-scale figure"):
        evaluate(model, recipe.vary(evaluation=dict(multi_scale_edges=())), data_root, multi_scale=True)
    with pytest.raises(ValueError, match="Only semantic models have a multi-scale figure"):
        evaluate(model, recipe.vary(task="panoptic"), data_root, multi_scale=True)


def test_split_limit_and_share_of_the_work(data_root, recipe, capsys):
    model = ColorReader()
    assert evaluate(model, recipe, data_root, split="train", limit=2, progress=True)["num_images"] == 2
    assert model.sizes == list(SIZES[:2])
    assert "evaluate folder train in " in capsys.readouterr().err
    assert evaluate(model, recipe, data_root, limit=99)["num_images"] == 3
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="got 0"):
        evaluate(model, recipe, data_root, limit=0)


def test_processes_share_the_images_and_the_result(data_root, recipe, monkeypatch):
    """Each process takes its own images; what all_reduce adds up is tested above."""
    seen, parts = [], []
    monkeypatch.setattr(SemanticEvaluator, "all_reduce", lambda self: parts.append(self))
    for rank in range(2):
        model = ColorReader()
        evaluate(model, recipe, data_root, rank=rank, world_size=2)
        seen.append(model.sizes)
    assert seen == [[SIZES[0], SIZES[2]], [SIZES[1]]]
    parts[0].merge(parts[1])
    assert parts[0].result() == evaluate(ColorReader(), recipe, data_root)


def test_model_and_data_set_must_have_the_same_classes(data_root, recipe):
    message = r"predicts 7 classes, but folder val in .* has 4\. Build the model with num_classes=4"
    with pytest.raises(ValueError, match=message):
        evaluate(ColorReader(7), recipe.vary(model=dict(num_classes=7)), data_root)
    model = ColorReader(7)
    model.config = replace(recipe.model, num_classes=7)
    with pytest.raises(ValueError, match=message):
        evaluate(model, recipe, data_root)
    with pytest.raises(ValueError, match="predicts 7 classes, but there are 4"):
        evaluate(ColorReader(7), recipe, data_root)


@pytest.fixture
def segments_root(data_root) -> Path:
    """The same with two things, cars and dogs, whose stripes are instances."""
    (data_root / "classes.txt").write_text("asphalt #101010\nbush #008000\ncar #0000ff thing\ndog #ffff00 thing\n")
    for split in ("training", "validation"):
        (data_root / "instances" / split).mkdir(parents=True)
        for path in (data_root / "annotations" / split).iterdir():
            label = np.asarray(Image.open(path))
            numbers = np.where(label >= 3, 1 + np.arange(label.shape[1]) // 8, 0).astype(np.uint16)
            Image.fromarray(numbers).save(data_root / "instances" / split / path.name)
    return data_root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_panoptic_evaluation_counts_stripes_of_a_color_as_one_thing(segments_root, recipe, num_workers):
    """The reader sees colours, not instances: it is right where a thing has one stripe, and about stuff."""
    recipe = recipe.vary(task="panoptic", data=dict(num_workers=num_workers))
    result = evaluate(ColorReader(), recipe, segments_root)
    assert result["num_images"] == len(SIZES)
    assert result["PQ_stuff"] > 90
    assert result["RQ_stuff"] == 100
    cars = result["classes"][2]
    assert (cars["name"], cars["TP"]) == ("car", 2)  # two images have one
    assert cars["FN"] == 2, "two stripes of an image that were taken for one car"
    assert cars["FP"] == 1
    assert result["mIoU"] > 99
    assert cars["AP"] is not None, "the same model, by its scored masks"
    assert cars["IoU"] > 99
    assert result["classes"][0]["AP"] is None, "stuff has no instances"
    assert "PQ_things" in format_table(result)


def test_instance_evaluation_has_only_things_and_a_limit(segments_root, recipe):
    recipe = recipe.vary(task="instance", model=dict(num_classes=2), evaluation=dict(top_k=7))
    model = ColorReader(2)  # colours 0 and 40 are asphalt and bush: nothing of it is a thing
    result = evaluate(model, recipe, segments_root)
    assert [c["name"] for c in result["classes"]] == ["car", "dog"]
    assert [c["instances"] for c in result["classes"]] == [4, 4]
    assert result["AP"] == 0
    assert "AR7" in result


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_data_set_without_annotation_for_the_task_is_named(data_root, recipe, task):
    from m2f_lab.data import open_dataset

    dataset = open_dataset("folder", data_root, "val")
    with pytest.raises(ValueError, match=f"folder val in .* has no annotation for task='{task}'; open"):
        evaluate(ColorReader(), replace(recipe, task=task), dataset)
    with pytest.raises(ValueError, match="marks no class as a thing"):
        evaluate(ColorReader(), replace(recipe, task=task), data_root)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_label_is_named_also_from_a_thread(data_root, recipe, num_workers):
    path = data_root / "annotations" / "validation" / "1.png"
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"1\.png"):
        evaluate(ColorReader(), recipe.vary(data=dict(num_workers=num_workers)), data_root)


@pytest.mark.parametrize("bad", range(len(SIZES)))
def test_predictions_that_cannot_be_counted_are_reported(data_root, recipe, monkeypatch, bad):
    """Counting goes on beside the model; what it raises must not get lost, not even after the last image."""

    def update(self, prediction, label_map):
        if label_map.shape == SIZES[bad]:
            raise ValueError("cannot count this")

    monkeypatch.setattr(SemanticEvaluator, "update", update)
    with pytest.raises(ValueError, match="cannot count this"):
        evaluate(ColorReader(), recipe, data_root)


@pytest.mark.skipif(not CAMVID.is_dir(), reason="the CamVid photographs are not here")
def test_a_constant_predictor_on_photographs():
    """The most frequent class at each pixel of the training images; its published reference is 16.7 %."""
    from m2f_lab.data import open_dataset

    train, val = (open_dataset("folder", CAMVID, split) for split in ("train", "val"))
    counts = np.zeros((11, 360, 480), np.int64)
    rows, columns = np.indices((360, 480))
    for i in range(len(train)):
        label_map = train.to_label_map(train.raw_label(i))
        known = label_map != 255
        counts[label_map[known], rows[known], columns[known]] += 1
    constant = counts.argmax(0).astype(np.uint8)
    evaluator = SemanticEvaluator(11, val.classes.names)
    for i in range(len(val)):
        evaluator.update(constant, val.to_label_map(val.raw_label(i)))
    assert evaluator.result()["mIoU"] == pytest.approx(16.7, abs=0.05)


def test_a_report_holds_every_image_and_shows_the_worst(segments_root, recipe, tmp_path):
    """The figures are those of an evaluation without a report."""
    for task in ("semantic", "panoptic"):
        varied = recipe.vary(task=task, published={"mIoU": 47.7})
        model = ColorReader(mistake={3: 2})
        out = tmp_path / task
        figures = evaluate(model, varied, segments_root, out=out)
        assert figures == evaluate(model, varied, segments_root)
        content = json.loads((out / "evaluation.json").read_text())
        assert {name: content[name] for name in figures} == json.loads(json.dumps(figures))
        assert [row["name"] for row in content["images"]] == ["0", "1", "2"]
        figure = "mIoU" if task == "semantic" else "PQ"
        assert all(row[figure] < 100 for row in content["images"])
        page = (out / "report.html").read_text()
        assert page.count("data:image/jpeg;base64,") == 3
        assert "<td>dog</td><td>car</td>" in page, "the confused pair"
        assert "47.70" in page, "the published figure"
        assert "Precision and recall of pixels" in page
        assert ("Precision and recall of segments" in page) == (task == "panoptic")
        assert page.count(" by size</h2>") == (1 if task == "semantic" else 2)
        for row in content["images"]:
            assert row["confused"][0]["is"] == "dog"
            assert row["confused"][0]["was called"] == "car"
            assert row["boundary_error"] > 0
            assert row["classes"]["asphalt"] > row["classes"]["dog"] == 0
        assert {row["name"]: row["recall"] for row in content["pixels"]}["dog"] == 0
        if task == "semantic":
            wrong, pixels = (
                sum(row["pixels"] * (row["error"] or 0) for row in content["by_distance"]),
                sum(row["pixels"] for row in content["by_distance"]),
            )
            assert wrong / pixels == pytest.approx(100 - figures["pACC"])
        worst = min(content["images"], key=lambda row: row[figure])
        assert page.index(f"dataset[{worst['number']}].image") == min(
            page.index(f"dataset[{row['number']}].image") for row in content["images"]
        )
        assert "http" not in page.replace("http-equiv", ""), "nothing is fetched"


def test_a_report_of_instances(segments_root, recipe, tmp_path):
    recipe = recipe.vary(task="instance", model=dict(num_classes=2))
    figures = evaluate(ColorReader(2), recipe, segments_root, out=tmp_path / "out")
    assert figures == evaluate(ColorReader(2), recipe, segments_root)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Classes by AP" in page
    assert page.count("<polyline") == 2 * sum(row["AP"] is not None for row in figures["classes"])
    with pytest.raises(ValueError, match="of one process"):
        evaluate(ColorReader(2), recipe, segments_root, out=tmp_path / "out", world_size=2)
