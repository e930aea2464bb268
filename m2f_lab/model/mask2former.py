"""The complete model (paper, Figure 2): backbone, pixel decoder, transformer decoder.

B batch, Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.inference import predict
from m2f_lab.model.backbone import STRIDES, Backbone
from m2f_lab.model.layers import speed_up_linears
from m2f_lab.model.pixel_decoder import PixelDecoder
from m2f_lab.model.transformer_decoder import TransformerDecoder
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import Output, Prediction

PIXEL_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB in 0..255
PIXEL_STD = (58.395, 57.12, 57.375)


class Mask2Former(nn.Module):
    """Masked-attention mask transformer for universal image segmentation (Cheng et al. 2022).

    Attributes:
        config: the architecture.
        classes: names, colours and things of the K classes, where known.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.classes: Classes | None = None
        self.backbone = Backbone(config)
        self.pixel_decoder = PixelDecoder(self.backbone.channels, config)
        self.transformer_decoder = TransformerDecoder(config)
        speed_up_linears(self)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, return_intermediates: bool = False) -> Output:
        """Segment images.

        Args:
            images: RGB in 0..255, uint8 or float, of any height and width. [B, 3, H, W]
            return_intermediates: also return what explorers look at, by name (see `Output.intermediates`). None of
                it is computed otherwise.

        Returns:
            Class logits and factored masks of every prediction, over the image padded bottom and right to a multiple
            of 32.

        Raises:
            ValueError: the images are not [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"Mask2Former takes RGB images [B, 3, H, W] in 0..255, got shape {tuple(images.shape)}.")
        intermediates = {} if return_intermediates else None
        padded = self.preprocess(images)
        pyramid = self.backbone(padded)
        mask_features, levels = self.pixel_decoder(pyramid, intermediates)
        class_logits, masks = self.transformer_decoder(levels, mask_features, intermediates)
        if intermediates is not None:
            intermediates |= {f"backbone.{i}": features for i, features in enumerate(pyramid)}
        return Output(
            class_logits=class_logits,
            masks=masks,
            image_size=(images.shape[2], images.shape[3]),
            padded_size=(padded.shape[2], padded.shape[3]),
            intermediates=intermediates,
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise, then pad bottom and right with zeros (the mean colour) to a multiple of the coarsest stride."""
        height, width = images.shape[2:]
        normalised = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return F.pad(normalised, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))

    def predict(self, image, task: str = "semantic", **options) -> Prediction:
        """Segment one image of any kind and size; see `m2f_lab.inference.predict`.

        Args:
            image: a path, a PIL image, or RGB uint8 [H, W, 3].
            task: "semantic", "panoptic" or "instance".
            options: of `m2f_lab.inference.predict`.
        """
        return predict(self, image, task, **options)


def build_model(config: ModelConfig) -> Mask2Former:
    """Build a Mask2Former with fresh decoders, and a backbone that is fresh or pretrained as the config says.

    Raises:
        ValueError: the backbone has no feature pyramid at strides 4, 8, 16, 32, or an option does not fit it.
        OSError: the backbone's weights cannot be read or downloaded.
    """
    return Mask2Former(config)
