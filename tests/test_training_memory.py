"""Freed memory is kept while a model trains, and given back afterwards."""

import gc
import resource
import sys
from unittest.mock import patch

import pytest
import torch

from m2f_lab.training import loop, train
from m2f_lab.training.memory import kept_memory
from tests.toy_training import toy_recipe, write_toy_data

CPU = torch.device("cpu")


def page_faults(repeats: int = 5) -> int:
    """Pages that the system hands out while 64 MiB are taken and given back a few times."""
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(repeats):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_memory_is_kept_inside_the_block_only():
    with kept_memory(CPU) as kept:
        if not kept:
            pytest.skip("another C library than glibc")
        torch.ones(2**24)
        inside = page_faults()
    outside = page_faults()
    assert inside < 1000 < outside


def test_nothing_is_done_for_a_gpu():
    with patch("ctypes.CDLL") as library, kept_memory(torch.device("cuda")) as kept:
        assert not kept
    library.assert_not_called()


def test_training_keeps_memory(tmp_path):
    data = write_toy_data(tmp_path / "data")
    with patch.object(loop, "kept_memory", wraps=kept_memory) as keep:
        train(toy_recipe(max_iterations=1), data, tmp_path / "run")
    keep.assert_called_once_with(CPU)
