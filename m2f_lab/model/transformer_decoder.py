"""The masked-attention decoder: queries attend only inside their own last mask, and predict again after every layer.

B batch, Q queries, K classes, C channels, S cells of one level, H/W height/width.

    state = decoder.start(memory)                        the learned queries and their prediction
    state = decoder.step(state, index, memory)           layer `index`, counted from 0, and its prediction

A decoder variant overrides one of these two, or a smaller piece of a step, and is passed to `Mask2Former`.

Source: Mask2Former (Cheng et al. 2022), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from m2f_lab.model.layers import Attention, Perceptron, sine_positions
from m2f_lab.model.pixel_decoder import NUM_LEVELS
from m2f_lab.ops import for_products
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import DecoderMemory, DecoderState, MaskLogits, resize


class DecoderLayer(nn.Module):
    """Masked cross-attention first, then self-attention, then a perceptron (section 3.2.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.cross_attention = Attention(dim, config.num_heads)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, config.num_heads)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.feedforward = Perceptron(dim, config.decoder_feedforward_dim)
        self.feedforward_norm = nn.LayerNorm(dim)

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
        """Refine the queries with one level of features.

        Args:
            queries: [B, Q, C]
            positions: learned; added wherever queries are compared. [Q, C] or [B, Q, C]
            memory: the level's features, with its level embedding. [B, S, C]
            keys: the same plus their sine positions. [B, S, C]
            blocked: True where a query must not look. bool [B, Q, S]
            queries_blocked: True where a query must not see another one. bool [1 or B, Q, Q]
            keep_attention: also return both kinds of attention weights.

        Returns:
            The queries [B, Q, C], cross-attention weights [B, heads, Q, S] and self-attention weights
            [B, heads, Q, Q], or None for both.
        """
        queries, cross = self.attend_to_memory(queries, positions, memory, keys, blocked, keep_attention)
        queries, within = self.attend_to_queries(queries, positions, queries_blocked, keep_attention)
        return self.feedforward_norm(queries + self.feedforward(queries)), cross, within

    def attend_to_memory(
        self, queries: Tensor, positions: Tensor, memory: Tensor, keys: Tensor, blocked: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Masked cross-attention, residual and norm."""
        attended, weights = self.cross_attention(queries + positions, keys, memory, blocked, keep)
        return self.cross_attention_norm(queries + attended), weights

    def attend_to_queries(
        self, queries: Tensor, positions: Tensor, blocked: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention, residual and norm."""
        positioned = queries + positions
        attended, weights = self.self_attention(positioned, positioned, queries, blocked, keep)
        return self.self_attention_norm(queries + attended), weights


class TransformerDecoder(nn.Module):
    """Learned queries, N layers that visit strides 32, 16, 8 in turn, and N + 1 predictions.

    Args:
        config: the architecture.
        layer: makes one of the N layers.
    """

    def __init__(self, config: ModelConfig, layer: Callable[[ModelConfig], nn.Module] = DecoderLayer) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.query_features = nn.Parameter(torch.randn(config.num_queries, dim))
        self.query_positions = nn.Parameter(torch.randn(config.num_queries, dim))
        self.level_embedding = nn.Parameter(torch.randn(NUM_LEVELS, dim))
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.mask_dim)
        )

    def forward(self, memory: DecoderMemory) -> list[DecoderState]:
        """Decode: the state of the learned queries, then the state after every layer."""
        states = [self.start(memory)]
        for index in range(len(self.layers)):
            states.append(self.step(states[-1], index, memory))
        return states

    def prepare(self, levels: list[Tensor], mask_features: Tensor, **wishes) -> DecoderMemory:
        """Lay out what all layers look at, once per batch.

        Attention masks are products with small feature maps, resized here instead of once per layer. No gradient flows
        through them: the published code detaches them, too.

        Args:
            levels: the pixel decoder's features at strides 32, 16, 8. [B, C, H / stride, W / stride]
            mask_features: [B, mask_dim, H/4, W/4]
            wishes: `targets`, `keep_attention` and `edit_attention` of the memory.
        """
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        features = [x.flatten(2).transpose(1, 2) + e for x, e in zip(levels, self.level_embedding, strict=True)]
        places = [sine_positions(size, x.shape[2], x.device) for x, size in zip(features, sizes, strict=True)]
        keys = [x + place.to(self.level_embedding.dtype) for x, place in zip(features, places, strict=True)]
        small = [resize(mask_features.detach(), size) for size in sizes]
        features, keys = ([for_products(x) for x in each] for each in (features, keys))
        return DecoderMemory(sizes, features, keys, mask_features, small, **wishes)

    def start(self, memory: DecoderMemory) -> DecoderState:
        """The learned queries, which predict before any layer (section 3.2.3: they act as region proposals)."""
        queries = self.query_features.expand(len(memory.mask_features), -1, -1)  # (B, Q, C)
        return DecoderState(queries, *self.predict(queries), self.query_positions)

    def step(self, state: DecoderState, index: int, memory: DecoderMemory) -> DecoderState:
        """Run one layer on one level, and predict.

        Args:
            state: before the layer.
            index: the layer, from 0.
            memory: what it looks at.
        """
        level = self.level_of(index)
        blocked, opened = self.attention_mask(state, index, memory)
        queries_blocked = self.queries_blocked(state, memory)
        features, keys = memory.features[level], memory.keys[level]
        queries, cross, within = self.layers[index](
            state.queries, state.positions, features, keys, blocked, queries_blocked, memory.keep_attention
        )
        return DecoderState(queries, *self.predict(queries), state.positions, level, blocked, opened, cross, within)

    def level_of(self, index: int) -> int:
        """The level that a layer attends to: strides 32, 16, 8 in turn (section 3.2.2)."""
        return index % NUM_LEVELS

    def attention_mask(self, state: DecoderState, index: int, memory: DecoderMemory) -> tuple[Tensor, Tensor]:
        """Cells that layer `index` hides from each query, bool [B, Q, S], and rows that were opened, bool [B, Q]."""
        blocked, opened = attention_blocked(state.embeddings, memory.small_mask_features[self.level_of(index)])
        return memory.edit_attention(index, blocked, opened) if memory.edit_attention else (blocked, opened)

    def queries_blocked(self, state: DecoderState, memory: DecoderMemory) -> Tensor | None:
        """Queries that are hidden from each query in self-attention, bool [1 or B, Q, Q]; None where all are seen."""
        return None

    def predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, K+1] and mask embeddings [B, Q, mask_dim]."""
        queries = for_products(self.decoder_norm(queries))
        return self.class_head(queries), self.mask_head(queries)


@torch.no_grad()
def attention_blocked(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Block attention outside a query's own mask, unless that mask is empty.

    Args:
        embeddings: mask embeddings. [B, Q, C]
        features: mask features at the size of the level to look at. [B, C, h, w]

    Returns:
        True where attention is blocked, bool [B, Q, h * w]; and the queries whose mask was empty, which may
        therefore look everywhere, bool [B, Q].

    Source: section 3.2.1, equations 2 and 3; masks are cut at probability 0.5.
    """
    outside = MaskLogits(embeddings, features).dense().flatten(2) < 0
    empty = outside.all(dim=2)
    return outside & ~empty.unsqueeze(2), empty
