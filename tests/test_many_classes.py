"""More classes than a byte holds: 16-bit label maps, with 65535 for pixels to ignore, from files to explorers."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from m2f_lab import build_model, evaluate, recipes
from m2f_lab.data import Classes, DataError, audit, open_dataset, overlay, read_label
from m2f_lab.data.colors import in_bytes
from m2f_lab.data.segments import Segments
from m2f_lab.evaluation import SemanticEvaluator
from m2f_lab.explore import CounterfactualExplorer, PixelLedger, QueryExplorer
from m2f_lab.explore.counterfactuals.label_change import compare_label_maps
from m2f_lab.explore.counterfactuals.views import named_maps
from m2f_lab.explore.runs.snapshots import Snapshots
from m2f_lab.inference.files import label_map_of, predict_files
from m2f_lab.structures import IGNORE, WIDE_IGNORE, MaskLogits, Output, Prediction, Segment, Target, ignored_label
from m2f_lab.training import train

K = 300
CLASSES = Classes(
    tuple(f"kind {k}" for k in range(K)),
    tuple((k % 256, k // 256, 255 - k % 256) for k in range(K)),
    frozenset(range(200, K)),
)
RECIPE = recipes.debug_tiny(num_classes=K, dataset="folder").vary(
    name="many",
    model=dict(num_queries=8, hidden_dim=32, mask_dim=32, num_decoder_layers=1),
    data=dict(crop_size=(48, 64), shortest_edges=(48,), longest_edge=None, single_category_max_area=0.9),
    loss=dict(num_points=64),
    optimization=dict(max_iterations=2, batch_size=2, evaluate_every=2, checkpoint_every=2),
)


def label_maps(count: int, seed: int) -> list[np.ndarray]:
    """Blocks of 8 × 8 pixels of random ids, 0 among them, as they are in files. uint16 [40, 56]"""
    rng = np.random.default_rng(seed)
    return [np.kron(rng.integers(0, K + 1, (5, 7)), np.ones((8, 8))).astype(np.uint16) for _ in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    (root / "classes.txt").write_text("\n".join(f"{name} {'thing' if k in CLASSES.things else 'stuff'}"
                                                for k, name in enumerate(CLASSES.names)))  # fmt: skip
    for seed, split in enumerate(("training", "validation")):
        for number, raw in enumerate(label_maps(3, seed)):
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
            picture = np.stack([raw % 256, raw // 256, 0 * raw], -1).astype(np.uint8)
            Image.fromarray(picture).save(root / "images" / split / f"{number}.png")
            Image.fromarray(raw).save(root / "annotations" / split / f"{number}.png")
    return root


class Reader:
    """The red and green of a pixel are its raw id; query k is class k."""

    def __call__(self, images: torch.Tensor) -> Output:
        height, width = images.shape[2:]
        ids = images[0, 0].long() + 256 * images[0, 1].long() - 1  # -1 in ignored pixels
        masks = torch.where(torch.arange(K)[:, None, None] == ids, 30.0, -30.0)[None]
        logits = torch.cat([40 * torch.eye(K), torch.zeros(K, 1)], dim=1)[None]
        return Output([logits], [MaskLogits(torch.eye(K)[None], masks)], (height, width), (height, width))


@pytest.mark.parametrize(("count", "ignore"), [(1, 255), (255, 255), (256, 65535), (847, 65535)])
def test_255_is_ignored_unless_it_is_a_class(count, ignore):
    classes = Classes(tuple(map(str, range(count))), ((0, 0, 0),) * count)
    assert classes.ignore == ignored_label(count) == ignore
    assert classes.label_dtype == (np.uint8 if ignore == 255 else np.uint16)


def test_a_folder_of_16_bit_labels_is_read_exactly(root):
    dataset = open_dataset("folder", root, "train")
    for sample, raw in zip(dataset, label_maps(3, 0), strict=True):
        expected = np.where(raw == 0, WIDE_IGNORE, raw.astype(int) - 1)
        assert sample.label_map.dtype == np.uint16
        np.testing.assert_array_equal(sample.label_map, expected)
        np.testing.assert_array_equal(dataset.to_raw(sample.label_map), raw)
        target = Target.from_label_map(sample.label_map, dataset.classes.ignore)
        assert target.labels.tolist() == sorted(set(np.unique(expected)) - {WIDE_IGNORE})
        for label, mask in zip(target.labels, target.dense(), strict=True):
            np.testing.assert_array_equal(mask, expected == label.item())
    assert dataset.to_raw(sample.label_map).dtype == np.uint16
    report = audit(dataset)
    assert report.unknown_ids == []
    assert f"kind {max(report.counts) - 1} " in str(report)
    assert not any(report.problems.values())


def test_an_image_may_show_more_classes_than_a_byte_holds():
    label_map = np.arange(K, dtype=np.uint16).reshape(15, 20)
    label_map[0, 0] = WIDE_IGNORE
    target = Target.from_label_map(label_map, WIDE_IGNORE)
    assert target.labels.tolist() == list(range(1, K))
    dense = target.dense()
    assert dense.sum((1, 2)).tolist() == [1] * (K - 1)
    assert not dense[:, 0, 0].any()
    with pytest.raises(ValueError, match="holds classes from 0 and 255 for ignored pixels, but this one holds 1…65535"):
        Target.from_label_map(label_map)


def test_ids_that_are_no_class_are_refused(root, tmp_path):
    dataset = open_dataset("folder", root, "train")
    with pytest.raises(DataError, match=r"holds the 1 unknown id 301\b"):
        dataset.to_label_map(np.full((2, 2), 301, np.uint16))


def test_training_evaluation_and_prediction_of_many_classes(root, tmp_path):
    run = train(RECIPE, root, tmp_path / "run")
    assert run.finished
    assert run.last["num_images"] == 3
    model = run.model("last")
    names = predict_files(model, [root / "images" / "validation"], tmp_path / "out", "semantic", classes=model.classes)
    assert names.is_dir()
    written = read_label(sorted(names.iterdir())[0])
    np.testing.assert_array_equal(written, model.predict(root / "images" / "validation" / "0.png").label_map)


def test_labels_against_themselves_reach_100(root):
    result = evaluate(Reader(), RECIPE, root, split="val")
    assert result["mIoU"] == result["pACC"] == 100
    assert len(result["classes"]) == K


def test_counts_by_hand():
    truth = np.array([[0, 255, 299, WIDE_IGNORE], [256, 256, 255, WIDE_IGNORE]], np.uint16)
    found = np.array([[0, 255, 298, 7], [256, 255, 255, 299]], np.int64)
    evaluator = SemanticEvaluator(K)
    evaluator.update(found, truth)
    expected = {(0, 0): 1, (255, 255): 2, (299, 298): 1, (256, 256): 1, (256, 255): 1}
    assert {tuple(at): int(evaluator.matrix[tuple(at)]) for at in evaluator.matrix.nonzero().tolist()} == expected
    with pytest.raises(ValueError, match=r"The prediction holds \[65535\], but there are 300 classes, 0…299\."):
        evaluator.update(truth, truth)
    with pytest.raises(ValueError, match=r"The truth holds \[300, 400\], .* \(and 65535 for pixels to ignore\)"):
        evaluator.update(found[:1, :2], np.array([[400, 300]]))
    assert evaluator.num_images == 1, "nothing is counted of what is refused"


def test_segments_and_pictures_of_many_classes():
    id_map = np.array([[0, 0, 1], [-1, 1, 2]], np.int32)
    segments = Segments(np.array([255, 299, 3]), np.zeros(3, bool), (2, 3), id_map=id_map)
    label_map = segments.label_map(CLASSES.ignore)
    assert label_map.dtype == np.uint16
    assert label_map.tolist() == [[255, 255, 299], [WIDE_IGNORE, 299, 3]]
    found = Prediction(
        "panoptic", segments_map=id_map + 1,
        segments=tuple(Segment(n + 1, k, False, 1.0, n, 1) for n, k in enumerate((255, 299, 3))),
    )  # fmt: skip
    np.testing.assert_array_equal(label_map_of(found, ignore=CLASSES.ignore), label_map)
    painted = overlay(np.zeros((2, 3, 3), np.uint8), label_map, CLASSES, opacity=1.0)
    assert painted[0, 0].tolist() == list(CLASSES.colors[255])
    assert painted[1, 0].tolist() == [0, 0, 0]


def test_maps_in_bytes_keep_the_largest_classes():
    rng = np.random.default_rng(0)
    label_map = np.minimum(rng.integers(0, K, (60, 60)), rng.integers(0, K, (60, 60)))  # small numbers are frequent
    shown, kept = in_bytes(label_map, CLASSES)
    assert shown.dtype == np.uint8
    assert len(kept) == 128
    assert kept.names[-1] == "other classes"
    counts = np.bincount(label_map.ravel(), minlength=K)
    assert counts[[int(name.split()[1]) for name in kept.names[:-1]]].min() >= np.sort(counts)[-127]
    for value, name in enumerate(kept.names[:-1]):
        label = int(name.split()[1])
        assert np.array_equal(shown == value, label_map == label)
        assert kept.colors[value] == CLASSES.colors[label]
        assert (value in kept.things) == (label in CLASSES.things)
    few = Classes(CLASSES.names[:254], CLASSES.colors[:254])
    same, classes = in_bytes(np.minimum(label_map, 253), few)
    assert classes is few
    assert np.array_equal(same, np.minimum(label_map, 253))


def test_changes_among_many_classes_have_names():
    before = np.array([[0, 256, 299], [299, 299, 299]])
    after = np.array([[0, 255, 298], [299, 299, 299]])
    shown = named_maps(compare_label_maps(before, after, K), CLASSES)
    words = np.array(shown.names)[shown.maps]
    assert words[0].tolist() == [["kind 0", "kind 256", "kind 299"], ["kind 299"] * 3]
    assert words[1, 0].tolist() == ["kind 0", "kind 255", "kind 298"]
    assert words[2].tolist() == [["unchanged", "kind 256 → kind 255", "kind 299 → kind 298"], ["unchanged"] * 3]


def test_explorers_open_models_of_many_classes(tmp_path):
    model, image = build_model(RECIPE.model).eval(), np.zeros((48, 64, 3), np.uint8)
    model.classes = CLASSES
    for tool in (QueryExplorer, PixelLedger, CounterfactualExplorer):
        plt.close(tool(model, image).figure())
    shots = Snapshots(tmp_path)
    shots.begin([image])
    shots.add(1, model, [image], RECIPE.evaluation)
    again = Snapshots(tmp_path)
    again.load()
    np.testing.assert_array_equal(again.label_maps[1][0], shots.label_maps[1][0])
    assert again.label_maps[1][0].dtype == np.uint16


def test_few_classes_stay_in_bytes(root, tmp_path):
    """The path that almost everybody uses does not change."""
    few = replace(CLASSES, names=CLASSES.names[:255], colors=CLASSES.colors[:255], things=frozenset())
    assert (few.ignore, few.label_dtype) == (IGNORE, np.uint8)
    assert Target.from_label_map(np.array([[0, 254, 255]], np.uint8)).id_map.dtype == torch.uint8
