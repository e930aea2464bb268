"""The paper's ablations of the transformer decoder, each by overriding one step; see `recipes.ablation`.

B batch, Q queries, S cells of one level, C channels.

Source: Mask2Former (Cheng et al. 2022), section 4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2f_lab.model.backbone import Backbone
from m2f_lab.model.mask2former import Mask2Former
from m2f_lab.model.pixel_decoder import PixelDecoder
from m2f_lab.model.transformer_decoder import DecoderLayer, DecoderMemory, TransformerDecoder
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import DecoderState


class Unmasked(TransformerDecoder):
    """Cross-attention to the whole image, as in DETR."""

    def attention_mask(self, state: DecoderState, index: int, memory: DecoderMemory) -> tuple[Tensor, Tensor]:
        blocked, opened = super().attention_mask(state, index, memory)
        return torch.zeros_like(blocked), torch.zeros_like(opened)


class CoarseOnly(TransformerDecoder):
    """Every layer attends to stride 32, the level without high-resolution features."""

    def level_of(self, index: int) -> int:
        return 0


class EmptyQueries(TransformerDecoder):
    """Query features that start from zero and are not learned; their positions are."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        nn.init.zeros_(self.query_features).requires_grad_(False)


class SelfAttentionFirst(DecoderLayer):
    """The order of a standard decoder layer: self-attention before cross-attention."""

    def forward(
        self,
        queries: Tensor,
        positions: Tensor,
        memory: Tensor,
        keys: Tensor,
        blocked: Tensor | None,
        queries_blocked: Tensor | None = None,
        keep_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        queries, within = self.attend_to_queries(queries, positions, queries_blocked, keep_attention)
        queries, cross = self.attend_to_memory(queries, positions, memory, keys, blocked, keep_attention)
        return self.feedforward_norm(queries + self.feedforward(queries)), cross, within


def no_masked_attention(config: ModelConfig) -> Mask2Former:
    return _compose(config, Unmasked(config))


def single_scale(config: ModelConfig) -> Mask2Former:
    return _compose(config, CoarseOnly(config))


def no_learnable_queries(config: ModelConfig) -> Mask2Former:
    return _compose(config, EmptyQueries(config))


def self_attention_first(config: ModelConfig) -> Mask2Former:
    return _compose(config, TransformerDecoder(config, layer=SelfAttentionFirst))


def _compose(config: ModelConfig, decoder: TransformerDecoder) -> Mask2Former:
    backbone = Backbone(config)
    return Mask2Former(backbone, PixelDecoder(backbone.channels, config), decoder, config)
