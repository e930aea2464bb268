"""Functions by name: found again, and never the wrong ones."""

from __future__ import annotations

import sys

import pytest

from m2f_lab.model import build_model
from m2f_lab.recipes import Recipe
from m2f_lab.references import is_reference, reference_to, resolve, resolve_file, resolve_loaded


def a_function():
    return 1


class AClass:
    def method(self):
        return 1


number = 3


def test_reference_round_trips():
    for thing in (a_function, AClass):
        assert reference_to(thing) == f"{__name__}:{thing.__name__}"
        assert resolve(reference_to(thing)) is resolve_loaded(reference_to(thing)) is thing


def test_reference_of_a_library_function_names_the_package_that_exposes_it():
    assert reference_to(build_model) == Recipe.builder
    assert resolve_loaded(Recipe.builder) is build_model


def test_reference_needs_the_top_level_of_a_module():
    def inner():
        return 1

    for thing in (inner, lambda: 1, AClass().method, AClass.method, number, len):
        with pytest.raises(ValueError, match="cannot be found again by name"):
            reference_to(thing)


@pytest.mark.parametrize("text", ["build", "a.b", "a:b:c", "a:", ":b", "a/b.py:c", "a:b c", "a..b:c", "1a:b", ""])
def test_malformed_references_are_refused(text):
    assert not is_reference(text)
    with pytest.raises(ValueError, match="names no function"):
        resolve(text)


@pytest.mark.parametrize("find", [resolve, resolve_loaded])
@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("shutil:rmtree", "standard library"),
        ("os.path:join", "standard library"),
        (f"{__name__}:nothing", "has no 'nothing'"),
        (f"{__name__}:number", "is of type int; expected a plain Python function or a class"),
        (f"{__name__}:build_model", r"is defined in m2f_lab\.model\.mask2former"),
    ],
)
def test_other_things_are_refused(find, reference, message):
    with pytest.raises(ValueError, match=message):
        find(reference)


def test_resolve_loaded_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"'never_imported' is not imported.*--build file\.py:build"):
        resolve_loaded("never_imported:build")


def test_resolve_names_the_missing_module_but_not_one_that_it_imports(tmp_path, monkeypatch):
    (tmp_path / "needs_another.py").write_text("import no_such_module_either\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="There is no module 'no_such_module'"):
        resolve("no_such_module:build")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_either"):
        resolve("needs_another:build")


def test_resolve_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 7\n")
    (tmp_path / "file_of_mine.py").write_text("import neighbour_of_mine as n\ndef value():\n    return n.VALUE\n")
    function = resolve_file(f"{tmp_path}/file_of_mine.py:value")
    assert function() == 7
    assert reference_to(function) == "file_of_mine:value"
    assert resolve_file(f"{tmp_path}/file_of_mine.py:value") is function
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file_of_mine.py").write_text("def value(): return 8\n")
    with pytest.raises(ValueError, match="another module 'file_of_mine' is"):
        resolve_file(f"{tmp_path}/other/file_of_mine.py:value")
    with pytest.raises(ValueError, match="There is no file"):
        resolve_file(f"{tmp_path}/nowhere.py:value")
    for name in ("file_of_mine", "neighbour_of_mine"):
        del sys.modules[name]


def test_resolve_file_finds_modules_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "module_beside.py").write_text("def value(): return 7\n")
    monkeypatch.chdir(tmp_path)
    assert resolve_file("module_beside:value")() == 7
    del sys.modules["module_beside"]
