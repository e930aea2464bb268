"""CounterfactualExplorer: what is clicked and painted is what runs, and what is shown is what came out."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2f_lab.data import Classes, distinct_colors
from m2f_lab.explore import CounterfactualExplorer, ForceClass, Mute, PaintAttention, Replay, Unmask, plots
from m2f_lab.explore.counterfactuals.label_change import compare_label_maps
from m2f_lab.explore.counterfactuals.views import LONGEST_EDGE, change_caption, edits_as_text, named_maps
from m2f_lab.explore.parts.labels import OPENED
from m2f_lab.explore.queries.trace import trace_queries
from m2f_lab.model import Mask2Former
from tests.toy_model import CLASSES, IMAGE, LAYERS, QUERIES, sure_model


@pytest.fixture(scope="module")
def model() -> Mask2Former:
    return sure_model()


@pytest.fixture
def tool(model: Mask2Former) -> Iterator[CounterfactualExplorer]:
    tool = CounterfactualExplorer(model, IMAGE)
    yield tool
    tool.close()


def shown_map(tool: CounterfactualExplorer, name: str, index: int = 0) -> np.ndarray:
    view = tool.views[name]
    view.index = index
    return view.mask


def shown_hidden(tool: CounterfactualExplorer, layer: int, query: int) -> np.ndarray:
    """What the picture says that a layer hides from a query."""
    view = tool.views["hidden"]
    view.stack, view.index = layer - 1, int(np.flatnonzero(tool.order == query)[0])
    return view.mask == 255


def caption(tool: CounterfactualExplorer, layer: int, query: int) -> dict:
    return tool.views["hidden"].captions[layer - 1][int(np.flatnonzero(tool.order == query)[0])]


def paint(
    tool: CounterfactualExplorer, layer: int, query: int, cells: list[int], painted: bool, number: int = 1
) -> None:
    """A stroke, as the browser tells it."""
    place = int(np.flatnonzero(tool.order == query)[0])
    tool.views["hidden"].set_state({"stroke": [number, layer - 1, place, 0, 255 if painted else 0, *cells]})


# --------------------------------------------------------------------------------------------------------------- edits


def test_a_click_on_mute_is_the_function(model: Mask2Former, tool: CounterfactualExplorer) -> None:
    expected = Replay(model, IMAGE)
    before = expected.label_map(expected.output)
    assert np.array_equal(shown_map(tool, "result", 1), before)
    tool.layer, tool.query = 2, 6
    tool.buttons["mute"].click()
    assert tool.edits == (Mute(6, from_layer=2),)
    after = expected.label_map(expected.run([Mute(6, from_layer=2)]))
    assert not np.array_equal(before, after)
    assert np.array_equal(shown_map(tool, "result", 0), before)
    assert np.array_equal(shown_map(tool, "result", 1), after)
    assert np.array_equal(tool.change.after, after)
    assert shown_hidden(tool, 2, 6).all()
    assert caption(tool, 2, 6)["text"] == "Layer 2, query 6: muted, it sees nothing"
    assert "cells hidden" in caption(tool, 1, 6)["text"]
    assert tool.edit_list.value == "<ol><li>query 6: muted from layer 2 on</li></ol>"
    assert tool.status.value == f"computed in {1000 * tool.seconds:.0f} ms"


def test_every_button_makes_its_edit(tool: CounterfactualExplorer) -> None:
    tool.layer, tool.query = 3, 1
    tool.class_menu.label = "car"
    for button in ("leave-out", "force-class", "unmask", "unmask-all"):
        tool.buttons[button].click()
    assert tool.edits == (Mute(1, None), ForceClass(1, 2), Unmask(3, 1), Unmask(3))
    assert not shown_hidden(tool, 3, 4).any()
    assert "by hand" in caption(tool, 3, 4)["text"]
    assert "by hand" not in caption(tool, 2, 1)["text"]


def test_undo_redo_and_reset(tool: CounterfactualExplorer) -> None:
    controls = tool.buttons
    assert [controls["undo"].disabled, controls["redo"].disabled, controls["reset"].disabled] == [True, True, True]
    original = shown_map(tool, "result", 1).copy()
    tool.apply(Mute(6))
    muted = shown_map(tool, "result", 1).copy()
    assert [controls["undo"].disabled, controls["redo"].disabled, controls["reset"].disabled] == [False, True, False]
    controls["undo"].click()
    assert tool.edits == ()
    assert np.array_equal(shown_map(tool, "result", 1), original)
    assert [controls["undo"].disabled, controls["redo"].disabled] == [True, False]
    controls["redo"].click()
    assert np.array_equal(shown_map(tool, "result", 1), muted)
    controls["reset"].click()
    assert tool.edits == ()
    assert tool.change.num_changed == 0
    assert "Nothing is changed" in tool.edit_list.value
    tool.undo()
    assert tool.edits == (Mute(6),)


@pytest.mark.parametrize("picture", ["hidden", "result", "difference"])
def test_keys_mute_undo_and_redo(tool: CounterfactualExplorer, picture: str) -> None:
    tool.layer, tool.query = 2, 6
    numbers = iter(range(1, 10))
    muted = (Mute(6, from_layer=2),)
    for key, edits in (
        ("m", muted), ("u", ()), ("y", muted), ("ctrl-z", ()), ("shift-ctrl-z", muted), ("u", ()), ("ctrl-y", muted),
    ):  # fmt: skip
        tool.views[picture].set_state({"pressed": [next(numbers), key]})
        assert tool.edits == edits, key


def test_arrows_choose_on_every_picture(tool: CounterfactualExplorer) -> None:
    links = {pair for links in tool._links for pair in links.pairs}
    for name, view in tool.views.items():
        assert (tool.layer_slider, "index", view, "stack") in links
        view.set_state({"stack": LAYERS - 1})
        if name != "result":  # there, they switch between before and now
            assert (tool.query_slider, "value", view, "index") in links
            view.set_state({"index": QUERIES - 1})


def test_each_click_runs_the_decoder_once(tool: CounterfactualExplorer, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    run = Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, *a, **k: runs.append(a) or run(self, *a, **k))
    tool.buttons["mute"].click()
    assert len(runs) == 1
    paint(tool, 1, 0, [0, 1], True)
    assert len(runs) == 2
    tool.buttons["undo"].click()
    assert len(runs) == 3
    tool.query_slider.value = 3  # choosing runs nothing
    tool.layer_slider.index = 0
    tool.brush.value = 1
    assert len(runs) == 3


def test_what_does_not_fit_is_refused_and_leaves_no_trace(tool: CounterfactualExplorer) -> None:
    for query in range(QUERIES - 1):
        tool.apply(Mute(query))
    edits, shown = tool.edits, shown_map(tool, "result", 1).copy()
    with pytest.raises(ValueError, match="All 8 queries are muted"):
        tool.apply(Mute(QUERIES - 1))
    tool.query = QUERIES - 1
    tool.buttons["mute"].click()  # a person is told in the notebook
    assert "All 8 queries are muted" in tool.status.value
    assert tool.edits == edits
    assert np.array_equal(shown_map(tool, "result", 1), shown)
    with pytest.raises(ValueError, match="no query 8"):
        tool.query = QUERIES
    with pytest.raises(ValueError, match="no layer 5"):
        tool.layer = LAYERS + 1


# ------------------------------------------------------------------------------------------------------------- painting


def test_strokes_hide_and_show_cells(tool: CounterfactualExplorer) -> None:
    query = 4
    before = shown_hidden(tool, 2, query).copy()
    paint(tool, 2, query, [0, 7, 8], True)
    expected = before.copy()
    expected.flat[[0, 7, 8]] = True
    assert np.array_equal(shown_hidden(tool, 2, query), expected)
    paint(tool, 2, query, [8, 9], False, number=2)
    expected.flat[[8, 9]] = False
    assert np.array_equal(shown_hidden(tool, 2, query), expected)
    assert len(tool.edits) == 1
    assert np.array_equal(tool.edits[0].blocked, expected)
    assert (tool.edits[0].layer, tool.edits[0].query) == (2, query)
    tool.undo()
    tool.undo()
    assert np.array_equal(shown_hidden(tool, 2, query), before)


def test_a_row_painted_shut_is_opened_and_the_browser_is_told(tool: CounterfactualExplorer, monkeypatch) -> None:
    """The picture's bytes are the same before and after, but the browser has drawn the stroke: it gets them anew."""
    query, sent = 4, []
    tool.apply(PaintAttention(2, query, np.zeros((4, 6), bool)))
    view = tool.views["hidden"]
    monkeypatch.setattr(view, "send_state", lambda key=None: sent.append(key))
    masks = view.masks
    paint(tool, 2, query, list(range(24)), True)
    assert view.masks == masks
    assert "masks" in sent
    assert caption(tool, 2, query)["warning"] == OPENED


def test_the_brush_is_chosen_by_name(tool: CounterfactualExplorer) -> None:
    for label, brush in (("hide", 1), ("show", -1), ("choose", 0)):
        tool.brush.label = label
        assert tool.views["hidden"].brush == brush


# ------------------------------------------------------------------------------------------------------------- pictures


def test_hidden_cells_are_the_models_own(model: Mask2Former, tool: CounterfactualExplorer) -> None:
    trace = trace_queries(tool.replay.run())
    for layer in range(1, LAYERS + 1):
        for query in range(QUERIES):
            blocked = trace.blocked[layer - 1][query]
            assert np.array_equal(shown_hidden(tool, layer, query), blocked)
            text = f"Layer {layer}, query {query}: {blocked.sum()} of {blocked.size} cells hidden"
            opened = {"warning": OPENED} if trace.opened[layer - 1, query] else {}
            assert caption(tool, layer, query) == {"text": text} | opened


def test_a_click_chooses_the_query_that_contributes_most_now(tool: CounterfactualExplorer) -> None:
    x, y = 42, 26  # the middle of a cell of 4 × 4 pixels, but for half a pixel

    def winner() -> int:
        probabilities = tool.output.class_logits[-1][0].softmax(-1)[:, :-1]
        masks = tool.output.masks[-1].dense()[0].sigmoid()  # at stride 4
        shares = probabilities * masks[:, y // 4, x // 4, None]
        return int(shares[:, shares.sum(0).argmax()].argmax())

    first = winner()
    tool.views["result"].set_state({"clicked": [x, y]})
    assert tool.query == tool.winner(x, y) == first
    tool.apply(Mute(first))
    assert tool.winner(x, y) == winner() != first
    for place, name in (((-1, y), "column -1"), ((x, 10**4), "row 10000")):
        with pytest.raises(ValueError, match=f"There is no {name}; they are numbered 0…"):
            tool.winner(*place)


def test_everything_is_linked_in_the_browser(tool: CounterfactualExplorer) -> None:
    links = {pair for links in tool._links for pair in links.pairs}
    hidden = tool.views["hidden"]
    assert (tool.query_slider, "value", hidden, "index") in links
    assert (tool.query_slider, "value", tool.query_slider.menu, "index") in links
    assert (tool.layer_slider, "index", hidden, "stack") in links
    assert (tool.state, "index", tool.views["result"], "index") in links
    assert (tool.radius_slider, "value", hidden, "brush_radius") in links
    assert (tool.layer, hidden.stack) == (LAYERS, LAYERS - 1)


def test_the_difference_tells_what_became_of_what(tool: CounterfactualExplorer) -> None:
    tool.apply(ForceClass(int(tool.order[0]), "tree"))
    change, view = tool.change, tool.views["difference"]
    difference = shown_map(tool, "difference")
    assert change.num_changed > 0
    for old, new, pixels in change.flows():
        value = view.names.index(f"{CLASSES.names[old]} → {CLASSES.names[new]}")
        place = difference == value
        assert place.sum() == pixels
        assert (change.before[place] == old).all()
        assert (change.after[place] == new).all()
        table = np.frombuffer(view.table, np.uint8).reshape(256, 4)
        assert tuple(table[value, :3]) == CLASSES.colors[new]
    assert np.array_equal(difference == view.names.index("unchanged"), ~change.changed)
    assert tool.views["result"].names == view.names
    text = f"{change.num_changed} of 4500 pixels changed"
    assert view.captions[0][0]["text"].startswith(text)


def test_rare_changes_share_a_value_where_there_are_too_many() -> None:
    """20 classes can change in 380 ways, and a byte tells 256 values apart."""
    pairs = np.arange(400).repeat(2).reshape(1, -1)
    before, after = pairs // 20, pairs % 20
    before = np.concatenate([before, [[0] * 800]])  # the commonest change: 0 → 1
    after = np.concatenate([after, [[1] * 800]])
    classes = Classes(tuple(f"c{k}" for k in range(20)), distinct_colors(20))
    maps, names, _ = named_maps(compare_label_maps(before, after, 20), classes, longest_edge=800)
    assert len(names) == 256
    assert names[20:22] == ["unchanged", "c0 → c1"]
    assert names[255] == "another change"
    assert (maps[2, 1] == 21).all()
    told = [names[value] for value in maps[2, 0]]
    for old, new, name in zip(before[0], after[0], told, strict=True):
        assert name in ("unchanged" if old == new else f"c{old} → c{new}", "another change")
        assert (name == "unchanged") == (old == new)
    assert told.count("another change") == 2 * (380 - 234)


def test_large_label_maps_are_sent_smaller() -> None:
    label_map = np.zeros((30, 3 * LONGEST_EDGE), np.uint8)
    label_map[:, 1::3] = 1  # the middle of three
    classes = Classes(("a", "b"), distinct_colors(2))
    maps = named_maps(compare_label_maps(label_map, label_map, 2), classes).maps
    assert maps.shape == (3, 10, LONGEST_EDGE)
    assert (maps[0] == 1).all()


def test_the_table_says_what_each_class_gained_or_lost() -> None:
    before, after = np.array([[0, 0, 0, 1]]), np.array([[0, 1, 1, 1]])
    truth = np.array([[0, 0, 1, 255]], np.uint8)
    shown = change_caption(compare_label_maps(before, after, 4, truth), CLASSES)
    assert shown.text == "2 of 4 pixels changed (50.0 %)"
    assert shown.table.rows == (
        ("road", "75.0 %", "25.0 %", "−50.0", "66.7", "50.0"),
        ("sky", "25.0 %", "75.0 %", "+50.0", "0.0", "50.0"),
    )
    assert len(change_caption(compare_label_maps(before, after, 4), CLASSES).table.header) == 4
    same = change_caption(compare_label_maps(before, before, 4), CLASSES)
    assert [row[3] for row in same.table.rows] == ["0.0", "0.0"]


def test_many_edits_are_told_in_one_line() -> None:
    edits = [Mute(0), Mute(1), Mute(2), Mute(3), Mute(4)]
    assert edits_as_text(edits, CLASSES.names).endswith("; query 2: muted from layer 1 on; and 2 more")
    assert edits_as_text([], CLASSES.names) == "nothing changed"


def test_the_truth_tells_whether_it_is_for_the_better(model: Mask2Former) -> None:
    truth = model.predict(IMAGE).label_map
    tool = CounterfactualExplorer(model, IMAGE, truth=truth)
    tool.apply(Mute(6))
    assert tool.change.iou_before[1] == 100 > tool.change.iou_after[1]
    header = [text for text, _ in tool.views["difference"].captions[0][0]["table"]["header"]]
    assert header[-2:] == ["IoU before", "IoU now"]
    tool.close()


# --------------------------------------------------------------------------------------------------------- to take away


def test_the_figure_holds_what_was_computed(tool: CounterfactualExplorer, monkeypatch) -> None:
    drawn = {}
    real = plots.label_change
    monkeypatch.setattr(plots, "label_change", lambda *a, **k: drawn.update(args=a) or real(*a, **k))
    tool.apply(Mute(6))
    figure = tool.figure()
    assert np.array_equal(drawn["args"][2], tool.change.after)
    assert drawn["args"][4] == "query 6: muted from layer 1 on"
    names = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    gained = [bar.get_width() for bar in figure.axes[3].patches]
    for name, share in zip(names, gained, strict=True):
        label = CLASSES.names.index(name)
        assert share == pytest.approx(100 * (tool.change.pixels_after - tool.change.pixels_before)[label] / 4500)
    picture = np.asarray(figure.axes[2].get_images()[0].get_array())
    changed = tool.change.changed
    assert (picture[changed] == np.array(CLASSES.colors)[tool.change.after[changed]]).all()
    assert (picture[~changed] < 64).all()
    bundle = tool._repr_mimebundle_()
    assert bundle["text/plain"] == "CounterfactualExplorer(8 queries, 4 layers, 90 × 50 pixels)"
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 400


def test_the_page_switches_between_before_now_and_difference(tool: CounterfactualExplorer, tmp_path: Path) -> None:
    tool.apply(Mute(6))
    tool.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Now: query 6: muted from layer 1 on." in text
    assert '"label": "result"' in text
    for state in ("before", "now", "difference"):
        assert f'["{state}", ' in text


def test_closing_gives_the_memory_back(model: Mask2Former) -> None:
    tool = CounterfactualExplorer(model, IMAGE, width=200)
    views = list(tool.views.values())
    tool.close()
    assert (tool.replay, tool.output, tool.change, tool.views) == (None, None, None, {})
    assert all(view.comm is None for view in views)
