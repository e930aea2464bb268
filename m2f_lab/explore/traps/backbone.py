"""Traps before the decoders: padding of windows and of images, and the order of channels in a file."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.explore.traps.measures import distance, mean_iou_with, with_method
from m2f_lab.explore.traps.trap import Bench, Finding, Trap
from m2f_lab.model import Mask2Former, ModelConfig
from m2f_lab.model.backbone import Backbone
from m2f_lab.model.swin import SwinBlock, cut_windows, merge_windows, shift_mask, window_attention
from m2f_lab.weights.sssegmentation import UNFOLD


def small_swin() -> Backbone:
    """A Swin of random weights, large enough that attention is not the same everywhere."""
    options = dict(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8))
    swin = Backbone(ModelConfig(num_classes=1, backbone_options=options, drop_path_rate=0.0)).eval()
    for parameter in swin.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return swin


@torch.no_grad()
def features_of_swin(bench: Bench, attend: Callable) -> Finding:
    """Features at stride 8 with `attend` as the attention of every block, beside those of the library."""
    swin, images = small_swin(), bench.model.preprocess(bench.images(0)).cpu()
    changed = with_method(swin, SwinBlock, "attend", attend)
    return distance(bench, swin(images)[1], changed(images)[1])


@torch.no_grad()
def features_of_loaded_swin(bench: Bench, reorder: Callable[[Tensor], Tensor]) -> Finding:
    """Features at stride 8 after loading, with `reorder`, what MMSegmentation would have saved of the same Swin."""
    swin, images = small_swin(), bench.model.preprocess(bench.images(0)).cpu()
    expected = swin(images)[1]
    merging = {name: tensor for name, tensor in swin.state_dict().items() if "downsample" in name}
    file = {name: UNFOLD.to_theirs(tensor) for name, tensor in merging.items()}
    swin.load_state_dict({name: reorder(tensor) for name, tensor in file.items()}, strict=False)
    return distance(bench, expected, swin(images)[1])


def as_in_the_file(tensor: Tensor) -> Tensor:
    """Names and shapes fit, so nothing complains."""
    return tensor


def shifted_first(self: SwinBlock, x: Tensor) -> Tensor:
    """Attention of a block in timm's order: shift, then pad."""
    height, width = x.shape[1:3]
    shifted = self.norm1(x).roll((-self.shift[0], -self.shift[1]), (1, 2))
    padded = F.pad(shifted, (0, 0, 0, -width % self.window[1], 0, -height % self.window[0]))
    size = (padded.shape[1], padded.shape[2])
    tokens = self.attn.qkv(cut_windows(padded, self.window)).unflatten(3, (3, self.attn.num_heads, -1))
    bias = self.position_bias()
    if any(self.shift):
        bias = bias + shift_mask(size, self.window, self.shift, x.device)
    attended = window_attention(*tokens.unbind(3), bias).flatten(3)
    return self.attn.proj(merge_windows(attended, self.window, size)[:, :height, :width].roll(self.shift, (1, 2)))


def padded_before_normalising(self: Mask2Former, images: Tensor) -> Tensor:
    """Zeros in the raw image are black; after normalising, zero is the mean colour."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (0, -width % 32, 0, -height % 32))
    return (padded - self.pixel_mean) / self.pixel_std


BACKBONE = (
    Trap(
        name="Swin pads after the shift",
        mistake="timm shifts the windows of a Swin and then pads them to whole ones; the published code, and every "
        "published checkpoint, pads first. Weights load without a complaint and mean something else.",
        question="Where in the image will features differ: everywhere, or along two edges?",
        unit="features off by up to {} %", right=SwinBlock.attend, broken=shifted_first, measure=features_of_swin,
        guarded_by="tests/test_backbone.py::test_swin_pads_before_the_shift",
    ),
    Trap(
        name="patch merging in another order",
        mistake="MMSegmentation and its kin merge four pixels in the order of torch's unfold, timm and the authors "
        "slice by slice. The same shapes, so a checkpoint loads without a word.",
        question="By how much are the features off if only the order of channels of three small layers is wrong?",
        unit="features off by up to {} %", right=UNFOLD.to_ours, broken=as_in_the_file, measure=features_of_loaded_swin,
        guarded_by="tests/test_weights_keymap.py::test_patch_merging_order_against_torch_unfold",
    ),
    Trap(
        name="image padded before normalising",
        mistake="The image is padded with zeros and then normalised, so the padding is black instead of the mean "
        "colour, which the network sees as nothing.",
        question="Does a black bar beside the image change labels inside it?",
        unit="mIoU {} %", right=Mask2Former.preprocess, broken=padded_before_normalising,
        measure=mean_iou_with(Mask2Former, "preprocess"),
        guarded_by="tests/test_model.py::test_raw_images_are_normalised_then_padded",
    ),
)  # fmt: skip
