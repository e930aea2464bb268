"""The paper's ablations, each an override of one step or a function of one's own: see `recipes.ablation`.

None of them needs anything that a file outside the package could not do as well.

B batch, Q queries, C channels, S cells of one level, N pairs of a prediction of one image, H/W height/width of the mask
features.

Source: Mask2Former (Cheng et al. 2022), section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from m2f_lab.loss import Criterion, Divisors, Matching, build_criterion, sees_output
from m2f_lab.loss.terms import dice, mask
from m2f_lab.model import Backbone, DecoderLayer, Mask2Former, PixelDecoder, TransformerDecoder
from m2f_lab.recipes import ModelConfig, Recipe
from m2f_lab.structures import DecoderMemory, DecoderState, Output, Target, cell_centres


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


class UnsupervisedStart(Criterion):
    """Learned queries that get no loss before the first layer; the numbers of the other predictions stay."""

    def __call__(
        self, output: Output, targets: Sequence[Target], divisors: Divisors | None = None
    ) -> dict[str, Tensor]:
        later = replace(output, class_logits=output.class_logits[1:], masks=output.masks[1:], states=())
        losses = super().__call__(later, targets, divisors)
        total = losses.pop("total")
        numbered = ((*name.split(".", 1), value) for name, value in losses.items())
        return {"total": total} | {f"{int(number) + 1}.{term}": value for number, term, value in numbered}


def learnable_queries_not_supervised(recipe: Recipe) -> Criterion:
    return UnsupervisedStart(**vars(build_criterion(recipe)))


def mask_loss_on_full_masks(recipe: Recipe) -> Criterion:
    """All cells of the mask features instead of points; matching still samples points."""
    return replace(build_criterion(recipe), terms={"mask": on_full_masks(mask), "dice": on_full_masks(dice)})


def on_full_masks(term: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A pointwise term, taken at every cell of the mask features."""

    @sees_output
    def full(output: Output, targets: Sequence[Target], matching: Matching) -> Tensor:
        sums = [masks.features.new_zeros(()) for masks in output.masks]
        for image, target in enumerate(targets):
            for prediction, masks in enumerate(output.masks):
                query, segment = matching.of(prediction, image)
                centres = cell_centres(masks.size, masks.features.device)  # (H*W, 2)
                truth = target.at(centres, output.padded_size)[segment.to(centres.device)]
                logits = masks.embeddings[image, query] @ masks.features[image].flatten(1)  # (N, H*W)
                sums[prediction] = sums[prediction] + term(logits, truth).sum()
        return torch.stack(sums)

    return full
