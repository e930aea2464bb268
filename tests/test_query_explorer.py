"""QueryExplorer: the arrays behind it are the model's own numbers, and the widget shows those arrays."""

from __future__ import annotations

import gc
import io
import re
import weakref
from dataclasses import replace
from pathlib import Path

import ipywidgets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import traitlets
from PIL import Image

from m2f_lab import recipes
from m2f_lab.data import Classes
from m2f_lab.explore import QueryExplorer, plots
from m2f_lab.explore.parts.labels import OPENED, class_labels, percent, query_options
from m2f_lab.explore.parts.reading import grid_size, rank_queries, read_masks, top_classes, winning_queries
from m2f_lab.explore.queries import views as query_views
from m2f_lab.explore.queries.trace import pool, trace_queries, with_mean
from m2f_lab.explore.queries.views import attention_pooling, make_views
from m2f_lab.model import build_model
from m2f_lab.model.transformer_decoder import TransformerDecoder
from m2f_lab.structures import Output
from tests.toy_output import toy_output

CLASSES = Classes(("road", "sky", "car", "tree"), ((128, 64, 128), (70, 130, 180), (0, 0, 142), (107, 142, 35)))


def some_image(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def some_explorer(**options) -> QueryExplorer:
    return QueryExplorer.from_output(toy_output(), some_image(), classes=CLASSES, **options)


# ------------------------------------------------------------------------------------------------------------ the trace


def test_masks_are_the_models_own_where_the_grid_fits() -> None:
    output = toy_output(batch=2)
    trace = trace_queries(output, index=1)
    assert trace.masks.shape == (5, 5, 16, 24)
    for mask, prediction in zip(trace.masks, output.masks, strict=True):
        np.testing.assert_allclose(mask, prediction.dense()[1].sigmoid().numpy(), atol=1e-5)
    for probabilities, logits in zip(trace.class_probabilities, output.class_logits, strict=True):
        np.testing.assert_allclose(probabilities, logits[1].softmax(-1).numpy(), atol=1e-6)


def test_padding_is_cut_off_the_masks() -> None:
    """40 × 72 pixels are padded to 64 × 96: the masks are those of the first 10 × 18 cells."""
    output = toy_output(image_size=(40, 72))
    masks = read_masks(output, 0, (10, 18))
    expected = output.masks[2].dense()[0, :, :10, :18].sigmoid()
    torch.testing.assert_close(masks[2], expected, atol=1e-6, rtol=0)
    assert trace_queries(output).coverage == (96 / 72, 64 / 40)


def test_coarser_grids_are_read_between_the_cells() -> None:
    output = toy_output(image_size=(64, 96))
    half = F.interpolate(output.masks[0].dense(), (8, 12), mode="bilinear", align_corners=False)[0].sigmoid()
    torch.testing.assert_close(read_masks(output, 0, (8, 12))[0], half, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image_size", "max_cells", "expected"),
    [((64, 96), 16384, (16, 24)), ((63, 94), 16384, (16, 24)), ((1024, 2048), 16384, (90, 181)), ((4, 4), 1, (1, 1))],
)
def test_grids_are_at_stride_4_or_as_fine_as_allowed(image_size, max_cells, expected) -> None:
    assert grid_size(image_size, max_cells) == expected
    assert np.prod(grid_size(image_size, max_cells)) <= max_cells


def test_attention_and_blocked_area_are_the_models_own() -> None:
    output = toy_output(batch=2)
    trace = trace_queries(output, index=1)
    assert trace.strides == (32, 16, 8, 32)
    for layer in range(4):
        state = output.states[layer + 1]
        height, width = output.level_sizes[layer % 3]
        weights, blocked = trace.attention[layer], trace.blocked[layer]
        assert weights.shape == (5, 2, height, width)
        assert weights[3, 1].ravel().tolist() == state.cross_attention[1, 1, 3].tolist()
        assert blocked[3].ravel().tolist() == state.blocked[1, 3].tolist()
        assert (weights.swapaxes(0, 1)[:, blocked] == 0).all()
        np.testing.assert_allclose(weights.sum(axis=(2, 3)), 1, atol=1e-5)
    assert trace.opened.tolist() == [[True, False, False, False, False]] * 4


def test_the_winner_contributes_most_to_the_winning_class() -> None:
    classes, masks = torch.rand(6, 5).softmax(-1), torch.rand(6, 3, 4)
    winners = winning_queries(classes, masks)
    for y in range(3):
        for x in range(4):
            shares = classes[:, :-1] * masks[:, y, x, None]  # (Q, K)
            label = shares.sum(0).argmax()
            assert winners[y, x] == shares[:, label].argmax()


def test_no_object_wins_nothing() -> None:
    """Query 1 is surer of "no object" than query 0 of anything, but pixels are shared among classes only."""
    classes = torch.tensor([[0.6, 0.4], [0.01, 0.99]])
    assert winning_queries(classes, torch.ones(2, 1, 1)).item() == 0


def without_weights(output: Output) -> Output:
    return replace(output, states=tuple(state._replace(cross_attention=None) for state in output.states))


def test_trace_without_attention_weights_keeps_the_rest() -> None:
    output = toy_output()
    trace, whole = trace_queries(without_weights(output)), trace_queries(output)
    assert (trace.attention, trace.num_heads) == ((), 0)
    assert whole.missing == ()
    assert len(trace.missing) == 1
    assert "keep_attention=True" in trace.missing[0]
    assert all(np.array_equal(a, b) for a, b in zip(trace.blocked, whole.blocked, strict=True))
    assert np.array_equal(trace.masks, whole.masks)


def test_trace_without_states_keeps_predictions() -> None:
    output = toy_output()
    trace = trace_queries(replace(output, states=(), level_sizes=()))
    assert (trace.blocked, trace.attention, trace.strides, trace.opened.shape) == ((), (), (), (0, 5))
    assert len(trace.missing) == 1
    assert "Output.states" in trace.missing[0]
    assert np.array_equal(trace.masks, trace_queries(output).masks)


def test_trace_of_layers_without_a_mask_hides_nothing() -> None:
    output = toy_output()
    states = tuple(state._replace(blocked=None, opened=None) for state in output.states)
    trace = trace_queries(replace(output, states=states))
    assert [blocked.shape for blocked in trace.blocked] == [weights[:, 0].shape for weights in trace.attention]
    assert not any(blocked.any() for blocked in trace.blocked)
    assert not trace.opened.any()


def test_trace_reads_masks_with_features_of_their_own() -> None:
    output = toy_output()
    masks = [replace(masks, features=torch.randn_like(masks.features)) for masks in output.masks]
    trace = trace_queries(replace(output, masks=masks))
    for mask, prediction in zip(trace.masks, masks, strict=True):
        np.testing.assert_allclose(mask, prediction.dense()[0].sigmoid().numpy(), atol=1e-5)


def test_an_output_of_nan_is_refused() -> None:
    output = toy_output()
    output.masks[2].embeddings[0, 1] = np.nan
    with pytest.raises(ValueError, match="mask embeddings of prediction 2 hold NaN"):
        trace_queries(output)


def test_small_helpers() -> None:
    maps = np.arange(24.0).reshape(1, 4, 6)
    assert pool(maps, 2).tolist() == [[[14, 22, 30], [62, 70, 78]]]
    with pytest.raises(ValueError, match="4 × 6 cells by 3"):
        pool(maps, 3)
    heads = np.stack([np.zeros((2, 2)), np.ones((2, 2))])[None]
    assert with_mean(heads)[0, :, 0, 0].tolist() == [0.5, 0, 1]
    probabilities = np.array([[0.1, 0.2, 0.7], [0.5, 0.2, 0.3], [0.2, 0.5, 0.3]])
    assert rank_queries(probabilities).tolist() == [1, 2, 0]  # "no object" does not count; the first of equals stays
    assert top_classes(probabilities[0], 2) == [(2, 0.7), (1, 0.2)]


def test_much_attention_is_pooled_and_still_adds_up() -> None:
    trace = trace_queries(toy_output())
    assert attention_pooling(trace) == [1, 1, 1, 1]
    everything = sum(weights.size // 2 * 3 for weights in trace.attention)
    assert attention_pooling(trace, everything - 1) == [1, 1, 2, 1]  # the finest level first
    assert attention_pooling(trace, 0) == [1, 2, 4, 1]  # 2 × 3 cells cannot be pooled further
    explorer = some_explorer()
    pooled = pool(with_mean(explorer.trace.attention[2]), 4)
    np.testing.assert_allclose(pooled.sum(axis=(2, 3)), 1, atol=1e-5)


def test_pooled_attention_may_be_rounded_to_more_than_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A query that sees four cells has all its attention in one block, whose sum may come out as 1.0000001."""
    too_much = np.nextafter(np.float32(0.25), np.float32(1))
    trace = trace_queries(toy_output())
    attention = tuple(np.zeros_like(weights) for weights in trace.attention)
    attention[2][..., :2, :2] = too_much
    monkeypatch.setattr(query_views, "attention_pooling", lambda trace: [1, 1, 2, 1])
    trace = replace(trace, attention=attention)
    order = np.arange(trace.num_queries)
    view = make_views(some_image(), trace, order, class_labels(CLASSES, 4), 560)["attention"]
    view.stack = 3
    assert view.mask[0, 0] == 255


# ----------------------------------------------------------------------------------------------------------- the widget


def test_the_views_hold_what_was_computed() -> None:
    explorer = some_explorer()
    trace = explorer.trace
    for layer in range(5):
        for place, query in enumerate(explorer.order):
            for kind in ("mask", "before", "blocked", "attention"):
                view = explorer.views[kind]
                view.stack, view.index, view.channel = layer, place, 2
            np.testing.assert_allclose(explorer.views["mask"].mask / 255, trace.masks[layer, query], atol=0.5 / 255)
            blocked, attention = explorer.views["blocked"].mask, explorer.views["attention"].mask
            before = explorer.views["before"].mask
            if layer == 0:
                assert not before.any()
                assert not blocked.any()
                assert not attention.any()
            else:
                np.testing.assert_allclose(before / 255, trace.masks[layer - 1, query], atol=0.5 / 255)
                head = trace.attention[layer - 1][query, 1]
                assert np.array_equal(blocked > 0, trace.blocked[layer - 1][query])
                np.testing.assert_allclose(attention / 255, head / head.max(), atol=0.5 / 255 + 1e-6)


def test_a_click_chooses_the_winner() -> None:
    explorer = some_explorer()
    for kind in ("mask", "before", "blocked", "attention"):
        view = explorer.views[kind]
        pick = np.frombuffer(view.pick, "<u2").reshape(view.pick_shape)
        assert np.array_equal(explorer.order[pick], explorer.trace.winners)


def test_the_grid_shows_every_query_in_three_orders() -> None:
    explorer = some_explorer()
    trace, order, grid = explorer.trace, explorer.order, explorer.views["grid"]
    assert list(grid.orders) == ["score", "class", "area"]
    assert all(sorted(places) == [0, 1, 2, 3, 4] for places in grid.orders.values())
    assert grid.orders["score"] == [0, 1, 2, 3, 4]  # the explorer's own order
    classes = trace.class_probabilities[-1][order[grid.orders["class"]]].argmax(axis=1)
    assert (np.diff(classes) >= 0).all()
    areas = (trace.masks[-1][order[grid.orders["area"]]] > 0.5).mean(axis=(1, 2))
    assert (np.diff(areas) <= 0).all()
    label = trace.class_probabilities[2, order[1]].argmax()
    assert grid.labels[2][1] == (
        f"{order[1]} {explorer.labels[label][0]} {percent(trace.class_probabilities[2, order[1], label])}"
    )
    grid.stack, grid.index = 2, 1
    expected = F.adaptive_avg_pool2d(torch.from_numpy(trace.masks[2, order[1]])[None], grid.mask.shape)[0]
    assert np.abs(grid.mask / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-6


def test_controls_speak_of_queries_layers_and_heads() -> None:
    explorer = some_explorer()
    assert (explorer.layer, explorer.query, explorer.head) == (4, explorer.order[0], None)
    explorer.layer, explorer.query, explorer.head = 2, 3, 1
    assert (explorer.layer, explorer.query, explorer.head) == (2, 3, 1)
    assert explorer.layer_slider.value == 2
    assert explorer.order[explorer.query_slider.value] == 3
    assert explorer.head_menu.label == "head 1"
    explorer.query_slider.set_state({"value": 4})  # as the browser does it
    assert explorer.query == explorer.order[4]
    explorer.head = None
    assert explorer.head_menu.label == "mean of 2 heads"
    for name, wrong, numbers in (("layer", 5, "0…4"), ("query", 5, "0…4"), ("head", 3, "1…2"), ("head", 0, "1…2")):
        with pytest.raises(ValueError, match=rf"no {name} {wrong}; they are numbered {numbers}"):
            setattr(explorer, name, wrong)


def test_everything_is_linked_in_the_browser() -> None:
    explorer = some_explorer()
    links = {pair for links in explorer._links for pair in links.pairs}
    for name, view in explorer.views.items():
        assert (explorer.layer_slider, "value", view, "stack") in links
        assert (explorer.query_slider, "value", view, "index") in links
        assert ((explorer.head_menu, "index", view, "channel") in links) == (name != "grid")
        assert ((explorer.opacity_slider, "value", view, "opacity") in links) == (name != "grid")
        assert ((explorer.threshold_slider, "value", view, "threshold") in links) == (name in ("mask", "grid"))
    assert (explorer.query_slider, "value", explorer.query_slider.menu, "index") in links


def test_words_say_what_happened() -> None:
    explorer = some_explorer()
    place = int(np.flatnonzero(explorer.order == 0)[0])  # toy_output: the fallback opens query 0 in every layer
    blocked = explorer.views["blocked"].captions
    assert [row[place].get("warning", "") for row in blocked] == ["", OPENED, OPENED, OPENED, OPENED]
    assert [row[1 - min(place, 1)].get("warning", "") for row in blocked] == [""] * 5
    query = int(explorer.order[1])
    hidden = int(explorer.trace.blocked[1][query].sum())
    assert blocked[2][1]["text"] == f"Layer 2: {hidden} of 24 cells hidden"
    assert explorer.views["attention"].captions[3][0]["text"] == "Layer 3: 8 × 12 cells, stride 8"
    mask = explorer.views["mask"].captions[4][1]
    assert mask["text"] == f"Query {query}, after layer 4 of 4"
    label, probability = top_classes(explorer.trace.class_probabilities[4, query])[0]
    assert mask["bars"][0][0] == [*CLASSES.names, "no object"][label]
    assert mask["bars"][0][1] == pytest.approx(probability, abs=1e-4)
    assert len(mask["bars"]) == 5


def test_menu_entries_are_sorted_and_name_the_best_class() -> None:
    probabilities = np.array([[0.1, 0.2, 0.0, 0.0, 0.7], [0.5, 0.2, 0.0, 0.0, 0.3]])
    options = query_options(probabilities, rank_queries(probabilities), class_labels(CLASSES, 4))
    assert options == [("query 1 · road 50 %", 1), ("query 0 · sky 20 % (no object)", 0)]


def test_class_names() -> None:
    assert class_labels(CLASSES, 4)[0] == ("road", "rgb(128, 64, 128)")
    assert class_labels(None, 2)[1][0] == "class 1"
    assert class_labels(None, 2)[2][0] == "no object"
    with pytest.raises(ValueError, match="predicts 3 classes, but there are 4 class names"):
        class_labels(CLASSES, 3)


def test_a_real_model_is_explored_and_left_as_it_was() -> None:
    model = build_model(recipes.debug_tiny(num_classes=4).model)
    model.classes = CLASSES
    model.backbone.eval()
    modes = [module.training for module in model.modules()]
    image = some_image(50, 70)
    explorer = QueryExplorer(model, Image.fromarray(image), width=300)
    assert [module.training for module in model.modules()] == modes
    with torch.inference_mode():
        model.eval()
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        output: Output = model(pixels, keep_attention=True)
    assert np.array_equal(explorer.trace.masks, trace_queries(output).masks)
    assert explorer.labels[0][0] == "road"
    assert repr(explorer) == "QueryExplorer(24 queries, 4 predictions, 70 × 50 pixels)"


@pytest.mark.parametrize("states", [False, True])
def test_explorer_shows_what_other_models_tell(states: bool, tmp_path: Path) -> None:
    """A function that takes images and nothing else, as an architecture of one's own may be."""
    whole = toy_output()
    output = without_weights(whole) if states else replace(whole, states=(), level_sizes=())
    explorer = QueryExplorer(lambda images: output, some_image())
    assert list(explorer.views) == ["mask", "before", *(["blocked"] if states else []), "grid"]
    (sentence,) = explorer.trace.missing
    assert [row.value for row in explorer.children if isinstance(row, ipywidgets.HTML)] == [f"<i>{sentence}</i>"]
    explorer.layer, explorer.query = 2, 3
    explorer.figure()
    explorer.save_html(tmp_path / "page.html")
    assert '"label": "attention"' not in (tmp_path / "page.html").read_text(encoding="utf-8")
    explorer.close()


def test_explorer_asks_a_decoder_variant_for_its_attention() -> None:
    class Reversed(TransformerDecoder):
        def level_of(self, index: int) -> int:
            return 2 - super().level_of(index)

    model = build_model(recipes.debug_tiny(num_classes=4).model)
    model.transformer_decoder = Reversed(model.config)
    explorer = QueryExplorer(model, some_image())
    assert explorer.trace.strides == (8, 16, 32)
    assert list(explorer.views) == ["mask", "before", "blocked", "attention", "grid"]
    explorer.close()


def test_several_models_are_refused() -> None:
    with pytest.raises(ValueError, match="QueryExplorer shows one model, got 2"):
        QueryExplorer({"a": lambda images: None, "b": lambda images: None}, some_image())


def test_the_model_may_see_the_image_smaller() -> None:
    model = build_model(recipes.debug_tiny(num_classes=4).model)
    explorer = QueryExplorer(model, some_image(120, 160), shortest_edge=60)
    assert explorer.trace.masks.shape[2:] == (15, 20)
    assert explorer.views["mask"].image_size == [160, 120]


def test_an_output_of_another_image_is_refused() -> None:
    other = toy_output(image_size=(32, 48))
    with pytest.raises(ValueError, match="made of an image of 48 × 32 pixels, not of 96 × 64"):
        QueryExplorer.from_output(other, some_image())
    assert QueryExplorer.from_output(other, some_image(), shortest_edge=32).image.shape == (64, 96, 3)


def test_bad_images_are_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        QueryExplorer(lambda *_, **__: toy_output(), "missing.png")


def test_the_page_has_the_same_controls(tmp_path) -> None:
    explorer = some_explorer()
    explorer.layer, explorer.query = 1, 2
    explorer.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for control in ("layer", "query", "attention", "opacity"):
        assert f'"label": "{control}"' in text
    assert text.count('"stack": 1') == 5  # the page opens where the explorer stands
    assert len(re.findall(r"query \d · ", text)) == 5


def test_a_figure_of_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="no head 3; they are numbered 1…2"):
        QueryExplorer.from_output(toy_output(), some_image()).figure(head=3)


def test_a_page_needs_its_folder(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to write page.html into"):
        QueryExplorer.from_output(toy_output(), some_image()).save_html(tmp_path / "nowhere" / "page.html")


def test_close_gives_the_memory_back() -> None:
    explorer = some_explorer()
    masks, links = weakref.ref(explorer.trace), [weakref.ref(link) for link in explorer._links]
    views = [weakref.ref(view) for view in explorer.views.values()]
    explorer.close()
    gc.collect()
    assert masks() is None
    assert [view() for view in views] == [None] * 5
    assert [link() for link in links] == [None] * len(links)
    assert repr(explorer) == "QueryExplorer(5 queries, 5 predictions, 96 × 64 pixels)"
    explorer.close()


def test_views_refuse_what_is_not_there() -> None:
    with pytest.raises(traitlets.TraitError, match=r"MaskView\.index = 5 is outside 0…4"):
        some_explorer().views["mask"].index = 5


def test_the_figure_shows_the_same_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = QueryExplorer.from_output(toy_output(image_size=(40, 72)), some_image(40, 72), classes=CLASSES)
    trace, drawn = explorer.trace, {}
    monkeypatch.setattr(plots, "attention", lambda *arrays, title: drawn.update(arrays=arrays, title=title))
    explorer.figure(layer=2, query=3, head=2)
    image, before, blocked, weights, after = drawn["arrays"]
    assert np.array_equal(image, explorer.image)
    assert np.array_equal(before, trace.masks[1, 3])
    assert np.array_equal(after, trace.masks[2, 3])
    for y, x in ((0, 0), (15, 16), (39, 71), (16, 40)):  # layer 2 looks at stride 16
        assert blocked[y, x] == trace.blocked[1][3, y // 16, x // 16]
        assert weights[y, x] == trace.attention[1][3, 1, y // 16, x // 16]
    assert drawn["title"].startswith("Query 3, layer 2: ")
    explorer.figure(layer=1, query=0)
    assert drawn["title"].endswith("(the fallback opened every cell)")
    with pytest.raises(ValueError, match="no query 5"):
        explorer.figure(query=5)


def test_there_is_a_picture_where_widgets_do_not_run() -> None:
    explorer = some_explorer()
    pictures = []
    for explorer.layer in (0, 3):
        bundle = explorer._repr_mimebundle_()
        assert bundle["text/plain"] == repr(explorer)
        assert "application/vnd.jupyter.widget-view+json" in bundle
        pictures.append(Image.open(io.BytesIO(bundle["image/png"])))
    assert [picture.width > 200 for picture in pictures] == [True, True]
