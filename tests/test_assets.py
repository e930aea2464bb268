"""Browser code: modules that import each other, packed into one text; JSON and masks on their way to a page."""

from __future__ import annotations

import json
import re
import zlib
from graphlib import CycleError
from pathlib import Path

import numpy as np
import pytest

from m2f_lab.explore.parts.assets import BROWSER, IMPORT, deflated, module, script_json, source_files, style

ENTRIES = ("mask_view", "mask_grid", "links", "page")
FILES = sorted(BROWSER.glob("*.js"))


def imported_names(text: str) -> dict[str, set[str]]:
    """File → the names that a module imports from it."""
    found = re.findall(r'^import \{([^}]*)\} from "\./(\w+\.js)";', text, re.MULTILINE)
    return {file: set(re.findall(r"\w+", names)) for names, file in found}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_modules_import_what_the_other_file_exports_and_use_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(re.findall(r"^import\b", text, re.MULTILINE)) == len(re.findall(IMPORT, text, re.MULTILINE))
    for other, names in imported_names(text).items():
        exported = re.findall(r"^export (?:async function|function|const) (\w+)", (BROWSER / other).read_text(), re.M)
        assert names <= set(exported), other
        unused = {name for name in names if len(re.findall(rf"\b{name}\b", text)) < 2}
        assert unused == set(), other


def test_every_browser_file_belongs_to_an_entry() -> None:
    packed = {name for entry in ENTRIES for name in source_files(f"{entry}.js")}
    assert packed == {file.name for file in FILES}


@pytest.mark.parametrize("entry", ENTRIES)
def test_imported_files_come_first(entry: str) -> None:
    files = source_files(f"{entry}.js")
    order = list(files)
    assert order[-1] == f"{entry}.js"
    for name, text in files.items():
        for other in imported_names(text):
            assert order.index(other) < order.index(name)


def test_a_module_holds_its_files_unchanged_and_cannot_end_a_script() -> None:
    text = module("mask_view")
    packed = re.match(r"const files = (.*); // those", text)
    assert json.loads(packed[1]) == source_files("mask_view.js")
    assert "<" not in text.replace(packed[1], "").replace("=>", "")
    assert "<" not in packed[1]


def test_statements_over_several_lines_are_imports_and_texts_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text('import {\n  b,\n  c as d,\n} from "./b.js";\nexport * from "./c.js";\nlet x = 1;\n')
    (tmp_path / "b.js").write_text(
        'const text = \'from "./none.js"\';\nexport const b = "import x"; // from "./no.js"\n'
    )
    (tmp_path / "c.js").write_text("export const c = 1;\n")
    assert set(source_files("a.js", tmp_path)) == {"a.js", "b.js", "c.js"}


def test_files_must_exist_and_must_not_import_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text('import { b } from "./b.js";\n')
    with pytest.raises(FileNotFoundError):
        source_files("a.js", tmp_path)
    (tmp_path / "b.js").write_text('import { a } from "./a.js";\n')
    with pytest.raises(CycleError):
        source_files("a.js", tmp_path)


def test_json_in_a_script_stays_json() -> None:
    value = {"name": "<!--<script>", "end": "</script>", "ä": 1}
    text = script_json(value)
    assert json.loads(text) == value
    assert "<" not in text


def test_style_sheets_ask_for_nothing() -> None:
    for name in ("mask_view", "page"):
        assert not re.search(r"@import|url\(", style(name))


def test_large_masks_with_few_values_are_deflated() -> None:
    few, many = bytes(2**20), np.random.default_rng(0).bytes(2**20)
    assert zlib.decompress(deflated(few)[1:]) == few
    assert deflated(few)[0] == 1
    assert deflated(few[:-1]) == b"\0" + few[:-1]
    assert deflated(many) == b"\0" + many
