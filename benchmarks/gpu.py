"""Everything that docs/performance.md says of a GPU, measured in one go of less than eight minutes.

    python -m benchmarks.gpu [--only NAME …] [--budget 460] [--out FILE]
    python -m benchmarks.gpu --small --device cpu     all of it in miniature, where there is no GPU

Sections, in the order in which they are worth having:

    kernel      deformable sampling and its gradients against float64: three types, two shapes
    autocast    the model's outputs, the loss and its gradient against float64: float32, TF32, bfloat16
    step        a training step on 16 images beside Hugging Face's: seconds, peak of memory, share of the floor
    image       one image to its label map beside Hugging Face's
    sampling    the kernel beside `grid_sample`, and its share of what the memory's bandwidth allows
    ideas       a training step with one operation plain at a time: seconds, peak of memory
    repeats     two runs from the same seed: whether they end alike, as they are and with deterministic=True
    tests       the tests marked `gpu`
    compiled    the model under `torch.compile`

Each section is a process of its own with a limit of time; one that fails, crashes or takes too long leaves the rows it
has and the reason. Everything is in benchmarks/results/gpu.json after each section. Without a GPU it says so, and
measures nothing. What a GPU is asked is counted without one: `benchmarks.gpu_counts`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.gpu_sections import COLUMNS, ENVIRONMENT, ROOT, SECTIONS, Place
from benchmarks.report import RESULTS, as_text, machine

ROW = "row: "  # before a row, in what a section prints
NO_GPU, NO_TIME = "not measured: there is no GPU", "not measured: no time was left"


def run_section(name: str, place: Place) -> None:
    """Print a section's rows, one by one."""
    for cells in SECTIONS[name][0](place):
        print(ROW + json.dumps(cells), flush=True)


def measured(name: str, place: Place, seconds: float) -> dict:
    """A section, in a process of its own: its rows, the seconds it took, and how it failed if it did."""
    flags = ["--section", name, "--folder", str(place.folder), "--device", place.device]
    command = [sys.executable, "-m", "benchmarks.gpu", *flags, *(["--small"] if place.small else [])]
    environment = os.environ | ENVIRONMENT.get(name, {})
    began, failed = time.perf_counter(), None
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code, failed = 0, f"took more than {seconds:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all that it has started
        process.wait()
        output.seek(0)
        errors.seek(0)
        rows = [json.loads(line.removeprefix(ROW)) for line in output if line.startswith(ROW)]
        if code:
            failed = "\n".join(errors.read().strip().splitlines()[-12:]) or f"ended with {code}"
    section = {"columns": COLUMNS[name], "rows": rows, "seconds": round(time.perf_counter() - began, 1)}
    return section | ({"failed": failed} if failed else {})


def not_measured(name: str, reason: str) -> dict:
    columns = COLUMNS[name]
    return {"columns": columns, "rows": [["not measured", *["–"] * (len(columns) - 1)]], "seconds": 0, "failed": reason}


def save_peer(place: Place) -> None:
    """Write the peer's files; what needs them fails by itself where that does not work, and the rest goes on."""
    try:
        peers.save_peer(place.folder, place.small)
    except Exception as error:
        print(f"No peer: {type(error).__name__}: {error}", flush=True)


def show(name: str, section: dict) -> None:
    print(f"\n{name}, {section['seconds']} s")
    if section["rows"]:
        print(as_text([section["columns"], *section["rows"]]))
    if "failed" in section:
        print(section["failed"], flush=True)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME", help="sections")
    parser.add_argument("--budget", type=float, default=460, help="seconds for all of it")
    parser.add_argument("--out", type=Path, help="the file to append to, by default benchmarks/results/gpu.json")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.section:
        run_section(options.section, Place(options.device, options.small, options.folder))
        return
    end = time.perf_counter() + options.budget
    file = options.out or RESULTS / "gpu.json"
    earlier = json.loads(file.read_text()) if file.is_file() else []
    run = {"date": datetime.date.today().isoformat(), **machine(), "small": options.small, "sections": {}}
    print("\n".join(f"{key}: {value}" for key, value in run.items() if key != "sections"))
    has_device = options.device == "cpu" or torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(options.device, options.small, Path(folder))
        if has_device:
            save_peer(place)
        for name in options.only:
            left = end - time.perf_counter()
            if has_device and left > 0:
                limit = SECTIONS[name][1] if place.device == "cuda" else left
                section = measured(name, place, min(limit, left))
            else:
                section = not_measured(name, NO_TIME if has_device else NO_GPU)
            run["sections"][name] = section
            show(name, section)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps([*earlier, run], indent=1) + "\n")


if __name__ == "__main__":
    main()
