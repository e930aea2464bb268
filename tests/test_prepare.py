"""Labels of other forms, rewritten as a folder: around the circle, nothing changes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_data import NAMES, picture, raw_label, write, write_folder

from m2f_lab.__main__ import main
from m2f_lab.data import DataError, open_dataset
from m2f_lab.data.prepare import prepare

NUCLEI = Path(__file__).parents[2] / "shared" / "data" / "nuclei" / "one_file_per_mask"
COLORS = ("#0000ff", "#808080", "#ff0000", "#00ff00")


def labels() -> np.ndarray:
    """0 is unlabelled, 1…4 are the classes. uint8 [12, 16]"""
    return raw_label()


def write_classes(root: Path) -> Path:
    path = root / "classes.txt"
    lines = [f"{name} {color}" for name, color in zip(NAMES, COLORS, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def from_zero(label: np.ndarray) -> np.ndarray:
    return label - np.uint8(1)  # 0 becomes 255


def painted(label: np.ndarray) -> np.ndarray:
    table = np.array([(0, 0, 0), *(tuple(bytes.fromhex(color[1:])) for color in COLORS)], np.uint8)
    return table[label]


def palette(label: np.ndarray) -> Image.Image:
    shown = Image.fromarray(label).convert("P")
    shown.putdata(label.ravel().tolist())
    return shown


@pytest.mark.parametrize(
    ("kind", "options", "form"),
    [
        ("label_maps", {"first_id": 0}, from_zero),
        ("label_maps", {"first_id": 1}, lambda label: label),
        ("label_maps", {"first_id": 1}, palette),
        ("colors", {}, painted),
    ],
    ids=["from 0", "from 1", "palette", "colors"],
)
def test_label_maps_come_around_unchanged(tmp_path, kind, options, form):
    source = tmp_path / "source"
    for name, seed in (("a", 0), ("deep/b", 1)):
        write(source / "images" / f"{name}.png", picture(seed=seed))
        path = source / "labels" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = form(labels())
        (shown if isinstance(shown, Image.Image) else Image.fromarray(shown)).save(path)
    out = prepare(source, tmp_path / "out", kind, classes=write_classes(tmp_path), **options)
    expected = open_dataset("folder", write_folder(tmp_path / "expected", count=2), "train")
    found = open_dataset("folder", out, "train")
    assert found.classes.names == NAMES
    assert len(found) == 2
    for sample, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(sample.image, other.image)
        np.testing.assert_array_equal(sample.label_map, other.label_map)


def test_the_first_id_is_guessed_and_asked_back(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    for label, guess in ((labels(), 1), (from_zero(labels()), 0)):
        write(tmp_path / "labels" / "a.png", label)
        with pytest.raises(ValueError, match=f"Say by first_id .*first_id={guess}, by the look of it"):
            prepare(tmp_path, tmp_path / "out", "label_maps", classes=write_classes(tmp_path))


def test_object_and_background_of_a_binary_mask(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    write(tmp_path / "masks" / "a.png", np.where(labels() > 2, 255, 0).astype(np.uint8))
    dataset = open_dataset("folder", prepare(tmp_path, tmp_path / "out", "binary", "val"), "val")
    assert dataset.classes.names == ("background", "object")
    np.testing.assert_array_equal(dataset[0].label_map, labels() > 2)


def test_polygons_become_the_pixels_inside(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    (tmp_path / "labels").mkdir()
    square = "0.25 0.25 0.5 0.25 0.5 0.75 0.25 0.75"  # columns 4…7, rows 3…8
    (tmp_path / "labels" / "a.txt").write_text(f"1 {square}\n0 0.75 0 1 0 1 0.5 0.75 0.5\n")
    (tmp_path / "classes.txt").write_text("cat thing\ndog thing\n")
    out = prepare(tmp_path, tmp_path / "out", "yolo", classes=tmp_path / "classes.txt")
    segments = open_dataset("folder", out, "train", task="instance")[0].segments
    assert segments.labels.tolist() == [1, 0]
    expected = np.zeros((2, 12, 16), bool)
    expected[0, 3:9, 4:8] = expected[1, :6, 12:] = True
    np.testing.assert_array_equal(segments.masks(), expected)
    (tmp_path / "labels" / "a.txt").write_text(f"1 {square}\n0 {square}\n")
    with pytest.raises(DataError, match=r"a\.txt, line 2: instances of several classes overlap"):
        prepare(tmp_path, tmp_path / "again", "yolo", classes=tmp_path / "classes.txt")
    (tmp_path / "labels" / "a.txt").write_text("dog 0.5 0.5\n")
    with pytest.raises(DataError, match=r"a\.txt, line 1: expected a class and pairs of numbers, got 'dog"):
        prepare(tmp_path, tmp_path / "again", "yolo", classes=tmp_path / "classes.txt")


@pytest.mark.parametrize("overlap", [False, True], ids=["apart", "overlapping"])
def test_a_file_for_each_instance(tmp_path, overlap):
    masks = np.zeros((3, 12, 16), bool)
    masks[0, :4, :4] = masks[1, 6:9] = masks[2, 8 if overlap else 10 :, 2:5] = True
    write(tmp_path / "x" / "images" / "x.png", picture())
    for number, mask in enumerate(masks):
        write(tmp_path / "x" / "masks" / f"{number}.png", 255 * mask.astype(np.uint8))
    out = prepare(tmp_path, tmp_path / "out", "masks")
    segments = open_dataset("folder", out, "train", task="instance")[0].segments
    np.testing.assert_array_equal(segments.masks(), masks)


def test_a_call_that_was_interrupted_goes_on(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "images" / f"{name}.png", picture())
        write(tmp_path / "masks" / f"{name}.png", labels())
    (tmp_path / "masks" / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png cannot be read"):
        prepare(tmp_path, tmp_path / "out", "binary")
    first = tmp_path / "out" / "images" / "training" / "a.png"
    time = first.stat().st_mtime_ns
    write(tmp_path / "masks" / "b.png", labels())
    assert len(open_dataset("folder", prepare(tmp_path, tmp_path / "out", "binary"), "train")) == 2
    assert first.stat().st_mtime_ns == time


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    with pytest.raises(DataError, match=r"a\.png has no label: there is no .*labels/a\.png"):
        prepare(tmp_path, tmp_path / "out", "colors", classes=write_classes(tmp_path))
    write(tmp_path / "labels" / "a.png", np.full((12, 16, 3), 7, np.uint8))
    with pytest.raises(DataError, match=r"a\.png has the colours #070707, which .*classes\.txt does not name"):
        prepare(tmp_path, tmp_path / "out", "colors", classes=write_classes(tmp_path))
    with pytest.raises(ValueError, match="needs classes="):
        prepare(tmp_path, tmp_path / "out", "yolo")
    with pytest.raises(ValueError, match="got 'voc'"):
        prepare(tmp_path, tmp_path / "out", "voc")
    with pytest.raises(DataError, match="There are no images of kind 'masks'"):
        prepare(tmp_path, tmp_path / "out", "masks")


@pytest.mark.skipif(not NUCLEI.is_dir(), reason="the microscopy is not there")
def test_the_command_line_prepares_real_microscopy(tmp_path, capsys):
    assert main(["prepare", str(NUCLEI), str(tmp_path / "out"), "--kind", "masks"]) == 0
    assert "opens it" in capsys.readouterr().out
    dataset = open_dataset("folder", tmp_path / "out", "train", task="instance")
    assert len(dataset) == 6
    for folder, sample in zip(sorted(NUCLEI.iterdir()), dataset, strict=True):
        assert len(sample.segments) == len(list((folder / "masks").iterdir()))


@pytest.mark.parametrize(("first_id", "wrong"), [(0, 256), (0, 254), (1, 256), (1, 255)])
def test_ids_are_never_cut_to_eight_bits(tmp_path, first_id, wrong):
    write(tmp_path / "images" / "a.png", picture())
    write(tmp_path / "labels" / "a.png", np.full((12, 16), wrong, np.uint16))
    with pytest.raises(DataError, match=rf"a\.png holds the ids {wrong}; with first_id={first_id}"):
        prepare(tmp_path, tmp_path / "out", "label_maps", classes=write_classes(tmp_path), first_id=first_id)


def test_names_with_dots_keep_their_own_labels(tmp_path):
    for number in (1, 2):
        write(tmp_path / "images" / f"photo.v{number}.png", picture(seed=number))
        write(tmp_path / "labels" / f"photo.v{number}.png", np.full((12, 16), number, np.uint8))
    out = prepare(tmp_path, tmp_path / "out", "label_maps", classes=write_classes(tmp_path), first_id=1)
    assert [sample.label_map[0, 0] for sample in open_dataset("folder", out, "train")] == [0, 1]


def test_two_images_never_share_a_label(tmp_path):
    for suffix in ("png", "bmp"):
        write(tmp_path / "images" / f"a.{suffix}", picture())
    write(tmp_path / "masks" / "a.png", labels())
    with pytest.raises(DataError, match=r"a\.bmp and .*a\.png would share the label a\.png"):
        prepare(tmp_path, tmp_path / "out", "binary")


def test_an_image_without_its_folder_of_masks_is_not_an_empty_one(tmp_path):
    write(tmp_path / "x" / "images" / "x.png", picture())
    with pytest.raises(DataError, match=r"x\.png has no masks: there is no folder .*masks"):
        prepare(tmp_path, tmp_path / "out", "masks")
    (tmp_path / "x" / "masks").mkdir()
    out = prepare(tmp_path, tmp_path / "out", "masks", "val")
    assert len(open_dataset("folder", out, "val", task="instance")[0].segments) == 0


@pytest.mark.parametrize("kind", ["binary", "masks"])
def test_labels_of_another_size_are_named(tmp_path, kind):
    image = {"binary": "images/a.png", "masks": "a/images/a.png"}[kind]
    mask = {"binary": "masks/a.png", "masks": "a/masks/0.png"}[kind]
    write(tmp_path / image, picture())
    write(tmp_path / mask, np.ones((9, 10), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is 16 × 12 pixels, but its label is 10 × 9"):
        prepare(tmp_path, tmp_path / "out", kind)


def test_splits_of_a_folder_share_their_classes(tmp_path):
    write(tmp_path / "images" / "a.png", picture())
    write(tmp_path / "labels" / "a.png", labels())
    classes = write_classes(tmp_path)
    prepare(tmp_path, tmp_path / "out", "label_maps", classes=classes, first_id=1)
    prepare(tmp_path, tmp_path / "out", "label_maps", "val", classes=classes, first_id=1)
    classes.write_text("road\nsky\ncar\ntree\n")
    with pytest.raises(DataError, match=r"out/classes\.txt names other classes"):
        prepare(tmp_path, tmp_path / "out", "label_maps", "val", classes=classes, first_id=1)
