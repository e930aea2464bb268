"""The backbone: any timm network with a feature pyramid at strides 4, 8, 16 and 32.

B batch, C channels, H/W height/width.

Swin's blocks are replaced by `m2f_lab.model.swin.SwinBlock`, which pads as the official ones do.
"""

import torch
from torch import Tensor, nn

import m2f_lab.ops._torchvision  # noqa: F401  isort: skip  (before timm, which imports torchvision)
import timm

from m2f_lab.model.swin import replace_blocks
from m2f_lab.networks import create_network
from m2f_lab.ops import replace_linears
from m2f_lab.recipes import ModelConfig

STRIDES = (4, 8, 16, 32)
_SUGGESTION = 'Use for example "swin_tiny_patch4_window7_224", "resnet50" or "convnext_tiny".'


class Backbone(nn.Module):
    """Images in, four feature maps out.

    Args:
        config: reads `backbone`, `backbone_options`, `backbone_weights`, `batch_norm`, `frozen_stages` and
            `drop_path_rate`.

    Attributes:
        channels: of the features at strides 4, 8, 16, 32.

    Raises:
        ValueError: timm does not know the name, the network has no such pyramid, or an option does not fit it.
        OSError: the weights cannot be read or downloaded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_swin = timm.models.is_model_in_modules(config.backbone, ["swin_transformer"])
        if self.is_swin:
            options = {"num_classes": 0, "always_partition": True, "strict_img_size": False}
        else:
            options = {"features_only": True, "out_indices": (-4, -3, -2, -1)}
        self.network = create_network(config, {**config.backbone_options, **options}, _SUGGESTION)
        replace_linears(self.network)
        levels = self.network.feature_info if self.is_swin else self.network.feature_info.get_dicts()
        self.channels = [level["num_chs"] for level in levels]
        if self.is_swin:
            # The official Swin normalises every level that leaves it, instead of the last one before the classifier.
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
            self.network.norm = nn.Identity()
            replace_blocks(self.network)
        # Pretrained batch norms can stay as they are, as in detectron2: small batches measure badly.
        self.batch_norm = config.batch_norm if config.backbone_weights else "trained"
        self.frozen_norms: set[nn.Module] = set()
        for norm in self._batch_norms():
            norm.requires_grad_(self.batch_norm == "trained")
        channels = config.backbone_options.get("in_chans", 3)
        self._check_pyramid(config.backbone, tuple(level["reduction"] for level in levels), channels)
        if config.frozen_stages:
            self._freeze(config.frozen_stages, channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features at strides 4, 8, 16, 32.

        Args:
            images: normalised; height and width divisible by 32. [B, 3, H, W]

        Returns:
            [B, C_i, H / stride, W / stride] each.
        """
        if not self.is_swin:
            features = self.network(images)
            channels_last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            return [x.permute(0, 3, 1, 2) for x in features] if channels_last else list(features)
        features = []
        x = self.network.patch_embed(images)  # (B, H / 4, W / 4, C)
        for layer, norm in zip(self.network.layers, self.norms, strict=True):
            x = layer(x)
            features.append(norm(x).permute(0, 3, 1, 2))
        return features

    def recompute(self) -> None:
        """Keep only the inputs of each block for the backward pass, which computes the rest again.

        Raises:
            ValueError: timm cannot do that with this network.
        """
        try:
            self.network.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise ValueError(
                f"{type(self.network).__name__} cannot compute its features twice; set "
                f"optimization.checkpoint_backbone to False. {_SUGGESTION}"
            ) from error

    def train(self, mode: bool = True) -> "Backbone":
        super().train(mode)
        for norm in self._batch_norms():
            if self.batch_norm == "frozen" or norm in self.frozen_norms:
                norm.eval()
        return self

    def _freeze(self, stages: int, channels: int) -> None:
        """Keep all parameters as they are that the features at the first strides depend on, whatever the network."""
        learns = {parameter: parameter.requires_grad for parameter in self.parameters()}
        features = self.requires_grad_(True).eval()(torch.rand(1, channels, 64, 96))[stages - 1]
        gradients = torch.autograd.grad(features.sum(), list(learns), allow_unused=True)
        needed = {parameter for parameter, gradient in zip(learns, gradients, strict=True) if gradient is not None}
        for parameter, learned in learns.items():
            parameter.requires_grad_(learned and parameter not in needed)
        self.frozen_norms = {norm for norm in self._batch_norms() if norm.weight in needed}
        self.train()

    def _batch_norms(self) -> list[nn.Module]:
        return [module for module in self.network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    @torch.no_grad()
    def _check_pyramid(self, name: str, strides: tuple[int, ...], channels: int) -> None:
        """Compare strides, then run a small image through, of a size that no pretraining used."""
        height, width = 64, 96
        backbone, image = f"Backbone {name!r}", f"an image of {height} × {width} pixels"
        if strides != STRIDES:
            needed = f"Mask2Former needs strides {STRIDES}"
            raise ValueError(f"{backbone} has features at strides {strides}; {needed}. {_SUGGESTION}")
        training = self.training
        self.eval()
        try:
            found = [tuple(x.shape[1:]) for x in self(torch.zeros(1, channels, height, width))]
        except Exception as error:
            needed = "It needs to take images of any size divisible by 32"
            raise ValueError(f"{backbone} cannot process {image}: {error}. {needed}. {_SUGGESTION}") from error
        self.train(training)
        expected = [(c, height // s, width // s) for c, s in zip(self.channels, STRIDES, strict=True)]
        if found != expected:
            raise ValueError(
                f"{backbone} returned features of shapes {found} for {image}, expected {expected}. {_SUGGESTION}"
            )
