"""The complete model (paper, Figure 2): backbone, pixel decoder, transformer decoder.

B batch, Q queries, K classes, H/W height/width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f_lab.data import Classes
from m2f_lab.inference import predict
from m2f_lab.model.backbone import STRIDES, Backbone
from m2f_lab.model.pixel_decoder import PixelDecoder
from m2f_lab.model.transformer_decoder import DecoderMemory, TransformerDecoder
from m2f_lab.networks import pixel_statistics
from m2f_lab.recipes import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Recipe
from m2f_lab.structures import DecoderState, MaskLogits, Output, Prediction, Target


class Mask2Former(nn.Module):
    """Masked-attention mask transformer for universal image segmentation (Cheng et al. 2022), made of three parts.

    Args:
        backbone: normalised images [B, 3, H, W] → features at strides 4, 8, 16, 32. [B, C_i, H / stride, W / stride]
        pixel_decoder: these → mask features [B, C, H/4, W/4], and levels at strides 32, 16, 8.
        transformer_decoder: a `TransformerDecoder` or a module with its `prepare` and `forward`.
        config: the numbers that the parts were made from, where there are any; it is saved with the weights.

    Attributes:
        classes: names, colours and things of the K classes, where known.
        builder: the name of the function that composed the model, where known; it is saved with the weights.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pixel_decoder: nn.Module,
        transformer_decoder: nn.Module,
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.classes: Classes | None = None
        self.builder: str | None = None
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.transformer_decoder = transformer_decoder
        statistics = (IMAGENET_MEAN, IMAGENET_STD) if config is None else pixel_statistics(config)
        for name, values in zip(("pixel_mean", "pixel_std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Sequence[Target] | None = None, keep_attention: bool = False) -> Output:
        """Segment images.

        Args:
            images: RGB (or the channels that the backbone takes) in 0..255, of any height and width. [B, 3, H, W]
            targets: ground truth of each image, for decoders that learn from it (denoising); the paper's does not.
            keep_attention: keep attention weights in the output's states.

        Returns:
            Class logits and factored masks of every prediction, over the image padded bottom and right to a multiple
            of 32.

        Raises:
            ValueError: the images are not [B, 3, H, W].
        """
        channels = len(self.pixel_mean)
        if images.ndim != 4 or images.shape[1] != channels:
            kind = "RGB images" if channels == 3 else "images"
            raise ValueError(
                f"Mask2Former takes {kind} [B, {channels}, H, W] in 0..255, got shape {tuple(images.shape)}."
            )
        padded = self.preprocess(images)
        mask_features, levels = self.pixel_decoder(self.backbone(padded))
        memory = self.transformer_decoder.prepare(levels, mask_features, targets=targets, keep_attention=keep_attention)
        states = self.transformer_decoder(memory)
        return self.output(states, memory, images.shape[2:], padded.shape[2:])

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise, then pad bottom and right with zeros (the mean colour) to a multiple of the coarsest stride."""
        height, width = images.shape[2:]
        normalised = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return F.pad(normalised, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))

    def output(
        self, states: list[DecoderState], memory: DecoderMemory, image_size: Sequence[int], padded_size: Sequence[int]
    ) -> Output:
        """Gather the decoder's states into predictions.

        Args:
            states: of `transformer_decoder`, one per prediction.
            memory: that they were made from.
            image_size: height and width of the images, in pixels.
            padded_size: height and width after padding, in pixels.
        """
        class_logits = [state.class_logits for state in states]
        masks = [MaskLogits(state.embeddings, memory.mask_features) for state in states]
        return Output(class_logits, masks, tuple(image_size), tuple(padded_size), tuple(states), tuple(memory.sizes))

    def predict(self, image, task: str = "semantic", **options) -> Prediction:
        """Segment one image: a path, a PIL image or RGB uint8 [H, W, 3]; see `m2f_lab.inference.predict`."""
        return predict(self, image, task, **options)


def build_model(config: ModelConfig) -> Mask2Former:
    """Compose the paper's three parts: fresh decoders, and a backbone that is fresh or pretrained as the config says.

    A changed model is composed alike, in a function of your own that takes a ModelConfig; hand it to `train(build=…)`.

    Raises:
        ValueError: the backbone has no feature pyramid at strides 4, 8, 16, 32, or an option does not fit it.
        OSError: the backbone's weights cannot be read or downloaded.
    """
    backbone = Backbone(config)
    model = Mask2Former(backbone, PixelDecoder(backbone.channels, config), TransformerDecoder(config), config)
    model.builder = Recipe.builder
    return model
