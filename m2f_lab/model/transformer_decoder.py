"""The masked-attention decoder: queries look only where their own last mask is, and predict anew after every layer.

B batch, Q queries, K classes, C channels, S positions of one level, H/W height/width.

Source: Mask2Former (Cheng et al. 2022), section 3.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from m2f_lab.model.layers import Attention, feedforward, sine_positions
from m2f_lab.model.pixel_decoder import NUM_LEVELS
from m2f_lab.recipes import ModelConfig
from m2f_lab.structures import MaskLogits, resize


class DecoderLayer(nn.Module):
    """Masked cross-attention first, then self-attention, then a perceptron (section 3.2.2: queries start empty)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.cross_attention = Attention(dim, config.num_heads)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, config.num_heads)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.feedforward = feedforward(dim, config.decoder_feedforward_dim)
        self.feedforward_norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        memory: Tensor,
        memory_keys: Tensor,
        attention_blocked: Tensor,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Refine the queries with one level of features.

        Args:
            queries: [B, Q, C]
            query_positions: learned; added wherever queries are compared. [Q, C]
            memory: the level's features, with its level embedding. [B, S, C]
            memory_keys: the same plus their positions. [B, S, C]
            attention_blocked: True where a query must not look. bool [B, Q, S]
            return_weights: also return both kinds of attention weights.

        Returns:
            The queries [B, Q, C], cross-attention weights [B, heads, Q, S] and self-attention weights
            [B, heads, Q, Q], or None for both.
        """
        attended, cross_weights = self.cross_attention(
            queries + query_positions, memory_keys, memory, attention_blocked, return_weights
        )
        queries = self.cross_attention_norm(queries + attended)
        positioned = queries + query_positions
        attended, self_weights = self.self_attention(positioned, positioned, queries, return_weights=return_weights)
        queries = self.self_attention_norm(queries + attended)
        queries = self.feedforward_norm(queries + self.feedforward(queries))
        return queries, cross_weights, self_weights


class Memory(NamedTuple):
    """What the layers look at: the pixel decoder's features at strides 32, 16, 8.

    Attributes:
        sizes: height and width of each level.
        features: with their level embedding. [B, S, C] each
        keys: features plus sine embeddings, added once for all layers. [B, S, C] each
        mask_features: the mask features at the size of each level, for attention masks. [B, mask_dim, h, w] each
    """

    sizes: list[tuple[int, int]]
    features: list[Tensor]
    keys: list[Tensor]
    mask_features: list[Tensor]


class TransformerDecoder(nn.Module):
    """Learned queries, N layers that visit strides 32, 16, 8 in turn, and N + 1 predictions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.query_features = nn.Parameter(torch.randn(config.num_queries, dim))
        self.query_positions = nn.Parameter(torch.randn(config.num_queries, dim))
        self.level_embedding = nn.Parameter(torch.randn(NUM_LEVELS, dim))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, config.num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, config.mask_dim)
        )

    def forward(
        self, levels: list[Tensor], mask_features: Tensor, intermediates: dict | None = None
    ) -> tuple[list[Tensor], list[MaskLogits]]:
        """Decode.

        Args:
            levels: the pixel decoder's features at strides 32, 16, 8. [B, C, H / stride, W / stride]
            mask_features: [B, mask_dim, H/4, W/4]
            intermediates: filled, where given, with what explorers look at.

        Returns:
            Class logits [B, Q, K+1] and factored masks of every prediction, the learned queries' first.
        """
        memory = self.remember(levels, mask_features)
        queries = self.query_features.expand(len(mask_features), -1, -1)  # (B, Q, C)
        class_logits, embeddings = self.predict(queries)
        all_class_logits, all_embeddings = [class_logits], [embeddings]
        if intermediates is not None:
            intermediates["decoder.initial_queries"] = queries
            intermediates["decoder.level_sizes"] = memory.sizes

        for i, layer in enumerate(self.layers):
            level = i % NUM_LEVELS
            blocked, opened = attention_blocked(embeddings, memory.mask_features[level])
            queries, cross_weights, self_weights = layer(
                queries,
                self.query_positions,
                memory.features[level],
                memory.keys[level],
                blocked,
                return_weights=intermediates is not None,
            )
            class_logits, embeddings = self.predict(queries)
            all_class_logits.append(class_logits)
            all_embeddings.append(embeddings)
            if intermediates is not None:
                name = f"decoder.layer.{i}"
                intermediates[f"{name}.level"] = level
                intermediates[f"{name}.queries"] = queries
                intermediates[f"{name}.attention_blocked"] = blocked
                intermediates[f"{name}.attention_opened"] = opened
                intermediates[f"{name}.cross_attention"] = cross_weights
                intermediates[f"{name}.self_attention"] = self_weights

        return all_class_logits, [MaskLogits(e, mask_features) for e in all_embeddings]

    def remember(self, levels: list[Tensor], mask_features: Tensor) -> Memory:
        """Prepare what the layers look at, once per image.

        Attention masks are products with small feature maps, resized here instead of once per layer. No gradient flows
        through them: the published code detaches them, too.
        """
        sizes = [(level.shape[2], level.shape[3]) for level in levels]
        features = [
            level.flatten(2).transpose(1, 2) + embedding
            for level, embedding in zip(levels, self.level_embedding, strict=True)
        ]
        keys = [x + sine_positions(size, x.shape[2], x.device) for x, size in zip(features, sizes, strict=True)]
        return Memory(sizes, features, keys, [resize(mask_features.detach(), size) for size in sizes])

    def predict(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, K+1] and mask embeddings [B, Q, mask_dim]."""
        queries = self.decoder_norm(queries)
        return self.class_head(queries), self.mask_head(queries)


@torch.no_grad()
def attention_blocked(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Where a query must not look: outside its own mask, unless that mask is empty.

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
