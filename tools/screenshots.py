"""Take the README's pictures of the tools, docs/explorer.png and docs/what_if.png, in JupyterLab in a real browser.

    python tools/screenshots.py

Trains the tiny model of notebook 07 first, unless `runs/07_attention_and_queries` is there; everything shown is real.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "browser"))  # the tests' own way to drive JupyterLab

from jupyter_lab import notebook_of, serve_lab, start_browser  # noqa: E402
from notebook_page import NotebookPage  # noqa: E402
from run_notebooks import execute  # noqa: E402

RUN = ROOT / "runs" / "07_attention_and_queries"
SCENES = ROOT / "data" / "scenes" / "queries"
SETUP = f"""\
from m2f_lab import QueryExplorer, explore
from m2f_lab.data import open_dataset
from m2f_lab.training.run import Run

model = Run({str(RUN)!r}).model()
sample = open_dataset("cityscapes", {str(SCENES)!r}, "val")[1]"""
TOOLS = {
    "explorer": """\
explorer = QueryExplorer(model, sample.image)
explorer.query, explorer.layer = int(explorer.trace.winners[24, 33]), 3
explorer""",
    "what_if": """\
what_if = explore.CounterfactualExplorer(model, sample.image, truth=sample.label_map)
what_if.apply(explore.Mute(what_if.winner(128, 110)))
what_if.query, what_if.layer = what_if.winner(40, 30), 3
what_if""",
}


def save_in_256_colours(png: bytes, path: Path) -> None:
    """A third of the bytes, and it looks the same: rare colours, as of traffic lights, get places of their own."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    palette = picture.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    picture.quantize(palette=palette).save(path, optimize=True)  # dithered, as it is towards a given palette only


def main() -> int:
    if not (RUN / "checkpoints").is_dir():
        with tempfile.TemporaryDirectory() as folder:  # the committed notebook stays as it is
            execute([Path(shutil.copy(next((ROOT / "notebooks").glob("07_*.ipynb")), folder))])
    with tempfile.TemporaryDirectory() as home, serve_lab(Path(home)) as lab, start_browser() as browser:
        for name, cell in TOOLS.items():
            lab.add(f"{name}.ipynb", notebook_of(SETUP, cell))
            page = NotebookPage(
                browser.new_page(viewport={"width": 1560, "height": 1400}, device_scale_factor=1.25), f"{name}.ipynb"
            )
            page.open(lab.url)
            page.run_all()
            tool = page.locate(".m2f-explorer")
            page.page.wait_for_function("() => !document.querySelector('.m2f-canvas:not([data-frames])')")
            page.page.wait_for_timeout(500)  # thumbnails follow
            path = ROOT / "docs" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            save_in_256_colours(tool.screenshot(), path)
            page.close()
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
