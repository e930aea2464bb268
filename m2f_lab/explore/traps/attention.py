"""Traps in attention: which cells are blocked, and where deformable attention reads.

B batch, Q queries, C channels, S positions of a level, h/w height/width of a level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m2f_lab.explore.traps.measures import distance, inside_image, mean_iou, mean_iou_with, with_method
from m2f_lab.explore.traps.trap import Bench, Finding, Trap
from m2f_lab.model import Mask2Former
from m2f_lab.model.deformable_attention import DeformableAttention
from m2f_lab.model.transformer_decoder import DecoderMemory, TransformerDecoder, attention_blocked
from m2f_lab.ops import deformable_sampling
from m2f_lab.ops.deformable_sampling import SamplingPlan, sample_by_grid
from m2f_lab.structures import DecoderState, MaskLogits

Blocked = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Mask embeddings and features of a level → cells that are hidden and queries that see everything."""

# --- masked attention -------------------------------------------------------------------------------------------------


def inverted(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks the inside of the mask: True was meant as "may look", and is read as "must not"."""
    inside = MaskLogits(embeddings, features).dense().flatten(2) >= 0
    full = inside.all(dim=2)
    return inside & ~full.unsqueeze(2), full


def never_opened(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """An empty mask blocks every cell."""
    outside = MaskLogits(embeddings, features).dense().flatten(2) < 0
    return outside, torch.zeros_like(outside[..., 0])


def cut_at_logit_one_half(embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Forgets the sigmoid: where the probability is 0.5, the logit is 0."""
    outside = MaskLogits(embeddings, features).dense().flatten(2) < 0.5
    empty = outside.all(dim=2)
    return outside & ~empty.unsqueeze(2), empty


def cut_and_detached(embeddings: Tensor, features: Tensor) -> Tensor:
    """The library's addition to the scores: minus infinity outside the mask. [B, Q, S]"""
    blocked, _ = attention_blocked(embeddings, features)
    return torch.zeros(blocked.shape).masked_fill(blocked, -torch.inf)


def soft_and_attached(embeddings: Tensor, features: Tensor) -> Tensor:
    """Adds the logarithm of the mask's probability, which forbids nothing and can be differentiated."""
    return F.logsigmoid(MaskLogits(embeddings, features).dense()).flatten(2)


def with_masks_by(model: Mask2Former, blocked: Blocked) -> Mask2Former:
    """A copy of the model whose decoder layers hide other cells."""

    def attention_mask(self: TransformerDecoder, state: DecoderState, index: int, memory: DecoderMemory) -> tuple:
        return blocked(state.embeddings, memory.small_mask_features[self.level_of(index)])

    return with_method(model, TransformerDecoder, "attention_mask", attention_mask)


def mean_iou_masked_by(bench: Bench, blocked: Blocked) -> Finding:
    """mIoU of the model whose layers hide other cells."""
    return mean_iou(bench, with_masks_by(bench.model, blocked))


def queries_without_numbers(bench: Bench, blocked: Blocked) -> Finding:
    """Share of queries whose attention weights are NaN in some layer, in percent."""
    _, *states = bench.output(0, with_masks_by(bench.model, blocked), keep_attention=True).states
    lost = torch.stack([state.cross_attention.isnan().any(dim=3).any(dim=1)[0] for state in states]).any(dim=0)  # (Q)
    return Finding(100 * float(lost.float().mean()))


def cells_hidden(bench: Bench, blocked: Callable) -> Finding:
    """Share of the cells inside the last masks, at stride 8, that queries may not look at, in percent; and where."""
    masks = bench.output(0).masks[-1]
    size = (masks.size[0] // 2, masks.size[1] // 2)
    factors = masks.resize_features(size)
    inside = factors.dense()[0] >= 0  # (Q, h, w)
    hidden = inside & blocked(factors.embeddings, factors.features)[0][0].unflatten(1, size)
    heat = hidden.float().sum(dim=0).clamp(max=1).cpu().numpy()
    return Finding(100 * float(hidden.sum() / inside.sum()), bench.samples[0].image, inside_image(bench, heat))


def _pyramid(bench: Bench) -> list[Tensor]:
    """Backbone features of the first street."""
    return bench.model.backbone(bench.model.preprocess(bench.images(0)))


def cells_taught_by_attention(bench: Bench, bias: Callable[[Tensor, Tensor], Tensor]) -> Finding:
    """Share of cells of the mask features that get a gradient from what attention saw, in percent; and how strong."""
    with torch.no_grad():
        level = bench.model.pixel_decoder(_pyramid(bench))[1][2].cpu()  # (1, C, h, w)
    masks = bench.output(0).masks[-1].resize_features(tuple(level.shape[2:]))  # clones may be differentiated
    features, embeddings = masks.features.cpu().clone().requires_grad_(), masks.embeddings.cpu().clone()
    weights = bias(embeddings, features).softmax(dim=2)  # (1, Q, h * w), of equal scores
    seen = (weights @ level.flatten(2).transpose(1, 2)).square().sum()
    if seen.requires_grad:
        seen.backward()
    gradient = torch.zeros(level.shape[2:]) if features.grad is None else features.grad.norm(dim=1)[0]
    picture = inside_image(bench, (gradient / gradient.max().clamp(min=1e-12)).sqrt().numpy())
    return Finding(100 * float((gradient > 0).float().mean()), bench.samples[0].image, picture)


# --- deformable attention ---------------------------------------------------------------------------------------------


def divided_by_height_and_width(
    self: DeformableAttention, features: Tensor, positions: Tensor, reference_points: Tensor, level_sizes: list
) -> tuple[Tensor, SamplingPlan]:
    """Equations 2 and 3 of Deformable DETR, but for the line that is marked."""
    values = self.value_projection(features).unflatten(2, (self.num_heads, -1))
    offsets, scores = self.offsets_and_scores(features, positions)
    swapped = [(width, height) for height, width in level_sizes]  # here: offsets are (x, y), and divided by these
    points = SamplingPlan(swapped, reference_points, offsets, scores)
    attended = sample_by_grid(values, level_sizes, points.locations, points.weights)
    return self.output_projection(attended.flatten(2)), points


def corners_aligned(values: Tensor, points: SamplingPlan) -> Tensor:
    """Reads as grid_sample does with align_corners=True: 0 and 1 become the centres of the outer cells."""
    cells = values.new_tensor([(width, height) for height, width in points.level_sizes])[:, None]  # (L, 1, 2)
    locations = (points.locations * (cells - 1) + 0.5) / cells
    return sample_by_grid(values, points.level_sizes, locations, points.weights)


def border_repeated(values: Tensor, points: SamplingPlan) -> Tensor:
    """Reads as grid_sample does with padding_mode="border": points outside move to the centre of an outer cell."""
    half = 0.5 / values.new_tensor([(width, height) for height, width in points.level_sizes])[:, None]  # (L, 1, 2)
    return sample_by_grid(values, points.level_sizes, points.locations.clamp(half, 1 - half), points.weights)


@torch.no_grad()
def features_of_pixel_decoder(bench: Bench, sampling: Callable[..., Tensor]) -> Finding:
    """Features at stride 8 of the pixel decoder that samples values otherwise, beside those of the library."""
    heads = bench.model.config.num_heads

    def forward(self: DeformableAttention, *inputs: Tensor | list) -> tuple[Tensor, SamplingPlan]:
        _, points = DeformableAttention.forward(self, *inputs)
        values = self.value_projection(inputs[0]).unflatten(2, (heads, -1))
        return self.output_projection(sampling(values, points).flatten(2)), points

    pyramid = _pyramid(bench)
    _, expected = bench.model.pixel_decoder(pyramid)
    _, found = with_method(bench.model.pixel_decoder, DeformableAttention, "forward", forward)(pyramid)
    return distance(bench, expected[2].cpu(), found[2].cpu())


ATTENTION = (
    Trap(
        name="attention mask inverted",
        mistake="In torch, True in a boolean mask means “blocked” for nn.MultiheadAttention and “allowed” for "
        "scaled_dot_product_attention. Mix them up, and every query looks everywhere but where it should.",
        question="What is left of the mIoU of a model that has learned these streets by heart?",
        unit="mIoU {} %", right=attention_blocked, broken=inverted, measure=mean_iou_masked_by,
        guarded_by="tests/test_model.py::test_decoder_states_explain_the_output_and_change_nothing",
    ),
    Trap(
        name="empty mask not opened",
        mistake="A query whose mask is empty may look nowhere. The softmax over nothing is 0 / 0: NaN, and after the "
        "next self-attention all other queries have it, too.",
        question="How many of the queries are lost: the one, some, all?",
        unit="{} % of the queries are NaN", right=attention_blocked, broken=never_opened,
        measure=queries_without_numbers, guarded_by="tests/test_model.py::test_an_empty_mask_opens_its_row",
    ),
    Trap(
        name="logits cut at 0.5",
        mistake="Masks are cut at a probability of 0.5, that is at a logit of 0. Cutting logits at 0.5 leaves queries "
        "the core of their mask, and hides the edge that is to be learned.",
        question="Where are the cells that queries may no longer see?",
        unit="{} % of the cells inside masks are hidden", right=attention_blocked, broken=cut_at_logit_one_half,
        measure=cells_hidden, guarded_by="tests/test_traps.py::test_attention_is_cut_at_a_logit_of_zero",
    ),
    Trap(
        name="soft mask, not detached",
        mistake="Instead of a cut, the mask's log-probability is added to the attention scores. Nothing is forbidden "
        "any more, and the class loss teaches masks through the attention, though only mask losses should.",
        question="Which share of the mask features is taught by a loss that is none of theirs?",
        unit="{} % of the cells taught by attention", right=cut_and_detached, broken=soft_and_attached,
        measure=cells_taught_by_attention,
        guarded_by="tests/test_traps.py::test_no_gradient_reaches_masks_through_attention",
    ),
    Trap(
        name="offsets divided by (H, W)",
        mistake="Offsets are (x, y) in pixels, so they are divided by (W, H). Sizes of feature maps are (H, W), and "
        "the division works with either. On square images both are the same.",
        question="The streets are nearly twice as wide as high. What is left of the mIoU?",
        unit="mIoU {} %", right=DeformableAttention.forward, broken=divided_by_height_and_width,
        measure=mean_iou_with(DeformableAttention, "forward"),
        guarded_by="tests/test_deformable_attention.py::test_offsets_are_pixels_of_the_level_they_point_into",
    ),
    Trap(
        name="align_corners=True",
        mistake="grid_sample can read 0 and 1 as the edges of the image or as the centres of its outer cells. "
        "Everything here means edges; the other choice moves what is read by up to half a cell.",
        question="At stride 32 this street has 4 × 6 cells. How far off can half a cell put a feature?",
        unit="features off by up to {} %", right=deformable_sampling, broken=corners_aligned,
        measure=features_of_pixel_decoder,
        guarded_by="tests/test_deformable_attention.py::test_sampling_against_a_loop",
    ),
    Trap(
        name="border instead of zeros",
        mistake="A point that lies outside the image reads zero. With padding_mode=“border” it reads the rim again.",
        question="Which places have sampling points that leave the image?",
        unit="features off by up to {} %", right=deformable_sampling, broken=border_repeated,
        measure=features_of_pixel_decoder,
        guarded_by="tests/test_deformable_attention.py::test_sampling_against_a_loop",
    ),
)  # fmt: skip
