"""Targets of all tasks beside those of the official mappers, in every pixel, class and order."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco
from safetensors.numpy import load_file

from m2f_lab.data import Sample, Segments, TrainingTransform
from m2f_lab.data.transforms import Placement
from m2f_lab.recipes import DataConfig
from m2f_lab.structures import IGNORE, Target

VECTORS = Path(__file__).parent / "golden" / "official_targets.safetensors"
CASES = json.loads(VECTORS.with_suffix(".json").read_text())
TENSORS = load_file(VECTORS)
TASKS = {"semantic": "semantic", "panoptic": "panoptic", "instance": "instance",
         "coco_panoptic": "panoptic", "coco_instance": "instance"}  # fmt: skip


def sample_of(name: str) -> Sample:
    """The sample that a case was made of."""
    case, image = CASES[name], TENSORS[f"{name}.image"]
    if "segments_info" in case:
        info = case["segments_info"]
        ids, labels, crowd = ([each[key] for each in info] for key in ("id", "category_id", "iscrowd"))
        return Sample(name, image, segments=Segments.from_id_map(TENSORS[f"{name}.id_map"], ids, labels, crowd))
    if "annotations" in case:
        labels, crowd = ([each[key] for each in case["annotations"]] for key in ("category_id", "iscrowd"))
        shapes = tuple(shape_of(each["segmentation"], image.shape[:2]) for each in case["annotations"])
        size = image.shape[:2]
        return Sample(name, image, segments=Segments(np.array(labels), np.array(crowd, bool), size, shapes=shapes))
    return Sample(name, image, TENSORS[f"{name}.semantic_map"].astype(np.uint8))


def shape_of(segmentation: dict | list, size: tuple[int, int]):
    if isinstance(segmentation, dict):
        return coco.decode(coco.frPyObjects(segmentation, *size)).astype(bool)
    return tuple(np.array(ring, float).reshape(-1, 2) for ring in segmentation)


def placement_of(name: str) -> Placement:
    steps = {step["kind"]: step for step in CASES[name]["transforms"]}
    order = [step["kind"] for step in CASES[name]["transforms"]]
    crop, size = steps["crop"], (steps["resize"]["new_height"], steps["resize"]["new_width"])
    height, width = min(crop["height"], size[0] - crop["y0"]), min(crop["width"], size[1] - crop["x0"])
    box = crop["y0"], crop["x0"], height, width
    return Placement(size, box, flip="flip_horizontal" in steps, flip_first=order[0] == "flip_horizontal")


def transform_of(name: str) -> TrainingTransform:
    lsj = name.startswith("coco")
    config = DataConfig(
        dataset="folder", crop_size=tuple(CASES[name]["out_size"]), shortest_edges=(40,), longest_edge=160,
        scale_range=(0.1, 2.0) if lsj else None,
    )  # fmt: skip
    return TrainingTransform(config, TASKS[name.split(".")[0]])


@pytest.mark.parametrize("name", CASES)
def test_targets_are_those_of_the_official_mappers(name: str) -> None:
    target = transform_of(name).target(sample_of(name), placement_of(name))
    assert target.labels.tolist() == CASES[name]["classes"]
    masks = target.dense().numpy()
    assert masks.shape == (len(target.labels), *CASES[name]["out_size"])
    if len(masks):
        assert np.array_equal(masks, TENSORS[f"{name}.out.masks"].astype(bool))


@pytest.mark.parametrize("name", CASES)
def test_images_are_those_of_the_official_mappers(name: str) -> None:
    """Within the two grey levels by which PyTorch's resize differs from Pillow's."""
    place = placement_of(name)
    image = place.image(TENSORS[f"{name}.image"]).astype(int)
    official = TENSORS[f"{name}.out.image"].transpose(1, 2, 0).astype(int)[: place.box[2], : place.box[3]]
    assert abs(image - official).max() <= 2


def test_segments_of_no_area_stay_targets() -> None:
    name = "panoptic.1"
    target = transform_of(name).target(sample_of(name), placement_of(name))
    assert (target.dense().flatten(1).sum(1) == 0).sum() == 3


@pytest.mark.parametrize("name", ["coco_panoptic.0", "coco_instance.0"])
def test_large_scale_jitter_reaches_from_its_least_to_its_largest_scale(name: str) -> None:
    sample, transform = sample_of(name), transform_of(name)
    sizes, flips = [], set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        image, target = transform(sample, rng)
        assert image.shape[1:] == target.size == (64, 64)
        filled = (image != 128).any(0).numpy()
        sizes.append(filled.any(0).sum())
        flips.add(bool(np.random.default_rng(seed).random() < 0.5))
    assert min(sizes) < 20
    assert max(sizes) == 64
    assert flips == {True, False}


def test_a_task_without_annotation_is_refused() -> None:
    sample = Sample("street", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))
    config = DataConfig(dataset="folder", crop_size=(8, 8), shortest_edges=(8,), longest_edge=8)
    with pytest.raises(ValueError, match="street has no annotation for task"):
        TrainingTransform(config, "panoptic")(sample, np.random.default_rng(0))


# ----------------------------------------------------------------------------------------------------------------------
# Segments


def test_more_segments_than_a_byte_holds() -> None:
    ids = np.arange(400).reshape(20, 20)
    segments = Segments.from_id_map(ids, range(400), [0] * 400)
    target = segments.target()
    assert (target.num_segments, target.id_map.dtype) == (400, torch.int16)
    assert torch.equal(target.dense().sum((1, 2)), torch.ones(400, dtype=torch.int64))
    few = segments.select([3, 255, 256])
    assert few.target().id_map.dtype == torch.uint8
    assert few.areas.tolist() == [1, 1, 1]
    assert few.label_map()[0, 3] == 0
    assert (few.label_map() == IGNORE).sum() == 397


def test_targets_of_bytes_and_wider_integers_are_read_together() -> None:
    many = Segments.from_id_map(np.arange(400).reshape(20, 20), range(400), [0] * 400).target()
    none = np.full((20, 20), -1)
    few = Segments.from_id_map(none, [7], [2]).target()  # 255 everywhere: no segment, not segment 255
    points = torch.rand(2, 50, 2, generator=torch.Generator().manual_seed(0))
    from m2f_lab.structures import segments_at

    both = segments_at([few, many], points, (20, 20))
    assert both[0].abs().sum() == 0
    assert torch.equal(both[1], many.at(points[1], (20, 20)))


def test_the_three_forms_of_a_segment_agree() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(-1, 5, (12, 15))
    by_map = Segments.from_id_map(ids, range(5), [4, 1, 1, 0, 2], [False, True, False, False, False])
    by_mask = replace(by_map, id_map=None, shapes=tuple(by_map.masks()))
    for form in (by_map, by_mask):
        assert form.areas.tolist() == [(ids == number).sum() for number in range(5)]
        assert np.array_equal(form.label_map(), np.append([4, 1, 1, 0, 2], IGNORE)[ids])
        target = form.target()
        assert target.labels.tolist() == [4, 1, 0, 2]
        assert torch.equal(target.dense()[1], torch.from_numpy(ids == 2))
    square = (np.array([[2, 3], [6, 3], [6, 8], [2, 8.0]]),)
    drawn = Segments(np.array([0]), np.array([False]), (12, 15), shapes=(square,))
    assert drawn.mask(0)[3:8, 2:6].all()
    assert drawn.areas.tolist() == [20]


def test_label_maps_that_are_none_are_refused() -> None:
    for wrong, words in (
        (torch.full((4, 4), 300), "holds 300…300"),
        (torch.full((4, 4), -1), "holds -1…-1"),
        (torch.ones(4, 4), r"torch.float32 \[4, 4\]"),
        (torch.ones(4, dtype=torch.uint8), r"torch.uint8 \[4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            Target.from_label_map(wrong)
    for good in (torch.ones(4, 4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.uint16), np.ones((4, 4), np.int32)):
        assert Target.from_label_map(good).labels.tolist() == [1]
