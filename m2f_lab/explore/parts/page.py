"""One HTML file that needs nothing else: what all saved pages have in common."""

from __future__ import annotations

import html
from pathlib import Path

PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>{css}</style></head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(path: str | Path, title: str, body: str, css: str) -> None:
    """Write a page. `body` is HTML; what people wrote is escaped in it already.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} into; create it first.")
    page = PAGE.format(title=html.escape(title), body=body, css=css)
    path.write_text(page, encoding="utf-8")
