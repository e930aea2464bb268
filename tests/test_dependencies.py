"""pyproject.toml, requirements.lock and environment.yml say the same, and nothing is imported that they do not name."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
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
EXTRAS = PROJECT["optional-dependencies"]


def requirements(*extras: str) -> list[Requirement]:
    """Packages of some extras; m2f_lab[jupyter] in an extra stands for the packages of that one."""
    found = []
    for wanted in (Requirement(line) for extra in extras for line in EXTRAS[extra]):
        found += requirements(*sorted(wanted.extras)) if wanted.name == PROJECT["name"] else [wanted]
    return found


CORE = [Requirement(line) for line in PROJECT["dependencies"]]
KERNELS = requirements("triton")  # imported only where it is installed
JUPYTER = requirements("jupyter")
DEVELOPERS = requirements("dev")
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
def test_lock_pins_each_dependency_once_and_inside_its_range(python: str, platform: str) -> None:
    where = environment(python, platform)
    pins: dict[str, list[str]] = {}
    for pin in LOCK:
        if applies(pin, where):
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"not an exact version: {pin}"
            pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    for wanted in CORE + DEVELOPERS:
        if applies(wanted, where):
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)][0]), f"{wanted}: run `make lock`"


def test_ranges_are_bounded_on_both_sides() -> None:
    """From the oldest version that is known to work, up to the next one that may break it."""
    for wanted in CORE + DEVELOPERS:
        operators = {specifier.operator for specifier in wanted.specifier}
        assert ">=" in operators, wanted
        assert "<" in operators or wanted.marker, wanted


def test_lock_pins_indirect_dependencies() -> None:
    """Follows the requirements of the installed packages from m2f_lab[dev] down."""
    pinned = {canonicalize_name(pin.name) for pin in LOCK}
    reached: set[str] = set()
    open_ends = [wanted for wanted in CORE + DEVELOPERS if applies(wanted, {"extra": ""})]
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


def test_environment_installs_the_locked_set() -> None:
    """conda gives Python, pip the rest: pyproject.toml's packages, all of them, at the versions of the lock."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    by_pip = next(entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict))
    by_conda = {re.split("[=<>]", entry)[0] for entry in conda["dependencies"] if isinstance(entry, str)}
    assert conda["name"] == PROJECT["name"]
    assert by_pip == ["--constraint requirements.lock", "--editable .[dev]"]
    assert not by_conda & {canonicalize_name(wanted.name) for wanted in CORE + DEVELOPERS}, "named twice"
    python = next(entry.split("=")[1] for entry in conda["dependencies"] if str(entry).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert {"pip", "make"} <= by_conda


def third_party_imports(sources: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Package → one place that imports it."""
    own = {
        "m2f_lab",
        "tests",
        "benchmarks",
        "examples",
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


def missing(imported: dict[str, str], requirements: list[Requirement]) -> dict[str, str]:
    named = {canonicalize_name(wanted.name) for wanted in requirements}
    return {name: place for name, place in imported.items() if name not in named}


def test_core_is_light() -> None:
    """A server that only trains needs neither Jupyter nor matplotlib."""
    named = {canonicalize_name(wanted.name) for wanted in CORE}
    assert named == {
        "faster-coco-eval", "numpy", "pillow", "safetensors", "scipy", "shapely", "timm", "torch", "tqdm",
    }  # fmt: skip


def test_dev_extra_holds_the_others() -> None:
    named = {wanted.name for wanted in DEVELOPERS}
    assert named >= {wanted.name for wanted in JUPYTER + KERNELS}
    assert not {wanted.name for wanted in CORE} & named, "named twice"


def test_core_names_all_imports_of_the_library() -> None:
    sources = [(place, source) for place, source in python_sources("m2f_lab") if "/explore/" not in place]
    assert missing(third_party_imports(sources), CORE + KERNELS) == {}


def test_jupyter_extra_names_all_imports_of_explorers_notebooks_and_tools() -> None:
    imported = third_party_imports(python_sources("m2f_lab", "examples", "notebooks", "tools"))
    assert missing(imported, CORE + KERNELS + JUPYTER) == {}


def test_dev_extra_names_all_imports_of_tests_and_benchmarks() -> None:
    assert missing(third_party_imports(python_sources("tests", "benchmarks")), CORE + DEVELOPERS) == {}


def test_make_installs_the_jupyter_extra() -> None:
    setup = (ROOT / "tools" / "setup.sh").read_text()
    assert "extra=${1:-jupyter}" in setup
    assert '-c requirements.lock -e ".[$extra]"' in setup
    assert "sh tools/setup.sh dev" in (ROOT / "Makefile").read_text()


def test_console_script_names_the_command_line() -> None:
    """An installer writes a script of these very lines."""
    assert PROJECT["scripts"] == {"m2f-lab": "m2f_lab.__main__:main"}
    module, _, function = PROJECT["scripts"]["m2f-lab"].partition(":")
    script = f"import sys\nfrom {module} import {function}\nsys.argv[0] = 'm2f-lab'\nsys.exit({function}())"
    done = subprocess.run([sys.executable, "-c", script, "recipes"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "camvid_small" in done.stdout


def test_console_script_is_installed_with_the_package() -> None:
    """The entry point of an installed package is the function that the project names."""
    points = importlib.metadata.entry_points(group="console_scripts", name="m2f-lab")
    if not points:
        pytest.skip("m2f_lab was installed before it had a console script, or not at all")
    from m2f_lab.__main__ import main

    assert {point.load() for point in points} == {main}
