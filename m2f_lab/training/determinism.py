"""Runs that repeat bit by bit on a GPU too."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Inside the block, use deterministic algorithms alone, if `enabled`; afterwards all settings are as before.

    On a GPU sums run in a fixed order then, and are slower for it. An operation that has no such order raises a
    RuntimeError that names it; those of this package ask `torch.are_deterministic_algorithms_enabled()`. A CPU adds in
    a fixed order in any case.

    cuBLAS reads the size of its workspace from the environment when a process first multiplies on a GPU. It is set
    here; a process that has used a GPU before gets a warning in the log.
    """
    if not enabled:
        yield
        return
    if torch.cuda.is_initialized() and _WORKSPACE not in os.environ:
        logging.getLogger("m2f_lab").warning(
            "This process has used a GPU before, so that its products may differ in their last bits from one run to "
            f"the next in spite of deterministic=True. Start Python with {_WORKSPACE}=:4096:8 in its environment."
        )
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = torch.backends.cudnn.benchmark, os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")
    torch.backends.cudnn.benchmark = False  # it picks algorithms by their time, which differs from run to run
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[_WORKSPACE]
