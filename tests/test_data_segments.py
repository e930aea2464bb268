"""Readers of segments: ADE20K, COCO and Mapillary Vistas, pixel for pixel against their files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from small_data import picture, write

from m2f_lab import recipes
from m2f_lab.data import DataError, Segments, ade20k, open_dataset, read_label, training_batches
from m2f_lab.data.coco import open_instances, open_panoptic, panoptic_picture, segment_ids
from m2f_lab.evaluation import InstanceEvaluator, PanopticEvaluator, SemanticEvaluator
from m2f_lab.structures import IGNORE, Prediction, Segment

DATA = Path(__file__).parents[2] / "shared" / "data"
COCO = DATA / "coco_panoptic_sample"
CATEGORIES = [
    {"id": 92, "name": "banner", "isthing": 0, "color": [1, 2, 3]},
    {"id": 1, "name": "person", "isthing": 1, "color": [4, 5, 6]},
    {"id": 3, "name": "car", "isthing": 1, "color": [7, 8, 9]},
]


def ids() -> np.ndarray:
    ids = np.zeros((6, 8), np.int32)
    ids[:2], ids[3:, :4], ids[3:, 5:] = 70_000, 300, 7
    return ids


def write_panoptic(root: Path, listed: list[tuple[int, int, int]]) -> Path:
    """One image of COCO; (segment id, category id, crowd) of each segment."""
    write(root / "train2017" / "a.jpg", picture(6, 8))
    write(root / "annotations" / "panoptic_train2017" / "a.png", panoptic_picture(ids()))
    infos = [{"id": i, "category_id": category, "iscrowd": crowd} for i, category, crowd in listed]
    return dump(
        root / "annotations" / "panoptic_train2017.json",
        [{"image_id": 5, "file_name": "a.png", "segments_info": infos}],
    )


def dump(path: Path, annotations: list[dict], categories: list[dict] = CATEGORIES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": 5, "file_name": "a.jpg", "height": 6, "width": 8}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def assert_perfect_against_itself(dataset) -> None:
    panoptic = PanopticEvaluator(len(dataset.classes), dataset.classes.things)
    semantic, instance = SemanticEvaluator(len(dataset.classes)), InstanceEvaluator(len(dataset.classes))
    for sample in dataset:
        found = sample.segments
        truth = dict(enumerate(found.labels.tolist(), start=1))
        singles = {number: label for number, label in truth.items() if not found.crowd[number - 1]}
        prediction = np.where(np.isin(found.id_map + 1, list(singles)), found.id_map + 1, 0)
        panoptic.update((prediction, singles), found.id_map + 1, truth, set(truth) - set(singles))
        semantic.update(np.where(sample.label_map == IGNORE, 0, sample.label_map), sample.label_map)
        instance.update(as_prediction(found), found)
    assert panoptic.result()["PQ"] == 100
    assert semantic.result()["mIoU"] == 100
    assert instance.result()["AP"] == pytest.approx(100)


def as_prediction(truth: Segments) -> Prediction:
    """What a perfect model says of each segment that is no crowd."""
    singles = np.flatnonzero(~truth.crowd).tolist()
    segments = [Segment(n + 1, int(truth.labels[n]), True, 1.0, n, int(truth.areas[n])) for n in singles]
    return Prediction("instance", masks=truth.masks()[singles], segments=tuple(segments))


def test_ids_survive_the_picture():
    numbers = np.array([[0, 1, 255, 256, 65535, 65536, 2**24 - 1]])
    np.testing.assert_array_equal(segment_ids(panoptic_picture(numbers)), numbers)


def test_panoptic_keeps_order_crowd_and_pixels_and_puts_things_first(tmp_path):
    write_panoptic(tmp_path, [(7, 3, 1), (70_000, 92, 0), (300, 1, 0)])
    dataset = open_dataset("coco", tmp_path, "train", task="panoptic")
    assert dataset.classes.names == ("person", "car", "banner")
    assert dataset.classes.things == {0, 1}
    segments = dataset[0].segments
    assert segments.labels.tolist() == [1, 2, 0]
    assert segments.crowd.tolist() == [True, False, False]
    for number, identity in enumerate((7, 70_000, 300)):
        np.testing.assert_array_equal(segments.mask(number), ids() == identity)
    assert_perfect_against_itself(dataset)


def test_segments_that_are_not_listed_are_named(tmp_path):
    write_panoptic(tmp_path, [(7, 3, 0), (300, 1, 0)])
    with pytest.raises(DataError, match=r"a\.png holds the segments 70000"):
        open_dataset("coco", tmp_path, "train", task="panoptic")[0]


def test_unknown_categories_are_named(tmp_path):
    write_panoptic(tmp_path, [(7, 44, 0)])
    with pytest.raises(DataError, match=r"panoptic_train2017\.json: .*category ids 44"):
        open_dataset("coco", tmp_path, "train", task="panoptic")


def test_instances_as_polygons_and_both_run_lengths_agree(tmp_path):
    from faster_coco_eval.core import mask as coco

    write(tmp_path / "train2017" / "a.jpg", picture(6, 8))
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:6] = 1
    compressed = coco.encode(np.asfortranarray(mask))
    counts = compressed["counts"]
    shapes = [
        [[2, 1, 6, 1, 6, 4, 2, 4]],
        {"size": [6, 8], "counts": counts.decode() if isinstance(counts, bytes) else counts},
        {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 14]},
    ]
    found = [
        {"id": n, "image_id": 5, "category_id": 3, "iscrowd": int(n == 2), "segmentation": shape}
        for n, shape in enumerate(shapes)
    ]
    dump(tmp_path / "annotations" / "instances_train2017.json", found, CATEGORIES[1:])
    segments = open_dataset("coco", tmp_path, "train", task="instance")[0].segments
    assert segments.labels.tolist() == [1, 1, 1]
    assert segments.crowd.tolist() == [False, False, True]
    for number in range(3):
        np.testing.assert_array_equal(segments.mask(number), mask.astype(bool))


def test_images_with_crowd_only_are_measured_but_not_trained_on(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / f"{split}2017" / "a.jpg", picture(6, 8))
        crowd = [{"id": 1, "image_id": 5, "category_id": 1, "iscrowd": 1, "segmentation": [[0, 0, 4, 0, 4, 4]]}]
        dump(tmp_path / "annotations" / f"instances_{split}2017.json", crowd, CATEGORIES[1:])
    assert len(open_dataset("coco", tmp_path, "val", task="instance")) == 1
    with pytest.raises(DataError, match="empty"):
        open_dataset("coco", tmp_path, "train", task="instance")


def test_ade20k_instances_have_the_classes_of_the_hundred_things(tmp_path):
    write(tmp_path / "images" / "training" / "a.jpg", picture(6, 8))
    label = np.zeros((6, 8, 3), np.uint8)
    label[:2] = (1, 9, 0)
    label[3:] = (100, 2, 0)
    file = write(tmp_path / "annotations_instance" / "training" / "a.png", label)
    dataset = open_dataset("ade20k", tmp_path, "train", task="instance")
    assert len(dataset.classes) == 100
    assert (dataset.classes.names[0], dataset.classes.names[99]) == ("bed", "flag")
    segments = dataset[0].segments
    assert segments.labels.tolist() == [99, 0]
    np.testing.assert_array_equal(segments.masks(), [label[..., 1] == 2, label[..., 1] == 9])
    label[5] = (50, 2, 0)
    write(file, label)
    with pytest.raises(DataError, match=r"a\.png: instance 2 has pixels of the class ids 50, 100"):
        dataset[0]


def test_ade20k_panoptic_keeps_things_interleaved(tmp_path):
    write(tmp_path / "images" / "validation" / "a.jpg", picture(6, 8))
    write(tmp_path / "ade20k_panoptic_val" / "a.png", panoptic_picture(ids()))
    infos = [{"id": 70_000, "category_id": 0}, {"id": 300, "category_id": 7}, {"id": 7, "category_id": 149}]
    categories = [{"id": number, "name": name} for number, name in enumerate(ade20k.CLASSES.names)]
    annotations = [{"image_id": 5, "file_name": "a.png", "segments_info": infos}]
    dump(tmp_path / "ade20k_panoptic_val.json", annotations, categories)
    dataset = open_dataset("ade20k", tmp_path, "val", task="panoptic")
    assert dataset[0].segments.labels.tolist() == [0, 7, 149]
    assert dataset.classes == ade20k.CLASSES
    assert_perfect_against_itself(dataset)


def test_mapillary_ignores_the_last_label(tmp_path):
    names = ("animal--bird", "construction--flat--road", "void--unlabeled")
    labels = [
        {"name": name, "readable": name.split("--")[-1].title(), "color": [n, n, n], "instances": n == 0}
        for n, name in enumerate(names)
    ]
    (tmp_path / "config.json").write_text(json.dumps({"labels": labels}))
    training = tmp_path / "training"
    write(training / "images" / "a.jpg", picture(6, 8))
    write(training / "labels" / "a.png", np.tile(np.array([0, 0, 1, 1, 1, 2, 2, 2], np.uint8), (6, 1)))
    sample = open_dataset("mapillary", tmp_path, "train")[0]
    assert sample.label_map[0].tolist() == [0, 0, 1, 1, 1, 255, 255, 255]

    write(training / "panoptic" / "a.png", panoptic_picture(ids()))
    infos = [{"id": 70_000, "category_id": 2}, {"id": 300, "category_id": 1}, {"id": 7, "category_id": 1}]
    categories = [{"id": n + 1, "name": name} for n, name in enumerate(names[:2])]
    annotations = [{"image_id": 5, "file_name": "a.png", "segments_info": infos}]
    dump(training / "panoptic" / "panoptic_2018.json", annotations, categories)
    dataset = open_dataset("mapillary", tmp_path, "train", task="panoptic")
    assert dataset[0].segments.labels.tolist() == [1, 0, 0]
    assert_perfect_against_itself(dataset)
    assert open_dataset("mapillary", tmp_path, "train", task="instance")[0].segments.labels.tolist() == [0, 0]


@pytest.mark.skipif(not COCO.is_dir(), reason="needs the sample of COCO's panoptic API")
def test_the_two_images_of_coco_load_and_match_themselves():
    images = COCO / "input_images"
    panoptic = open_panoptic(images, COCO / "panoptic_examples.json", COCO / "panoptic_examples", split="val")
    assert panoptic.classes.things == set(range(80))
    assert len(panoptic.classes) == 133
    assert_perfect_against_itself(panoptic)
    instances = open_instances(images, COCO / "panoptic_coco_detection_format.json", split="val")
    evaluator = InstanceEvaluator(len(instances.classes))
    for sample in instances:
        evaluator.update(as_prediction(sample.segments), sample.segments)
    assert evaluator.result()["AP"] == pytest.approx(100)
    for sample, other in zip(panoptic, instances, strict=True):
        assert sorted(sample.segments.areas.tolist()) == sorted(other.segments.areas.tolist())


# ADE20K's sample has semantic labels alone. What stands beside them here is made from these: each connected part of a
# thing is an instance, in the layouts that the benchmark's own scripts write.

ADE20K_SAMPLE = DATA / "ade20k_sample"


def with_all_labels(root: Path) -> Path:
    """The sample with instance and panoptic labels."""
    for folder in ("images", "annotations"):
        shutil.copytree(ADE20K_SAMPLE / folder, root / folder)
    infos, rows = [], []
    categories = [
        {"id": k, "name": name, "isthing": int(k in ade20k.CLASSES.things), "color": [0, 0, 0]}
        for k, name in enumerate(ade20k.CLASSES.names)
    ]
    things = sorted(ade20k.CLASSES.things)
    for number, file in enumerate(sorted((root / "annotations" / "validation").glob("*.png"))):
        label_map = read_label(file).astype(int) - 1
        picture, segments_map, segments = np.zeros((*label_map.shape, 3), np.uint8), np.zeros_like(label_map), []
        for label in sorted(set(np.unique(label_map)) - {-1}):
            parts, count = ndimage.label(label_map == label)
            for part in range(1, count + 1) if label in things else [None]:
                mask = (label_map == label) if part is None else parts == part
                segments.append({"id": 1000 + len(segments), "category_id": int(label), "iscrowd": 0})
                segments_map[mask] = segments[-1]["id"]
                if part is not None and picture[..., 1].max() < 255:
                    picture[mask] = (1 + things.index(label), picture[..., 1].max() + 1, 0)
        write(root / "annotations_instance" / "validation" / file.name, picture)
        write(root / "ade20k_panoptic_val" / file.name, panoptic_picture(segments_map))
        rows.append({"image_id": number, "file_name": file.name, "segments_info": segments})
        height, width = label_map.shape
        infos.append({"id": number, "file_name": f"{file.stem}.jpg", "height": height, "width": width})
    content = {"images": infos, "annotations": rows, "categories": categories}
    (root / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    return root


@pytest.mark.skipif(not ADE20K_SAMPLE.is_dir(), reason="the sample of ADE20K is not on this machine")
def test_the_three_images_of_ade20k_load_in_every_task_and_match_themselves(tmp_path):
    root = with_all_labels(tmp_path / "ade20k")
    opened = {task: open_dataset("ade20k", root, "val", task=task) for task in ("semantic", "panoptic", "instance")}
    assert {len(dataset) for dataset in opened.values()} == {3}
    assert_perfect_against_itself(opened["panoptic"])
    evaluator = InstanceEvaluator(100)
    for semantic, panoptic, instance in zip(*opened.values(), strict=True):
        np.testing.assert_array_equal(panoptic.label_map, semantic.label_map)
        assert len(instance.segments) == sum(label in ade20k.CLASSES.things for label in panoptic.segments.labels)
        things = sorted(ade20k.CLASSES.things)
        covered = np.isin(semantic.label_map, things)
        np.testing.assert_array_equal(instance.segments.id_map >= 0, covered)
        labels = np.array(things)[instance.segments.labels[instance.segments.id_map[covered]]]
        np.testing.assert_array_equal(labels, semantic.label_map[covered])
        evaluator.update(as_prediction(instance.segments), instance.segments)
    assert evaluator.result()["AP"] == pytest.approx(100)
    for task, dataset in opened.items():
        recipe = recipes.ade20k_swin_tiny(task)
        (batch,) = training_batches(
            dataset, replace(recipe.data, num_workers=0), batch_size=3, seed=0, num_batches=1, task=task
        )
        assert any(target.num_segments for target in batch.targets)
