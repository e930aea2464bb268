from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from m2f_lab.data import AuditReport, DataError, audit, open_dataset
from tests.small_data import NAMES, raw_label, write, write_cityscapes, write_folder


def audit_folder(root: Path, label: np.ndarray | None = None, **options) -> AuditReport:
    return audit(open_dataset("folder", write_folder(root, label=label), "train", strict=False), **options)


# ----------------------------------------------------------------------------------------------------------------------
# Counting


def test_every_pixel_is_counted(tmp_path: Path) -> None:
    """Sixteen columns of twelve pixels in five stripes of 4, 3, 3, 3, 3 columns; in each of three labels."""
    report = audit_folder(tmp_path)
    assert {raw_id: count.pixels for raw_id, count in report.counts.items()} == {
        0: 3 * 12 * 4, 1: 3 * 12 * 3, 2: 3 * 12 * 3, 3: 3 * 12 * 3, 4: 3 * 12 * 3,
    }  # fmt: skip
    assert all(count.images == 3 for count in report.counts.values())
    assert report.share(0) == 4 / 16
    assert report.num_pixels == 3 * 12 * 16
    assert (report.never_seen, report.unknown_ids, report.unlabelled, report.hints) == ([], [], [], [])
    report.raise_if_wrong()


def test_the_table_can_be_read(tmp_path: Path) -> None:
    label = raw_label(num_ids=4)  # no tree
    label[:, 0] = 0
    lines = str(audit_folder(tmp_path, label)).splitlines()
    assert lines[0] == f"folder train in {tmp_path}: 3 images, 576 pixels"
    assert lines[2].split() == ["raw", "id", "train", "id", "class", "pixels", "share", "images"]
    assert lines[3].split() == ["0", "ignored", "–", "144", "25.00", "%", "3"]
    assert lines[4].split() == ["1", "0", "sky", "144", "25.00", "%", "3"]
    assert len({len(line) for line in lines[2:7]}) == 1  # columns line up
    assert "Never seen (1): tree" in lines
    assert lines[-1] == "Every label fits its image and holds known ids only."


def test_images_that_lack_a_class_are_not_counted_for_it(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write(root / "annotations/training/001.png", np.full((12, 16), 2, np.uint8))
    report = audit(open_dataset("folder", root, "train"))
    assert (report.counts[1].images, report.counts[2].images) == (2, 3)
    assert report.counts[2].pixels == 2 * 36 + 192


def test_a_limit_looks_at_some_images_spread_evenly(tmp_path: Path) -> None:
    dataset = open_dataset("folder", write_folder(tmp_path, count=9), "train")
    dataset.label_paths[4].write_bytes(b"")
    report = audit(dataset, limit=3)  # images 0, 4 and 8
    assert report.num_images == 3
    assert len(report.problems["unreadable"]) == 1
    assert "3 of 9 images" in str(report)


# ----------------------------------------------------------------------------------------------------------------------
# What would train wrongly


def test_everything_wrong_is_collected_and_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path, count=6)
    labels, images = root / "annotations/training", root / "images/training"
    (labels / "000.png").unlink()
    write(labels / "001.png", raw_label(16, 12))
    (labels / "002.png").write_bytes(b"no image")
    (images / "003.png").write_bytes((images / "003.png").read_bytes()[:-200])
    write(labels / "004.png", np.full((12, 16), 77, np.uint8))
    report = audit(open_dataset("folder", root, "train", strict=False))

    assert {kind: len(sentences) for kind, sentences in report.problems.items()} == {
        "no label": 1, "shared label": 0, "other size": 1, "unreadable": 2,
    }  # fmt: skip
    assert report.unknown_ids == [77]
    with pytest.raises(DataError) as caught:
        report.raise_if_wrong()
    for text in (
        "images/training/000.png has no label",
        "annotations/training/001.png is 12 × 16",
        "annotations/training/002.png cannot be read",
        "images/training/003.png cannot be read",
        "annotations/training/004.png holds the unknown id 77 (192 pixels in 1 labels)",
    ):
        assert text in str(caught.value)
        assert text in str(report) or "77" in text
    assert "UNKNOWN IDS: 77" in str(report)
    assert "Every label fits" not in str(report)


def test_labels_without_any_class_are_wrong(tmp_path: Path) -> None:
    report = audit_folder(tmp_path, np.zeros((12, 16), np.uint8))
    assert len(report.unlabelled) == 3
    with pytest.raises(DataError, match=r"None of the 3 labels .* has a pixel with a class"):
        report.raise_if_wrong()


def test_one_label_without_any_class_is_only_mentioned(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write(root / "annotations/training/001.png", np.zeros((12, 16), np.uint8))
    report = audit(open_dataset("folder", root, "train"))
    assert "Without any labelled pixel (1): 001.png" in str(report)
    report.raise_if_wrong()


def test_many_problems_are_cut_short(tmp_path: Path) -> None:
    root = write_folder(tmp_path, count=30)
    for path in (root / "annotations/training").iterdir():
        path.unlink()
    report = audit(open_dataset("folder", root, "train", strict=False))
    assert len(report.problems["no label"]) == 30
    assert "and 10 more" in str(report)
    with pytest.raises(DataError, match="and 10 more"):
        report.raise_if_wrong()


# ----------------------------------------------------------------------------------------------------------------------
# Hints: the classic mistakes


def test_labels_that_were_shifted_already(tmp_path: Path) -> None:
    """(label - 1) as uint8: 0…K-1, and 255 where nothing is."""
    report = audit_folder(tmp_path, (raw_label() - 1).astype(np.uint8))
    assert any("one too low" in hint and "Id 4 (tree) never occurs" in hint for hint in report.hints)
    with pytest.raises(DataError, match=r"(?s)unknown id 255.*Hint: The ids may be one too low"):
        report.raise_if_wrong()


def test_labels_that_never_had_an_unlabelled_id(tmp_path: Path) -> None:
    """0…K-1 and nothing else: every id is known, so only the counts can tell."""
    report = audit_folder(tmp_path, raw_label(num_ids=4))
    report.raise_if_wrong()
    assert any("one too low" in hint for hint in report.hints)


def test_a_small_first_class_is_noticed_too(tmp_path: Path) -> None:
    """The first class covers one pixel, but the last id is the only one that is missing."""
    label = raw_label(num_ids=3) + np.uint8(1)
    label[0, 0] = 0
    assert any("one too low" in hint for hint in audit_folder(tmp_path, label).hints)


def test_a_large_unlabelled_part_is_noticed_though_other_classes_are_missing_too(tmp_path: Path) -> None:
    assert any("covers 38 %" in hint for hint in audit_folder(tmp_path, raw_label(num_ids=3)).hints)


def test_labels_shifted_up_once_too_often(tmp_path: Path) -> None:
    report = audit_folder(tmp_path, raw_label() + np.uint8(1))
    assert any("run to 5, one more than there are classes" in hint for hint in report.hints)


def test_a_classes_txt_that_names_the_unlabelled_id(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "classes.txt").write_text("\n".join(("Background", *NAMES)) + "\n")
    report = audit(open_dataset("folder", root, "train"))
    assert any("'Background'" in hint and "take the line away" in hint for hint in report.hints)


def test_train_ids_in_place_of_label_ids(tmp_path: Path) -> None:
    report = audit(open_dataset("cityscapes", write_cityscapes(tmp_path, raw_label(num_ids=19)), "train"))
    assert any("look like trainIds" in hint for hint in report.hints)


def test_good_cityscapes_labels_give_no_hint(tmp_path: Path) -> None:
    label = np.array([[7, 8, 11, 21, 23, 26, 26, 0]], np.uint8).repeat(8, 0)
    report = audit(open_dataset("cityscapes", write_cityscapes(tmp_path, label), "train"))
    assert report.hints == []
    report.raise_if_wrong()


def test_labels_resized_with_interpolation(tmp_path: Path) -> None:
    label = np.full((100, 100), 1, np.uint8)
    label[0, :40] = np.arange(60, 100)
    assert any("40 unknown ids" in hint and "interpolation" in hint for hint in audit_folder(tmp_path, label).hints)


def test_mostly_ignored(tmp_path: Path) -> None:
    label = np.zeros((12, 16), np.uint8)
    label[0] = np.arange(16) % 5
    assert any("% of the pixels are ignored" in hint for hint in audit_folder(tmp_path, label).hints)


def test_masks_of_0_and_255_are_not_called_shifted(tmp_path: Path) -> None:
    """Adding 1 would make the object void and the background the class."""
    label = np.zeros((12, 16), np.uint8)
    label[3:9, 4:12] = 255
    root = write_folder(tmp_path, label=label)
    (root / "classes.txt").write_text("object\n")
    report = audit(open_dataset("folder", root, "train", strict=False))
    assert not any("one too low" in hint for hint in report.hints)
    (hint,) = [hint for hint in report.hints if "0 and 255 only" in hint]
    assert "label = 1 + (label > 0)" in hint
    for path in (root / "annotations").rglob("*.png"):
        write(path, (1 + (label > 0)).astype(np.uint8))
    (root / "classes.txt").write_text("background\nobject\n")
    dataset = open_dataset("folder", root, "train")
    np.testing.assert_array_equal(dataset[0].label_map == 1, label == 255)
    assert not any("0 and 255" in hint for hint in audit(dataset).hints)


def test_labels_of_other_formats_are_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write(root / "annotations/training/001.jpg", raw_label())
    (root / "annotations/training/001.png").unlink()
    report = audit(open_dataset("folder", root, "train", strict=False))
    assert any("1 labels are not PNG: 001.jpg. JPEG changes ids" in hint for hint in report.hints)


def test_an_image_too_large_for_pillow_is_not_called_truncated(tmp_path: Path, monkeypatch) -> None:
    root = write_folder(tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 12 * 16 // 2 - 1)
    with pytest.raises(DataError, match=r"000\.png is larger than Pillow opens .*Cut it .*MAX_IMAGE_PIXELS = None"):
        open_dataset("folder", root, "train")[0]
