"""pyproject.toml, requirements.lock and environment.yml say the same, and nothing is imported that they do not name."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
USERS = [Requirement(line) for line in PROJECT["dependencies"]]
KERNELS = [Requirement(line) for line in PROJECT["optional-dependencies"]["triton"]]  # imported only where it is there
DEVELOPERS = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
PYTHONS = [f"3.{minor}" for minor in range(10, 15)]
# Where the module is not called as the package is.
IMPORTED_AS = {"PIL": "pillow", "yaml": "pyyaml", "cv2": "opencv-python-headless"}
CUDA = re.compile(r"nvidia-|cuda-|triton$")  # torch names these itself


def environment(python: str, platform: str) -> dict[str, str]:
    full = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": platform, "extra": ""}
    return full | {"os_name": "nt" if platform == "win32" else "posix", "platform_machine": "x86_64"}


def applies(requirement: Requirement, where: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(where)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_each_dependency_once_and_inside_its_range(python: str, platform: str) -> None:
    where = environment(python, platform)
    pins: dict[str, list[str]] = {}
    for pin in LOCK:
        if applies(pin, where):
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"not an exact version: {pin}"
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    for wanted in USERS + DEVELOPERS:
        if applies(wanted, where):
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)][0]), f"{wanted}: run `make lock`"


def test_ranges_are_bounded_on_both_sides() -> None:
    """From the oldest version that is known to work, up to the next one that may break it."""
    for wanted in USERS + DEVELOPERS:
        operators = {specifier.operator for specifier in wanted.specifier}
        assert ">=" in operators, wanted
        assert "<" in operators or wanted.marker, wanted


def test_whatever_is_installed_on_the_way_is_pinned_as_well() -> None:
    """Follows the requirements of the installed packages from m2f_lab[dev] down."""
    pinned = {canonicalize_name(pin.name) for pin in LOCK}
    reached: set[str] = set()
    open_ends = [wanted for wanted in USERS + DEVELOPERS if applies(wanted, {"extra": ""})]
    while open_ends:
        wanted = open_ends.pop()
        name = canonicalize_name(wanted.name)
        key = f"{name}[{','.join(sorted(wanted.extras))}]"
        if key in reached or CUDA.match(name) or name == "setuptools":
            continue
        reached.add(key)
        assert name in pinned, f"{name} is not in requirements.lock: run `make lock`"
        for line in importlib.metadata.requires(name) or []:
            further = Requirement(line)
            if any(applies(further, {"extra": extra}) for extra in ("", *wanted.extras)):
                open_ends.append(further)


def test_conda_users_get_the_same() -> None:
    """conda gives Python, pip the rest: pyproject.toml's packages, all of them, at the versions of the lock."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    by_conda = {re.split("[=<>]", entry)[0] for entry in conda["dependencies"] if isinstance(entry, str)}
    assert conda["name"] == PROJECT["name"]
    assert by_pip == ["--constraint requirements.lock", "--editable .[dev]"]
    assert not by_conda & {canonicalize_name(wanted.name) for wanted in USERS + DEVELOPERS}, "named twice"
    python = next(entry.split("=")[1] for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert {"pip", "make"} <= by_conda


def third_party_imports(sources: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Package → one place that imports it."""
    own = {
        "m2f_lab",
        "tests",
        "benchmarks",
        *(path.stem for path in ROOT.glob("tests/**/*.py")),
        *(p.stem for p in ROOT.glob("tools/*.py")),
    }
    found = {}
    for place, source in sources:
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            for name in {name.split(".")[0] for name in names} - own - set(sys.stdlib_module_names):
                found[canonicalize_name(IMPORTED_AS.get(name, name))] = place
    return found


def python_sources(*folders: str) -> Iterable[tuple[str, str]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                if cell["cell_type"] == "code":
                    lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))]
                    yield str(path.relative_to(ROOT)), "\n".join(lines)


def test_users_get_all_that_the_package_and_the_notebooks_import() -> None:
    named = {canonicalize_name(wanted.name) for wanted in USERS + KERNELS}
    imported = third_party_imports(python_sources("m2f_lab", "notebooks", "tools"))
    assert {name: place for name, place in imported.items() if name not in named} == {}


def test_developers_get_all_that_tests_and_benchmarks_import() -> None:
    named = {canonicalize_name(wanted.name) for wanted in USERS + DEVELOPERS}
    imported = third_party_imports(python_sources("tests", "benchmarks"))
    assert {name: place for name, place in imported.items() if name not in named} == {}
