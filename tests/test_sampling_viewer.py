"""SamplingExplorer: the points shown are those that the encoder read, and they lie where they are drawn."""

from __future__ import annotations

import gc
import io
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from m2f_lab import recipes
from m2f_lab.explore import MaskView, SamplingExplorer, plots
from m2f_lab.explore.sampling.trace import STRIDES, SamplingTrace, trace_sampling
from m2f_lab.explore.sampling.views import GROUPS, LEVELS
from m2f_lab.model import Mask2Former, build_model
from m2f_lab.model.deformable_attention import DeformableAttention
from m2f_lab.structures import Output
from tests.toy_output import toy_output

HEADS, POINTS = 2, 4


def some_image(height: int = 50, width: int = 70) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_model(seed: int = 0, **config) -> Mask2Former:
    """Its sampling offsets and weights depend on what is seen, as after training."""
    torch.manual_seed(seed)
    model = build_model(recipes.debug_tiny(num_classes=4).vary(model=config).model).eval()
    for layer in model.pixel_decoder.layers:
        torch.nn.init.normal_(layer.attention.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.attention.attention_weights.weight, std=0.3)
    return model


class GivenPoints(DeformableAttention):
    """Attention that reads at given points."""

    def __init__(self, locations: Tensor, weights: Tensor) -> None:
        nn.Module.__init__(self)
        self.locations, self.weights = locations, weights

    def forward(self, *given: object) -> tuple[Tensor, SimpleNamespace]:
        return torch.zeros(1), SimpleNamespace(locations=self.locations, weights=self.weights)


class Reader(nn.Module):
    """A model of random sampling points, some outside the padded image."""

    def __init__(self, image_size: tuple[int, int] = (50, 70), num_layers: int = 3, batch: int = 1) -> None:
        super().__init__()
        self.output = toy_output(image_size, batch)
        padded_height, padded_width = self.output.padded_size
        num_positions = sum(padded_height // stride * (padded_width // stride) for stride in STRIDES)
        shape = (batch, num_positions, HEADS, 3, POINTS)
        self.layers = nn.ModuleList(
            GivenPoints(torch.rand(*shape, 2) * 1.4 - 0.2, torch.rand(shape).flatten(3).softmax(3).view(shape))
            for _ in range(num_layers)
        )

    def forward(self, images: Tensor) -> Output:
        for layer in self.layers:
            layer(images)
        return self.output


def trace_of(reader: Reader, **options) -> SamplingTrace:
    return trace_sampling(reader, some_image(*reader.output.image_size), **options)


def read_bilinearly(level: np.ndarray, x: float, y: float) -> np.ndarray:
    """What lies at a place in pixels of a level, whose first pixel's centre is at 0.5; zero outside. [H, W, D] → [D]"""
    height, width, channels = level.shape
    total = np.zeros(channels)
    for row in (math.floor(y - 0.5), math.floor(y - 0.5) + 1):
        for column in (math.floor(x - 0.5), math.floor(x - 0.5) + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(y - 0.5 - row)) * (1 - abs(x - 0.5 - column)) * level[row, column]
    return total


# --------------------------------------------------------------------------------------------------------- the arrays


@pytest.mark.parametrize("stride", STRIDES)
def test_the_points_explain_what_the_module_computed(stride: int) -> None:
    """Read every level at the points shown, weigh, project: this is the encoder layer's own result at that position."""
    model, heard = some_model(num_encoder_layers=2), []
    for layer in model.pixel_decoder.layers:
        layer.attention.register_forward_hook(lambda module, given, result: heard.append((given[0], result[0])))
    trace = trace_sampling(model, some_image(), dtype=torch.float32)
    assert trace.padded_size == (64, 96)
    sampled = trace.at((0.61, 0.43), stride)
    level = STRIDES.index(stride)
    row, column = sampled.cell
    start = sum(height * width for height, width in trace.level_sizes[:level])
    position = start + row * trace.level_sizes[level][1] + column
    for i, (layer, (features, result)) in enumerate(zip(model.pixel_decoder.layers, heard, strict=True)):
        attention = layer.attention
        with torch.inference_mode():
            values = attention.value_projection(features)[0].unflatten(1, (attention.num_heads, -1)).double().numpy()
        parts = np.split(values, np.cumsum([height * width for height, width in trace.level_sizes])[:-1])
        total = np.zeros(values.shape[1:])
        for head in range(attention.num_heads):
            for source, (part, (height, width)) in enumerate(zip(parts, trace.level_sizes, strict=True)):
                grid = part[:, head].reshape(height, width, -1)
                for point, weight in zip(
                    sampled.points[i, head, source], sampled.weights[i, head, source], strict=True
                ):
                    x, y = point * (70, 50) / STRIDES[source]  # of the image in 0…1 → of that level in pixels
                    total[head] += weight * read_bilinearly(grid, x, y)
        expected = attention.output_projection(torch.from_numpy(total.reshape(1, -1)).float())[0]
        torch.testing.assert_close(result[0, position], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("image_size", [(64, 96), (50, 70), (33, 65)])
@pytest.mark.parametrize("stride", STRIDES)
def test_a_place_is_asked_for_by_the_cell_it_lies_in(image_size: tuple[int, int], stride: int) -> None:
    """The cell of every pixel, by division in the padded image; its points, without padding."""
    reader = Reader(image_size)
    output, trace = reader.output, trace_of(reader, dtype=torch.float32)
    height, width = image_size
    rows, columns = (edge // stride for edge in output.padded_size)
    before = {32: 0, 16: math.prod(trace.level_sizes[0])}
    before[8] = before[16] + math.prod(trace.level_sizes[1])
    locations, weights = reader.layers[1].locations[0].numpy(), reader.layers[1].weights[0].numpy()
    for y in range(0, height, 7):
        for x in range(0, width, 7):
            sampled = trace.at(((x + 0.5) / width, (y + 0.5) / height), stride)
            assert sampled.cell == (y // stride, x // stride)
            np.testing.assert_allclose(
                sampled.location * (width, height),
                [(x // stride + 0.5) * stride, (y // stride + 0.5) * stride],
                rtol=1e-6,
            )
            position = before[stride] + (y // stride) * columns + x // stride
            in_pixels = locations[position] * output.padded_size[::-1]
            np.testing.assert_allclose(sampled.points[1] * (width, height), in_pixels, atol=1e-3)
            assert np.array_equal(sampled.weights[1], weights[position])
    assert (rows, columns) == trace.level_sizes[STRIDES.index(stride)]


def test_the_far_corner_belongs_to_the_last_cell() -> None:
    assert trace_of(Reader((64, 96))).at((1.0, 1.0), 8).cell == (7, 11)
    assert trace_of(Reader((50, 70))).at((1.0, 1.0), 32).cell == (1, 2)


def test_fresh_weights_sample_a_star() -> None:
    """Before training, head h reads into direction h, point p at p + 1 cells of the level, all alike."""
    model = build_model(recipes.debug_tiny(num_classes=4).model).eval()
    sampled = trace_sampling(model, some_image()).at((0.5, 0.5), 8)
    away = (sampled.points - sampled.location) * (70, 50)
    for level, stride in enumerate(STRIDES):
        reach = stride * np.arange(1, sampled.points.shape[3] + 1)
        np.testing.assert_allclose(
            np.abs(away[:, :, level]).max(axis=-1), np.broadcast_to(reach, away.shape[:2] + reach.shape), atol=0.05
        )
        np.testing.assert_allclose(away[:, 0, level, :, 0], np.broadcast_to(reach, (len(away), len(reach))), atol=0.05)
    np.testing.assert_allclose(sampled.level_shares, 1 / 3, atol=2e-3)


def test_numbers_worked_by_hand() -> None:
    """One layer, one head, one point per level, on an image of 20 × 10 pixels in a padding of 32 × 32."""
    offsets = np.zeros((1, 21, 1, 3, 1, 2))
    offsets[0, 5, 0, :, 0] = [(3, 4), (0, -10), (16, 0)]  # position 5: the first of stride 8, at (4, 4) pixels
    weights = np.broadcast_to(np.reshape([0.5, 0.3, 0.2], (3, 1)), (1, 21, 1, 3, 1))
    trace = SamplingTrace(offsets, weights, ((1, 1), (2, 2), (4, 4)), (10, 20), (32, 32))
    sampled = trace.at((0.1, 0.1), 8)
    np.testing.assert_allclose(sampled.location, [0.2, 0.4])
    np.testing.assert_allclose(sampled.points[0, 0, :, 0], [(0.35, 0.8), (0.2, -0.6), (1.0, 0.4)], rtol=1e-6)
    np.testing.assert_allclose(sampled.level_shares, [[[0.5, 0.3, 0.2]]])
    np.testing.assert_allclose(sampled.distances, [[0.5 * 5 + 0.3 * 10 + 0.2 * 16]])
    np.testing.assert_allclose(sampled.outside, [[1 / 3]])


def test_half_precision_keeps_eleven_bits_of_every_offset() -> None:
    reader = Reader((256, 512))
    exact, half = (trace_of(reader, dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert trace_of(reader).offsets.dtype == np.float16
    np.testing.assert_allclose(half.offsets, exact.offsets, rtol=2**-11, atol=1e-6)
    np.testing.assert_allclose(half.weights, exact.weights, rtol=2**-11, atol=1e-7)


def test_trace_keeps_weights_and_leaves_no_hook_behind() -> None:
    reader = Reader()
    trace = trace_of(reader, dtype=torch.float32)
    assert np.array_equal(trace.weights[2], reader.layers[2].weights[0].numpy())
    assert (trace.num_layers, trace.num_heads) == (3, HEADS)
    assert not any(layer._forward_hooks for layer in reader.layers)


def test_what_is_not_there_is_named() -> None:
    trace = trace_of(Reader())
    with pytest.raises(ValueError, match="stride must be one of 32, 16, 8, got 4"):
        trace.at((0.5, 0.5), 4)
    with pytest.raises(ValueError, match=r"in 0…1 of the image, got \(35, 25\)"):
        trace.at((35, 25))
    with pytest.raises(ValueError, match="with deformable attention, which this function does not have"):
        trace_sampling(lambda images: toy_output(), some_image())
    with pytest.raises(ValueError, match="which this Linear does not have"):
        SamplingExplorer(nn.Linear(1, 1), some_image())
    reader = Reader((64, 96))
    reader.output = toy_output((32, 96))
    with pytest.raises(ValueError, match=r"strides 32, 16, 8, 63 positions here, but .* \[\(126, 3\)\]"):
        trace_sampling(reader, some_image(32, 96))


# ---------------------------------------------------------------------------------------------------------- the widget


def some_viewer(**options) -> SamplingExplorer:
    torch.manual_seed(0)
    return SamplingExplorer({"before": Reader(), "after": Reader()}, some_image(), **options)


def dots(view: MaskView) -> np.ndarray:
    return np.frombuffer(view.marks, "<f4").reshape(*view.marks_shape, 3)


def assert_shows(viewer: SamplingExplorer, place: tuple[float, float], stride: int) -> None:
    for name, view in viewer.views.items():
        sampled = viewer.traces[name].at(place, stride)
        shown = dots(view)
        assert shown.shape == (1, 1, 3, HEADS, 4 * POINTS, 3)
        assert (shown[..., 3 * POINTS :, :2] == sampled.location).all()
        for layer in range(3):
            for head in range(HEADS):
                expected = sampled.points[layer, head].reshape(-1, 2)  # level by level, as the groups are
                assert np.array_equal(shown[0, 0, layer, head, : 3 * POINTS, :2], expected)
                assert np.array_equal(shown[0, 0, layer, head, : 3 * POINTS, 2], sampled.weights[layer, head].ravel())


def test_the_middle_is_shown_at_first() -> None:
    viewer = some_viewer()
    assert (viewer.pixel, viewer.layer, viewer.stride, viewer.head) == ((35, 25), 3, 8, None)
    assert_shows(viewer, (35.5 / 70, 25.5 / 50), 8)
    assert viewer.views["after"].mark_groups == [list(group) for group in GROUPS]
    assert [color for _, color in LEVELS] == list(plots.PALETTE[:3])
    assert [name for name, _ in LEVELS] == [f"stride {stride}" for stride in STRIDES]


def test_a_click_into_one_picture_shows_the_place_in_all() -> None:
    viewer = some_viewer()
    before = dots(viewer.views["before"]).copy()
    viewer.views["after"].set_state({"clicked": [69, 3]})  # as the browser does it
    assert viewer.pixel == (69, 3)
    assert_shows(viewer, (69.5 / 70, 3.5 / 50), 8)
    assert viewer.views["before"].clicked == [69, 3]
    assert not np.array_equal(before, dots(viewer.views["before"]))
    note = viewer.views["before"].notes[0][1]
    assert note["text"].startswith("Encoder layer 2 of 3: row 0, column 8 of stride 8 reads ")


def test_the_menu_chooses_which_level_asks() -> None:
    viewer = some_viewer()
    viewer.level_menu.set_state({"index": 0})
    assert viewer.stride == 32
    assert_shows(viewer, (35.5 / 70, 25.5 / 50), 32)
    viewer.stride = 16
    assert_shows(viewer, (35.5 / 70, 25.5 / 50), 16)
    viewer.pixel = (0, 49)
    assert_shows(viewer, (0.5 / 70, 49.5 / 50), 16)


def test_notes_tell_the_numbers_of_the_place() -> None:
    viewer = some_viewer()
    sampled = viewer.points("after")
    for layer, note in enumerate(viewer.views["after"].notes[0]):
        assert [bar[1] for bar in note["bars"]] == pytest.approx(sampled.level_shares[layer].mean(0), abs=1e-4)
        assert sum(bar[1] for bar in note["bars"]) == pytest.approx(1, abs=1e-3)
        assert f"reads {sampled.distances[layer].mean():.0f} pixels away" in note["text"]
        assert f"{100 * sampled.outside[layer].mean():.0f} % of its points" in note["text"]
        rows = note["table"]["rows"]
        assert [row[0] for row in rows] == ["1", "2"]
        assert [row[1] for row in rows] == [f"{distance:.0f}" for distance in sampled.distances[layer]]


def test_the_map_below_says_how_far_each_position_reads() -> None:
    viewer = some_viewer()
    view, trace = viewer.views["after"], viewer.traces["after"]
    assert view.coverage == [96 / 70, 64 / 50]
    view.stack, view.channel = 1, 2  # layer 2
    diagonal = math.hypot(50, 70)
    for view.index, stride in enumerate(STRIDES):
        maps = trace.distance_maps(2, stride)
        top = float(np.frombuffer(view.scales, "<f4").reshape(3, 3, 3)[1, view.index, 2])
        for x, y in ((3, 3), (64, 45)):
            sampled = trace.at(((x + 0.5) / 70, (y + 0.5) / 50), stride)
            assert maps[1, y // stride, x // stride] == pytest.approx(sampled.distances[1, 1], rel=1e-3)
            shown = view.mask[y // 8, x // 8] / 255 * top * diagonal
            assert shown == pytest.approx(min(sampled.distances[1, 1], diagonal), abs=0.6 / 255 * top * diagonal)


def test_controls_are_linked_in_the_browser() -> None:
    viewer = some_viewer()
    links = {pair for links in viewer._links for pair in links.pairs}
    for view in viewer.views.values():
        assert (viewer.layer_slider, "index", view, "stack") in links
        assert (viewer.level_menu, "index", view, "index") in links
        assert (viewer.head_menu, "index", view, "channel") in links
        assert (viewer.reach_slider, "value", view, "opacity") in links
        assert view.num_channels == HEADS + 1
    before, after = viewer.views.values()
    assert (before, "clicked", after, "clicked") in links


def test_what_the_viewer_cannot_show_is_refused() -> None:
    viewer = some_viewer()
    for name, count, numbers in (("layer", 4, "1…3"), ("layer", 0, "1…3"), ("head", 3, "1…2")):
        with pytest.raises(ValueError, match=rf"no {name} {count}; they are numbered {numbers}"):
            setattr(viewer, name, count)
    with pytest.raises(ValueError, match="no column 70"):
        viewer.pixel = (70, 0)
    with pytest.raises(ValueError, match="stride must be one of 32, 16, 8"):
        viewer.stride = 4
    with pytest.raises(ValueError, match="there is none"):
        SamplingExplorer({}, some_image())
    with pytest.raises(
        ValueError, match=r"differ in their numbers of encoder layers and heads \(a: 3 and 2, b: 2 and 2"
    ):
        SamplingExplorer({"a": Reader(), "b": Reader(num_layers=2)}, some_image())


def test_a_real_model_before_and_after() -> None:
    """The trained one is a fresh one that was changed; the image is larger than what the models see."""
    fresh = build_model(recipes.debug_tiny(num_classes=4).model)
    image = Image.fromarray(some_image(100, 140))
    viewer = SamplingExplorer({"fresh": fresh, "trained": some_model()}, image, shortest_edge=50, width=300)
    assert repr(viewer) == "SamplingExplorer(fresh | trained, 1 layer, 140 × 100 pixels)"
    viewer.views["fresh"].set_state({"clicked": [139, 99]})
    assert viewer.points().cell == (6, 8)  # of 64 × 96 pixels that show the image in 50 × 70
    fresh_shares = viewer.points("fresh").level_shares
    np.testing.assert_allclose(fresh_shares, 1 / 3, atol=2e-3)
    assert np.abs(viewer.points("trained").level_shares - 1 / 3).max() > 0.05
    assert fresh.training


def test_the_figure_has_a_panel_per_model_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = some_viewer()
    drawn = {}
    monkeypatch.setattr(plots, "sampling_panels", lambda image, panels, columns: drawn.update(panels, columns=columns))
    viewer.figure()
    assert list(drawn) == ["before, layer 3", "after, layer 3", "columns"]
    assert drawn["columns"] is None
    drawn.clear()
    viewer.figure(layers=(1, 3), head=2)
    assert list(drawn)[:2] == ["before, layer 1, head 2", "before, layer 3, head 2"]
    assert drawn["columns"] == 2
    location, points, weights = drawn["after, layer 3, head 2"]
    sampled = viewer.points("after")
    assert np.array_equal(points, sampled.points[2, 1:2])
    assert np.array_equal(weights, sampled.weights[2, 1:2])
    assert np.array_equal(location, sampled.location)
    with pytest.raises(ValueError, match="no layer 4"):
        viewer.figure(layers=[4])
    with pytest.raises(ValueError, match="layers is empty; name at least one of 1…3"):
        viewer.figure(layers=[])


def test_a_saved_page_knows_a_grid_of_places(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = some_viewer()
    viewer.stride, viewer.layer = 16, 2
    kept = []
    monkeypatch.setattr(MaskView, "close", lambda view: kept.append(view))
    viewer.save_html(tmp_path / "page.html", places=(3, 4))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('"places": [3, 4]') == 2
    assert text.count('"stack": 1') == 2
    assert '"linked": ["stack", "channel", "opacity", "clicked"]' in text
    for view, trace in zip(kept, viewer.traces.values(), strict=True):
        shown = dots(view)
        assert shown.shape[:2] == (3, 4)
        for row in range(3):
            for column in range(4):
                sampled = trace.at(((column + 0.5) / 4, (row + 0.5) / 3), 16)
                assert np.array_equal(
                    shown[row, column, ..., : 3 * POINTS, :2].reshape(sampled.points.shape), sampled.points
                )
                note = view.notes[row * 4 + column][0]["text"]
                assert f"row {sampled.cell[0]}, column {sampled.cell[1]} of stride 16" in note
    assert_shows(viewer, (35.5 / 70, 25.5 / 50), 16)  # what the notebook shows is as it was


def test_there_is_a_picture_where_widgets_do_not_run() -> None:
    bundle = some_viewer()._repr_mimebundle_()
    assert bundle["text/plain"] == "SamplingExplorer(before | after, 3 layers, 70 × 50 pixels)"
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 200


def test_close_gives_the_memory_back() -> None:
    viewer = some_viewer()
    kept = [weakref.ref(each) for each in (*viewer.traces.values(), *viewer.views.values(), *viewer._links)]
    viewer.close()
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
    viewer.close()
