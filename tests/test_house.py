"""House rules of the code base: imports between its parts, sizes, forbidden text, and ruff."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "m2f_lab"

FLOORS = (
    ("ops",),
    ("structures", "references", "recipes", "networks"),
    ("data", "loss", "inference"),
    ("model",),
    ("weights", "evaluation"),
    ("training",),
    ("explore", "__main__", "scenes"),
    ("__init__",),  # the public face; no other module imports it
)
# A module imports from floors below it, and on its own floor from what stands to its left: from lower numbers.
HEIGHT = {name: 10 * floor + place for floor, names in enumerate(FLOORS) for place, name in enumerate(names)}
ONLY_IN = {
    "ipywidgets": "explore/",
    "IPython": "explore/",
    "anywidget": "explore/",
    "traitlets": "explore/",
    "matplotlib": "explore/plots/",
}
OPS_IMPORT = {"torch", "triton", *sys.stdlib_module_names}
SHARED_ROOMS = {"parts", "plots", "__init__"}  # of explore; every other room there is a tool
MAX_DEFINITION = 60  # lines of a function or method, without its docstring
MAX_MODEL_AND_LOSS = 1600  # lines; speed belongs into ops


def name_of(path: Path, package: Path) -> str:
    """Dotted name of a module: m2f_lab.loss.points; that of a package's `__init__` is the package's."""
    return ".".join([package.name, *path.relative_to(package).with_suffix("").parts]).removesuffix(".__init__")


def modules_of(package: Path) -> dict[str, Path]:
    return {name_of(path, package): path for path in sorted(package.rglob("*.py"))}


def part_of(module: str) -> str:
    """The part of the house a module belongs to: m2f_lab.loss.points → loss; m2f_lab → __init__."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def room_of(module: str) -> str:
    """The room of explore a module belongs to: m2f_lab.explore.queries.trace → queries."""
    names = module.split(".")
    return names[2] if len(names) > 2 else "__init__"


def imports_of(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute module of every import, including those in functions, under TYPE_CHECKING and by name."""
    here = [package.name, *path.relative_to(package).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*(here[: -node.level] if node.level else []), *(node.module or "").split(".")]
            module = ".".join(filter(None, base))
            for alias in node.names:  # `from m2f_lab import recipes` imports m2f_lab.recipes
                is_module = module == package.name and alias.name in HEIGHT
                is_module = is_module or is_file_of(f"{module}.{alias.name}", package)
                yield node.lineno, f"{module}.{alias.name}" if is_module else module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def is_file_of(module: str, package: Path) -> bool:
    top, *names = module.split(".")
    place = package.joinpath(*names)
    return top == package.name and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def refusal(importer: str, module: str, package: str) -> str | None:
    """The rule that an import breaks, or None."""
    part, top = part_of(importer), module.split(".")[0]
    if top != package:
        place = "/".join(importer.split(".")[1:])
        if not place.startswith(ONLY_IN.get(top, "")):
            return f"{top} belongs to {ONLY_IN[top]}"
        if part == "ops" and top not in OPS_IMPORT:
            return f"ops imports torch only, not {module}"
        return None
    target = part_of(module)
    if target == "scenes" != part:
        return f"{module} is imported by nothing in the library"
    if target != part and HEIGHT.get(target, 99) > HEIGHT[part]:
        return f"{part} imports {module}, which stands above it"
    if target == part == "explore" and room_of(importer) != "__init__":
        room = room_of(module)
        if room not in SHARED_ROOMS and room != room_of(importer):
            return f"explore/{room_of(importer)} imports {module}, a tool of its own"
    return None


def import_violations(package: Path) -> list[str]:
    found = []
    for name, path in modules_of(package).items():
        relative = path.relative_to(package)
        if part_of(name) not in HEIGHT:
            found.append(f"{relative}: the design has no place for {part_of(name)!r}")
            continue
        importer = f"{name}.__init__" if path.name == "__init__.py" and name != package.name else name
        for line, module in dict.fromkeys(imports_of(path, package)):
            if broken := refusal(importer, module, package.name):
                found.append(f"{relative}:{line}: {broken}")
    return found


def import_cycles(package: Path) -> list[str]:
    """Groups of modules that import each other, each as "a, b, c" (strongly connected components, Tarjan 1972)."""
    modules = modules_of(package)
    graph = {name: {m for _, m in imports_of(path, package)} & set(modules) - {name} for name, path in modules.items()}
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[-len(group) :]
            if len(group) > 1:
                found.append(", ".join(sorted(group)))

    for name in graph:
        if name not in order:
            visit(name)
    return sorted(found)


def definition_lines(definition: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end. The docstring is left out: it is for users, and its sections take their lines."""
    lines = definition.end_lineno - definition.lineno + 1
    if ast.get_docstring(definition) is not None:
        lines -= definition.body[0].end_lineno - definition.body[0].lineno + 1
    return lines


def long_definitions(paths: Iterable[Path], root: Path) -> dict[str, int]:
    """Functions and methods, nested ones too, above the limit: "path:line name" → lines."""
    return {
        f"{path.relative_to(root)}:{node.lineno} {node.name}": definition_lines(node)
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and definition_lines(node) > MAX_DEFINITION
    }


def lines_of(*folders: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for f in folders for path in f.rglob("*.py"))


def plant(folder: Path, files: dict[str, str]) -> Path:
    """Write a package m2f_lab of some files."""
    for path, source in files.items():
        (folder / "m2f_lab" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "m2f_lab" / path).write_text(source)
    return folder / "m2f_lab"


def test_imports_respect_the_floors() -> None:
    assert import_violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("structures.py", "import m2f_lab.data", "structures imports m2f_lab.data"),
        ("structures.py", "from m2f_lab import recipes", "structures imports m2f_lab.recipes"),
        ("loss/points.py", "from m2f_lab.inference import predict", "loss imports m2f_lab.inference"),
        ("data/audit.py", "def draw():\n    from m2f_lab.explore import plots", "data imports m2f_lab.explore"),
        ("loss/criterion.py", "from ..model import mask2former", "loss imports m2f_lab.model"),
        ("weights/official.py", "from .. import training", "weights imports m2f_lab.training"),
        ("evaluation/semantic.py", "from m2f_lab import build_model", "evaluation imports m2f_lab,"),
        ("training/loop.py", "import importlib\nimportlib.import_module('m2f_lab.explore')", "training imports"),
        ("training/loop.py", "if TYPE_CHECKING:\n    import ipywidgets as widgets", "ipywidgets belongs to explore/"),
        ("explore/runs/monitor.py", "from matplotlib.figure import Figure", "matplotlib belongs to explore/plots/"),
        ("ops/points.py", "import numpy as np", "ops imports torch only, not numpy"),
        ("ops/points.py", "import torchvision.ops", "ops imports torch only, not torchvision.ops"),
        ("ops/points.py", "from m2f_lab.structures import Output", "ops imports m2f_lab.structures"),
        ("data/folder.py", "from m2f_lab.scenes import draw_room", "m2f_lab.scenes is imported by nothing"),
        ("__init__.py", "from m2f_lab import scenes", "m2f_lab.scenes is imported by nothing"),
        ("explore/pixels/explorer.py", "from m2f_lab.explore.queries.trace import t", "explore/pixels imports m2f_lab"),
        ("explore/pixels/explorer.py", "def f():\n    from ..queries import t", "a tool of its own"),
        ("explore/plots/matching.py", "from m2f_lab.explore.matching.trace import t", "explore/plots imports m2f_lab"),
        ("explore/parts/tool.py", "from m2f_lab.explore import queries", "explore/parts imports m2f_lab"),
        ("helpers.py", "", "no place for 'helpers'"),
    ],
)
def test_import_violations_are_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    found = import_violations(plant(tmp_path, {"explore/queries/__init__.py": "", path: source}))
    assert len(found) == 1
    assert complaint in found[0]


def test_allowed_imports_are_no_violations(tmp_path: Path) -> None:
    allowed = {
        "ops/sampling.py": "import math, torch\nimport triton.language as tl\nfrom m2f_lab.ops import switch",
        "structures.py": "from m2f_lab import ops",
        "inference/predict.py": "from m2f_lab.loss import points\nfrom ..structures import Output\nfrom . import rows",
        "explore/plots/charts.py": "import matplotlib, ipywidgets\nfrom m2f_lab import recipes",
        "explore/pixels/explorer.py": "from m2f_lab.explore import parts, plots\nfrom .ledger import Ledger",
        "explore/__init__.py": "from m2f_lab.explore.pixels.explorer import PixelLedger",
        "scenes/__main__.py": "from m2f_lab.scenes.writing import render_sample\nfrom m2f_lab.data import DataError",
        "__main__.py": "import m2f_lab.explore",
        "__init__.py": "from .training import train",
    }
    assert import_violations(plant(tmp_path, allowed)) == []


def test_modules_do_not_import_each_other() -> None:
    assert import_cycles(PACKAGE) == []


@pytest.mark.parametrize(
    ("files", "cycles"),
    [
        ({"a.py": "from m2f_lab import b", "b.py": "def f():\n    import m2f_lab.a"}, ["m2f_lab.a, m2f_lab.b"]),
        (
            {
                "x/a.py": "from .b import f",
                "x/b.py": "from . import c",
                "x/c.py": "if TYPE_CHECKING:\n    from m2f_lab.x.a import T",
                "x/d.py": "from .a import f",
            },
            ["m2f_lab.x.a, m2f_lab.x.b, m2f_lab.x.c"],
        ),
        ({"x/__init__.py": "from .a import f", "x/a.py": "from m2f_lab.x import g"}, ["m2f_lab.x, m2f_lab.x.a"]),
        ({"x/__init__.py": "from .a import f", "x/a.py": "from . import b", "x/b.py": "import torch"}, []),
        ({"a.py": "import m2f_lab.b, m2f_lab.c", "b.py": "import m2f_lab.c", "c.py": ""}, []),
    ],
    ids=["in a function", "for types", "through a package", "package of modules", "diamond"],
)
def test_import_cycles_are_found(tmp_path: Path, files: dict[str, str], cycles: list[str]) -> None:
    assert import_cycles(plant(tmp_path, {"__init__.py": "", "x/__init__.py": "", **files})) == cycles


def test_everything_but_explore_works_without_jupyter_and_matplotlib() -> None:
    """As on a headless GPU server. The finder refuses what is not installed there."""
    has_triton = importlib.util.find_spec("triton") is not None
    modules = [
        name
        for name, path in modules_of(PACKAGE).items()
        if part_of(name) not in ("explore", "__main__")
        and (has_triton or not re.search(r"^(import|from) triton", path.read_text(encoding="utf-8"), re.MULTILINE))
    ]
    assert "m2f_lab.scenes.__main__" in modules
    program = f"""
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {("matplotlib", "jupyterlab", "ipykernel", "nbformat", *ONLY_IN)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tracked_files() -> list[Path]:
    """Files that git holds or would hold; in an unpacked archive, all but the environment and the data."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    outside = {".venv", "data", "runs", "__pycache__"}
    return [p for p in ROOT.rglob("*") if p.is_file() and not outside & set(p.relative_to(ROOT).parts)]


FORBIDDEN = {
    r"\b(TO[D]O|FIXM[E]|XX[X]|HAC[K])\b": "unfinished work belongs into an issue",
    r"\bNotImplemented[E]rror\b": "no stubs",
    r"except[^:\n]*:\s*pas[s]\b": "a hidden error; use contextlib.suppress and say why",
    r"\bassert [T]rue\b": "asserts nothing",
    r"pytest\.mark\.xfai[l]": "a known fault is mended, not marked",
    r"\bsys\.exi[t]\((?!main\(\)\))": "a library does not end the process",
    r"(?<![\w.:$})\\])/(home|root|tmp|work|mnt|Users)/\w": "a path of one machine",
}


ENCODED_PICTURE = re.compile(r'"image/png": "[A-Za-z0-9+/=\\n]*"')  # in a notebook; spells any short word by chance


@pytest.mark.parametrize(("pattern", "reason"), FORBIDDEN.items(), ids=FORBIDDEN.values())
def test_tracked_files_hold_nothing_forbidden(pattern: str, reason: str) -> None:
    text_files = {".py", ".ipynb", ".md", ".toml", ".yml", ".cfg", ".sh", ".js", ".css", ".json", ".lock", ""}
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked_files()
        if path.suffix in text_files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if re.search(pattern, ENCODED_PICTURE.sub("", line))
    ]
    assert found == [], reason


def test_definitions_stay_short_enough_to_read() -> None:
    """A file holds one idea, however long that is; a function fits on one screen."""
    assert long_definitions((path for path in tracked_files() if path.suffix == ".py"), ROOT) == {}


def test_long_definitions_are_found(tmp_path: Path) -> None:
    body = "\n".join("        x = 1" for _ in range(MAX_DEFINITION))
    docstring = '        """One.\n\n        Two.\n        """'
    (tmp_path / "a.py").write_text(
        f"class A:\n    def long(self):\n{body}\n\n    async def short(self):\n        pass\n"
    )
    (tmp_path / "b.py").write_text(f"def outer():\n    def f():\n{docstring}\n{body[:-14]}\n")
    assert long_definitions([tmp_path / "a.py"], tmp_path) == {"a.py:2 long": MAX_DEFINITION + 1}
    assert long_definitions([tmp_path / "b.py"], tmp_path) == {"b.py:1 outer": MAX_DEFINITION + 5}


def test_model_and_loss_stay_short_enough_to_read() -> None:
    """In an afternoon. What exists for speed only belongs into ops."""
    assert lines_of(PACKAGE / "model", PACKAGE / "loss") <= MAX_MODEL_AND_LOSS


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_finds_nothing(command: list[str]) -> None:
    command = [sys.executable, "-m", "ruff", *command, "--output-format", "concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ruff_reads_notebooks(tmp_path: Path) -> None:
    """Notebooks are part of ruff's default set; an option in pyproject.toml must not have taken them out."""
    notebook = tmp_path / "planted.ipynb"
    cell = (
        '{"cell_type": "code", "execution_count": 1, "id": "a", "metadata": {}, "outputs": [], "source": ["import os"]}'
    )
    notebook.write_text(f'{{"cells": [{cell}], "metadata": {{}}, "nbformat": 4, "nbformat_minor": 5}}')
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "F401" in done.stdout
