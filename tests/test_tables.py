"""Tables of text: no text becomes HTML, and columns stand below each other."""

from __future__ import annotations

from m2f_lab.explore.parts.table import Table

ROWS = (("<small>", "9"), ("large", "12"))


def test_html_tables_escape_cells_and_print_chosen_ones_bold() -> None:
    assert Table((("run", ""), ("mIoU", "")), ROWS, bold=((1, 1),))._repr_html_() == (
        '<table class="m2f-table"><thead><tr><th>run</th><th>mIoU</th></tr></thead><tbody>'
        "<tr><td>&lt;small&gt;</td><td>9</td></tr><tr><td>large</td><td><b>12</b></td></tr></tbody></table>"
    )
    assert '<th title="of &quot;all&quot;">mIoU</th>' in Table((("run", ""), ("mIoU", 'of "all"')), ROWS)._repr_html_()


def test_text_tables_align_words_left_and_numbers_right() -> None:
    table = Table((("run", ""), ("mIoU", "")), ROWS)
    assert repr(table).splitlines() == ["run      mIoU", "<small>     9", "large      12"]
