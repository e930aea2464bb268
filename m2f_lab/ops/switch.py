"""The switch between the plain and the fast version of every operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

OPERATIONS = (
    "add_branch",
    "checkpointed",
    "deformable_sampling",
    "linear",
    "mask_and_dice",
    "sample_points",
    "select_uncertain",
)
"""Names of the operations that exist twice; each is a function of `m2f_lab.ops`."""

_plain: ContextVar[frozenset[str]] = ContextVar("plain_operations", default=frozenset())


def is_plain(operation: str | None = None) -> bool:
    """True where the plain version of an operation has to run; without a name: where all of them have to.

    Under `torch.compile` all have to: it fuses what it is given, and cannot trace the switch itself.
    """
    if torch.compiler.is_compiling():
        return True
    chosen = _plain.get()
    return chosen.issuperset(OPERATIONS) if operation is None else operation in chosen


@contextmanager
def plain(*operations: str) -> Iterator[None]:
    """Run plain versions inside the block: research, gradient checks, `torch.compile`, the ablation.

    With all of them plain, the model and its losses run on ordinary autograd.

    Args:
        operations: names from `OPERATIONS`; all of them if none is given.

    Raises:
        ValueError: there is no operation of that name.
    """
    for name in operations:
        if name not in OPERATIONS:
            raise ValueError(f"There is no operation {name!r}. Operations: {', '.join(OPERATIONS)}.")
    token = _plain.set(_plain.get() | frozenset(operations or OPERATIONS))
    try:
        yield
    finally:
        _plain.reset(token)
