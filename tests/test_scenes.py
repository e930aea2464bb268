"""The drawn scenes: labels that are exact, pictures that repeat, layouts that the real readers read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_lab.data import DataError, audit, open_dataset, read_label, split_instance_ids
from m2f_lab.data import ade20k as ade20k_reader
from m2f_lab.data import cityscapes as cityscapes_reader
from m2f_lab.scenes import Scene, draw_room, draw_street, render_sample, write_ade20k, write_cityscapes, writing
from m2f_lab.scenes import stage as drawing
from m2f_lab.scenes.__main__ import main
from m2f_lab.scenes.props import Prop, Stage

DRAWERS = {"street": draw_street, "room": draw_room}


@pytest.fixture(scope="module")
def many() -> dict[str, list[Scene]]:
    """Forty scenes of each kind."""
    return {name: [draw(seed, (96, 160)) for seed in range(40)] for name, draw in DRAWERS.items()}


# ---- labels ----


@pytest.mark.parametrize(("kind", "last"), [("street", 33), ("room", 150)])
def test_scene_maps_hold_raw_ids(many, kind, last) -> None:
    for scene in many[kind]:
        assert (scene.image.dtype, scene.image.shape) == (np.uint8, (96, 160, 3))
        assert (scene.class_ids.dtype, scene.class_ids.shape) == (np.uint8, (96, 160))
        assert (scene.instance_ids.dtype, scene.instance_ids.shape) == (np.int32, (96, 160))
        assert scene.class_ids.max() <= last


def things(kind: str) -> set[int]:
    """The raw ids of the classes whose instances are told apart, as the readers have it."""
    if kind == "room":
        return {thing + 1 for thing in ade20k_reader.CLASSES.things}
    raw = {train_id: label_id for label_id, train_id in cityscapes_reader.TRAIN_IDS.items() if train_id != 255}
    return {raw[thing] for thing in cityscapes_reader.CLASSES.things}


@pytest.mark.parametrize("kind", DRAWERS)
def test_scene_instances_belong_to_their_class(many, kind) -> None:
    """Things are class × 1000 + n, everything else is its class, and which is which agrees with the readers."""
    for scene in many[kind]:
        single = scene.instance_ids >= 1000
        np.testing.assert_array_equal(np.where(single, scene.instance_ids // 1000, scene.instance_ids), scene.class_ids)
        np.testing.assert_array_equal(single, np.isin(scene.class_ids, list(things(kind))))


def test_streets_show_every_class_and_void(many) -> None:
    found = set(np.unique(np.stack([scene.class_ids for scene in many["street"]])).tolist())
    assert found >= {label_id for label_id, train_id in cityscapes_reader.TRAIN_IDS.items() if train_id != 255}
    assert found & {1, 4, 5} == {1, 4, 5}  # ego vehicle, static, dynamic


def test_rooms_show_many_classes_and_other(many) -> None:
    found = set(np.unique(np.stack([scene.class_ids for scene in many["room"]])).tolist())
    assert 0 in found
    assert len(found) >= 35
    for name in ("wall", "floor", "ceiling", "bed", "sofa", "chair", "table", "lamp", "door", "windowpane", "painting"):
        assert ade20k_reader.CLASSES.names.index(name) + 1 in found


def test_scene_instances_of_a_class_are_separate(many) -> None:
    for kind, label in (("street", 26), ("room", 20)):
        counts = [len(np.unique(s.instance_ids[s.class_ids == label])) for s in many[kind]]
        assert max(counts) >= 3


@pytest.mark.parametrize("kind", DRAWERS)
@pytest.mark.parametrize("seed", range(4))
def test_stroke_covers_same_pixels_in_picture_and_map(kind, seed, monkeypatch) -> None:
    """Paint everything in the number of its object and switch the light off: the picture must become the map."""
    papers: list[drawing.Paper] = []
    paint = {name: getattr(drawing.Paper, name) for name in ("polygon", "ellipse", "line", "backdrop", "finish")}

    def numbered(name):
        return lambda paper, number, *rest: paint[name](paper, number, *rest[:-1], (number, number, number))

    for name in ("polygon", "ellipse", "line"):
        monkeypatch.setattr(drawing.Paper, name, numbered(name))
    monkeypatch.setattr(
        drawing.Paper, "backdrop", lambda paper, number, _: paint["backdrop"](paper, number, [(0, (number,) * 3)])
    )
    for name in ("glow", "overlay"):
        monkeypatch.setattr(drawing.Paper, name, lambda *_, **__: None)
    monkeypatch.setattr(drawing.Paper, "finish", lambda p, *rest: papers.append(p) or paint["finish"](p, *rest))
    DRAWERS[kind](seed, (80, 120))
    picture, objects = np.asarray(papers[0].picture), np.asarray(papers[0].objects)
    assert len(np.unique(objects)) > 8
    np.testing.assert_array_equal(picture, np.repeat(objects[..., None], 3, 2))


def test_majority_takes_most_frequent_object() -> None:
    fine = np.random.default_rng(0).integers(0, 3, (40, 60), dtype=np.uint8)
    coarse = drawing.majority(fine)
    assert coarse.shape == (20, 30)
    for y, x in np.ndindex(coarse.shape):
        counts = np.bincount(fine[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel(), minlength=3)
        assert counts[coarse[y, x]] == counts.max()


def test_paper_light_changes_picture_and_not_map() -> None:
    paper = drawing.Paper((20, 20))
    number = paper.new_object(7)
    paper.backdrop(number, [(0, (100, 100, 100)), (1, (100, 100, 100))])
    paper.overlay([[(0, 0), (20, 0), (20, 40), (0, 40)]], (0, 0, 0), 0.5, softness=0.0)
    paper.glow((30, 20), 8, (255, 255, 255))
    image, classes, _ = paper.finish({7: (0.0, 0.0)}, seed=0)
    assert image[10, 3].tolist() == [50, 50, 50]
    assert image[10, 15, 0] > 150
    assert image[3, 18].tolist() == [100, 100, 100]
    assert (classes == 7).all()


def test_paper_numbers_instances_per_class_and_stuff_not_at_all() -> None:
    paper = drawing.Paper((2, 4))
    numbers = [paper.new_object(8, thing=True), paper.new_object(8, thing=True), paper.new_object(9, thing=True)]
    numbers += [paper.new_object(4), paper.new_object(4)]
    assert numbers == [0, 1, 2, 3, 3]
    for column, number in enumerate(numbers[:4]):
        paper.polygon(number, [(2 * column, 0), (2 * column + 1, 0), (2 * column + 1, 3), (2 * column, 3)], (0, 0, 0))
    _, classes, instances = paper.finish({}, seed=0)
    assert classes.tolist() == [[8, 8, 9, 4]] * 2
    assert instances.tolist() == [[8000, 8001, 9000, 4]] * 2


def test_paper_refuses_too_many_objects() -> None:
    paper = drawing.Paper((4, 4))
    for _ in range(drawing.MAX_OBJECTS):
        paper.new_object(3, thing=True)
    with pytest.raises(ValueError, match="at most 255 objects"):
        paper.new_object(3, thing=True)


# ---- space ----


def test_camera_projects_like_a_pinhole() -> None:
    """A point 2 m right, 1 m below the eye and 4 m away, at a focal length of half the height."""
    camera = drawing.Camera((100, 200), focal=0.5, center=(0.5, 0.4), eye=(0, 1.5, 0))
    assert camera.project([(2.0, 0.5, 4.0)]) == [(100 + 50 * 2 / 4, 40 + 50 * 1 / 4)]


def test_camera_cuts_off_everything_behind_the_viewer() -> None:
    camera = drawing.Camera((100, 100), focal=1.0, center=(0.5, 0.5), eye=(0, 1, 0))
    assert camera.project([(0, 0, -1), (1, 0, -1), (1, 0, -2)]) == []
    ground = camera.project([(-1, 0, -5), (1, 0, -5), (1, 0, 10), (-1, 0, 10)])
    assert len(ground) == 4
    assert min(y for _, y in ground) == pytest.approx(50 + 100 / 10)
    assert max(y for _, y in ground) == pytest.approx(50 + 100 / drawing.NEAR)


@pytest.mark.parametrize(
    ("eye", "yaw", "seen"),
    [
        ((0.0, 0.5, 0.0), 0.0, {"front"}),
        ((0.0, 3.0, 0.0), 0.0, {"front", "top"}),
        ((3.0, 3.0, 0.0), 0.0, {"front", "right", "top"}),
        ((-3.0, -1.0, 0.0), 0.0, {"front", "left", "bottom"}),
        ((0.0, 0.5, 0.0), np.pi, {"back"}),
    ],
)
def test_box_shows_sides_that_face_the_viewer(eye, yaw, seen) -> None:
    paper = drawing.Paper((100, 100))
    camera = drawing.Camera((200, 200), focal=0.5, center=(0.5, 0.5), eye=eye)
    prop = Prop(Stage(paper, camera, drawing.Light(), None), 5, 0, 5, yaw=yaw)
    assert set(prop.box((-1, 1), (0, 1), (-1, 1), (200, 0, 0))) == seen


def test_light_fades_colours_into_haze_with_distance() -> None:
    light = drawing.Light(haze=(200, 210, 220), haze_distance=50)
    assert light.tone((10, 20, 30), 0) == (10, 20, 30)
    assert light.tone((10, 20, 30), 1e6) == (200, 210, 220)
    assert light.tone((10, 20, 30), 50)[0] == int(10 / np.e + 200 * (1 - 1 / np.e))


# ---- repetition, sizes ----


def digest(scene: Scene) -> str:
    return hashlib.sha256(b"".join((scene.image, scene.class_ids, scene.instance_ids))).hexdigest()


@pytest.mark.parametrize("kind", DRAWERS)
def test_seed_determines_scene(kind) -> None:
    digests = [digest(DRAWERS[kind](seed, (64, 96))) for seed in (0, 1, 2, 0, -1)]
    assert digests[0] == digests[3]
    assert len(set(digests)) == 4


def test_scene_is_the_same_in_another_process() -> None:
    """Nothing hangs on the order of sets or on random state that other code has touched."""
    program = (
        "import random, numpy, hashlib; random.seed(5); numpy.random.seed(5)\n"
        "from m2f_lab.scenes import draw_room, draw_street\n"
        "for draw in (draw_street, draw_room):\n"
        "    s = draw(7, (64, 96))\n"
        "    print(hashlib.sha256(b''.join((s.image, s.class_ids, s.instance_ids))).hexdigest())\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [digest(draw(7, (64, 96))) for draw in (draw_street, draw_room)], done.stderr


@pytest.mark.parametrize("kind", DRAWERS)
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (61, 167), (200, 40), (1024, 2048)])
def test_scene_has_the_requested_size(kind, size) -> None:
    scene = DRAWERS[kind](3, size)
    assert scene.image.shape == (*size, 3)
    assert scene.class_ids.shape == scene.instance_ids.shape == size
    assert len(np.unique(scene.class_ids)) > 3
    assert scene.image.std() > 20


def test_scene_refuses_size_that_is_too_small() -> None:
    with pytest.raises(ValueError, match=r"at least 16 × 16, got \(8, 64\)"):
        draw_street(0, (8, 64))


# ---- on disk ----


def test_written_streets_have_the_layout_of_cityscapes(tmp_path) -> None:
    root = write_cityscapes(tmp_path / "streets", num_train=4, num_val=2, size=(48, 96), seed=3)
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*") if path.name != writing.MARKER)
    pattern = r"(leftImg8bit|gtFine)/(train|val)/([a-z]+)/\3_\d{6}_\d{6}_(leftImg8bit|gtFine_(label|instance)Ids)\.png"
    assert all(re.fullmatch(pattern, file) for file in files)
    assert len(files) == 3 * 6
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            kind = path.stem.rpartition("_")[2]
            assert image.mode == {"leftImg8bit": "RGB", "labelIds": "L", "instanceIds": "I;16"}[kind]


def test_written_streets_are_read_by_the_cityscapes_reader(tmp_path) -> None:
    root = write_cityscapes(tmp_path / "streets", num_train=4, num_val=2, size=(48, 96), seed=3)
    for split, count, first in (("train", 4, 3_000_000), ("val", 2, 3_500_000)):
        dataset = open_dataset("cityscapes", root, split)
        assert len(dataset) == count
        drawn = {s.image.tobytes(): s for s in (draw_street(first + i, (48, 96)) for i in range(count))}
        for index, sample in enumerate(dataset):
            scene = drawn.pop(sample.image.tobytes())  # in the order of the towns, every scene once
            np.testing.assert_array_equal(dataset.raw_label(index), scene.class_ids)
            table = np.array([cityscapes_reader.TRAIN_IDS[i] for i in range(34)])
            np.testing.assert_array_equal(sample.label_map, table[scene.class_ids])
            path = dataset.label_paths[index]
            ids = read_label(path.with_name(path.name.replace("labelIds", "instanceIds")))
            np.testing.assert_array_equal(ids, scene.instance_ids)
            np.testing.assert_array_equal(split_instance_ids(ids)[0], scene.class_ids)
        audit(dataset).raise_if_wrong()


def test_written_rooms_are_read_by_the_ade20k_reader(tmp_path) -> None:
    root = write_ade20k(tmp_path / "rooms", num_train=3, num_val=2, size=(64, 80))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.???"))
    assert names[0] == "annotations/training/ADE_train_00000001.png"
    assert names[-1] == "images/validation/ADE_val_00000002.jpg"
    assert len(names) == 2 * 5
    for split, count, first in (("train", 3, 0), ("val", 2, 500_000)):
        dataset = open_dataset("ade20k", root, split)
        assert len(dataset) == count
        for index, sample in enumerate(dataset):
            scene = draw_room(first + index, (64, 80))
            np.testing.assert_array_equal(dataset.raw_label(index), scene.class_ids)
            np.testing.assert_array_equal(sample.label_map, scene.class_ids.astype(int) - 1 & 255)
            assert np.abs(sample.image.astype(float) - scene.image).mean() < 6  # JPEG
        audit(dataset).raise_if_wrong()


def test_sample_holds_streets_and_rooms(tmp_path, capsys) -> None:
    main([str(tmp_path / "scenes"), "--cityscapes", "2", "--ade20k", "1"])
    assert "cityscapes: " in capsys.readouterr().out
    assert [len(open_dataset("cityscapes", tmp_path / "scenes", split)) for split in ("train", "val")] == [2, 1]
    assert [len(open_dataset("ade20k", tmp_path / "scenes", split)) for split in ("train", "val")] == [1, 1]
    assert set(render_sample(tmp_path / "scenes", 2, 1)) == {"cityscapes", "ade20k"}


WRITERS = {"cityscapes": write_cityscapes, "ade20k": write_ade20k}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_writing_a_set_twice_does_nothing(write, tmp_path, monkeypatch) -> None:
    arguments = dict(num_train=2, num_val=1, size=(32, 32), seed=1)
    (tmp_path / "set").mkdir()  # an empty folder is as good as none
    root = write(tmp_path / "set", **arguments)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    monkeypatch.setattr(writing, "_save", None)
    assert write(tmp_path / "set", **arguments) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert os.listdir(tmp_path) == ["set"]


def test_writing_refuses_folder_of_other_scenes(tmp_path) -> None:
    root = write_cityscapes(tmp_path / "set", num_train=1, num_val=1, size=(32, 32))
    with pytest.raises(DataError, match=r"set holds other drawn scenes \(num_train is 1, not 2; seed is 0, not 4\)"):
        write_cityscapes(root, num_train=2, num_val=1, size=(32, 32), seed=4)
    with pytest.raises(DataError, match="layout is 'cityscapes', not 'ade20k'"):
        write_ade20k(root, num_train=1, num_val=1, size=(32, 32))


def test_writing_recognises_set_of_an_earlier_version(tmp_path) -> None:
    root = write_cityscapes(tmp_path / "set", num_train=1, num_val=1, size=(32, 32))
    marker = root / writing.MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"drawn by": "m2f_lab.data.scenes"}))
    assert write_cityscapes(root, num_train=1, num_val=1, size=(32, 32)) == root


def test_writing_refuses_folder_of_a_real_data_set(tmp_path) -> None:
    picture = tmp_path / "leftImg8bit" / "train" / "aachen" / "aachen_000000_000019_leftImg8bit.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"mine")
    with pytest.raises(DataError, match="not drawn by m2f_lab, perhaps a real data set, and is not overwritten"):
        write_cityscapes(tmp_path, num_train=1, num_val=1, size=(32, 32))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [picture]
    assert picture.read_bytes() == b"mine"


def test_interrupted_writing_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    save, saved = writing._save, []

    def interrupted(pixels, path) -> None:
        if len(saved) == 4:
            raise KeyboardInterrupt
        saved.append(path)
        save(pixels, path)

    monkeypatch.setattr(writing, "_save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cityscapes(tmp_path / "set", num_train=3, num_val=1, size=(32, 32))
    assert len(saved) == 4
    assert os.listdir(tmp_path) == []


def test_two_processes_may_write_the_same_set(tmp_path, monkeypatch) -> None:
    """Another process finishes the same set while this one draws."""
    arguments = dict(num_train=2, num_val=1, size=(32, 32))
    save = writing._save

    def overtaken(pixels, path) -> None:
        monkeypatch.setattr(writing, "_save", save)
        write_ade20k(tmp_path / "set", **arguments)
        save(pixels, path)

    monkeypatch.setattr(writing, "_save", overtaken)
    root = write_ade20k(tmp_path / "set", **arguments)
    assert os.listdir(tmp_path) == ["set"]
    assert json.loads((root / writing.MARKER).read_text())["num_train"] == 2
    assert len(open_dataset("ade20k", root, "train")) == 2


@pytest.mark.parametrize("counts", [(0, 1), (1, 0), (500_001, 1)])
def test_writing_refuses_impossible_counts(counts, tmp_path) -> None:
    with pytest.raises(ValueError, match="1 to 500000 scenes"):
        write_cityscapes(tmp_path / "set", *counts)
