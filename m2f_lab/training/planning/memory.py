"""Keep freed heap memory in the process during CPU training (glibc mallopt)."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers of mallopt's parameters in glibc's malloc.h
_USUAL = {_TRIM_THRESHOLD: 128 * 1024, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: -1, _MMAP_MAX: 0}  # never give the end of the heap back; take nothing outside it


@contextmanager
def keep_freed_memory(device: torch.device) -> Iterator[bool]:
    """Inside the block, freed memory of the CPU stays with the process and serves the next allocation.

    Otherwise every large array is asked of the system and given back; in a step of Swin-T and two images of 512 × 512
    that is more than a million pages, each cleared by the system when it is first touched: a fifth of the step.
    Afterwards free memory is given back.

    Args:
        device: of the training; for a GPU nothing is done, PyTorch keeps its memory by itself.

    Yields:
        True if memory is kept: on a CPU, with Linux's usual C library.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    possible = hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    if not possible:
        yield False
        return
    _set(libc, _KEEPING)
    try:
        yield True
    finally:
        _set(libc, _USUAL)
        libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, options: dict[int, int]) -> None:
    for parameter, value in options.items():
        libc.mallopt(parameter, value)
