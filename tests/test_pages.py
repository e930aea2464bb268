"""Saved pages: figures, tables and a note in one file; pages with views are in test_mask_view.py and tests/browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m2f_lab.explore import plots
from m2f_lab.explore.parts.pages import save_page
from m2f_lab.explore.parts.table import Table


def test_a_page_without_views_has_no_script(tmp_path: Path) -> None:
    figures = [plots.bars(["a"], [1.0], name) for name in ("first", "second")]
    save_page(tmp_path / "page.html", figures=figures, tables=[Table((("<b>", ""),), (("1 & 2",),))], title="a < b")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("a &lt; b") == 2
    assert text.index("<!-- first -->") < text.index("<!-- second -->") < text.index("<td>1 &amp; 2</td>")
    assert text.count("<svg ") == text.count("</svg>") == 2
    assert not re.search("<script|<[?]xml|<p ", text)


def test_a_page_is_written_at_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_page("~/page.html", title="title", note="more < less")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<p class="m2f-note">more &lt; less</p>' in text


def test_a_page_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none to write page\.html into"):
        save_page(tmp_path / "none" / "page.html")
