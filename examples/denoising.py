"""Changed queries: in training, extra queries start from disturbed segments and learn to restore them.

    from examples.denoising import build_denoising, denoising_criterion
    run = train(recipes.debug_tiny(), "data/scenes", "runs/dn", build=build_denoising, criterion=denoising_criterion)

    m2f-lab train debug_tiny --build examples/denoising.py:build_denoising \
                             --criterion examples/denoising.py:denoising_criterion …

Their segments are known, so they need no matching, and the decoder learns from the first step on what matched queries
learn late. Outside training they do not exist.

B images, Q learned queries, D denoising queries, K classes, C channels, T segments of an image.

Source: Mask DINO (Li et al. 2023), section 3.4; DN-DETR (Li et al. 2022), section 4.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from m2f_lab.loss import Criterion, Divisors, Matching, build_criterion
from m2f_lab.model import Backbone, Mask2Former, ModelConfig, PixelDecoder, TransformerDecoder
from m2f_lab.recipes import Recipe
from m2f_lab.structures import Output, Target

NUM_DENOISING = 40  # D
LABEL_NOISE, BOX_NOISE = 0.5, 0.4  # share of labels that are drawn at random; of a box's size that it is moved by


@dataclass(frozen=True)
class DenoisingOutput(Output):
    """The learned queries' predictions, and in training those of the denoising queries beside them."""

    restored: Output | None = None


class DenoisingDecoder(TransformerDecoder):
    """A decoder with D more queries in training: query d restores segment d modulo T, once per group of T."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.hidden_dim
        self.label_embedding = nn.Embedding(config.num_classes + 1, dim)  # the last is for images without segments
        self.box_embedding = nn.Sequential(nn.Linear(4, dim), nn.ReLU(), nn.Linear(dim, dim))

    def start(self, memory):
        state = super().start(memory)
        if memory.targets is None:
            return state
        height, width = (4 * side for side in memory.mask_features.shape[2:])
        nothing = self.label_embedding.num_embeddings - 1
        disturbed = [disturb(target, nothing, width, height) for target in memory.targets]
        labels, boxes = (torch.stack(values) for values in zip(*disturbed, strict=True))  # (B, D), (B, D, 4)
        queries = torch.cat([state.queries, self.label_embedding(labels)], dim=1)
        positions = torch.cat([state.positions.expand_as(state.queries), self.box_embedding(boxes)], dim=1)
        class_logits, embeddings = self.predict(queries)
        return state._replace(queries=queries, positions=positions, class_logits=class_logits, embeddings=embeddings)

    def queries_blocked(self, state, memory):
        """Nobody sees a denoising query of another group: it would give away the answer. bool [B, Q + D, Q + D]"""
        if memory.targets is None:
            return None
        learned = len(self.query_features)
        groups = []
        for target in memory.targets:
            group = torch.arange(NUM_DENOISING) // max(target.num_segments, 1)
            groups.append(torch.cat([torch.full((learned,), -1), group]))
        group = torch.stack(groups).to(state.queries.device)  # (B, Q + D); -1 for the learned queries
        return (group[:, None] != -1) & (group[:, None] != group[:, :, None])


def disturb(target: Target, nothing: int, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Labels [D] and boxes [D, 4] (centre x and y, width, height, in [0, 1] of the padded image), with noise."""
    device = target.labels.device
    if target.num_segments == 0:
        return torch.full((NUM_DENOISING,), nothing, device=device), torch.zeros(NUM_DENOISING, 4, device=device)
    segment = torch.arange(NUM_DENOISING, device=device) % target.num_segments
    random = torch.randint(nothing, segment.shape, device=device)
    labels = torch.where(torch.rand(NUM_DENOISING, device=device) < LABEL_NOISE, random, target.labels.long()[segment])
    masks = target.dense()
    x, y = ((masks.any(dim).float()) for dim in (1, 2))  # (T, W), (T, H)
    boxes = torch.stack([*extent(x, width), *extent(y, height)], dim=1)[segment]  # x, width, y, height
    boxes = boxes[:, [0, 2, 1, 3]]
    size = boxes[:, 2:].repeat(1, 2)
    return labels, (boxes + size * BOX_NOISE * (torch.rand(NUM_DENOISING, 4, device=device) - 0.5)).clamp(0, 1)


def extent(present: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Centre and size of the ones in each row, as shares of a length. [T, N] → [T], [T]"""
    first = present.argmax(1)
    last = present.shape[1] - present.flip(1).argmax(1)
    return (first + last) / (2 * length), (last - first) / length


class DenoisingMask2Former(Mask2Former):
    """Mask2Former whose output keeps learned and denoising queries apart."""

    def output(self, states, memory, image_size, padded_size):
        if memory.targets is None:
            return super().output(states, memory, image_size, padded_size)
        learned, restored = (
            super(DenoisingMask2Former, self).output(
                [state.rows(queries) for state in states], memory, image_size, padded_size
            )
            for queries in (slice(None, -NUM_DENOISING), slice(-NUM_DENOISING, None))
        )
        return DenoisingOutput(**{f.name: getattr(learned, f.name) for f in fields(Output)}, restored=restored)


def build_denoising(config: ModelConfig) -> DenoisingMask2Former:
    """Compose the paper's model with the denoising decoder."""
    backbone = Backbone(config)
    decoder = DenoisingDecoder(config)
    return DenoisingMask2Former(backbone, PixelDecoder(backbone.channels, config), decoder, config)


class DenoisingCriterion(Criterion):
    """Losses of the learned queries, and the same losses of the denoising queries, whose pairs are known."""

    def losses(self, output, targets, matching, points=None, divisors=None):
        losses = super().losses(output, targets, matching, points, divisors)
        if not isinstance(output, DenoisingOutput):
            return losses
        pairs = known_pairs(output.num_predictions, targets)
        matched = sum(NUM_DENOISING for target in targets if target.num_segments)
        weight = self.class_sums(output.restored, targets, pairs)[1][0]  # the same in every prediction
        # Where these images are a part of the batch, as many parts are missing here as in the paper's divisors.
        share = 1.0 if divisors is None else divisors.segments / max(sum(t.num_segments for t in targets), 1)
        divisors = Divisors(queries=weight * share, segments=max(matched, 1) * share)
        restored = super().losses(output.restored, targets, pairs, divisors=divisors)
        losses["total"] = losses["total"] + restored.pop("total")
        return losses | {f"{name}_restored": value for name, value in restored.items()}


def known_pairs(num_predictions: int, targets: list[Target]) -> Matching:
    """Denoising query d restores segment d modulo T, in every prediction; see `Matching` for the order."""
    pairs = [
        (image, prediction, query, query % target.num_segments)
        for image, target in enumerate(targets)
        for prediction in range(num_predictions)
        for query in range(NUM_DENOISING if target.num_segments else 0)
    ]
    return Matching(*torch.tensor(pairs, dtype=torch.long).view(-1, 4).T)


def denoising_criterion(recipe: Recipe) -> DenoisingCriterion:
    """The paper's criterion, applied to both kinds of queries."""
    return DenoisingCriterion(**vars(build_criterion(recipe)))
