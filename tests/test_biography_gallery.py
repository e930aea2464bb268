"""The table and the gallery of query biographies say and show what was counted."""

from __future__ import annotations

import gc
import io
import weakref
from pathlib import Path

import numpy as np
import pytest
import traitlets
from PIL import Image

from m2f_lab.data import Classes
from m2f_lab.explore import BiographyCollector, BiographyExplorer, BiographyGallery, biography_table, plots
from m2f_lab.explore.biographies.words import describe_sizes
from m2f_lab.explore.parts.labels import percent
from m2f_lab.explore.parts.table import Table
from tests.toy_biographies import ALL, CLASSES, FIRST, LEFT, RIGHT, by_hand, cells, grey, some_output


def queries(table: Table) -> list[int]:
    return [int(row[0]) for row in table.rows]


def test_the_gallery_keeps_its_old_name() -> None:
    assert BiographyGallery is BiographyExplorer


def test_orders() -> None:
    assert by_hand().orders() == {
        "wins": [0, 2, 3, 1, 4],
        "class": [0, 1, 2, 3, 4],  # road, car, none; within a class by wins
        "size": [0, 1, 2, 3, 4],
        "number": [0, 1, 2, 3, 4],
        "dead": [1, 4],
        "duplicates": [0, 1],
    }


def test_the_table_says_what_was_counted() -> None:
    table = biography_table(by_hand())
    assert queries(table) == [0, 2, 3, 1, 4]
    assert table.rows[0][:6] == ("0", "road", "100 %", "50 %", "2", "2")
    assert table.rows[1][:6] == ("2", "car", "80 %", "42 %", "2", "2")
    assert table.rows[2][:6] == ("3", "car", "100 %", "8.3 %", "1", "1")
    assert table.rows[3] == (
        "1",
        "(road)",
        "–",
        "0 %",
        "0",
        "2",
        "37 % (37–50 %)",
        "dead, duplicate of 0 (overlap 88 %)",
    )
    assert table.rows[4] == ("4", "–", "–", "0 %", "0", "0", "–", "dead")
    lines = repr(table).splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["query", "main", "class", "of", "its", "wins", "wins", "wins", "in", "active", "in",
                                "size", "note"]  # fmt: skip
    assert lines[3].startswith("    3  car ")
    assert queries(biography_table(by_hand(), "dead")) == [1, 4]
    assert queries(biography_table(by_hand(), "number", limit=2)) == [0, 1]
    assert "duplicate of 2" in biography_table(by_hand(), "number", threshold=0.4).rows[3][-1]
    with pytest.raises(ValueError, match="sort must be one of wins, class, size, number, dead, duplicates, got 'area'"):
        biography_table(by_hand(), "area")


def test_a_notebook_shows_the_table_with_escaped_names() -> None:
    collector = BiographyCollector()
    collector.add(FIRST, grey(32, 32))
    text = biography_table(collector.result(Classes(("<b>", "a & b", "c"), CLASSES.colors)))._repr_html_()
    assert text.count("<tr>") == 6
    assert "<td>&lt;b&gt;</td>" in text
    assert 'title="In how many images it wins a pixel."' in text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.5, "50 %"), (0.0123, "1.2 %"), (0.0009, "0.09 %"), (1e-9, "0.01 %"), (1, "100 %")],
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_sizes_in_words() -> None:
    assert describe_sizes(np.array([0.05, 0.01, 0.2])) == "5.0 % (1.0–20 %)"
    assert describe_sizes(np.full(3, np.nan)) == "–"


def test_the_gallery_holds_the_heat_maps() -> None:
    found = by_hand()
    gallery = BiographyExplorer(found)
    assert repr(gallery) == "BiographyExplorer(5 queries, 2 images, 2 dead, 1 duplicate)"
    grid, heat = gallery.views["gallery"], gallery.views["heat"]
    assert grid.orders == {
        "wins": [0, 2, 3, 1, 4], "class": [0, 1, 2, 3, 4], "size": [0, 1, 2, 3, 4], "number": [0, 1, 2, 3, 4],
        "only dead": [1, 4], "only duplicates": [0, 1],
    }  # fmt: skip
    assert grid.labels == [["0 road 50 %", "1 dead", "2 car 42 %", "3 car 8.3 %", "4 dead"]]
    for view in (grid, heat):
        assert view.image_size == [540, 360]
        for view.index in range(4):
            expected = found.heat[view.index]
            np.testing.assert_allclose(view.mask / 255, expected / expected.max(), atol=0.5 / 255 + 1e-6)
    pick = np.frombuffer(heat.pick, "<u2").reshape(heat.pick_shape)
    assert [pick[20, 2], pick[2, 30]] == [0, 2]
    links = {pair for links in gallery._links for pair in links.pairs}
    assert (grid, "index", heat, "index") in links
    assert (gallery.opacity_slider, "value", heat, "opacity") in links


def test_captions_tell_the_life_of_a_query() -> None:
    captions = BiographyExplorer(by_hand()).views["heat"].captions[0]
    assert captions[2]["text"].startswith("Query 2 wins 42 % of all pixels, in 2 of 2 images. Active in 2, size ")
    assert captions[2]["bars"] == (("car", 0.8, "rgb(0, 0, 142)"), ("sky", 0.2, "rgb(70, 130, 180)"))
    assert captions[1]["warning"] == "Dead, duplicate of 0 (overlap 88 %)"
    assert "bars" not in captions[4]
    assert captions[4]["text"].endswith("Never active.")


def test_the_gallery_is_driven() -> None:
    gallery = BiographyExplorer(by_hand())
    assert (gallery.query, gallery.sort) == (0, "wins")
    gallery.views["gallery"].set_state({"index": 3, "sort": "only dead"})  # as the browser does it
    assert (gallery.query, gallery.sort) == (3, "only dead")
    gallery.query, gallery.sort = 4, "size"
    assert gallery.views["heat"].index == 4
    with pytest.raises(ValueError, match="no query 5; they are numbered 0…4"):
        gallery.query = 5
    with pytest.raises(ValueError, match="limit must be at least 1, or None for all queries, got 0"):
        gallery.figure(limit=0)
    with pytest.raises(traitlets.TraitError, match="There is no order 'age'"):
        gallery.sort = "age"


def test_orders_of_nothing_are_not_offered() -> None:
    collector = BiographyCollector()
    collector.add(some_output(((0, 1), cells(ALL, LEFT)), ((1, 0), cells(ALL, RIGHT))), grey(32, 32))
    assert list(BiographyExplorer(collector.result()).views["gallery"].orders) == ["wins", "class", "size", "number"]


def test_the_figure_shows_the_first_of_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery, drawn = BiographyExplorer(by_hand()), {}
    assert [ax.get_title() for ax in gallery.figure().axes[:2]] == ["query 0\nroad 50 %", "query 2\ncar 42 %"]
    monkeypatch.setattr(plots, "heat_over_image", lambda image, maps, columns, width: drawn.update(maps))
    gallery.sort = "only dead"
    gallery.figure(limit=1)
    assert list(drawn) == ["query 1\ndead"]
    assert np.array_equal(drawn["query 1\ndead"], gallery.biographies.heat[1])


def test_the_page_opens_where_the_gallery_stands(tmp_path: Path) -> None:
    gallery = BiographyExplorer(by_hand())
    gallery.views["gallery"].set_state({"index": 3, "sort": "size"})
    gallery.save_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('"index": 3') == 2
    assert '"sort": "size"' in text
    assert '"linked": ["opacity", "index"]' in text


def test_there_is_a_picture_where_widgets_do_not_run_and_close_frees_it() -> None:
    gallery = BiographyExplorer(by_hand())
    bundle = gallery._repr_mimebundle_()
    assert bundle["text/plain"] == repr(gallery)
    assert Image.open(io.BytesIO(bundle["image/png"])).width > 200
    kept = [weakref.ref(each) for each in (gallery.biographies, *gallery.views.values(), *gallery._links)]
    gallery.close()
    gc.collect()
    assert [each() for each in kept] == [None] * len(kept)
    gallery.close()
