"""Folders with instances: numbers in one file, a file each, with classes and with stuff."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_lab.data import DataError, open_dataset

NUCLEI = Path(__file__).parents[2] / "shared" / "data" / "nuclei"


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path) -> Path:
    """One image of 6 × 8 pixels in which the instances 300 and 7 lie, and 0 is background."""
    (tmp_path / "classes.txt").write_text("cell #e8a33d thing\n")
    write(tmp_path / "images" / "training" / "a.png", np.zeros((6, 8, 3), np.uint8))
    write(tmp_path / "instances" / "training" / "a.png", numbers())
    return tmp_path


def numbers() -> np.ndarray:
    ids = np.zeros((6, 8), np.uint16)
    ids[1:3, 1:4], ids[4:, 2:] = 300, 7
    return ids


def with_classes(root: Path, label: np.ndarray) -> None:
    (root / "classes.txt").write_text("sky #0000ff\ncell #e8a33d thing\nworm #00ff00 thing\n")
    write(root / "annotations" / "training" / "a.png", label)


def test_numbers_of_sixteen_bits_in_any_order(root):
    dataset = open_dataset("folder", root, "train", task="instance")
    sample = dataset[0]
    assert dataset.classes.names == ("cell",)
    assert sample.segments.labels.tolist() == [0, 0]
    np.testing.assert_array_equal(sample.segments.mask(0), numbers() == 7)
    np.testing.assert_array_equal(sample.segments.mask(1), numbers() == 300)


def test_more_than_255_instances_all_become_targets(root):
    ids = np.arange(1, 20 * 20 + 1, dtype=np.uint16).reshape(20, 20)
    write(root / "images" / "training" / "a.png", np.zeros((20, 20, 3), np.uint8))
    write(root / "instances" / "training" / "a.png", ids)
    target = open_dataset("folder", root, "train", task="instance")[0].segments.target()
    assert target.num_segments == 400
    assert target.id_map.unique().tolist() == list(range(400))


def test_a_file_for_each_instance_which_may_overlap(root):
    (root / "instances" / "training" / "a.png").unlink()
    first, second = np.zeros((6, 8), np.uint8), np.zeros((6, 8), np.uint8)
    first[:3], second[2:5] = 255, 1
    for name, mask in (("b", first), ("c", second)):
        write(root / "instances" / "training" / "a" / f"{name}.png", mask)
    segments = open_dataset("folder", root, "train", task="instance")[0].segments
    np.testing.assert_array_equal(segments.masks(), [first > 0, second > 0])
    second[2] = 0
    write(root / "instances" / "training" / "a" / "c.png", second)
    segments = open_dataset("folder", root, "train", task="instance")[0].segments
    assert segments.id_map is not None, "what does not overlap lies in one map"
    np.testing.assert_array_equal(segments.masks(), [first > 0, second > 0])


def test_classes_of_instances_come_from_the_annotation(root):
    with_classes(root, np.where(numbers() == 7, 2, np.where(numbers() == 300, 3, 1)).astype(np.uint8))
    dataset = open_dataset("folder", root, "train", task="instance")
    assert dataset.classes.names == ("cell", "worm")
    assert dataset[0].segments.labels.tolist() == [0, 1]
    panoptic = open_dataset("folder", root, "train", task="panoptic")
    assert panoptic.classes.names == ("sky", "cell", "worm")
    sample = panoptic[0]
    assert sample.segments.labels.tolist() == [1, 2, 0]
    np.testing.assert_array_equal(sample.segments.mask(2), numbers() == 0)
    np.testing.assert_array_equal(sample.label_map, open_dataset("folder", root, "train")[0].label_map)


def test_an_instance_of_two_classes_is_named(root):
    label = np.where(numbers() > 0, 2, 1).astype(np.uint8)
    label[4] = 3
    with_classes(root, label)
    with pytest.raises(DataError, match=r"a\.png: instance 7 of a\.png covers cell, worm; each instance"):
        open_dataset("folder", root, "train", task="instance")[0]


def test_what_is_missing_is_said_before_anything_is_read(root):
    write(root / "images" / "training" / "b.png", np.zeros((6, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"1 of 2 images have no instances in .*training: b\.png"):
        open_dataset("folder", root, "train", task="instance")
    with pytest.raises(DataError, match=r"There is no .*annotations/training, which says of what class"):
        open_dataset("folder", root, "train", task="panoptic")
    (root / "classes.txt").write_text("cell\n")
    with pytest.raises(DataError, match="marks no class as a thing"):
        open_dataset("folder", root, "train", task="instance")


def test_sizes_that_differ_are_named(root):
    write(root / "images" / "training" / "a.png", np.zeros((6, 9, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is 9 × 6 pixels, but its annotation is for 8 × 6"):
        open_dataset("folder", root, "train", task="instance")[0]


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the microscopy is not there")
def test_real_microscopy_has_the_same_instances_in_both_layouts(tmp_path):
    one_map = open_dataset("folder", NUCLEI, "train", task="instance")
    assert len(one_map) == 453
    (tmp_path / "classes.txt").write_text((NUCLEI / "classes.txt").read_text())
    folder = sorted((NUCLEI / "one_file_per_mask").iterdir())[0]
    (picture,) = (folder / "images").iterdir()
    write(tmp_path / "images" / "training" / picture.name, np.asarray(Image.open(picture)))
    for mask in (folder / "masks").iterdir():
        write(tmp_path / "instances" / "training" / picture.stem / mask.name, np.asarray(Image.open(mask)))
    sample = open_dataset("folder", tmp_path, "train", task="instance")[0]
    assert len(sample.segments) == len(list((folder / "masks").iterdir()))
    twins = [other for other in one_map if other.image.shape == sample.image.shape]
    twin = next(other for other in twins if np.array_equal(other.image, sample.image))
    assert sorted(twin.segments.areas.tolist()) == sorted(sample.segments.areas.tolist())
