"""MaskView: what is sent to the browser, what it draws, and what comes back."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from pathlib import Path

import comm
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import traitlets
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore.parts.assets import source_files
from m2f_lab.explore.parts.drawing import TABLES, composite, label_table, tint, to_png, to_uint8
from m2f_lab.explore.parts.mask_grid import MaskGrid
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.pages import Control, off_page, save_page
from m2f_lab.explore.parts.table import Caption, Table

IMAGE = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
GREY = np.full((12, 16, 3), 100, np.uint8)
RED = tint((200, 0, 0))


# ------------------------------------------------------------------------------------------------------- quantisation


def test_probabilities_become_the_nearest_of_256_values() -> None:
    values, scales = to_uint8(np.array([[[0.0, 1.0, 0.5, 0.1]]]))
    assert values.tolist() == [[[0, 255, 128, 26]]]
    assert scales.tolist() == [1.0]


def test_booleans_and_bytes() -> None:
    assert to_uint8(np.array([[[False, True]]]))[0].tolist() == [[[0, 255]]]
    assert to_uint8(np.array([[[3, 255]]], np.uint8))[0].tolist() == [[[3, 255]]]


def test_small_weights_are_stretched_and_can_be_read_back() -> None:
    weights = torch.rand(3, 2, 5, 7).mul(0.01).numpy()
    weights[1, 0] = 0  # nothing to stretch, and no division by zero
    values, scales = to_uint8(weights, relative=True)
    assert values.max(axis=(2, 3)).tolist() == [[255, 255], [0, 255], [255, 255]]
    np.testing.assert_allclose(values / 255 * scales[..., None, None], weights, atol=0.01 / 255)


@pytest.mark.parametrize("wrong", [np.array([[[1.5]]]), np.array([[[-0.1]]]), np.array([[[np.nan]]])])
def test_logits_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match="apply a sigmoid to logits first"):
        to_uint8(wrong)


# --------------------------------------------------------------------------------------------------------- composition


def test_cells_are_drawn_where_they_belong() -> None:
    drawn = composite(GREY, np.array([[0, 255], [51, 0]], np.uint8), RED, smooth=False)
    assert (drawn[:6, :8] == 100).all()
    assert (drawn[:6, 8:] == [200, 0, 0]).all()
    assert (drawn[6:, :8] == [120, 80, 80]).all()  # a fifth of the way from grey to red
    assert (drawn[6:, 8:] == 100).all()


def test_smooth_masks_are_resized_as_torch_resizes() -> None:
    mask = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    black = np.zeros((33, 41, 3), np.uint8)
    drawn = composite(black, mask, tint((255, 255, 255)), smooth=True)[..., 0]
    resized = F.interpolate(torch.from_numpy(mask)[None, None].float(), (33, 41), mode="bilinear", align_corners=False)
    assert np.abs(drawn - resized[0, 0].numpy()).max() <= 0.51


def test_padding_is_left_out() -> None:
    """The image covers two of three columns and one of two rows."""
    mask = np.array([[0, 255, 9], [9, 9, 9]], np.uint8)
    drawn = composite(GREY, mask, RED, smooth=False, coverage=(1.5, 2.0))
    assert (drawn[:, :8] == 100).all()
    assert (drawn[:, 8:] == [200, 0, 0]).all()


def test_opacity_and_threshold() -> None:
    mask = np.array([[100, 200]], np.uint8)
    half = composite(GREY, mask, RED, opacity=0.5, threshold=0.5, smooth=False)
    assert (half[:, :8] == 100).all()
    assert (half[:, 8:] == [150, 50, 50]).all()
    assert (composite(GREY, mask, RED, opacity=0, contour=0.5) == GREY).all()


def test_the_contour_is_the_inner_edge() -> None:
    mask = np.zeros((12, 16), np.uint8)
    mask[3:8, 4:10] = 255
    drawn = composite(GREY, mask, RED, contour=0.5, smooth=False)
    white = (drawn == 255).all(-1)
    expected = mask > 0
    expected[4:7, 5:9] = False
    assert (white == expected).all()
    assert (drawn[4:7, 5:9] == [200, 0, 0]).all()


def test_every_table_shows_nothing_where_there_is_nothing() -> None:
    for name, table in TABLES.items():
        assert table.shape == (256, 4), name
        assert table[0, 3] == 0, name
        assert (np.diff(table[:, 3].astype(int)) >= 0).all(), name


# ----------------------------------------------------------------------------------------------------------- the widget


def some_view(**traits) -> MaskView:
    generator = np.random.default_rng(2)
    stacks = [generator.random((3, 2, 4, 5)), generator.random((3, 1, 8, 6))]
    return MaskView(IMAGE, stacks, **traits)


def test_the_chosen_mask_is_found_among_stacks_of_different_sizes() -> None:
    generator = np.random.default_rng(2)
    stacks = [generator.random((3, 2, 4, 5)), generator.random((3, 1, 8, 6))]
    view = MaskView(IMAGE, iter(stacks))
    for view.stack, stack in enumerate(stacks):
        for view.index in range(3):
            for view.channel in range(2):
                expected = stack[view.index, min(view.channel, stack.shape[1] - 1)]
                np.testing.assert_allclose(view.mask / 255, expected, atol=0.5 / 255)


def test_what_the_browser_gets() -> None:
    view = some_view(title="masks", captions=[[Caption("one", "look out", (("road", 0.5, "red"),)), Caption("two")]])
    state = view.get_state()
    assert state["shapes"] == [[3, 2, 4, 5], [3, 1, 8, 6]]
    assert state["masks"] == b"\0" + view.masks
    assert len(view.masks) == 3 * 2 * 4 * 5 + 3 * 8 * 6
    assert len(state["scales"]) == 4 * (6 + 3)
    assert state["image_size"] == [40, 30]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(state["base"]))), IMAGE)
    assert json.loads(state["captions"]) == [
        [{"text": "one", "warning": "look out", "bars": [["road", 0.5, "red"]]}, {"text": "two"}]
    ]
    assert "export default" in state["_esm"]


def test_masks_travel_deflated_where_that_makes_much_of_it() -> None:
    view = MaskView(IMAGE, np.arange(120)[:, None, None] % 2 * np.ones((120, 96, 96)))
    sent = view.get_state()["masks"]
    assert (sent[:1], zlib.decompress(sent[1:])) == (b"\1", view.masks)
    assert len(sent) < len(view.masks) / 50


def test_large_images_are_sent_smaller_but_keep_their_coordinates() -> None:
    view = MaskView(np.zeros((1500, 3000, 3), np.uint8), np.zeros((1, 2, 2), bool))
    assert view.image_size == [3000, 1500]
    assert Image.open(io.BytesIO(view.base)).size == (1024, 512)


def test_clicks_and_keys_come_back_as_traits() -> None:
    view, seen = some_view(), []
    view.observe(lambda change: seen.append((change["name"], change["new"])), ["clicked", "index"])
    view.set_state({"index": 2, "clicked": [7, 11]})
    assert sorted(seen) == [("clicked", [7, 11]), ("index", 2)]


@pytest.mark.parametrize(("name", "count"), [("stack", 2), ("index", 3), ("channel", 2)])
def test_what_is_not_there_cannot_be_chosen(name: str, count: int) -> None:
    view = some_view()
    setattr(view, name, count - 1)
    for wrong in (-1, count):
        with pytest.raises(traitlets.TraitError, match=rf"MaskView\.{name} = {wrong} is outside 0…{count - 1}"):
            setattr(view, name, wrong)


@pytest.mark.parametrize("shape", [(4, 5), (0, 4, 5), (1, 1, 1, 4, 5)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        MaskView(IMAGE, np.zeros(shape, bool))


def test_the_representation_is_short_and_stable() -> None:
    assert repr(some_view()) == "MaskView(2 stacks of 3 masks)"
    assert repr(MaskView(IMAGE, np.zeros((4, 2, 2), bool))) == "MaskView(4 masks)"


def test_there_is_a_picture_where_widgets_do_not_run() -> None:
    view = MaskView(IMAGE, np.ones((1, 2, 2), bool), width=80, opacity=1, colors="blocked", smooth=False)
    data, _ = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"] == repr(view)
    picture = np.asarray(Image.open(io.BytesIO(data["image/png"])))
    assert picture.shape == (60, 80, 3)
    assert (picture == TABLES["blocked"][255, :3]).all()


# ----------------------------------------------------------------------------------------------------------- the page


def read_page(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script id="m2f-page" type="application/json">(.*?)</script>', text, re.S)[1])


def test_a_page_holds_all_and_refers_to_nothing_else(tmp_path: Path) -> None:
    view = some_view(title="</script><b>", captions=[[Caption("</script>")] * 3] * 2)
    view.save_html(tmp_path / "page.html", title="a < b")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<title>a &lt; b</title>" in text
    assert not re.search(r"""(src|href)\s*=|@import|https?://|url\(""", text)
    page = read_page(tmp_path / "page.html")
    state = page["columns"][0][0]
    assert state["traits"]["title"] == "</script><b>"
    for name, number in state["packed"].items():
        expected = b"\0" + view.masks if name == "masks" else getattr(view, name)
        assert gzip.decompress(base64.b64decode(page["buffers"][number])) == expected, name
    assert [control["trait"] for control in page["controls"]] == ["stack", "index", "channel", "opacity"]


def test_the_page_knows_every_trait_the_browser_reads(tmp_path: Path) -> None:
    view = some_view()
    view.save_html(tmp_path / "page.html")
    state = read_page(tmp_path / "page.html")["columns"][0][0]
    read = set(re.findall(r'model\.get\("(\w+)"\)', "".join(source_files("mask_view.js").values())))
    assert read
    assert read <= {*state["traits"], *state["packed"]}
    assert read <= set(view.keys)


def test_no_name_of_a_class_ends_the_data_of_a_page(tmp_path: Path) -> None:
    """After "<!--<script>", a browser takes "</script>" for the end of another script."""
    names = ("<!--<script>", "</script>", "<![CDATA[")
    view = MaskView(
        IMAGE, np.array([[[0, 1, 2]]], np.uint8), colors=label_table(Classes(names, ((0, 0, 0),) * 3)), names=names
    )
    view.save_html(tmp_path / "page.html")
    assert read_page(tmp_path / "page.html")["columns"][0][0]["traits"]["names"] == list(names)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2
    assert "<!--" not in text


def test_views_of_a_page_share_what_is_equal(tmp_path: Path) -> None:
    views = [some_view(), some_view(), some_view(colors="heat")]
    save_page(tmp_path / "page.html", [views[0], views[1:]], controls=[Control("index", "mask", high=2)])
    page = read_page(tmp_path / "page.html")
    assert [len(column) for column in page["columns"]] == [1, 2]
    assert len(page["buffers"]) == 6  # image, masks, scales, two tables, and no pick
    assert len(page["controls"]) == 1


def test_png_keeps_every_pixel() -> None:
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(IMAGE)))), IMAGE)


# ------------------------------------------------------------------------------------------ label maps, places, strokes


def test_label_maps_are_never_interpolated() -> None:
    classes = Classes(("road", "sky"), ((1, 2, 3), (4, 5, 6)), frozenset())
    view = MaskView(IMAGE, np.array([[[0, 1, 255]]], np.uint8), colors=label_table(classes), names=classes.names)
    assert not view.smooth
    assert view.mask.tolist() == [[0, 1, 255]]
    table = label_table(classes, opacity=1.0)
    assert table[:3].tolist() == [[1, 2, 3, 255], [4, 5, 6, 255], [0, 0, 0, 0]]
    drawn = composite(GREY, np.array([[0, 1]], np.uint8), table, smooth=False)
    assert (drawn[:, :8] == [1, 2, 3]).all()
    assert (drawn[:, 8:] == [4, 5, 6]).all()


def test_notes_are_told_per_place_and_stack() -> None:
    view = some_view()
    table = Table((("query", "its number"), ("share", "")), (("3", "0.5"),), marked=(0,))
    view.set_notes([[Caption("left", table=table)], [Caption("right")]], places=(1, 2))
    assert view.places == [1, 2]
    assert [row[0]["text"] for row in view.notes] == ["left", "right"]
    assert view.notes[0][0]["table"]["rows"] == (("3", "0.5"),)
    with pytest.raises(ValueError, match="2 × 2 places wants as many lists of notes, got 1"):
        view.set_notes([[Caption("alone")]], places=(2, 2))


def test_a_table_has_a_text_for_every_column() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        Table((("a", ""), ("b", "")), (("1",),))


def test_marks_are_sent_as_they_are() -> None:
    view, marks = some_view(), np.random.default_rng(3).random((2, 3, 1, 4, 6, 3)).astype(np.float32)
    view.set_marks(marks, [("stride 8", "#000"), ("stride 16", "#fff")])
    assert view.marks_shape == [2, 3, 1, 4, 6]
    assert np.frombuffer(view.marks, "<f4").reshape(marks.shape).tolist() == marks.tolist()
    with pytest.raises(ValueError, match="for 4 groups"):
        view.set_marks(marks, [("a", "#000")] * 4)


def test_a_stroke_is_told_once_and_the_same_stroke_again_is_another_one() -> None:
    view, told = some_view(brush=1), []
    view.on_stroke(told.append)
    view.set_state({"stroke": [1, 0, 2, 1, 255, 7, 8]})
    view.set_state({"stroke": [2, 0, 2, 1, 255, 7, 8]})
    view.set_state({"stroke": [3, 1, 0, 0, 0, 5]})
    assert [(s.stack, s.index, s.channel, s.painted, s.cells.tolist()) for s in told] == [
        (0, 2, 1, True, [7, 8]),
        (0, 2, 1, True, [7, 8]),
        (1, 0, 0, False, [5]),
    ]


def test_keys_that_were_asked_for_are_told_every_time() -> None:
    view, told = some_view(), []
    view.on_keys({"m": lambda: told.append("mute"), "ctrl-z": lambda: told.append("undo")})
    assert view.get_state()["bound_keys"] == ["m", "ctrl-z"]
    for number, key in enumerate(("m", "m", "ctrl-z"), start=1):
        view.set_state({"pressed": [number, key]})
    assert told == ["mute", "mute", "undo"]


def test_arrows_may_step_through_more_than_one_picture_holds() -> None:
    view = some_view(num_masks=7, num_stacks=4)
    view.set_state({"index": 6, "stack": 3})
    assert (view.index, view.stack) == (6, 3)
    assert np.array_equal(view.mask, some_view(index=2, stack=1).mask)  # the last there is
    for name, wrong in (("index", 7), ("stack", 4)):
        with pytest.raises(traitlets.TraitError):
            setattr(view, name, wrong)


# ------------------------------------------------------------------------------------------------------------- the grid


def test_a_grid_knows_its_orders() -> None:
    masks = np.random.default_rng(4).random((3, 4, 5))
    grid = MaskGrid(IMAGE, masks, orders={"score": [2, 0, 1], "size": [1, 2]})
    assert grid.order == [2, 0, 1]
    grid.sort = "size"
    assert grid.order == [1, 2]
    assert repr(grid) == "MaskGrid(2 thumbnails)"
    with pytest.raises(traitlets.TraitError, match="no order 'name'"):
        grid.sort = "name"
    with pytest.raises(ValueError, match=r"names masks \[3\]"):
        MaskGrid(IMAGE, masks, orders={"score": [0, 3]})


def test_a_page_holds_each_kind_of_view_once(tmp_path: Path) -> None:
    masks = np.random.default_rng(4).random((3, 4, 5))
    views = [MaskView(IMAGE, masks), MaskView(IMAGE, masks), MaskGrid(IMAGE, masks)]
    views[0].brush = 1
    save_page(tmp_path / "page.html", views, linked=("index", "clicked"))
    text = (tmp_path / "page.html").read_text()
    page = json.loads(re.search(r'<script id="m2f-page" type="application/json">(.*?)</script>', text, re.S)[1])
    assert [column[0]["module"] for column in page["columns"]] == [0, 0, 1]
    assert len(page["modules"]) == 2
    assert page["linked"] == ["index", "clicked"]
    first, _, grid = (column[0] for column in page["columns"])
    assert first["packed"]["masks"] == grid["packed"]["masks"]  # written once
    assert first["traits"]["brush"] == 0  # there is nobody to answer a stroke
    assert grid["traits"]["orders"] == {"number": [0, 1, 2]}
    assert not {"layout", "tooltip", "stroke", "_esm"} & set(first["traits"])


def test_no_browser_hears_of_views_that_are_made_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail to build what is closed before it is there."""
    opened = []
    monkeypatch.setattr(comm, "create_comm", lambda **options: opened.append(options) or comm.DummyComm(**options))
    with off_page():
        some_view().close()
    assert opened == []
    some_view().close()
    assert opened
