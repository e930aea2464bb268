"""A folder with every fault gives one report that lists all of them by file, before anything is trained."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import picture, raw_label, write, write_folder

from m2f_lab.__main__ import main
from m2f_lab.data import DataError, audit, open_dataset

TURNED = 0x0112


def write_turned(path: Path, pixels: np.ndarray, orientation: int) -> None:
    exif = Image.Exif()
    exif[TURNED] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = write_folder(tmp_path, count=3)  # 000…002 are right
    images, labels = root / "images" / "training", root / "annotations" / "training"
    write(images / "no_label.png", picture())
    write(images / "unknown.png", picture())
    write(labels / "unknown.png", np.full((12, 16), 77, np.uint8))
    write(images / "wide.png", picture(12, 20))
    write(labels / "wide.png", raw_label())
    write(images / "colored.png", picture())
    write(labels / "colored.png", picture())
    (images / "broken.png").write_bytes(b"not a picture")
    write(labels / "broken.png", raw_label())
    write(images / "twin.png", picture())
    write(images / "twin.jpg", picture())
    write(labels / "twin.png", raw_label())
    write(images / "sixteen_bits.png", picture())
    write(labels / "sixteen_bits.png", np.full((12, 16), 999, np.uint16))
    write(images / "palette.png", picture())
    palette = Image.fromarray(raw_label()).convert("P")
    palette.putdata(raw_label().ravel().tolist())
    palette.save(labels / "palette.png")
    write_turned(images / "turned.jpg", picture(), 3)
    write(labels / "turned.png", raw_label())
    Image.fromarray(np.zeros((12, 16, 4), np.uint8), "CMYK").save(images / "print.jpg")
    write(labels / "print.png", raw_label())
    (images / "notes.txt").write_text("photographed on a Monday")
    write(labels / "orphan.png", raw_label())
    write(labels / "compressed.jpg", raw_label())
    (images / "again").symlink_to(images)
    add_instances(root)
    return root


def add_instances(root: Path) -> None:
    """A thing, class 2, of which each image has one instance; and what only instances can get wrong."""
    (root / "classes.txt").write_text("background\ncar thing\ntree\nsea\n")
    images, labels = root / "images" / "training", root / "annotations" / "training"
    instances = root / "instances" / "training"
    square = np.zeros((12, 16), np.uint16)
    square[2:6, 2:6] = 1
    label = np.where(square > 0, 2, 1).astype(np.uint8)
    for name in ("overlap", "nothing", "no_instances", "half_outside"):
        write(images / f"{name}.png", picture())
        write(labels / f"{name}.png", label)
    for file in images.glob("*.*"):
        if file.stem != "no_instances":
            write(instances / f"{file.stem}.png", 0 * square)
    for name in ("overlap", "nothing"):
        (instances / f"{name}.png").unlink()
        for number in range(2):
            write(instances / name / f"{number}.png", (255 * square).astype(np.uint8))
    write(instances / "nothing" / "1.png", np.zeros((12, 16), np.uint8))
    write(instances / "half_outside.png", np.roll(square, 2, axis=0))
    write(instances / "wide.png", np.zeros((12, 16), np.uint16))


IN_LABELS = (
    ("no_label.png", "has no label"),
    ("twin.jpg, twin.png", "share the label"),
    ("wide.png", "is 20 × 12"),
    ("colored.png", "is not a label"),
    ("broken.png", "cannot be read"),
    ("unknown.png", "unknown id 77"),
    ("sixteen_bits.png", "unknown id 999"),
    ("turned.jpg", "turned upright by their EXIF orientation"),
    ("images/training/notes.txt", "LEFT OUT (3)"),
    ("annotations/training/orphan.png", "LEFT OUT (3)"),
    ("annotations/training/compressed.jpg", "LEFT OUT (3)"),
)
IN_INSTANCES = (
    ("overlap", "instances overlap"),
    ("nothing", "1.png of nothing covers"),
    ("no_instances.png", "There is no"),
    ("half_outside.png", "covers background, car"),
)


def test_one_report_lists_every_fault_of_labels_and_instances_by_file(root):
    dataset = open_dataset("folder", root, "train", strict=False, task="panoptic")
    report = audit(dataset)
    for text in (str(report), report.text(most=None)):
        for name, fault in IN_LABELS + IN_INSTANCES:
            assert any(name in line and fault in line for line in text.splitlines()), (name, fault, text)
    with pytest.raises(DataError) as error:
        report.raise_if_wrong()
    for name, _ in IN_INSTANCES:
        assert name in str(error.value), name
    with pytest.raises(DataError, match="would share the label"):
        open_dataset("folder", root, "train", task="panoptic")


def test_the_command_lists_every_file_if_asked(root, capsys):
    images = root / "images" / "training"
    for number in range(30):
        write(images / f"bare_{number}.png", picture())
    arguments = ["audit", "folder", "--data-root", str(root), "--task", "semantic"]
    assert main(arguments) == 1
    assert "and 11 more" in capsys.readouterr().out
    assert main([*arguments, "--all"]) == 1
    text = capsys.readouterr().out
    assert all(f"bare_{number}.png" in text for number in range(30))
    assert "TURNED (1): turned.jpg" in text


def test_one_report_lists_every_fault_by_file(root, caplog):
    with caplog.at_level(logging.WARNING, logger="m2f_lab"):
        dataset = open_dataset("folder", root, "train", strict=False)
    assert "notes.txt" in caplog.text
    report = audit(dataset)
    text = str(report)
    assert report.num_images == 18, "a symbolic link that leads back adds none"
    for kind, name in (
        ("NO LABEL (1)", "no_label.png"),
        ("SHARED LABEL (1)", "twin.jpg, twin.png"),
        ("OTHER SIZE (1)", "wide.png is 16 × 12"),
        ("UNREADABLE (2)", "broken.png"),
        ("UNKNOWN IDS: 77, 999", "colored.png is not a label"),
        ("LEFT OUT (3)", "images/training/notes.txt"),
        ("LEFT OUT (3)", "annotations/training/orphan.png"),
        ("LEFT OUT (3)", "annotations/training/compressed.jpg"),
        ("turned upright by their EXIF orientation", "turned.jpg"),
    ):
        assert kind in text, kind
        assert name in text, name
    assert {"print.jpg", "palette.png"} <= {path.name for path in dataset.image_paths}
    with pytest.raises(DataError) as error:
        report.raise_if_wrong()
    for name in ("no_label", "twin", "wide", "colored", "broken", "unknown", "sixteen_bits"):
        assert name in str(error.value), name


def test_training_does_not_start_on_such_a_folder(root):
    with pytest.raises(DataError, match=r"twin\.jpg, twin\.png in .* would share the label"):
        open_dataset("folder", root, "train")


def test_image_and_label_that_are_turned_alike_stay_together(tmp_path):
    root = write_folder(tmp_path, count=1)
    image, label = np.zeros((12, 16, 3), np.uint8), np.ones((12, 16), np.uint8)
    image[:6], label[:6] = 255, 2
    for orientation in range(1, 9):
        write_turned(root / "images" / "training" / "000.png", image, orientation)
        write_turned(root / "annotations" / "training" / "000.png", label, orientation)
        dataset = open_dataset("folder", root, "train")
        np.testing.assert_array_equal(dataset[0].image[..., 0] > 128, dataset[0].label_map == 1)
        assert not audit(dataset).turned


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".bmp"])
def test_other_formats_and_subfolders_are_read(tmp_path, suffix):
    root = write_folder(tmp_path, count=1)
    write(root / "images" / "training" / "deep" / "down" / f"a{suffix}", picture())
    write(root / "annotations" / "training" / "deep" / "down" / "a.png", raw_label())
    dataset = open_dataset("folder", root, "train")
    assert [path.name for path in dataset.image_paths] == ["000.png", f"a{suffix}"]
    assert dataset[1].label_map.shape == (12, 16)
    assert not dataset.left_out


def test_segments_are_audited_by_class(tmp_path):
    root = write_folder(tmp_path, count=2)
    (root / "classes.txt").write_text("cell thing\n")
    (root / "annotations" / "training" / "000.png").parent.rename(root / "unused")
    overlapping = np.zeros((12, 16), np.uint8)
    overlapping[2:6, 2:6] = 255
    nothing = np.zeros((12, 16), np.uint8)
    for name, mask in (("a", overlapping), ("b", overlapping), ("c", nothing)):
        write(root / "instances" / "training" / "000" / f"{name}.png", mask)
    write(root / "instances" / "training" / "001.png", np.zeros((9, 9), np.uint16))
    report = audit(open_dataset("folder", root, "train", task="instance"))
    text = str(report)
    assert report.counts[0].pixels == 32
    assert "1 images list segments without a pixel, which can only be missed: 000.png" in text
    assert "1 images have instances that overlap" in text
    assert "001.png is 16 × 12 pixels, but its annotation is for 9 × 9" in text


@pytest.mark.parametrize("line", ["cell thing", "cell #e8a33d thing"])
def test_a_kind_needs_no_color(tmp_path, line):
    root = write_folder(tmp_path)
    (root / "classes.txt").write_text(f"sky\n{line}\nroad stuff\ntree\n")
    classes = open_dataset("folder", root, "train").classes
    assert classes.names == ("sky", "cell", "road", "tree")
    assert classes.things == {1}


def test_class_files_of_other_systems(tmp_path):
    root = write_folder(tmp_path)
    (root / "classes.txt").write_bytes("background\r\ncar\r\ntree\r\nsea\r\n".encode("utf-8-sig"))
    assert open_dataset("folder", root, "train").classes.names == ("background", "car", "tree", "sea")
    (root / "classes.txt").write_bytes("straße\ncar\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"classes\.txt is not UTF-8 .*Save it as UTF-8"):
        open_dataset("folder", root, "train")
