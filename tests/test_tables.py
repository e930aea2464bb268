"""Tables of text: nothing that people wrote becomes HTML, and columns stand below each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2f_lab.explore.parts.page import write_page
from m2f_lab.explore.parts.table import html_table, text_table

ROWS = [("run", "mIoU"), ("<small>", "9"), ("large", "12")]


def test_cells_are_escaped_and_chosen_ones_bold() -> None:
    assert html_table(ROWS, bold={(1, 1)}) == (
        '<table class="m2f-table"><thead><tr><th>run</th><th>mIoU</th></tr></thead><tbody>'
        "<tr><td>&lt;small&gt;</td><td>9</td></tr><tr><td>large</td><td><b>12</b></td></tr></tbody></table>"
    )
    assert '<th title="of &quot;all&quot;">mIoU</th>' in html_table(ROWS, tooltips=("", 'of "all"'))


def test_lines_are_as_wide_as_their_longest_cell() -> None:
    assert text_table(ROWS).splitlines() == ["run      mIoU", "<small>  9", "large    12"]
    assert text_table(ROWS, right={1}).splitlines() == ["run      mIoU", "<small>     9", "large      12"]


def test_a_page_is_written_at_home_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_page("~/page.html", "a < b", "<p>body</p>", "p { color: red; }")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("a &lt; b") == 2
    assert "<p>body</p>" in text
    assert "<style>p { color: red; }</style>" in text
