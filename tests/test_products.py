"""Products by the fastest library are products."""

import pytest
import torch

from m2f_lab import products
from m2f_lab.products import linear_product


@pytest.mark.parametrize("has_onednn", [products.HAS_ONEDNN, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 7])
def test_it_is_the_product(monkeypatch, has_onednn, dtype, rows):
    monkeypatch.setattr(products, "HAS_ONEDNN", has_onednn)
    x, y = torch.randn(5, 3, dtype=dtype), torch.randn(3, rows, dtype=dtype).T  # in any layout
    torch.testing.assert_close(linear_product(x, y), x @ y.T)
    torch.testing.assert_close(linear_product(y, x), y @ x.T)
    bias = torch.randn(5, dtype=dtype)
    torch.testing.assert_close(linear_product(y, x, bias), y @ x.T + bias)
