"""The planner's estimates of memory and time beside what was measured.

    python -m benchmarks.memory [SETTING …] [--device cpu] [--rounds 2]

For each setting the planner tries out a few small batches. Then larger batches, and batches in parts, are trained for a
few steps, each in a process of its own, and measured: the peak of its resident memory (of the GPU's memory, where one
is used) and the time of a step, the median. Limit: 15 %.

On a machine that is shared, the time of the same step drifts by a fifth within minutes, and a plan made in a slow one
says little about a batch measured in a fast one. So planning and measuring take turns, several rounds, and of each
probe and each batch the fastest round counts. What a single round said is in the last column. Appends the table to
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.report import Table
from m2f_lab import recipes
from m2f_lab.recipes import Recipe
from m2f_lab.training import Plan, plan
from m2f_lab.training.planning.planner import Probe, took_in_a_process


@dataclass(frozen=True)
class Setting:
    """Batches to plan with the probes that `probed` images get, and to check: (batch, parts)."""

    recipe: Recipe
    probed: int
    checked: tuple[tuple[int, int], ...]


def swin_tiny(crop: int) -> Recipe:
    return recipes.ade20k_swin_tiny().vary(data=dict(crop_size=(crop, crop)))


SETTINGS = {
    "debug_tiny": Setting(recipes.debug_tiny(), 8, ((16, 1), (32, 1), (16, 2))),
    "swin_tiny_256": Setting(swin_tiny(256), 4, ((8, 1), (8, 2))),
    "swin_tiny_512": Setting(swin_tiny(512), 4, ((6, 1),)),
}


def compare(name: str, setting: Setting, device: torch.device, rounds: int, table: Table) -> None:
    """Plan and train in turn, and add a row for each batch."""
    plans: list[Plan] = []
    measured: dict[tuple[int, int], list[Probe]] = {batch: [] for batch in setting.checked}
    for _ in range(rounds):
        plans.append(planned(setting, device))
        for (images, parts), rows in measured.items():
            rows.append(measure(setting.recipe, images, parts, device))
    probes = zip(*(p.probes for p in plans), strict=False)  # a slow round has fewer
    best = replace(
        plans[0],
        probes=tuple(quickest(each) for each in probes),
        in_two_parts=quickest([p.in_two_parts for p in plans]),
    )
    for (images, parts), rows in measured.items():
        took, at_once = quickest(rows), images // parts
        gib, seconds = best.memory(at_once, parts), best.seconds(at_once, parts)
        single = [p.seconds(at_once, parts) / row.seconds for p, row in zip(plans, rows, strict=True)]
        table.add(
            f"{name}, {images} in {parts}",
            f"{gib:.2f}", f"{took.gib:.2f}", f"{gib / took.gib:.2f}",
            f"{seconds:.2f}", f"{took.seconds:.2f}", f"{seconds / took.seconds:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in single),
        )  # fmt: skip


def planned(setting: Setting, device: torch.device) -> Plan:
    """A plan that knows also what two parts take, as it does where the batch does not fit."""
    found = plan(setting.recipe.vary(optimization=dict(batch_size=setting.probed)), device)
    return replace(found, in_two_parts=measure(setting.recipe, 2, 2, device))


def measure(recipe: Recipe, images: int, parts: int, device: torch.device) -> Probe:
    took = took_in_a_process(recipe.vary(optimization=dict(batch_size=images, accumulation_steps=parts)), device)
    if took is None:
        raise MemoryError(f"{images} images in {parts} parts do not fit; measure a smaller setting.")
    return Probe(images // parts, **took)


def quickest(rounds: Sequence[Probe]) -> Probe:
    """The round with the shortest step, with the highest peak of all."""
    return replace(min(rounds, key=lambda r: r.seconds), gib=max(r.gib for r in rounds))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare the planner's estimates with measurement.")
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args(arguments)
    columns = (
        "batch, in parts", "GiB planned", "GiB measured", "ratio",
        "s planned", "s measured", "ratio of s", "in single rounds",
    )  # fmt: skip
    table = Table("memory", columns)
    for name in options.settings:
        compare(name, SETTINGS[name], torch.device(options.device), options.rounds, table)
    table.finish()


if __name__ == "__main__":
    main()
