"""Memory that an explorer keeps, and gives back when it is closed.

    python -m benchmarks.explorer_memory

An image of 1024 × 2048 pixels, a small model of 100 queries, nine layers and eight heads, on the CPU. The resident
memory of a whole process, one for each tool: before the tool is opened (Python, torch and the model, which has run
once), at its peak, while the tool is held, after `close()`, and after opening and closing it twice more. What a tool
keeps is held minus before; the limit is 1536 MiB. Appends the table to benchmarks/results/explorer_memory.json.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.report import Table

SIZE = (1024, 2048)
LIMIT = 1536  # MiB
TOOLS = ("QueryExplorer", "PixelLedger", "CounterfactualExplorer", "SamplingViewer", "MatchingInspector")


def memory() -> float:
    """Resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(name: str) -> dict[str, float]:
    """Open and close a tool three times; MiB."""
    from m2f_lab import explore, recipes
    from m2f_lab.explore import plots  # noqa: F401  what a tool imports for its static figure is not its own
    from m2f_lab.explore.parts.tool import trim_heap
    from m2f_lab.inference.predict import look
    from m2f_lab.model import build_model
    from m2f_lab.scenes import draw_street
    from m2f_lab.training.loop import peak_memory

    torch.manual_seed(0)
    model = build_model(recipes.debug_tiny().vary(model=dict(num_queries=100, num_decoder_layers=9, num_heads=8)).model)
    scene = draw_street(0, SIZE)
    truth = [scene.class_ids % model.config.num_classes] if name == "MatchingInspector" else []
    tool_class = getattr(explore, name)
    look(model, scene.image[:256, :256])
    gc.collect()
    trim_heap()
    found = {"before": memory()}
    for _ in range(3):
        tool = tool_class(model, scene.image, *truth)
        held = memory()
        found.setdefault("peak", 1024 * peak_memory(torch.device("cpu")))
        found.setdefault("held", held)
        tool.close()
        found.setdefault("closed", memory())
    return found | {"closed thrice": memory()}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    table = Table("explorer_memory", ("MiB", "before", "peak", "held", "closed", "closed thrice", "kept", "limit"))
    for name in TOOLS:
        command = [sys.executable, "-m", "benchmarks.explorer_memory", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        kept = found["held"] - found["before"]
        table.add(name, *(f"{value:.0f}" for value in found.values()), f"{kept:.0f}", str(LIMIT))
    table.finish()


if __name__ == "__main__":
    main()
