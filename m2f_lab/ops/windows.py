"""Windows of feature maps, and the mask of shifted windows, which is made once per size.

B images, H/W height/width, C channels, W windows, N tokens of a window.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def cut_windows(maps: Tensor, window: tuple[int, int]) -> Tensor:
    """[B, H, W, C] → [B, W, N, C]"""
    maps = maps.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, rows, h, columns, w, C)
    return maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def merge_windows(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo `cut_windows`. [B, W, N, C] → [B, *size, C]"""
    rows, columns = size[0] // window[0], size[1] // window[1]
    maps = windows.unflatten(2, window).unflatten(1, (rows, columns))  # (B, rows, columns, h, w, C)
    return maps.transpose(2, 3).flatten(3, 4).flatten(1, 2)


@functools.lru_cache(maxsize=16)  # four stages of two sizes of image, on two devices
@torch.inference_mode(False)  # a mask that was first made for inference must serve training as well
def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Mask of shifted windows: 0 between neighbours, -100 where only the shift brought two tokens together.

    Args:
        size: height and width of the padded feature map.

    Returns:
        [W, 1, N, N]
    """
    rows, columns = (_bands(*sizes) for sizes in zip(size, window, shift, strict=True))
    bands = cut_windows((3 * rows[:, None] + columns)[None, :, :, None], window)[0, :, :, 0]  # (W, N)
    return torch.where(bands[:, None, :, None] == bands[:, None, None, :], 0.0, -100.0).to(device)


def _bands(length: int, window: int, shift: int) -> Tensor:
    """Along one axis of a shifted map: 0 before the last window, and in it 1 before and 2 after the seam. [length]"""
    place = torch.arange(length)
    return (place >= length - window).long() + (place >= length - shift)
