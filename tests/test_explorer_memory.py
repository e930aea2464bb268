"""Every explorer gives everything back when it is closed: its arrays, its widgets, and the memory they took."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ipywidgets.widgets.widget import _instances

from m2f_lab.explore import CounterfactualExplorer, MatchingExplorer, PixelExplorer, QueryExplorer, SamplingExplorer
from m2f_lab.explore.parts.tool import Tool
from m2f_lab.model import Mask2Former
from tests.toy_model import IMAGE, sure_model

ROOT = Path(__file__).parents[1]
TRUTH = np.repeat(np.arange(3), 30)[None].repeat(50, axis=0).astype(np.uint8)

TOOLS: dict[str, Callable[[Mask2Former], Tool]] = {
    "QueryExplorer": lambda model: QueryExplorer(model, IMAGE),
    "PixelExplorer": lambda model: PixelExplorer(model, IMAGE),
    "CounterfactualExplorer": lambda model: CounterfactualExplorer(model, IMAGE),
    "SamplingExplorer": lambda model: SamplingExplorer(model, IMAGE),
    "MatchingExplorer": lambda model: MatchingExplorer(model, IMAGE, TRUTH),
}


def arrays_of(tool: Tool) -> list[object]:
    """What is large, by the tool's own names for it."""
    names = ("trace", "_output", "_masks", "replay", "output", "change")
    held = [getattr(tool, name) for name in names if getattr(tool, name, None) is not None]
    held += (getattr(tool, "traces", None) or {}).values()
    return [each for thing in held for each in (thing.values() if isinstance(thing, dict) else [thing])]


@pytest.mark.parametrize("name", TOOLS)
def test_nothing_of_a_closed_tool_stays(name: str) -> None:
    model = sure_model()
    open_before = len(_instances)
    tool = TOOLS[name](model)
    kept = [weakref.ref(each) for each in (*arrays_of(tool), *tool.views.values(), *tool._links)]
    assert len(kept) > len(tool.views) + len(tool._links)
    assert len(_instances) > open_before
    tool.close()
    assert [ref() for ref in kept if ref() is not None] == []
    assert len(_instances) == open_before  # widgets, their layouts and styles
    tool.close()  # once more does no harm


PROGRAM = """
import json
import torch
from m2f_lab import recipes
from m2f_lab.scenes import draw_street
from m2f_lab.explore import CounterfactualExplorer, MatchingExplorer, PixelExplorer, QueryExplorer, SamplingExplorer
from m2f_lab.model import build_model

torch.set_num_threads(1)
model = build_model(recipes.debug_tiny().vary(model=dict(num_queries=50, num_decoder_layers=6, num_heads=8)).model)
scene = draw_street(0, (512, 1024))

def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

seen = {}
for tool in (QueryExplorer, PixelExplorer, CounterfactualExplorer, SamplingExplorer, MatchingExplorer):
    held, closed = seen[tool.__name__] = [], []
    for _ in range(3):
        opened = tool(model, scene.image, *([scene.class_ids % 19] if tool is MatchingExplorer else []))
        held.append(memory())
        opened.close()
        closed.append(memory())
print(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the process's memory from /proc")
def test_opening_and_closing_does_not_grow() -> None:
    """MiB of a whole process of its own. The first time, Python imports what it needs and the model warms up."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (held, closed) in json.loads(done.stdout).items():
        assert min(held) - max(closed) > 4, name  # enough to tell whether it was given back
        assert max(closed) - closed[0] < 3, name
