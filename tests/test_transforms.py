from __future__ import annotations

import colorsys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from m2f_lab import recipes
from m2f_lab.data import Sample, TrainingTransform, resized_size
from m2f_lab.data.jitter import ColorJitter, add_brightness, scale_contrast, scale_saturation, turn_hue
from m2f_lab.data.transforms import crop_of_resized_image, crop_of_resized_labels
from m2f_lab.recipes import DataConfig
from tests.small_data import picture

# Nothing random but the place of the crop.
PLAIN = DataConfig(
    dataset="folder", crop_size=(32, 48), shortest_edges=(64,), longest_edge=1000, color_jitter=False, flip=False
)


def coded_sample(height: int = 64, width: int = 96, num_classes: int = 6) -> Sample:
    """Blocks of 16 pixels whose red says the class, whose green says the row and whose blue says the column."""
    rows, columns = np.mgrid[:height, :width]
    label_map = ((rows // 16 + 2 * (columns // 16)) % num_classes).astype(np.uint8)
    image = np.stack((label_map * 40, rows * 2, columns * 2), axis=-1).astype(np.uint8)
    return Sample("coded", image, label_map)


def label_map_of(target) -> np.ndarray:
    """A target back to train ids."""
    table = np.full(256, 255)
    table[: len(target.labels)] = target.labels.numpy()
    return table[target.id_map.numpy()]


def inner(mask: np.ndarray, reach: int = 2) -> np.ndarray:
    """Where a boolean map is true as far as `reach` pixels around."""
    size = 2 * reach + 1
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, reach), (size, size))
    return windows.all((2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Resize


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((360, 480), 512, 2048, (512, 683)),  # 682.67 rounds up
        ((480, 360), 512, 2048, (683, 512)),
        ((512, 512), 256, 2048, (256, 256)),
        ((100, 500), 512, 2048, (410, 2048)),  # the longest edge limits: 409.6
        ((1024, 2048), 1024, 4096, (1024, 2048)),
        ((1024, 2048), 2048, 4096, (2048, 4096)),
        ((300, 400), 307, None, (307, 409)),  # 409.33 rounds down
        ((2, 4000), 10, 100, (1, 100)),  # not to nothing
    ],
)
def test_resized_size(size: tuple, shortest: int, longest: int | None, expected: tuple) -> None:
    assert resized_size(size, shortest, longest) == expected


def test_recipes_resize_to_half_and_double_the_crop() -> None:
    ade20k, cityscapes = recipes.ade20k_swin_tiny().data, recipes.cityscapes_swin_tiny().data
    assert (min(ade20k.shortest_edges), max(ade20k.shortest_edges), ade20k.longest_edge) == (256, 1024, 2048)
    assert (min(cityscapes.shortest_edges), max(cityscapes.shortest_edges), cityscapes.longest_edge) == (
        512,
        2048,
        4096,
    )


@pytest.mark.parametrize("seed", range(12))
def test_resizing_a_crop_is_cropping_the_resized_image(seed: int) -> None:
    """For shrinking and growing, wherever the crop lies; noise would show every slip.

    To the last bit beside PyTorch's resize of the whole image, and within the rounding of its weights beside Pillow's.
    """
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 120, 2).tolist()
    size = resized_size((height, width), int(rng.integers(20, 300)), 700)
    box_size = np.minimum(size, rng.integers(16, 120, 2))
    corner = [int(rng.choice([0, rng.integers(s - b + 1), s - b])) for s, b in zip(size, box_size, strict=True)]
    top, left, h, w = box = (*corner, *box_size.tolist())
    image = picture(height, width, seed)
    crop = crop_of_resized_image(image, size, box)

    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    whole = F.interpolate(pixels, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(crop, whole[top : top + h, left : left + w])

    by_pillow = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    difference = abs(by_pillow[top : top + h, left : left + w] - crop)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 20), (20, 7), (9, 18), (18, 9), (60, 90), (360, 512)])
def test_labels_are_read_at_the_centres_of_the_new_pixels(old: int, new: int) -> None:
    label_map = np.arange(old, dtype=np.int32)[:, None].repeat(3, 1)
    expected = np.asarray(Image.fromarray(label_map).resize((3, new), Image.Resampling.NEAREST))[:, 0].tolist()
    between = [i for i in range(new) if ((Fraction(i) + Fraction(1, 2)) * old / new).denominator == 1]
    exact = [int((Fraction(i) + Fraction(1, 2)) * old / new) for i in range(new)]
    assert {i for i in range(new) if exact[i] != expected[i]} <= set(between)  # there only rounding decides
    assert crop_of_resized_labels(label_map, (new, 3), (0, 0, new, 3))[:, 0].tolist() == expected
    assert crop_of_resized_labels(label_map, (new, 3), (2, 1, new - 3, 2))[:, 0].tolist() == expected[2:-1]


@pytest.mark.parametrize(("old", "new"), [(7, 7), (7, 20), (20, 7), (9, 18), (18, 9), (60, 90), (360, 512)])
def test_class_maps_are_read_at_the_corners_of_the_new_pixels(old: int, new: int) -> None:
    label_map = np.arange(old, dtype=np.float64)[:, None].repeat(3, 1)
    expected = F.interpolate(torch.from_numpy(label_map)[None, None], (new, 3), mode="nearest")[0, 0, :, 0].tolist()
    found = crop_of_resized_labels(label_map, (new, 3), (2, 1, new - 3, 2), corners=True)
    assert found[:, 0].tolist() == expected[2:-1]


@pytest.mark.parametrize("corners", [False, True])
def test_labels_of_the_same_size_stay(corners: bool) -> None:
    label_map = picture(20, 30)[..., 0]
    assert np.array_equal(crop_of_resized_labels(label_map, (20, 30), (0, 0, 20, 30), corners), label_map)


# ----------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("edges", [(40,), (64,), (130,), (40, 64, 97, 130)])
def test_image_and_labels_stay_together(flip: bool, edges: tuple[int, ...]) -> None:
    """The red of every pixel that is not near an edge between classes still says its class."""
    transform = TrainingTransform(replace(PLAIN, flip=flip, shortest_edges=edges))
    sample = coded_sample()
    checked = 0
    for seed in range(6):
        image, target = transform(sample, np.random.default_rng(seed))
        label_map, red = label_map_of(target), image[0].numpy().astype(int)
        for train_id in target.labels.tolist():
            here = inner(label_map == train_id)
            assert np.all(red[here] == 40 * train_id)
            checked += here.sum()
    assert checked > 1000


def test_an_example_is_typed_and_shaped_as_promised() -> None:
    image, target = TrainingTransform(replace(PLAIN, color_jitter=True, flip=True))(
        coded_sample(), np.random.default_rng(0)
    )
    assert (image.dtype, image.shape, image.is_contiguous()) == (torch.uint8, (3, 32, 48), True)
    assert target.masks is None
    assert (target.id_map.dtype, target.size) == (torch.uint8, (32, 48))
    assert target.labels.dtype == torch.int64


def test_without_resizing_the_crop_is_a_piece_of_the_image() -> None:
    """Green and blue say where it was cut; every place is possible."""
    places = set()
    for seed in range(40):
        image, _ = TrainingTransform(PLAIN)(coded_sample(), np.random.default_rng(seed))
        top, left = int(image[1, 0, 0]) // 2, int(image[2, 0, 0]) // 2
        assert np.array_equal(image.permute(1, 2, 0), coded_sample().image[top : top + 32, left : left + 48])
        places.add((top, left))
    assert min(p[0] for p in places) < 4
    assert max(p[0] for p in places) > 28
    assert min(p[1] for p in places) < 6
    assert max(p[1] for p in places) > 42


def test_small_images_are_padded_at_the_bottom_and_right() -> None:
    config = replace(PLAIN, shortest_edges=(16,), flip=True, color_jitter=True)
    for seed in range(4):
        image, target = TrainingTransform(config)(coded_sample(), np.random.default_rng(seed))
        assert image.shape == (3, 32, 48)
        label_map = label_map_of(target)
        assert torch.all(image[:, 16:] == 128)
        assert torch.all(image[:, :, 24:] == 128)
        assert np.all(label_map[16:] == 255)
        assert np.all(label_map[:, 24:] == 255)
        assert np.all(label_map[:16, :24] != 255)


def test_a_narrow_image_is_cropped_one_way_and_padded_the_other() -> None:
    sample = coded_sample(96, 32)
    image, target = TrainingTransform(replace(PLAIN, shortest_edges=(32,)))(sample, np.random.default_rng(1))
    assert np.all(label_map_of(target)[:, :32] != 255)
    assert torch.all(image[:, :, 32:] == 128)
    assert not torch.all(image[:, :, :32] == 128)


def test_ignored_pixels_stay_ignored() -> None:
    sample = coded_sample()
    sample.label_map[:, :48] = 255
    _, target = TrainingTransform(replace(PLAIN, crop_size=(64, 96)))(sample, np.random.default_rng(0))
    assert np.array_equal(label_map_of(target), sample.label_map)


def test_an_image_without_labels_gives_an_empty_target() -> None:
    sample = replace(coded_sample(), label_map=np.full((64, 96), 255, np.uint8))
    _, target = TrainingTransform(replace(PLAIN, single_category_max_area=0.5))(sample, np.random.default_rng(0))
    assert target.num_segments == 0


def test_the_generator_decides_everything() -> None:
    transform = TrainingTransform(replace(PLAIN, color_jitter=True, flip=True, shortest_edges=(40, 64, 80)))
    np.random.seed(1)
    first = transform(coded_sample(), np.random.default_rng([3, 1, 4]))
    np.random.seed(2)
    again = transform(coded_sample(), np.random.default_rng([3, 1, 4]))
    other = transform(coded_sample(), np.random.default_rng([3, 1, 5]))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1].id_map, again[1].id_map)
    assert not torch.equal(first[0], other[0])


def test_the_sample_is_not_changed() -> None:
    sample = coded_sample()
    transform = TrainingTransform(replace(PLAIN, color_jitter=True, flip=True))
    for seed in range(8):
        transform(sample, np.random.default_rng(seed))
    assert np.array_equal(sample.image, coded_sample().image)
    assert np.array_equal(sample.label_map, coded_sample().label_map)


def test_half_of_the_images_are_flipped() -> None:
    transform = TrainingTransform(replace(PLAIN, flip=True, crop_size=(64, 96)))
    flipped = 0
    for seed in range(200):
        image, _ = transform(coded_sample(), np.random.default_rng(seed))
        blue = image[2, 0].int()  # grows to the right unless flipped
        flipped += int(blue[0] > blue[-1])
    assert 75 <= flipped <= 125


# ----------------------------------------------------------------------------------------------------------------------
# Crops that one class does not fill


def two_classes(share_of_second: float, ignored: int = 0) -> Sample:
    """Class 0 to the left, class 1 to the right, ignored rows at the bottom. 32 × 400"""
    label_map = np.zeros((32, 400), np.uint8)
    label_map[:, round(400 * (1 - share_of_second)) :] = 1
    label_map[32 - ignored :] = 255
    return Sample("two", np.zeros((32, 400, 3), np.uint8), label_map)


def largest_share(target) -> float:
    counts = np.bincount(label_map_of(target).ravel(), minlength=256)[:255]
    return counts.max() / counts.sum()


def crops_of(sample: Sample, max_area: float, count: int = 60) -> list:
    config = replace(PLAIN, crop_size=(32, 200), shortest_edges=(32,), single_category_max_area=max_area)
    return [TrainingTransform(config)(sample, np.random.default_rng(seed))[1] for seed in range(count)]


@pytest.mark.parametrize("ignored", [0, 24])
def test_crops_are_drawn_again_while_one_class_fills_them(ignored: int) -> None:
    """Of 201 places, those within 50 of the middle are good: half. Ten draws in vain: one in a thousand."""
    sample = two_classes(0.5, ignored)
    assert max(map(largest_share, crops_of(sample, 1.0))) > 0.9
    assert all(largest_share(target) < 0.75 for target in crops_of(sample, 0.75))


def test_a_single_class_is_drawn_again_whatever_its_share() -> None:
    """With 0.999 almost any crop of two classes will do, but none of one."""
    assert any(target.num_segments == 1 for target in crops_of(two_classes(0.3), 1.0))
    assert all(target.num_segments == 2 for target in crops_of(two_classes(0.3), 0.999))


def test_after_ten_draws_any_crop_will_do() -> None:
    class Counting:
        draws = 0

        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def integers(self, *args) -> int:
            self.draws += 1
            return self.rng.integers(*args)

    config = replace(PLAIN, crop_size=(32, 200), shortest_edges=(32,), single_category_max_area=0.75)
    rng = Counting()
    TrainingTransform(config)(two_classes(0.0), rng)
    assert rng.draws == 1 + 10 * 2  # one size, ten corners
    rng = Counting()
    TrainingTransform(replace(config, single_category_max_area=1.0))(two_classes(0.0), rng)
    assert rng.draws == 1 + 2


# ----------------------------------------------------------------------------------------------------------------------
# Colours


def all_kinds_of_colors() -> np.ndarray:
    """A grid over the cube of colours, with greys, black, white and pure colours. uint8 [3, N, 1]"""
    levels = np.array([0, 1, 60, 128, 200, 254, 255], np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij")).reshape(3, -1, 1)


ROUNDED = 0.5 + 1e-3  # grey levels; a half may go either way


def by_colorsys(image: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Pixel by pixel. [3, N, 1]"""
    result = []
    for pixel in image[:, :, 0].T / 255:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        result.append(colorsys.hsv_to_rgb((h + hue / 360) % 1, min(1, s * saturation), v))
    return 255 * np.array(result).T[:, :, None]


@pytest.mark.parametrize("factor", [0.5, 0.83, 1.0, 1.2, 1.5])
def test_saturation_is_that_of_hsv(factor: float) -> None:
    image = all_kinds_of_colors()
    scale_saturation(image, factor)
    assert abs(image - by_colorsys(all_kinds_of_colors(), factor, 0)).max() < ROUNDED


@pytest.mark.parametrize("degrees", [-60, -36, -14, 0, 2, 36, 60, 61, 120, 180, 350])
def test_hue_is_that_of_hsv(degrees: float) -> None:
    image = all_kinds_of_colors()
    turn_hue(image, degrees)
    assert abs(image - by_colorsys(all_kinds_of_colors(), 1, degrees)).max() < ROUNDED


def test_red_turned_by_a_third_is_green() -> None:
    image = np.array([255, 0, 0], np.uint8).reshape(3, 1, 1)
    turn_hue(image, 120)
    assert image.ravel().tolist() == [0, 255, 0]


@pytest.mark.parametrize("levels", [-255, -20.5, -20, -0.5, 0.5, 20, 20.5, 255])
def test_brightness_cuts_off(levels: float) -> None:
    """Fractions, and what is beyond 0…255."""
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    expected = np.clip(image + float(levels), 0, 255).astype(np.uint8)
    add_brightness(image, levels)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.3, 1.5])
def test_contrast_cuts_off(factor: float) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    expected = np.clip(image.astype(np.float32) * np.float32(factor), 0, 255).astype(np.uint8)
    scale_contrast(image, factor)
    assert np.array_equal(image, expected)


@pytest.mark.parametrize("contrast_first", [True, False])
def test_jitter_goes_step_by_step_through_bytes(contrast_first: bool) -> None:
    """As the official code does: brightness, saturation, hue, and contrast before or after those two."""
    draw = ColorJitter(brightness=-20.5, contrast=1.3, contrast_first=contrast_first, saturation=0.7, hue=-16)
    image, expected = all_kinds_of_colors(), all_kinds_of_colors()
    draw.apply(image)
    add_brightness(expected, -20.5)
    if contrast_first:
        scale_contrast(expected, 1.3)
    scale_saturation(expected, 0.7)
    turn_hue(expected, -16)
    if not contrast_first:
        scale_contrast(expected, 1.3)
    assert np.array_equal(image, expected)


def test_jitter_is_the_published_one_but_for_the_steps_of_its_hue() -> None:
    """Beside OpenCV, which keeps saturations as bytes, and hues in steps of two degrees."""
    from benchmarks.published_mapper import jittered

    for seed in range(20):
        draw = ColorJitter.draw(np.random.default_rng(seed))
        image = picture(40, 50, seed).transpose(2, 0, 1).copy()
        expected = jittered(np.ascontiguousarray(image.transpose(1, 2, 0)), draw).transpose(2, 0, 1)
        draw.apply(image)
        difference = abs(image.astype(int) - expected)
        assert difference.max() <= 16
        assert difference.mean() < 2


def test_no_jitter_is_no_change() -> None:
    image = all_kinds_of_colors()
    ColorJitter().apply(image)
    assert np.array_equal(image, all_kinds_of_colors())


def test_tall_images_are_jittered_to_the_last_row() -> None:
    image = np.full((3, 200, 2), 100, np.uint8)
    image[0] = 200
    ColorJitter(hue=120).apply(image)
    assert np.all(image == np.array([100, 200, 100])[:, None, None])


def test_jitter_is_drawn_with_the_published_odds_and_strengths() -> None:
    draws = [ColorJitter.draw(np.random.default_rng(seed)) for seed in range(2000)]
    for name, neutral, low, high in (
        ("brightness", 0, -32, 32), ("contrast", 1, 0.5, 1.5), ("saturation", 1, 0.5, 1.5), ("hue", 0, -36, 36),
    ):  # fmt: skip
        values = np.array([getattr(jitter, name) for jitter in draws])
        changed = values[values != neutral]
        assert 0.45 < len(changed) / len(values) < 0.55, name
        assert low <= changed.min() < low + 0.05 * (high - low), name
        assert high - 0.05 * (high - low) < changed.max() <= high, name
    assert 0.45 < np.mean([jitter.contrast_first for jitter in draws]) < 0.55
    assert all(jitter.hue % 2 == 0 for jitter in draws)  # OpenCV's steps of two degrees
