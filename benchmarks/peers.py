"""Shared parts of the benchmarks of the whole model: the peer, and the measuring of one side alone.

The peer is Hugging Face's `Mask2FormerForUniversalSegmentation` with random weights, and ours is loaded from the very
files it saves. Its Swin runs on `scaled_dot_product_attention`; its decoders have no such path. Both sides are asked
first for the same images, and must give the same logits.

Each side runs in a fresh process of its own: neither warms up or fragments the other's memory, and the peak of the
process is the peak of that side. The two take turns, call by call, and the ratio is the median over the rounds: the
speed of a shared machine drifts by a third within minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from operator import truediv
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.report import Table
from m2f_lab.model import Mask2Former, ModelConfig, build_model
from m2f_lab.weights import load_weights

REPEATS, WARM_UP = 7, 1
OURS, THEIRS = "ours", "Hugging Face"
DROP_PATH = 0.3
COLUMNS = ("ours s", "peer s", "ratio", "floor s", "floor / ours", "ours MiB", "peer MiB")
NUM_CLASSES, NUM_QUERIES, SIDE = 150, 100, 512
SMALL = dict(
    theirs=dict(
        hidden_dim=64, feature_size=64, mask_feature_size=64, encoder_layers=1, encoder_feedforward_dim=64,
        decoder_layers=3, dim_feedforward=64, num_queries=NUM_QUERIES, train_num_points=256,
    ),
    swin=dict(embed_dim=12, depths=[2, 2, 2, 2], num_heads=[1, 2, 4, 8], window_size=7),
    ours=dict(
        hidden_dim=64, mask_dim=64, num_encoder_layers=1, encoder_feedforward_dim=64, num_decoder_layers=2,
        decoder_feedforward_dim=64, num_queries=NUM_QUERIES,
        backbone_options=dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window_size=7),
    ),
)  # fmt: skip


def save_peer(folder: Path, small: bool) -> None:
    """Write the files of a Hugging Face Mask2Former in which every number is random."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(out_features=stages, drop_path_rate=DROP_PATH, **(SMALL["swin"] if small else {}))
    config = Mask2FormerConfig(backbone_config=swin, num_labels=NUM_CLASSES, **(SMALL["theirs"] if small else {}))
    theirs = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    theirs.save_pretrained(folder)


def load_theirs(folder: Path) -> nn.Module:
    from transformers import Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    logging.disable_progress_bar()
    attention = {"backbone_config": "sdpa", "": "eager"}
    theirs = Mask2FormerForUniversalSegmentation.from_pretrained(folder, attn_implementation=attention)
    assert theirs.model.pixel_level_module.encoder.config._attn_implementation == "sdpa"
    return theirs


def load_ours(folder: Path, small: bool) -> Mask2Former:
    options = SMALL["ours"] if small else {}
    ours = build_model(ModelConfig(num_classes=NUM_CLASSES, drop_path_rate=DROP_PATH, **options))
    load_weights(ours, folder)
    return ours


def random_images(count: int, small: bool) -> Tensor:
    """Smooth random pictures; noise would be a picture of nothing. uint8 [B, 3, H, W]"""
    side = 64 if small else SIDE
    coarse = torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 255
    return nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def check_equal(folder: Path, small: bool) -> None:
    """Raise an AssertionError where the two models' logits differ by more than rounding."""
    ours, theirs, images = load_ours(folder, small).eval(), load_theirs(folder).eval(), random_images(1, small)
    output = ours(images)
    reference = theirs(pixel_values=ours.preprocess(images))
    for found, expected in (
        (output.class_logits[-1], reference.class_queries_logits),
        (output.masks[-1].dense(), reference.masks_queries_logits),
    ):
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        assert difference < 1e-3, f"The logits differ by {difference:.1e} of the largest."


TURN_OVER = "turn over"


@contextmanager
def turn() -> Iterator[None]:
    """Turn of a measuring process; the other one waits."""
    sys.stdin.readline()
    yield
    print(TURN_OVER, flush=True)


def measure_in_turn(module: str, folder: Path, precision: str, device: str, small: bool) -> tuple[dict, dict]:
    """Let both sides be measured by `python -m module`, each in a process of its own, call by call in turn.

    Returns:
        For ours and for the peer: "times" (seconds of each call), "peak" (MiB) and what else that benchmark says;
        "failed", the last line of the error, where the peer cannot do it.
    """
    options = ["--folder", str(folder), "--precision", precision, "--device", device, *(["--small"] if small else [])]
    return tuple(in_turn([[module, "--measure", side, *options] for side in (OURS, THEIRS)]))


def in_turn(commands: Sequence[Sequence[str]]) -> list[dict]:
    """Start `python -m` with each of the commands, give them turns, and return what each says in the end."""
    root = Path(__file__).parents[1]
    with ExitStack() as stack:
        sides = []
        for command in commands:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=root)
            sides.append((stack.enter_context(subprocess.Popen([sys.executable, "-m", *command], **pipes)), errors))
        for _ in range(WARM_UP + REPEATS + 1):  # the last turn is for everything else
            for process, _ in sides:
                give_turn(process)
        return [outcome(process, errors) for process, errors in sides]


def give_turn(process: subprocess.Popen) -> None:
    """Let a process take its turn, and wait until it is over, or the process is."""
    try:
        print(file=process.stdin, flush=True)
    except BrokenPipeError:
        return
    while (line := process.stdout.readline()) and line.strip() != TURN_OVER:
        pass


def outcome(process: subprocess.Popen, errors: TextIO) -> dict:
    """Return the last line that a process printed, or the reason why it failed."""
    with suppress(BrokenPipeError):  # a process that has failed takes no more turns
        process.stdin.close()
    printed = process.stdout.read()  # not `communicate`, which does not see what `readline` has read ahead
    if process.wait() == 0:
        return json.loads(printed.splitlines()[-1])
    errors.seek(0)
    return {"failed": errors.read().strip().splitlines()[-1]}


def times_in_turn(work: Callable[[], object], device: str) -> list[float]:
    """The seconds of each call, after a first one that is not counted; see `turn`."""
    times = []
    for seed in range(WARM_UP + REPEATS):
        with turn():
            times.append(seconds_of(work, device, seed))
    return times[WARM_UP:]


def median_seconds(work: Callable[[], object], device: str) -> float:
    """The median time of one call, after a first one that is not counted."""
    return statistics.median([seconds_of(work, device, seed) for seed in range(WARM_UP + REPEATS)][WARM_UP:])


def seconds_of(work: Callable[[], object], device: str, seed: int) -> float:
    """The time of one call under a seed, so that stochastic depth drops the same in every run of the benchmark."""
    torch.manual_seed(seed)
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def autocast(precision: str, device: str) -> AbstractContextManager:
    return torch.autocast(device, getattr(torch, precision), enabled=precision != "float32")


def matrix_product_rate(precision: str, device: str) -> float:
    """Floating point operations per second in products of large matrices."""
    side = 8192 if device == "cuda" else 1536
    a, b = torch.randn(2, side, side, device=device, dtype=getattr(torch, precision))
    return 2 * side**3 / median_seconds(lambda: a @ b, device)


def count_operations(work: Callable[[], object]) -> int:
    """Floating point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def floor(work: Callable[[], object], precision: str, device: str) -> float:
    """The seconds that the matrix products of a call would take at the rate of large ones, measured in a turn."""
    with turn():
        return count_operations(work) / matrix_product_rate(precision, device)


def compared(ours: dict, theirs: dict) -> tuple[str, ...]:
    """Seven cells: seconds of both, their ratio, the floor, its share of our time, and both peaks of memory.

    Raises:
        RuntimeError: ours failed.
    """
    if "failed" in ours:
        raise RuntimeError(ours["failed"])
    seconds, failed = statistics.median(ours["times"]), "failed" in theirs
    return (
        f"{seconds:.2f}",
        f"fails: {theirs['failed'][:60]}" if failed else f"{statistics.median(theirs['times']):.2f}",
        "–" if failed else f"{statistics.median(map(truediv, theirs['times'], ours['times'])):.2f}",
        f"{ours['floor']:.2f}",
        f"{ours['floor'] / seconds:.0%}",
        f"{ours['peak']:.0f}",
        "–" if failed else f"{theirs['peak']:.0f}",
    )


def computes_bfloat16() -> bool:
    """True if the CPU has instructions for bfloat16 that PyTorch uses."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def obstacle_to_measuring(device: str, precision: str, small: bool) -> str | None:
    """Why a row stays empty, if it does: no GPU, or a CPU on which a step in bfloat16 would take minutes."""
    if device == "cuda":
        return None if torch.cuda.is_available() else "not measured"
    slow = precision == "bfloat16" and not computes_bfloat16()
    return "no bfloat16" if slow and not small else None


def arguments(about: str, given: list[str] | None) -> argparse.Namespace:
    """Options of such a benchmark's command line. `measure` and what follows it is for its own processes."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--measure", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def compare(
    module: str,
    about: str,
    work: str,
    measure: Callable[[argparse.Namespace], dict],
    given: list[str] | None,
    finish: Callable[[Table, Path, bool], None] = lambda table, folder, small: None,
) -> None:
    """The whole benchmark: one row for each device and precision, after a check that both sides agree.

    Args:
        module: the benchmark's own, which is started once for each side and then only measures.
        about: what its command line says of it.
        work: what both sides do, at the head of the table.
        measure: one side in this process, by its options: "times", "peak" in MiB and "floor".
        given: the command line's arguments.
        finish: adds what else the table is to say, from the peer's files.
    """
    options = arguments(about, given)
    if options.measure:
        print(json.dumps(measure(options)))
        return
    table = Table(module.rpartition(".")[2], (work, *COLUMNS))
    with tempfile.TemporaryDirectory() as path:
        folder, small = Path(path), options.small
        save_peer(folder, small)
        check_equal(folder, small)
        for device in ("cpu", "cuda"):
            for precision in ("float32", "bfloat16"):
                title = f"{device}, {precision}"
                if obstacle := obstacle_to_measuring(device, precision, small):
                    table.add(title, *[obstacle] * len(COLUMNS))
                    continue
                table.add(title, *compared(*measure_in_turn(module, folder, precision, device, small)))
        finish(table, folder, small)
    table.finish()
