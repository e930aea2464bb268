"""EoMT, the encoder-only mask transformer: a plain ViT segments; queries are tokens that join its last blocks.

B batch, Q queries, K classes, C channels (width of the ViT), N tokens, S patches, H/W height/width.

    the first blocks run on                           [cls and register tokens, patches], as in any ViT
    the last blocks run on                            [queries, cls and register tokens, patches]
    before each of the last blocks, and at the end    queries predict classes, and masks as queries · upscaled patches

There is neither a pixel decoder nor a transformer decoder: the self-attention of the blocks does the work of both. In
training it is masked as in Mask2Former, with a probability that falls to 0, so that a trained model needs no masks.

Source: Your ViT is Secretly an Image Segmentation Model (Kerssies et al. 2025); https://github.com/tue-mps/eomt
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2f_lab.data import Classes
from m2f_lab.inference import predict
from m2f_lab.networks import create_network, pixel_statistics
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import DecoderState, MaskLogits, Output, Prediction, Target

_SUGGESTION = (
    'EoMT takes a ViT of timm, for example ModelConfig(backbone="vit_large_patch14_reg4_dinov2", '
    'backbone_options={"img_size": 512, "patch_size": 16}) or ModelConfig(backbone="vit_large_patch16_dinov3").'
)


class ViT(nn.Module):
    """A vision transformer of timm (DINOv2, DINOv3, AugReg, …), run block by block.

    Args:
        config: reads `backbone`, `backbone_options`, `backbone_weights` and `drop_path_rate`.

    Raises:
        ValueError: timm does not know the name, an option does not fit, or the network is no ViT.
        OSError: the weights cannot be read or downloaded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        options = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True, **config.backbone_options}
        self.network = create_network(config, options, _SUGGESTION)
        if not isinstance(self.network, (VisionTransformer, Eva)):
            raise ValueError(f"{config.backbone!r} is a {type(self.network).__name__}. {_SUGGESTION}")
        self.patch_size: tuple[int, int] = self.network.patch_embed.patch_size
        self.checkpointed = False

    def forward(self, images: Tensor) -> tuple[Tensor, list[dict]]:
        """Embed normalised images of whole patches. [B, 3, H, W]

        Returns:
            The tokens that enter the first block [B, N, C], patches last; and rotary positions for every block of a ViT
            that has them.
        """
        network, depth = self.network, len(self.network.blocks)
        tokens, options = network._pos_embed(network.patch_embed(images)), [{}] * depth
        if isinstance(network, Eva):
            tokens, ropes = tokens
            options = [{"rope": rope} for rope in (ropes if network.rope_mixed else [ropes] * depth)]
        return network.norm_pre(tokens), options

    def block(self, index: int, tokens: Tensor, keep_attention: bool = False, **options) -> tuple[Tensor, list[Tensor]]:
        """Run one block, counted from 0: tokens [B, N, C], and its attention weights [B, heads, N, N] if asked for."""
        block = self.network.blocks[index]
        run = partial(checkpoint, block, use_reentrant=False) if self.checkpointed and self.training else block
        with attention_weights(block.attn) if keep_attention else nullcontext([]) as weights:
            return run(tokens, **options), weights

    def recompute(self) -> None:
        """Keep only what enters each block for the backward pass, and compute the rest there once more."""
        self.checkpointed = True


@contextmanager
def attention_weights(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the weights of an attention of timm, which has them only where it is not fused."""
    weights: list[Tensor] = []
    hook = attention.attn_drop.register_forward_hook(lambda module, args, output: weights.append(output))
    fused, attention.fused_attn = attention.fused_attn, False
    try:
        yield weights
    finally:
        attention.fused_attn = fused
        hook.remove()


class ScaleBlock(nn.Sequential):
    """Double height and width of patch features. [B, C, h, w] → [B, C, 2h, 2w]"""

    def __init__(self, channels: int) -> None:
        super().__init__(
            nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2),
            nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False),
            LayerNorm2d(channels),
        )


class EoMT(nn.Module):
    """Encoder-only mask transformer (Kerssies et al. 2025).

    Args:
        config: reads what `ViT` reads, `num_classes`, `num_queries`, and `num_decoder_layers`, the number of last
            blocks that the queries join (published for ViT-L: 4). Width and heads are the ViT's own.

    Attributes:
        mask_probabilities: probability of a query to be masked, in each of the last blocks; `anneal` lowers them.
        classes: names, colours and things of the K classes, where known.

    Raises:
        ValueError: the ViT has fewer blocks; or see `ViT`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.classes: Classes | None = None
        self.builder: str | None = None
        self.backbone = ViT(config)
        network, count = self.backbone.network, config.num_decoder_layers
        dim, self.first = network.embed_dim, len(network.blocks) - count  # the first block that takes queries
        if self.first < 0:
            raise ValueError(f"num_decoder_layers = {count}, but {config.backbone!r} has {len(network.blocks)} blocks.")
        if isinstance(network, Eva):  # its rotary positions are for patches alone, which follow the queries
            for block in network.blocks[self.first :]:
                block.attn.num_prefix_tokens += config.num_queries
        self.query_features = nn.Parameter(torch.randn(config.num_queries, dim))
        self.class_head = nn.Linear(dim, config.num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        doublings = max(1, int(math.log2(max(self.backbone.patch_size))) - 2)  # patches of 16 pixels: to stride 4
        self.upscale = nn.Sequential(*(ScaleBlock(dim) for _ in range(doublings)))
        self.register_buffer("mask_probabilities", torch.ones(count))
        for name, values in zip(("pixel_mean", "pixel_std"), pixel_statistics(config), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, targets: Sequence[Target] | None = None, keep_attention: bool = False) -> Output:
        """Segment images.

        Evaluation makes those predictions only that are needed: the last one, and those that mask attention.

        Args:
            images: RGB in 0..255, uint8 or float, of any height and width. [B, 3, H, W]
            targets: not used.
            keep_attention: make all predictions, and keep attention weights in the states. Those of a query add up to 1
                over patches (cross-attention), queries (self-attention) and cls and register tokens together.

        Returns:
            Predictions, each with mask features of its own, over the image padded bottom and right to whole patches.

        Raises:
            ValueError: the images are not [B, 3, H, W].
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"EoMT takes RGB images [B, 3, H, W] in 0..255, got shape {tuple(images.shape)}.")
        padded = self.preprocess(images)
        grid = tuple(length // patch for length, patch in zip(padded.shape[2:], self.backbone.patch_size, strict=True))
        tokens, options = self.backbone(padded)
        for index in range(self.first):
            tokens, _ = self.backbone.block(index, tokens, **options[index])
        tokens = torch.cat([self.query_features.expand(len(images), -1, -1), tokens], dim=1)  # (B, N, C)

        queries, patches = slice(len(self.query_features)), slice(-math.prod(grid), None)  # among the tokens
        predictions: list[tuple[DecoderState, MaskLogits]] = []
        seen: list = []  # the next state from its `level` on: what the block before attended to
        for index, probability in enumerate(self.mask_probabilities.tolist(), start=self.first):
            blocked = opened = allowed = None
            if self.training or keep_attention or probability > 0:
                predictions.append(self.predict_masks(tokens, grid, seen))
                blocked, opened = self.attention_mask(predictions[-1][1], grid, probability, seed=index)
            if probability > 0:
                allowed = blocked.new_ones(len(tokens), 1, tokens.shape[1], tokens.shape[1])
                allowed[:, 0, queries, patches] = ~blocked
            tokens, weights = self.backbone.block(index, tokens, keep_attention, attn_mask=allowed, **options[index])
            parts = [w[:, :, queries, columns].clone() for w in weights for columns in (patches, queries)]
            seen = [0, blocked, opened, *parts]
        predictions.append(self.predict_masks(tokens, grid, seen))
        states, masks = zip(*predictions, strict=True)
        class_logits = [state.class_logits for state in states]
        return Output(class_logits, list(masks), tuple(images.shape[2:]), tuple(padded.shape[2:]), states, (grid,))

    def preprocess(self, images: Tensor) -> Tensor:
        """Normalise, then pad bottom and right with zeros (the mean colour) to whole patches."""
        height, width = self.backbone.patch_size
        normalised = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return F.pad(normalised, (0, -images.shape[3] % width, 0, -images.shape[2] % height))

    def predict_masks(self, tokens: Tensor, grid: tuple[int, int], seen: Sequence) -> tuple[DecoderState, MaskLogits]:
        """Predict from the tokens between two blocks [B, N, C]; `seen` are the state's fields from `level` on."""
        count, normalised = len(self.query_features), self.backbone.network.norm(tokens)
        queries, patches = normalised[:, :count], normalised[:, -math.prod(grid) :]
        features = self.upscale(patches.transpose(1, 2).unflatten(2, grid))  # (B, C, H/4, W/4)
        masks = MaskLogits(self.mask_head(queries), features)
        return DecoderState(tokens[:, :count], self.class_head(queries), masks.embeddings, None, *seen), masks

    @torch.no_grad()
    def attention_mask(
        self, masks: MaskLogits, grid: tuple[int, int], probability: float, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Hide from each query the patches outside its own mask, unless chance spares it while masks are annealed.

        An empty mask needs no fallback: its query still attends to other queries and to cls and register tokens.

        Args:
            masks: predicted before the block.
            grid: height and width in patches.
            probability: of a query to be masked.
            seed: of the draw in evaluation, so that an unfinished model predicts the same every time.

        Returns:
            True where a patch is hidden, bool [B, Q, S]; queries that were spared, bool [B, Q].
        """
        outside = masks.resized(grid).flatten(2) <= 0
        generator = None if self.training else torch.Generator(outside.device).manual_seed(seed)
        spared = torch.rand(outside.shape[:2], device=outside.device, generator=generator) >= probability
        return outside & ~spared.unsqueeze(2), spared & (probability > 0)

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        """Lower the mask probabilities, as published: to 0 in one block after the other, beginning with the first.

        Training has two parts more than there are blocks with queries, all of the same length. All attention is masked
        in the first part and none in the last; in between, each block in its turn goes from 1 to 0 as (1 - t)^0.9.

        Args:
            progress: share of the training steps that are done, in [0, 1].
        """
        count = len(self.mask_probabilities)
        starts = torch.arange(1, count + 1, device=self.mask_probabilities.device)
        done = (progress * (count + 2) - starts).clamp(0, 1)
        self.mask_probabilities.copy_((1 - done) ** 0.9)

    def predict(self, image, task: str = "semantic", **options) -> Prediction:
        """Segment one image of any kind and size; see `m2f_lab.inference.predict`."""
        return predict(self, image, task, **options)


def build_eomt(config: ModelConfig) -> EoMT:
    """Build an EoMT with fresh heads, and a ViT that is fresh or pretrained as the config says; see `EoMT`."""
    model = EoMT(config)
    model.builder = "m2f_lab.model:build_eomt"
    return model
