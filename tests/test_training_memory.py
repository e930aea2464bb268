"""Freed memory is kept while a model trains, and given back afterwards."""

import gc
import resource
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from m2f_lab.training import loop, train
from m2f_lab.training.planning.memory import keep_freed_memory
from tests.toy_training import toy_recipe, write_toy_data

CPU = torch.device("cpu")


def resident() -> int:
    """What this process holds of the machine's memory, in MiB."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_memory_is_kept_inside_the_block_and_given_back_at_its_end():
    with keep_freed_memory(CPU) as kept:
        if not kept:
            pytest.skip("another C library than glibc")
    before = resident()  # what earlier tests freed was given back just now
    torch.ones(2**26)
    usual = resident() - before
    with keep_freed_memory(CPU):
        torch.ones(2**26)  # 256 MiB
        inside = resident() - before
    after = resident() - before
    assert usual < 30
    assert inside > 225
    assert after < 30


def test_nothing_is_done_for_a_gpu():
    with patch("ctypes.CDLL") as library, keep_freed_memory(torch.device("cuda")) as kept:
        assert not kept
    library.assert_not_called()


def test_training_keeps_memory(tmp_path):
    data = write_toy_data(tmp_path / "data")
    with patch.object(loop, "keep_freed_memory", wraps=keep_freed_memory) as keep:
        train(toy_recipe(max_iterations=1), data, tmp_path / "run")
    keep.assert_called_once_with(CPU)
