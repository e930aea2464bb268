"""The list of images in report.html, in a real browser."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser

from m2f_lab.evaluation import page

ROWS = [
    {"number": 4, "name": "dusk", "mIoU": 60.0, "boundary_error": 5.0, "classes": {"car": 40.0}, "confused": []},
    {"number": 7, "name": "<b>noon", "mIoU": 30.0, "boundary_error": None, "classes": {"car": 90.0},
     "confused": [{"is": "car", "was called": "bus", "pixels": 12, "share": 3.0}]},
    {"number": 9, "name": "night", "mIoU": None, "boundary_error": 8.0, "classes": {}, "confused": []},
]  # fmt: skip


def test_images_are_listed_worst_first_in_every_order(browser: Browser, tmp_path: Path):
    (tmp_path / "report.html").write_text(page.page("A report", [page.images(ROWS, "mIoU")]), encoding="utf-8")
    tab = browser.new_page()
    errors = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto((tmp_path / "report.html").as_uri())

    def shown(order: str) -> list[list[str]]:
        tab.locator("#by").select_option(label=order)
        lines = tab.locator("#images tr").all()
        return [line.locator("td").all_inner_texts() for line in lines]

    assert shown("mIoU") == [
        ["<b>noon", "30.00 %", "QueryExplorer(model, dataset[7].image)"],
        ["dusk", "60.00 %", "QueryExplorer(model, dataset[4].image)"],
    ]
    assert tab.locator("#count").inner_text() == "2 of 3 images; the first 50:"
    assert [line[0] for line in shown("error near outlines")] == ["night", "dusk"]
    assert [line[0] for line in shown("class car")] == ["dusk", "<b>noon"]
    assert [line[:2] for line in shown("car called bus")] == [["<b>noon", "12 pixels"]]
    tab.close()
    assert not errors
