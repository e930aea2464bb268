"""Matrix products by the fastest library at hand."""

import torch
import torch.nn.functional as F
from torch import Tensor

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_multiplies(x: Tensor, y: Tensor) -> bool:
    """Whether `linear_product` takes oneDNN for these: float32 numbers on a CPU. `torch.compile` chooses by itself."""
    plain = x.dtype == y.dtype == torch.float32 and x.device.type == "cpu"
    return HAS_ONEDNN and plain and min(x.numel(), y.numel()) > 0 and not torch.compiler.is_compiling()


def linear_product(x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ y.T + bias`, without a gradient. [N, C], [M, C], [M] → [N, M]

    For float32 PyTorch asks MKL, which on an AMD CPU reaches between half and nine tenths of oneDNN's rate on the long,
    narrow products of a transformer.
    """
    if not onednn_multiplies(x, y):
        return F.linear(x, y, bias)
    return torch.ops.mkldnn._linear_pointwise(x, y, bias, "none", [], "")
