"""The backbone: any timm network with a feature pyramid at strides 4, 8, 16 and 32.

B batch, C channels, H/W height/width.

Swin's blocks are replaced by `m2f_lab.model.swin.SwinBlock`, which pads as the official ones do.
"""

import difflib
import functools
from pathlib import Path

import torch
from torch import Tensor, nn

import m2f_lab.ops._torchvision  # noqa: F401  isort: skip  (before timm, which imports torchvision)
import timm
from timm.models.swin_transformer import SwinTransformer

from m2f_lab.model.layers import replace_linears
from m2f_lab.model.swin import replace_blocks
from m2f_lab.recipes import ModelConfig

STRIDES = (4, 8, 16, 32)
_SUGGESTION = 'Use for example "swin_tiny_patch4_window7_224", "resnet50" or "convnext_tiny".'


class Backbone(nn.Module):
    """Images in, four feature maps out.

    Args:
        config: reads `backbone`, `backbone_options`, `backbone_weights` and `drop_path_rate`.

    Attributes:
        channels: of the features at strides 4, 8, 16, 32.

    Raises:
        ValueError: timm does not know the name, the network has no such pyramid, or an option does not fit it.
        OSError: the weights cannot be read or downloaded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.is_swin = _is_swin(config.backbone)
        self.network = _create_network(config, features_only=not self.is_swin)
        replace_linears(self.network)
        if self.is_swin:
            self.channels = [stage["num_chs"] for stage in self.network.feature_info]
            # The official Swin normalises every level that leaves it, instead of the last one before the classifier.
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)
            self.network.norm = nn.Identity()
            replace_blocks(self.network)
        else:
            self.channels = list(self.network.feature_info.channels())
        # Pretrained batch norms stay as they are, as in detectron2: batches are too small to measure them again.
        self.freeze_batch_norm = bool(config.backbone_weights)
        if self.freeze_batch_norm:
            for norm in _batch_norms(self.network):
                norm.requires_grad_(False)
        self._check_pyramid(config.backbone)

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
        if self.freeze_batch_norm:
            for norm in _batch_norms(self.network):
                norm.eval()
        return self

    @torch.no_grad()
    def _check_pyramid(self, name: str) -> None:
        """Run a small image through, of a size that no pretraining used."""
        height, width = 64, 96
        training = self.training
        self.eval()
        try:
            features = self(torch.zeros(1, 3, height, width))
        except Exception as error:
            raise ValueError(
                f"Backbone {name!r} cannot process an image of {height} × {width} pixels: {error}. It needs to take "
                f"images of any size divisible by 32. {_SUGGESTION}"
            ) from error
        self.train(training)
        found = [tuple(x.shape[1:]) for x in features]
        expected = [(c, height // s, width // s) for c, s in zip(self.channels, STRIDES, strict=True)]
        if found != expected:
            raise ValueError(
                f"Backbone {name!r} returned features of shapes {found} for an image of {height} × {width} pixels, "
                f"expected {expected}. {_SUGGESTION}"
            )


def _is_swin(name: str) -> bool:
    try:
        entry = timm.models.model_entrypoint(name.split(".")[0])
    except (RuntimeError, KeyError) as error:
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=5)
        hint = f"Did you mean {', '.join(close)}?" if close else _SUGGESTION
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}. {hint}") from error
    return entry.__module__ == SwinTransformer.__module__


def _create_network(config: ModelConfig, features_only: bool) -> nn.Module:
    options = dict(config.backbone_options)
    if features_only:
        options |= {"features_only": True, "out_indices": (-4, -3, -2, -1)}
    else:
        options |= {"num_classes": 0, "always_partition": True, "strict_img_size": False}
    if isinstance(config.backbone_weights, (str, Path)):
        path = Path(config.backbone_weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"backbone_weights: there is no file {path}. Give the path of a timm checkpoint, True to download "
                "timm's pretrained weights, or None for random ones."
            )
        options["pretrained_cfg_overlay"] = {"file": str(path)}
    network = _call_timm(config, options)
    if features_only and tuple(network.feature_info.reduction()) != STRIDES:
        raise ValueError(
            f"Backbone {config.backbone!r} has features at strides {tuple(network.feature_info.reduction())}; "
            f"Mask2Former needs strides {STRIDES}. {_SUGGESTION}"
        )
    return network


def _call_timm(config: ModelConfig, options: dict) -> nn.Module:
    """`timm.create_model` with errors that say what to do."""
    create = functools.partial(timm.create_model, config.backbone, pretrained=bool(config.backbone_weights), **options)
    try:
        try:
            return create(drop_path_rate=config.drop_path_rate)
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
        if config.drop_path_rate == 0:
            return create()
        raise ValueError(
            f"Backbone {config.backbone!r} has no stochastic depth: set drop_path_rate=0.0 in the ModelConfig."
        )
    except OSError as error:
        raise OSError(
            f"The pretrained weights of {config.backbone!r} could not be loaded: {error}. timm downloads them from the "
            "Hugging Face hub; without a network set backbone_weights to a downloaded file, or to None for random "
            "weights."
        ) from error
    except (TypeError, RuntimeError, IndexError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"timm cannot build {config.backbone!r} as a feature pyramid with {options}: {error}. {_SUGGESTION}"
        ) from error


def _batch_norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
