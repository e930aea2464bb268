"""A changed model: a feature pyramid as pixel decoder, without any attention.

    from examples.feature_pyramid import build_fpn
    run = train(recipes.debug_tiny(), "data/scenes", "runs/fpn", build=build_fpn)

    m2f-lab train debug_tiny --build examples/feature_pyramid.py:build_fpn …

B batch, C channels, H/W height/width.

Source: Feature Pyramid Networks (Lin et al. 2017), section 3; the paper compares pixel decoders, too (Mask2Former,
section 4.3).
"""

from torch import Tensor, nn

from m2f_lab.model import Backbone, Mask2Former, ModelConfig, TransformerDecoder
from m2f_lab.structures import resize


class FeaturePyramid(nn.Module):
    """From coarse to fine: enlarge, add the backbone's next finer features, smooth.

    Args:
        in_channels: channels of the backbone's features at strides 4, 8, 16, 32.
        config: the architecture.
    """

    def __init__(self, in_channels: list[int], config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.lateral = nn.ModuleList(nn.Conv2d(channels, dim, 1) for channels in in_channels)
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.GroupNorm(32, dim), nn.ReLU())
            for _ in in_channels
        )
        self.mask_projection = nn.Conv2d(dim, config.mask_dim, 1)

    def forward(self, pyramid: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features at strides 4, 8, 16, 32 → mask features [B, mask_dim, H/4, W/4] and levels at strides 32, 16, 8."""
        merged, maps = None, []
        for features, lateral, smooth in reversed(list(zip(pyramid, self.lateral, self.smooth, strict=True))):
            features = lateral(features)
            merged = features if merged is None else features + resize(merged, features.shape[2:])
            maps.append(smooth(merged))
        *levels, finest = maps
        return self.mask_projection(finest), levels


def build_fpn(config: ModelConfig) -> Mask2Former:
    """Compose the paper's model with the feature pyramid in the place of its pixel decoder."""
    backbone = Backbone(config)
    return Mask2Former(backbone, FeaturePyramid(backbone.channels, config), TransformerDecoder(config), config)
