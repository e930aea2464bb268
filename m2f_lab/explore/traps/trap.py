"""Traps: a step done right and done wrong, a way to measure both, and the test that guards it.

K classes, H/W height/width of an image, h/w of a coarser map.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from m2f_lab.data import Classes, Dataset, Sample
from m2f_lab.evaluation import SemanticEvaluator
from m2f_lab.inference.predict import look, seen_by
from m2f_lab.model import Mask2Former
from m2f_lab.structures import IGNORE, Output

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Bench:
    """Model and scenes that traps are tried on.

    Attributes:
        model: has memorised the first streets, so that any damage shows.
        streets: Cityscapes or drawn streets. Unless their sizes are no multiples of 32, nothing is padded and those
            traps do no damage.
        rooms: ADE20K or drawn rooms; no model is needed for them.
        count: how many streets are predicted and measured.
    """

    model: Mask2Former
    streets: Dataset
    rooms: Dataset
    count: int = 4

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """The streets that are predicted."""
        return tuple(self.streets[index] for index in range(min(self.count, len(self.streets))))

    @cached_property
    def room(self) -> int:
        """Of the first `count` rooms, the one with the most pixels that have no name."""
        unnamed = [(self.rooms.raw_label(index) == 0).mean() for index in range(min(self.count, len(self.rooms)))]
        return int(np.argmax(unnamed))

    def images(self, index: int) -> torch.Tensor:
        """One street as the model takes it. uint8 [1, 3, H, W]"""
        return seen_by(self.model, self.samples[index].image)

    def output(self, index: int, model: Mask2Former | None = None, **options: object) -> Output:
        """Output of the model, or of a variant of it, for one street."""
        return look(self.model if model is None else model, self.samples[index].image, **options)

    def mean_iou(self, label_maps: Sequence[np.ndarray], samples: Sequence[Sample] | None = None) -> float:
        """mIoU of predictions for samples, by default for all, in percent, from one confusion matrix."""
        evaluator = SemanticEvaluator(len(self.streets.classes))
        for label_map, sample in zip(label_maps, self.samples if samples is None else samples, strict=True):
            evaluator.update(label_map, sample.label_map)
        return evaluator.result()["mIoU"]


@dataclass(frozen=True)
class Finding:
    """Result of one variant.

    Attributes:
        value: in the trap's unit; NaN where the variant computes NaN.
        image: uint8 [H, W, 3], or None where there is nothing to see.
        picture: over the image: a label map, integers [H, W], 255 for nothing; or heat, floats in 0…1 [h, w].
        classes: of the label map; None for heat.
    """

    value: float
    image: np.ndarray | None = None
    picture: np.ndarray | None = None
    classes: Classes | None = None


@dataclass(frozen=True)
class Trap:
    """A mistake that reimplementations make.

    Attributes:
        name: a few words.
        mistake: made by people, in a sentence or two.
        question: to be answered before looking.
        unit: of the values, with a place {} for the number.
        right: the variant of the library, mostly its own function.
        broken: the smallest realistic variant of it.
        measure: tries a variant, either of the two, on a bench.
        guarded_by: the pytest node id of the test that fails when this library steps into the trap.
    """

    name: str
    mistake: str
    question: str
    unit: str
    right: Callable
    broken: Callable
    measure: Callable[[Bench, Callable], Finding]
    guarded_by: str

    def __repr__(self) -> str:
        return f"Trap({self.name!r})"

    def try_on(self, bench: Bench) -> Trial:
        """Measure both variants, from the same random numbers."""
        findings = []
        for variant in (self.right, self.broken):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                findings.append(self.measure(bench, variant))
        return Trial(self, *findings)

    def source(self, variant: str) -> str:
        """The code of the variant "right" or "broken"."""
        return textwrap.dedent(inspect.getsource(getattr(self, variant))).rstrip()

    def where(self, variant: str) -> str:
        """Module and name of the variant "right" or "broken"."""
        function = getattr(self, variant)
        return f"{function.__module__}.{function.__qualname__}"

    def guard_source(self) -> str:
        """The code of the test that guards the trap.

        Raises:
            FileNotFoundError: the tests are not there; they come with the repository, not with an installed package.
            LookupError: there is no such test.
        """
        name, *path = self.guarded_by.split("::")
        file = REPOSITORY / name
        if not file.is_file():
            raise FileNotFoundError(f"There is no {file}: tests come with the repository. Clone it to read them.")
        text = file.read_text(encoding="utf-8")
        node = ast.parse(text)
        for part in path:
            node = next((each for each in node.body if getattr(each, "name", "") == part), None)
            if node is None:
                raise LookupError(f"{file} has no test {'::'.join(path)}; guarded_by of {self.name!r} is outdated.")
        first = min(each.lineno for each in (node, *node.decorator_list))
        return textwrap.dedent("\n".join(text.splitlines()[first - 1 : node.end_lineno]))


@dataclass(frozen=True)
class Trial:
    """Results of the right and the broken variant of a trap."""

    trap: Trap
    right: Finding
    broken: Finding

    @property
    def damage(self) -> float:
        """By how much the value changes; NaN where the broken variant computes NaN."""
        return self.broken.value - self.right.value

    @property
    def has_picture(self) -> bool:
        return self.right.picture is not None and self.broken.picture is not None

    @cached_property
    def pictures(self) -> dict[str, np.ndarray]:
        """Pictures named "right", "broken" and "difference".

        Of label maps the last holds, where the two differ, what the broken variant says, or if it says nothing, what it
        should have said; elsewhere 255.
        """
        right, broken = self.right.picture, self.broken.picture
        if self.right.classes is None:
            difference = np.abs(broken - right)
        else:
            difference = np.where(right == broken, IGNORE, np.where(broken == IGNORE, right, broken))
        return {"right": right, "broken": broken, "difference": difference}

    @property
    def changed(self) -> float:
        """Share of the pixels of two label maps that differ, in percent."""
        return 100 * float((self.right.picture != self.broken.picture).mean())

    def text(self, variant: str) -> str:
        """The value of the variant "right" or "broken", with its unit."""
        value = getattr(self, variant).value
        return self.trap.unit.format("NaN" if np.isnan(value) else f"{value:.3g}")

    def __repr__(self) -> str:
        return f"{self.trap.name}: {self.text('right')} → {self.text('broken')}"
