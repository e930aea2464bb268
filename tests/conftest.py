"""What holds for every test: seeded, no more threads than cores, and GPU tests only where there is a GPU."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import m2f_lab.ops._torchvision  # noqa: F401  heals torchvision before a test imports timm or transformers
from m2f_lab.training import Run, train
from tests.toy_training import toy_recipe, write_toy_data

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


def pytest_configure() -> None:
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // WORKERS)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random numbers, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A data set of a few tiny images, for tests of training."""
    return write_toy_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory) -> Run:
    """A run on it that was never stopped."""
    return train(toy_recipe(), root, tmp_path_factory.mktemp("runs") / "whole")
