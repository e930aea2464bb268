"""Worth of `torch.compile`: the model as it is, and compiled.

    python -m benchmarks.compiled

Swin-T, 150 classes, 100 queries, random weights. "forward" is one image of 512 × 512 without gradients, "training" two
of them forward and backward, with stochastic depth, without losses. Where there is a GPU, a column of its own says what
CUDA graphs add (`mode="reduce-overhead"`; shapes are static here). Compiling takes minutes, which the table shows, too.
What both give is compared before the compiled model is timed. Appends the table to benchmarks/results/compiled.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.report import Table
from m2f_lab.model import ModelConfig, build_model

MODES = ("default", "reduce-overhead")
PLACES = ("cpu, float32", "cuda, bfloat16")
COLUMNS = ("as it is s", "compiled s", "ratio", "compiling s", "with CUDA graphs s")


def random_model(small: bool) -> nn.Module:
    torch.manual_seed(0)
    options = peers.SMALL["ours"] if small else {}
    return build_model(ModelConfig(num_classes=peers.NUM_CLASSES, drop_path_rate=peers.DROP_PATH, **options))


def forward(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return a function to the class logits of the last prediction for the first image."""
    model.eval()

    @torch.inference_mode()
    def work() -> Tensor:
        return model(images[:1]).class_logits[-1].float()

    return work


def training(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """Return a function to a number in which every output has a share, and to the norm of every gradient."""
    model.train()

    def work() -> Tensor:
        torch.manual_seed(0)
        model.zero_grad()
        output = model(images)
        total = output.masks[0].features.float().mean()
        for logits, masks in zip(output.class_logits, output.masks, strict=True):
            total = total + logits.float().mean() + masks.embeddings.float().square().mean()
        total.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return torch.stack([total.detach(), *(gradient.norm() for gradient in gradients)])

    return work


def compare(kind: Callable, precision: str, device: str, small: bool) -> tuple[str, ...]:
    """Five cells: seconds as it is and compiled, their ratio, of the first compiled call, and with CUDA graphs."""
    images = peers.random_images(2, small).to(device)
    model = random_model(small).to(device)
    with peers.autocast(precision, device):
        work = kind(model, images)
        expected = work()
        plain = peers.median_seconds(work, device)
        seconds, compiling = [], []
        for mode in MODES if device == "cuda" else MODES[:1]:
            torch.compiler.reset()
            work = kind(torch.compile(model, mode=mode), images)
            began = time.perf_counter()
            rounding = 1e-3 if precision == "float32" else 3e-2
            torch.testing.assert_close(work(), expected, rtol=rounding, atol=rounding)
            compiling.append(time.perf_counter() - began)
            seconds.append(peers.median_seconds(work, device))
    return (
        f"{plain:.2f}",
        f"{seconds[0]:.2f}",
        f"{plain / seconds[0]:.2f}",
        f"{compiling[0]:.0f}",
        f"{seconds[1]:.2f}" if device == "cuda" else "–",
    )


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model and 64 pixels: whether all of it runs")
    parser.add_argument("--only", choices=("forward", "training"), help="one of the two")
    options = parser.parse_args(given)
    table = Table("compiled", ("torch.compile", *COLUMNS))
    for kind in (forward, training):
        for place in PLACES if options.only in (None, kind.__name__) else ():
            device, precision = place.split(", ")
            title = f"{place}, {kind.__name__}"
            if device == "cuda" and not torch.cuda.is_available():
                table.add(title, *["not measured"] * len(COLUMNS))
            else:
                table.add(title, *compare(kind, precision, device, options.small))
    table.finish()


if __name__ == "__main__":
    main()
