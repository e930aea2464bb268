"""A torchvision that was built for another torch can be imported once its operators are declared."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = Path(__file__).resolve().parents[1] / "m2f_lab" / "ops" / "_torchvision.py"

# What torchvision does on import, and what fails where its library could not be loaded.
REGISTER = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: scores)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: scores)
"""
# By its path: a whole m2f_lab would import timm, and with it everything else of torchvision.
HEAL = f"import runpy; healer = runpy.run_path({str(MODULE)!r});"
COUNT = "import torch; print(sum(hasattr(torch.ops.torchvision, name) for name in ('nms', 'qnms')))"


def run(folder: Path, program: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r}); {program}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with a torchvision whose compiled library does not load."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(REGISTER)
    (package / "_C.so").write_bytes(b"made for another torch")
    return tmp_path


def test_missing_operators_are_declared(broken: Path) -> None:
    assert "torchvision::nms does not exist" in run(broken, "import torchvision").stderr
    done = run(broken, HEAL + "import torchvision")
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_where_the_library_loads(broken: Path) -> None:
    """Declaring an operator twice is an error: torchvision itself would fail."""
    (broken / "torchvision" / "_C.so").unlink()
    assert run(broken, HEAL + COUNT).stdout == "0\n"
