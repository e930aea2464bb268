"""What a GPU is asked, counted on a small model: growth fails; and the benchmark of the counts."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu_counts, report
from benchmarks.emulated_cuda import Kind, Log, emulated_cuda, why_not_emulated
from benchmarks.gpu_counts import CRITERION, MODEL, REST
from benchmarks.peers import OURS, THEIRS
from m2f_lab import build_model
from m2f_lab.model import Mask2Former
from tests.test_emulated_device import EVERYTHING, small_recipe
from tests.toy_model import CLASSES

pytestmark = pytest.mark.skipif(bool(why_not_emulated()), reason=why_not_emulated() or "")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="grid_sample takes more launches")

# Upper bounds, a few percent above what was counted. Lower them where there is less to do.
LIMITS: dict[str, dict[Kind | str, int]] = {
    "step": {MODEL: 1050, CRITERION: 365, REST: 31, Kind.SYNC: 2, Kind.COPY: 8},
    "semantic": {Kind.LAUNCH: 350, Kind.SYNC: 1, Kind.COPY: 4},
    "panoptic": {Kind.LAUNCH: 345, Kind.SYNC: 1, Kind.COPY: 1},
    "instance": {Kind.LAUNCH: 346, Kind.SYNC: 12, Kind.COPY: 8},
}


def count_step(log: Log) -> None:
    recipe = small_recipe(batch_size=4).vary(model=dict(num_decoder_layers=2))
    gpu_counts.count_our_step(recipe, log)


def count_prediction(task: str, **options: object) -> Callable[[Log], None]:
    def count(log: Log) -> None:
        torch.manual_seed(0)
        model = build_model(small_recipe().vary(model=dict(num_classes=len(CLASSES.names))).model).to("cuda")
        model.classes = CLASSES
        image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
        gpu_counts.count_image(lambda: model.predict(image, task, **options), log)

    return count


WORK: dict[str, Callable[[Log], None]] = {
    "step": count_step,
    "semantic": count_prediction("semantic"),
    "panoptic": count_prediction("panoptic", **EVERYTHING),
    "instance": count_prediction("instance"),
}


def check(name: str) -> None:
    with emulated_cuda() as log:
        WORK[name](log)
    for what, limit in LIMITS[name].items():
        kind, phase = (what, None) if isinstance(what, Kind) else (Kind.LAUNCH, what)
        count = log.count(kind, phase)
        assert count <= limit, offenders(log, kind, phase, f"{count} {kind.value} of {phase or name}, not {limit}")


def offenders(log: Log, kind: Kind, phase: str | None, title: str) -> str:
    """Operations, files and lines of most events."""
    own = Log()
    own.events = [event for event in log.events if phase in (None, event.phase)]
    rows = own.top(kind, lambda e: f"{e.name} {' < '.join(e.callers[:3])}")[:20]
    return "\n".join([f"{title}. Most come from:", *(f"{count:5} {place}" for place, count in rows)])


@needs_triton
@pytest.mark.parametrize("name", WORK)
def test_a_gpu_is_not_asked_for_more(name: str) -> None:
    check(name)


def test_growth_is_found_and_its_place_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Mask2Former.forward

    def wasteful(self, images, *arguments, **options):
        for _ in range(100):
            images = images + images.sum().item() * 0
        return forward(self, images, *arguments, **options)

    monkeypatch.setattr(Mask2Former, "forward", wasteful)
    for name in WORK:
        with pytest.raises(AssertionError, match=r"Most come from:\n +\d\d\d \w+ tests/test_gpu_counts.py:\d+ <"):
            check(name)


@pytest.mark.slow
def test_benchmark_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    gpu_counts.main(["--small", "--batch", "2", "--where", "3"])
    (table,) = json.loads((tmp_path / "gpu_counts.json").read_text())
    rows = {title: row for row in table["rows"] for title in [row.pop("bfloat16, Swin-T")]}
    step = {title.rpartition(": ")[2]: row for title, row in rows.items() if title.startswith("a step on 2 images")}
    for side in (OURS, THEIRS):
        counts = {title: int(row[side]) for title, row in step.items()}
        assert counts["launches"] == sum(counts[f"launches, {phase}"] for phase in (MODEL, CRITERION, REST))
        assert min(counts.values()) > 0
    assert "m2f_lab/model/swin.py" in capsys.readouterr().out
