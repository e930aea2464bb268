"""One image in, a result of its own size out: files of all kinds, tiles, averaging, and the state of the model."""

from __future__ import annotations

import logging
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from m2f_lab.data import Classes
from m2f_lab.inference import postprocess, predict
from m2f_lab.inference.images import as_rgb, fitted_size
from m2f_lab.inference.rows import Rows
from m2f_lab.inference.tiles import tile_starts
from m2f_lab.structures import MaskLogits, Output

K = 3
CLASSES = Classes(names=("red", "green", "blue"), colors=((255, 0, 0), (0, 255, 0), (0, 0, 255)), things=frozenset({1}))


class ColorModel(nn.Module):
    """A model one can predict: query k is sure to be class k, and its mask is channel k of the image.

    Each stride-4 cell looks at itself and, a little, at everything to its right, so that mirroring shows.
    """

    def __init__(self, num_classes: int = K, look_right: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / 32))
        self.frozen = nn.BatchNorm2d(3)
        self.num_classes, self.look_right = num_classes, look_right
        self.classes = None
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> Output:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        assert not self.frozen.training
        self.seen.append(images)
        height, width = images.shape[2:]
        padded = F.pad((images.float() - 128) * self.scale, (0, -width % 32, 0, -height % 32))
        features = F.avg_pool2d(padded, 4)
        features = features + self.look_right * features.flip(-1).cumsum(-1).flip(-1)
        class_logits = 4 * torch.eye(3, self.num_classes + 1)[None]
        return Output(
            [class_logits], [MaskLogits(torch.eye(3)[None], features)], (height, width),
            (padded.shape[2], padded.shape[3]),
        )  # fmt: skip


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Coarse coloured noise, so that resizing matters without blurring all away."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 6), -(-width // 6), 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def model() -> ColorModel:
    return ColorModel()


# Reading images


def test_path_pil_image_and_array_give_the_same(model, tmp_path):
    pixels = random_image(50, 70)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    expected = predict(model, pixels).label_map
    assert expected.shape == (50, 70)
    assert len(np.unique(expected)) == 3
    for image in (tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(pixels)):
        assert (predict(model, image).label_map == expected).all()
    assert model.seen[0].dtype == torch.uint8
    assert (model.seen[0][0].permute(1, 2, 0).numpy() == pixels).all()


def test_exif_orientation_is_honoured(model, tmp_path):
    """A camera held upright stores the image lying on its side."""
    upright = random_image(64, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    lying = Image.fromarray(np.rot90(upright, 1).copy())
    lying.save(tmp_path / "phone.png", exif=exif)
    got = predict(model, tmp_path / "phone.png").label_map
    assert (got == predict(model, upright).label_map).all()
    with Image.open(tmp_path / "phone.png") as stored:
        assert stored.size == (64, 32)
        assert (predict(model, stored).label_map == got).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_images_of_any_mode_become_rgb(mode, tmp_path):
    grey = random_image(20, 30)[..., 0]
    rgb = random_image(20, 30)
    if mode == "RGBA":
        image, expected = Image.fromarray(np.dstack([rgb, np.full((20, 30), 9, np.uint8)])), rgb
    elif mode == "LA":
        image, expected = Image.merge("LA", (Image.fromarray(grey), Image.new("L", (30, 20), 9))), None
    elif mode == "I;16":
        image, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.dstack([grey] * 3)
    else:
        image, expected = Image.fromarray(rgb).convert(mode), None
    assert image.mode == mode
    got = as_rgb(image)
    assert got.shape == (20, 30, 3)
    assert got.dtype == np.uint8
    assert (got == (np.asarray(image.convert("RGB")) if expected is None else expected)).all()


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path):
    image = Image.fromarray(random_image(20, 30)).convert("P")
    image.save(tmp_path / "palette.png", transparency=bytes(range(256)))
    assert (as_rgb(tmp_path / "palette.png") == np.asarray(image.convert("RGB"))).all()


def test_unreadable_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no image .*nowhere\.jpg"):
        predict(model, tmp_path / "nowhere.jpg")
    (tmp_path / "notes.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"notes\.jpg is not an image that PIL can read"):
        predict(model, tmp_path / "notes.jpg")
    Image.fromarray(random_image(200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"half\.png cannot be read.*truncated"):
        predict(model, tmp_path / "half.png")
    with pytest.raises(ValueError, match="is a folder"):
        predict(model, tmp_path)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"float32 \[8, 8, 3\].*0\.\.255"),
        (np.zeros((8, 8), np.uint8), r"uint8 \[8, 8\].*Grey"),
        (np.zeros((8, 8, 4), np.uint8), r"\[8, 8, 4\].*RGBA"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\].*channels last"),
        (np.zeros((0, 8, 3), np.uint8), r"\[0, 8, 3\]"),
        (Image.new("F", (8, 8)), "mode F"),
        (Image.new("RGB", (0, 8)), "empty"),
    ],
)
def test_arrays_and_images_of_the_wrong_kind_are_refused(model, image, message):
    with pytest.raises(ValueError, match=message):
        predict(model, image)
    assert not model.seen


def test_a_tensor_is_refused_with_the_way_out(model):
    with pytest.raises(TypeError, match=r"got Tensor.*permute"):
        predict(model, torch.zeros(3, 8, 8))


# Sizes


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((100, 200), 50, None, (50, 100)),
        ((200, 100), 50, 80, (80, 40)),
        ((333, 500), 512, 2048, (512, 769)),  # 768.77
        ((1024, 2048), 1024, 2048, (1024, 2048)),
        ((100, 200), None, 100, (50, 100)),
        ((100, 200), None, 400, (100, 200)),
        ((100, 201), None, None, (100, 201)),
    ],
)
def test_the_shortest_edge_decides_up_to_the_longest(size, shortest, longest, expected):
    assert fitted_size(size, shortest, longest) == expected


def test_the_model_sees_pils_antialiased_image_and_the_result_has_the_own_size(model):
    pixels = random_image(90, 130)
    got = predict(model, pixels, shortest_edge=40, longest_edge=50, return_scores=True)
    assert got.label_map.shape == (90, 130)
    assert got.scores.shape == (K, 90, 130)
    assert got.scores.dtype == np.float32
    expected = np.asarray(Image.fromarray(pixels).resize((50, 35), Image.Resampling.BILINEAR))
    assert (model.seen[0][0].permute(1, 2, 0).numpy() == expected).all()
    with torch.inference_mode():
        model.eval()
        direct = postprocess.semantic(model(model.seen[0]), 0, (90, 130), return_scores=True)
    assert (got.scores == direct.scores).all()
    assert (got.label_map == got.scores.argmax(0)).all()
    assert predict(model, pixels, shortest_edge=40).scores is None


# Tiles and averaging


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("length", "tile"), [(100, 32), (64, 32), (33, 32), (32, 32), (5, 32), (1000, 7)])
def test_tiles_cover_everything_and_overlap(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile >= length
    if tile >= length:
        assert starts == [0]
        return
    assert starts[-1] + tile == length, "no tile looks beyond the image"
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (tile - steps >= int(tile * overlap)).all()
    assert len(starts) <= 1 + np.ceil((length - tile) / max(1, int(tile * (1 - overlap)))), "no tile too many"


def naive_tiles(model, pixels: np.ndarray, tile: tuple[int, int], overlap: float) -> np.ndarray:
    """Whole arrays: every tile's scores, times its weight, over the sum of weights."""
    height, width = pixels.shape[:2]
    total, weights = np.zeros((K, height, width)), np.zeros((height, width))
    for top in tile_starts(height, tile[0], overlap):
        for left in tile_starts(width, tile[1], overlap):
            part = np.ascontiguousarray(pixels[top : top + tile[0], left : left + tile[1]])
            scores = predict(model, part, return_scores=True).scores
            edge = [
                np.minimum(1, (np.minimum(np.arange(n), np.arange(n)[::-1]) + 0.5) / max(1, int(n * overlap)))
                for n in part.shape[:2]
            ]
            weight = np.outer(*edge)
            total[:, top : top + tile[0], left : left + tile[1]] += scores * weight
            weights[top : top + tile[0], left : left + tile[1]] += weight
    return total / weights


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((70, 100), (32, 48), 0.25), ((40, 90), (64, 32), 0.5), ((64, 64), (32, 32), 0.0)]
)
def test_tiles_are_averaged_with_weights_that_fall_towards_their_edges(size, tile, overlap):
    model, pixels = ColorModel(look_right=0.05), random_image(*size)
    expected = naive_tiles(model, pixels, tile, overlap)
    model.seen.clear()
    got = predict(model, pixels, tile=tile, tile_overlap=overlap, return_scores=True)
    np.testing.assert_allclose(got.scores, expected, rtol=1e-4, atol=1e-5)
    assert (got.label_map == got.scores.argmax(0)).all()
    for seen in model.seen:
        assert seen.shape[2] == min(tile[0], size[0])
        assert seen.shape[3] == min(tile[1], size[1])
    assert len(model.seen) == np.prod([len(tile_starts(s, t, overlap)) for s, t in zip(size, tile, strict=True)])


def test_each_tile_runs_once_also_when_the_scores_are_resized(model):
    predict(model, random_image(150, 100), shortest_edge=60, tile=32)
    assert len(model.seen) == len(tile_starts(90, 32, 0.25)) * len(tile_starts(60, 32, 0.25))


def test_only_the_tiles_in_use_are_kept(monkeypatch):
    """Reading from top to bottom holds at most two rows of tiles, however long the image is."""
    alive, most = weakref.WeakSet(), 0
    original = postprocess.semantic_rows

    def watched(output: Output, **options) -> Rows:
        nonlocal most
        alive.add(rows := original(output, **options))
        most = max(most, len(alive))
        return rows

    monkeypatch.setattr(postprocess, "semantic_rows", watched)
    model = ColorModel()
    predict(model, random_image(400, 512), tile=64)
    columns = len(tile_starts(512, 64, 0.25))
    assert most == 2 * columns
    assert len(model.seen) >= 8 * columns


def test_one_tile_is_the_whole_image(model):
    pixels = random_image(50, 70)
    whole = predict(model, pixels, return_scores=True).scores
    np.testing.assert_allclose(predict(model, pixels, tile=100, return_scores=True).scores, whole, rtol=1e-5)


def test_flipping_averages_with_the_mirrored_prediction_turned_back():
    model, pixels = ColorModel(look_right=0.05), random_image(64, 96)
    plain = predict(model, pixels, return_scores=True).scores
    mirrored = predict(model, np.ascontiguousarray(pixels[:, ::-1]), return_scores=True).scores[..., ::-1]
    assert np.abs(plain - mirrored).max() > 0.05
    got = predict(model, pixels, flip=True, return_scores=True)
    np.testing.assert_allclose(got.scores, (plain + mirrored) / 2, rtol=1e-5)
    assert (got.label_map == got.scores.argmax(0)).all()


def test_a_symmetric_model_gains_nothing_from_flipping(model):
    """Were the mirrored scores not turned back, or the image not mirrored, this would differ."""
    pixels = random_image(64, 96)
    plain = predict(model, pixels, return_scores=True).scores
    np.testing.assert_allclose(predict(model, pixels, flip=True, return_scores=True).scores, plain, rtol=1e-5)


def test_scales_average_over_sizes_of_the_original_image():
    model, pixels = ColorModel(look_right=0.02), random_image(60, 100)
    expected = [
        predict(model, pixels, shortest_edge=edge, flip=True, return_scores=True).scores for edge in (24, 48, 72)
    ]
    model.seen.clear()
    got = predict(model, pixels, shortest_edge=48, scales=(0.5, 1.0, 1.5), flip=True, return_scores=True).scores
    np.testing.assert_allclose(got, np.mean(expected, axis=0), rtol=1e-4, atol=1e-6)
    assert [tuple(s.shape[2:]) for s in model.seen[::2]] == [(24, 40), (48, 80), (72, 120)]
    assert (predict(model, pixels, scales=(0.5,), return_scores=True).scores != got).any()


def test_several_shortest_edges_are_the_published_multi_scale_sizes():
    """Absolute sizes of the original image, each within the longest edge and mirrored."""
    model, pixels = ColorModel(look_right=0.02), random_image(60, 100)
    expected = [
        predict(model, pixels, shortest_edge=edge, longest_edge=100, flip=True, return_scores=True).scores
        for edge in (24, 48, 72)
    ]
    model.seen.clear()
    sizes = dict(shortest_edge=(24, 48, 72), longest_edge=100)
    got = predict(model, pixels, **sizes, flip=True, return_scores=True).scores
    np.testing.assert_allclose(got, np.mean(expected, axis=0), rtol=1e-4, atol=1e-6)
    assert [tuple(s.shape[2:]) for s in model.seen[::2]] == [(24, 40), (48, 80), (60, 100)]
    with pytest.raises(ValueError, match=r"shortest_edge=\(24, 48\) for task='panoptic'"):
        predict(model, pixels, "panoptic", classes=CLASSES, shortest_edge=(24, 48))
    with pytest.raises(ValueError, match="or several, got none"):
        predict(model, pixels, shortest_edge=())


# Tasks


def test_panoptic_and_instance_come_back_at_the_images_own_size(model):
    pixels = random_image(50, 70)
    model.classes = CLASSES
    got = predict(model, pixels, "panoptic", shortest_edge=32, overlap_threshold=0.1)
    assert got.task == "panoptic"
    assert got.segments_map.shape == (50, 70)
    assert {(s.label, s.is_thing) for s in got.segments} == {(0, False), (1, True), (2, False)}
    got = predict(model, pixels, "instance", shortest_edge=32)
    assert got.masks.shape[1:] == (50, 70)
    assert {s.label for s in got.segments} == {1}, "only things"
    model.classes = None
    got = predict(model, pixels, "instance", top_k=3, score_threshold=0.1)
    assert {s.label for s in got.segments} == {0, 1, 2}
    assert predict(model, pixels, "panoptic", classes=CLASSES, object_mask_threshold=0.999).segments == ()


def test_without_classes_all_are_things_and_that_is_logged(model, caplog):
    pixels, all_things = random_image(40, 50), replace(CLASSES, things=frozenset(range(len(CLASSES))))
    with caplog.at_level(logging.WARNING, logger="m2f_lab"):
        got = predict(model, pixels, "panoptic", object_mask_threshold=0.1)
    assert "set model.classes" in caplog.text
    assert got.segments == predict(model, pixels, "panoptic", classes=all_things, object_mask_threshold=0.1).segments
    assert all(segment.is_thing for segment in got.segments)


def test_the_wrong_task_or_option_is_refused(model):
    pixels = random_image(20, 20)
    with pytest.raises(ValueError, match=r"task must be one of .*'instance'.*got 'depth'"):
        predict(model, pixels, "depth")
    with pytest.raises(ValueError, match='top_k is an option of task="instance"; task="panoptic" takes tile'):
        predict(model, pixels, "panoptic", classes=CLASSES, top_k=3)
    for option in (dict(flip=True), dict(scales=(0.5, 1)), dict(return_scores=True), dict(order="resize_first")):
        for task in ("panoptic", "instance"):
            with pytest.raises(ValueError, match=f'{next(iter(option))} is an option of task="semantic"'):
                predict(model, pixels, task, classes=CLASSES, **option)
    with pytest.raises(ValueError, match='top_k is an option of task="instance"; task="semantic" takes tile'):
        predict(model, pixels, top_k=3)
    with pytest.raises(ValueError, match="predicts 3 classes, but there are 1"):
        predict(model, pixels, classes=Classes(("a",), ((0, 0, 0),)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(tile_overlap=0.5), "pass tile"),
        (dict(tile=32, tile_overlap=1.0), r"share of the tile in \[0, 1\), got 1.0"),
        (dict(tile=0), "positive size"),
        (dict(scales=()), "positive numbers"),
        (dict(scales=(1, 0)), "positive numbers"),
        (dict(shortest_edge=0), "shortest_edge = 0"),
        (dict(longest_edge=-5), "longest_edge = -5"),
    ],
)
def test_options_out_of_range_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        predict(model, random_image(20, 20), **options)
    assert not model.seen


# The state of the model


def test_every_submodule_is_left_in_the_mode_it_was_in(model):
    model.train()
    model.frozen.eval()  # as people freeze batch normalisation
    predict(model, random_image(20, 20))
    assert model.training
    assert not model.frozen.training
    model.frozen.train()
    with pytest.raises(ValueError, match="class names"):
        predict(model, random_image(20, 20), classes=Classes(("a",), ((0, 0, 0),)))
    assert model.frozen.training, "also after an error"
    model.eval()
    predict(model, random_image(20, 20))
    assert not model.training
    assert not model.frozen.training
    assert not torch.is_inference_mode_enabled()


def test_any_callable_will_do(model):
    model.eval()
    pixels = random_image(40, 50)
    got = predict(lambda images: model(images), pixels)
    assert (got.label_map == predict(model, pixels).label_map).all()


def test_an_image_that_pillow_finds_too_large_is_not_called_truncated(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.fromarray(random_image(40, 50)).save(tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"map\.png is larger than Pillow opens .*Cut it into tiles"):
        predict(model, tmp_path / "map.png")
