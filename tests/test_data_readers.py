from __future__ import annotations

import itertools
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_lab.data import DataError, open_dataset, read_image, read_label, split_instance_ids
from m2f_lab.data.ade20k import CLASSES as ADE20K
from m2f_lab.data.cityscapes import CLASSES as CITYSCAPES
from m2f_lab.data.cityscapes import TRAIN_IDS
from m2f_lab.data.folder import parse_classes
from m2f_lab.inference.images import as_rgb
from tests.small_data import NAMES, picture, raw_label, write, write_cityscapes, write_folder

# ----------------------------------------------------------------------------------------------------------------------
# ADE20K


def test_ade20k_shifts_once_and_ignores_zero(tmp_path: Path) -> None:
    root = write_folder(tmp_path, label=np.array([[0, 1], [2, 150]], np.uint8), suffix=".jpg")
    sample = open_dataset("ade20k", root, "train")[0]
    assert sample.label_map.tolist() == [[255, 0], [1, 149]]
    assert sample.label_map.dtype == np.uint8


@pytest.mark.parametrize("unknown", [151, 200, 254, 255])
def test_ade20k_refuses_ids_beyond_150(tmp_path: Path, unknown: int) -> None:
    """255 is refused too: it is what a label that was shifted before has where it was unlabelled."""
    root = write_folder(tmp_path, label=np.array([[0, 1], [150, unknown]], np.uint8))
    with pytest.raises(DataError, match=rf"annotations.training.001\.png holds the 1 unknown id {unknown}\. .*0–150"):
        open_dataset("ade20k", root, "train")[1]


def test_ade20k_classes_are_the_published_ones() -> None:
    assert len(ADE20K) == 150
    assert len(set(ADE20K.names)) == 150
    assert ADE20K.names[:4] == ("wall", "building", "sky", "floor")
    assert (ADE20K.names[12], ADE20K.names[44], ADE20K.names[149]) == ("person", "chest of drawers", "flag")
    assert ADE20K.colors[:3] == ((120, 120, 120), (180, 120, 120), (6, 230, 230))
    assert ADE20K.colors[149] == (92, 0, 255)
    assert len(set(ADE20K.colors)) == 149  # road and skyscraper share theirs in the published palette
    assert len(ADE20K.things) == 100
    assert {7, 12, 20, 149} < ADE20K.things
    assert not {0, 1, 2, 3, 6} & ADE20K.things


def test_ade20k_is_found_in_the_folder_above(tmp_path: Path) -> None:
    write_folder(tmp_path / "ADEChallengeData2016")
    assert open_dataset("ade20k", tmp_path, "val").root == tmp_path / "ADEChallengeData2016"


# ----------------------------------------------------------------------------------------------------------------------
# Cityscapes


def test_cityscapes_maps_all_34_label_ids(tmp_path: Path) -> None:
    root = write_cityscapes(tmp_path, np.arange(34, dtype=np.uint8)[None])
    sample = open_dataset("cityscapes", root, "train")[0]
    void = 255
    assert sample.label_map[0].tolist() == [
        void, void, void, void, void, void, void, 0, 1, void, void, 2, 3, 4, void, void, void, 5, void, 6, 7, 8, 9, 10,
        11, 12, 13, 14, 15, void, void, 16, 17, 18,
    ]  # fmt: skip
    assert sample.name == "aachen_000000_000019"


def test_cityscapes_gives_label_ids_back_for_submission(tmp_path: Path) -> None:
    dataset = open_dataset("cityscapes", write_cityscapes(tmp_path, raw_label(num_ids=34)), "val")
    submitted = dataset.to_raw(np.arange(19)[None])
    assert submitted.tolist() == [[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]]
    assert submitted.dtype == np.uint8
    assert dataset.to_label_map(submitted).tolist() == [list(range(19))]
    assert dataset.to_raw(np.array([[255]])).tolist() == [[0]]


def test_cityscapes_classes_are_the_published_ones() -> None:
    assert len(CITYSCAPES) == 19
    assert CITYSCAPES.names[TRAIN_IDS[26]] == "car"
    assert CITYSCAPES.colors[TRAIN_IDS[26]] == (0, 0, 142)
    assert [CITYSCAPES.names[i] for i in sorted(CITYSCAPES.things)] == [
        "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    ]  # fmt: skip


@pytest.mark.parametrize("unknown", [34, 255])
def test_cityscapes_refuses_unknown_ids(tmp_path: Path, unknown: int) -> None:
    root = write_cityscapes(tmp_path, np.array([[7, unknown]], np.uint8))
    with pytest.raises(DataError, match=rf"_gtFine_labelIds\.png holds the 1 unknown id {unknown}\. .*0–33"):
        open_dataset("cityscapes", root, "train")[0]


def test_cityscapes_pairs_across_cities_in_order(tmp_path: Path) -> None:
    names = ("ulm_000000_000019", "aachen_000001_000019", "aachen_000000_000019")
    root = write_cityscapes(tmp_path / "cityscapes", raw_label(num_ids=34), names)
    shutil.copy(
        root / "leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png",
        root / "leftImg8bit/train/ulm/._ulm_000000_000019_leftImg8bit.png",  # macOS leaves such files behind
    )
    dataset = open_dataset("cityscapes", tmp_path, "train")
    assert [sample.name for sample in dataset] == sorted(names)
    assert [path.parent.name for path in dataset.label_paths] == ["aachen", "aachen", "ulm"]


def test_instance_ids_come_apart() -> None:
    label_ids, numbers = split_instance_ids(np.array([[26000, 26001, 24012], [7, 26, 0]], np.int32))
    assert label_ids.tolist() == [[26, 26, 24], [7, 26, 0]]
    assert numbers.tolist() == [[0, 1, 12], [-1, -1, -1]]
    with pytest.raises(DataError, match="34000"):
        split_instance_ids(np.array([[34000, 7]]))


# ----------------------------------------------------------------------------------------------------------------------
# Any folder


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".JPG", ".jpeg"])
def test_folder_reads_any_kind_of_image(tmp_path: Path, suffix: str) -> None:
    dataset = open_dataset("folder", write_folder(tmp_path, count=3, suffix=suffix), "train")
    assert (len(dataset), dataset.name, dataset.split) == (3, "folder", "train")
    assert dataset.classes.names == NAMES
    sample = dataset[2]
    assert sample.name == "002"
    assert sample.image.shape == (12, 16, 3)
    assert np.array_equal(sample.label_map, (raw_label().astype(int) - 1) % 256)
    assert np.array_equal(dataset.raw_label(2), raw_label())
    if suffix == ".png":
        assert np.array_equal(sample.image, picture(seed=2))


def test_a_dataset_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    dataset = open_dataset("folder", write_folder(tmp_path), "train")
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again[1].label_map, dataset[1].label_map)


def test_classes_txt_may_give_colors_and_things() -> None:
    classes = parse_classes("road\ntraffic sign #dcdc00\ncar #00008e thing\nplaything\n", "classes.txt")
    assert classes.names == ("road", "traffic sign", "car", "plaything")
    assert classes.colors[1:3] == ((220, 220, 0), (0, 0, 142))
    assert classes.things == {2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n\nroad\n", "classes.txt, line 2 is empty"),
        ("sky\nroad\nsky\n", "classes.txt, line 3: 'sky' is already line 1"),
        ("", "names 0 classes"),
        ("\n".join(f"class {i}" for i in range(65535)), "names 65535 classes"),
    ],
)
def test_classes_txt_is_checked(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_classes(text, "classes.txt")


def test_folder_without_classes_txt(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "classes.txt").unlink()
    with pytest.raises(DataError, match=r"There is no .*classes\.txt\. Write one, with one class per line"):
        open_dataset("folder", root, "train")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "folder"])
def test_missing_root_shows_layout_and_what_is_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "somewhere_else").mkdir()
    with pytest.raises(DataError) as caught:
        open_dataset(name, tmp_path / "data", "train")
    message = str(caught.value)
    assert "leftImg8bit/train" in message if name == "cityscapes" else "images/training" in message
    assert f"{tmp_path / 'data'} does not exist. {tmp_path} holds somewhere_else/." in message
    assert "data/README.md" in message


def test_missing_subfolder_shows_what_is_there(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    shutil.rmtree(root / "annotations")
    with pytest.raises(DataError, match=r"no folder .*annotations.training(.|\n)*holds classes.txt, images/\."):
        open_dataset("folder", root, "train")


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_empty_split(tmp_path: Path, name: str) -> None:
    for folder in ("images/training", "annotations/training", "leftImg8bit/train", "gtFine/train"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=rf"{name} train split is empty: no image .*is empty\."):
        open_dataset(name, tmp_path, "train")


def test_image_without_label_is_refused_when_opening(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    (root / "annotations/training/001.png").unlink()
    with pytest.raises(DataError, match=r"1 image of 3 without a label\. .*images.training.001\.png would need"):
        open_dataset("folder", root, "train")
    loose = open_dataset("folder", root, "train", strict=False)
    assert loose[0].name == "000"
    with pytest.raises(DataError, match=r"001\.png has no label: there is no .*annotations.training.001\.png"):
        loose[1]


def test_label_of_another_size(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    path = write(root / "annotations/training/001.png", raw_label(16, 12))
    with pytest.raises(DataError, match=rf"{path} is 12 × 16 pixels, but its image .*001\.png is 16 × 12"):
        open_dataset("folder", root, "train")[1]


@pytest.mark.parametrize("which", ["images", "annotations"])
@pytest.mark.parametrize("damage", ["truncated", "not an image", "empty"])
def test_unreadable_file(tmp_path: Path, which: str, damage: str) -> None:
    root = write_folder(tmp_path)
    path = root / which / "training" / "001.png"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) * 2 // 3], "not an image": b"<html>", "empty": b""}[damage])
    with pytest.raises(DataError, match=rf"{path} cannot be read as an image: .*copy or download it again"):
        open_dataset("folder", root, "train")[1]


def test_truncated_jpeg(tmp_path: Path) -> None:
    path = write(tmp_path / "photo.jpg", picture(64, 64))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=rf"{path} cannot be read as an image: .*truncated"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_whatever_byte_is_damaged_the_file_is_named(tmp_path: Path, suffix: str) -> None:
    """Pillow raises half a dozen kinds of errors, depending on which byte it is."""
    path = write(tmp_path / f"photo{suffix}", picture(4, 4))
    content, refusals = path.read_bytes(), []
    for position, value in itertools.product(range(0, len(content), 1 if suffix == ".png" else 5), (0, 255)):
        damaged = bytearray(content)
        damaged[position] = value
        path.write_bytes(damaged)
        try:
            assert read_image(path).shape[2] == 3
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert all(refusal.startswith(f"{path} cannot be read as an image") for refusal in refusals)


def test_label_in_colors(tmp_path: Path) -> None:
    path = write(tmp_path / "label.png", picture())
    with pytest.raises(DataError, match=rf"{path} is not a label: it has mode RGB"):
        read_label(path)


@pytest.mark.parametrize(("name", "split"), [("voc", "train"), ("ade20k", "training"), ("cityscapes", "test")])
def test_unknown_name_or_split(tmp_path: Path, name: str, split: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'|'{split}'"):
        open_dataset(name, tmp_path, split)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of files


def test_labels_with_palette_or_16_bits_keep_their_ids(tmp_path: Path) -> None:
    label = raw_label()
    image = Image.fromarray(label)
    image.putpalette(list(range(255, -1, -1)) * 3)
    image.save(tmp_path / "palette.png")
    Image.fromarray(label.astype(np.uint16) + 300).save(tmp_path / "deep.png")
    assert np.array_equal(read_label(tmp_path / "palette.png"), label)
    assert np.array_equal(read_label(tmp_path / "deep.png"), label.astype(int) + 300)


def test_ids_beyond_a_byte_are_unknown_rather_than_wrapped(tmp_path: Path) -> None:
    """257 must not become 1."""
    root = write_folder(tmp_path)
    Image.fromarray(raw_label().astype(np.uint16) + 256).save(root / "annotations/training/000.png")
    with pytest.raises(DataError, match="5 unknown ids 256, 257, 258, 259, 260"):
        open_dataset("folder", root, "train")[0]


def test_negative_ids_are_unknown(tmp_path: Path) -> None:
    dataset = open_dataset("folder", write_folder(tmp_path), "train")
    with pytest.raises(DataError, match="unknown id -1"):
        dataset.to_label_map(np.array([[-1, 1]]))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_become_red_green_blue(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.fromarray(np.full((8, 8, 3), 204, np.uint8)).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert image.flags.writeable  # else torch.from_numpy warns
    assert abs(image.astype(int) - 204).max() <= 2


def test_images_of_16_bits_are_scaled_down_in_training_as_in_prediction(tmp_path: Path) -> None:
    """Pillow cuts them off at 255 of 65535, which makes nearly every pixel white."""
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 4 * 257
    Image.fromarray(shades).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert np.array_equal(image, np.dstack([shades // 257] * 3))
    assert np.array_equal(image, as_rgb(tmp_path / "x.png"))


def test_images_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(DataError, match=r"x\.tiff has mode F, numbers of unknown range.*0\.\.255"):
        read_image(tmp_path / "x.tiff")


def test_images_are_turned_upright(tmp_path: Path) -> None:
    """Cameras store how they were held; annotators saw the photograph upright."""
    pixels = picture(8, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90°
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "x.png"), np.rot90(pixels, -1))


def cityscapes_with_instances(root: Path) -> Path:
    """Road, two cars, a group of cars, a person, and what is not labelled."""
    ids = np.full((8, 16), 7, np.uint16)
    ids[:2], ids[2:4, :4], ids[2:4, 6:9], ids[2:4, 12:], ids[5:, 3] = 0, 26000, 26001, 26, 24005
    write_cityscapes(root, np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8))
    for split in ("train", "val"):
        write(root / "gtFine" / split / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png", ids)
    return root


def test_cityscapes_panoptic_segments_are_those_of_the_instance_ids(tmp_path):
    dataset = open_dataset("cityscapes", cityscapes_with_instances(tmp_path), "val", task="panoptic")
    sample = dataset[0]
    names = [dataset.classes.names[label] for label in sample.segments.labels]
    assert names == ["road", "car", "person", "car", "car"]  # 7, 26, 24005, 26000, 26001
    assert sample.segments.crowd.tolist() == [False, True, False, False, False]
    assert sample.segments.areas.tolist() == [128 - 32 - 8 - 6 - 8 - 3, 8, 3, 8, 6]
    semantic = open_dataset("cityscapes", tmp_path, "val")[0]
    np.testing.assert_array_equal(sample.label_map, semantic.label_map)
    assert sample.segments.target().labels.tolist() == [0, 11, 13, 13], "a crowd is no target"


def test_cityscapes_instances_are_the_eight_things(tmp_path):
    dataset = open_dataset("cityscapes", cityscapes_with_instances(tmp_path), "train", task="instance")
    expected = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
    assert dataset.classes.names == expected
    assert dataset.classes.things == frozenset(range(8))
    segments = dataset[0].segments
    assert [(expected[label], bool(crowd)) for label, crowd in zip(segments.labels, segments.crowd, strict=True)] == [
        ("car", True),
        ("person", False),
        ("car", False),
        ("car", False),
    ]


def test_cityscapes_instance_ids_of_no_class_are_named_with_their_file(tmp_path):
    root = cityscapes_with_instances(tmp_path)
    write(
        root / "gtFine" / "val" / "aachen" / "aachen_000000_000019_gtFine_instanceIds.png",
        np.full((8, 16), 99, np.uint16),
    )
    with pytest.raises(DataError, match=r"aachen_000000_000019_gtFine_instanceIds\.png: The instance ids \[99\]"):
        open_dataset("cityscapes", root, "val", task="panoptic")[0]
