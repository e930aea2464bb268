"""Whether the planner's estimates of memory and time hold.

    python -m benchmarks.memory [SETTING …] [--device cpu]

For each setting the planner tries out a few small batches. Then larger batches, and batches in parts, are trained for a
few steps, each in a process of its own, and measured: the peak of its resident memory (of the GPU's memory, where one
is used) and the time of a step. Limit: 15 %. Appends the table to benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.report import Table
from m2f_lab import recipes
from m2f_lab.recipes import Recipe
from m2f_lab.training import plan
from m2f_lab.training.planner import Probe, took_in_a_process


@dataclass(frozen=True)
class Setting:
    """What to plan with the probes that a batch of `probed` images gets, and what to check: (batch, parts)."""

    recipe: Recipe
    probed: int
    checked: tuple[tuple[int, int], ...]


def swin_tiny(crop: int) -> Recipe:
    return recipes.ade20k_swin_tiny().vary(data=dict(crop_size=(crop, crop)))


SETTINGS = {
    "debug_tiny": Setting(recipes.debug_tiny(), 8, ((16, 1), (32, 1), (16, 2))),
    "swin_tiny_256": Setting(swin_tiny(256), 2, ((4, 1), (8, 1), (4, 2))),
    "swin_tiny_512": Setting(swin_tiny(512), 2, ((3, 1),)),
}


def compare(name: str, setting: Setting, device: torch.device, table: Table) -> None:
    """Plan, train as planned, and add a row for each batch."""
    found = plan(setting.recipe.vary(optimization=dict(batch_size=setting.probed)), device)
    in_two_parts = took_in_a_process(setting.recipe.vary(optimization=dict(batch_size=2, accumulation_steps=2)), device)
    found = replace(found, in_two_parts=Probe(1, **in_two_parts))  # as it plans where the batch does not fit
    for images, parts in setting.checked:
        recipe = setting.recipe.vary(optimization=dict(batch_size=images, accumulation_steps=parts))
        took = took_in_a_process(recipe, device)
        if took is None:
            table.add(f"{name}, {images} in {parts}", *["out of memory"] * 6)
            continue
        gib, seconds = found.memory(images // parts, parts), found.seconds(images // parts, parts)
        table.add(
            f"{name}, {images} in {parts}",
            f"{gib:.2f}", f"{took['gib']:.2f}", f"{gib / took['gib']:.2f}",
            f"{seconds:.2f}", f"{took['seconds']:.2f}", f"{seconds / took['seconds']:.2f}",
        )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the planner's estimates with measurement.")
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    columns = ("batch, in parts", "GiB planned", "GiB measured", "ratio", "s planned", "s measured", "ratio of s")
    table = Table("memory", columns)
    for name in options.settings:
        compare(name, SETTINGS[name], torch.device(options.device), table)
    table.finish()


if __name__ == "__main__":
    main()
