"""A table on the screen and the same in a file, with what it was measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Device and versions."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": f"{name}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


class Table:
    """Rows of text, printed at the end and appended to benchmarks/results/<name>.json."""

    def __init__(self, name: str, columns: tuple[str, ...]) -> None:
        self.name, self.columns = name, columns
        self.rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"The table has the columns {self.columns}, got {cells}.")
        self.rows.append(cells)
        print(" · ".join(cells), flush=True)

    def finish(self) -> None:
        """Print the whole table, and keep it."""
        about = machine()
        print("\n" + "\n".join(f"{key}: {value}" for key, value in about.items()) + "\n")
        print(as_text([self.columns, *self.rows]))
        file = RESULTS / f"{self.name}.json"
        kept = json.loads(file.read_text()) if file.is_file() else []
        kept.append(
            {
                "date": datetime.date.today().isoformat(),
                **about,
                "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            }
        )
        RESULTS.mkdir(exist_ok=True)
        file.write_text(json.dumps(kept, indent=1) + "\n")
