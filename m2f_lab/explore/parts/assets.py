"""Browser code and masks, in the form in which they travel to a page.

The files in `browser/` are ES modules that import each other. A widget, and a saved page, can hand a browser one text
only, so `module` packs a file and all that it imports into one: a loader gives every file an address of its own (a blob
URL) and writes these addresses into the import statements. Nothing else in the files is changed, and each remains a
module with its own scope.
"""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

BROWSER = Path(__file__).parents[1] / "browser"

IMPORT = r'^((?:import|export)\b[^;"]*\bfrom )"\./(\w+\.js)"'
"""An import statement of JavaScript and of Python's `re` alike (multiline): what precedes the file, and the file."""

LOADER = """const files = %s; // those that are imported before those that import them
const known = globalThis.m2fModules ??= new Map(); // all widgets of a page share modules: engines compile them once
const urls = {};
for (const [name, text] of Object.entries(files)) {
  const linked = text.replace(new RegExp(%s, "gm"), (_, before, file) => `${before}"${urls[file]}"`);
  if (!known.has(linked)) known.set(linked, URL.createObjectURL(new Blob([linked], { type: "text/javascript" })));
  urls[name] = known.get(linked);
}
export default (await import(urls[%s])).default;
"""


def module(name: str) -> str:
    """Pack browser/<name>.js and the files that it imports into the text of one ES module with the same default export.

    Raises:
        FileNotFoundError: a file that is imported does not exist.
        graphlib.CycleError: files import each other.
    """
    files = source_files(f"{name}.js")
    return LOADER % (script_json(files), script_json(IMPORT), script_json(f"{name}.js"))


@cache
def source_files(name: str, folder: Path = BROWSER) -> dict[str, str]:
    """Read a file and all that it imports, directly or not: name → text, imported files first."""
    texts, imports, waiting = {}, {}, {name}
    while waiting:
        file = waiting.pop()
        texts[file] = (folder / file).read_text(encoding="utf-8")
        imports[file] = [imported for _, imported in re.findall(IMPORT, texts[file], re.MULTILINE)]
        waiting |= set(imports[file]) - set(texts)
    return {file: texts[file] for file in TopologicalSorter(imports).static_order()}


def style(name: str) -> str:
    """The style sheet browser/<name>.css."""
    return (BROWSER / f"{name}.css").read_text(encoding="utf-8")


def script_json(value: object) -> str:
    """JSON that may stand in a script element: no text in it can end the script or open a comment."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def deflated(masks: bytes, widget: object = None) -> bytes:
    """Compress masks for the way to the browser: 1 and the deflated masks, or 0 and the masks where that gains little.

    Masks of a trained model are mostly 0 or 1 and label maps have few values, and they pass two servers on their way.
    Below one megabyte inflating takes as long as sending.
    """
    middle = masks[len(masks) // 2 :][: 2**16]
    if len(masks) < 2**20 or len(zlib.compress(middle, 1)) > len(middle) / 2:
        return b"\0" + masks
    return b"\1" + zlib.compress(masks, 1)
