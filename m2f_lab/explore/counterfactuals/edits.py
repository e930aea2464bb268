"""Changes of an image's way through the transformer decoder, and the history of such changes.

Layer n of 1…N makes prediction n; prediction 0 is that of the learned queries. Queries and classes are numbered from 0.

h/w height/width of the grid of cells that a layer looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from m2f_lab.explore.parts.labels import NO_OBJECT


@dataclass(frozen=True)
class Mute:
    """Take a query out.

    From `from_layer` on the query is no longer in the decoder: the others cannot see it in self-attention, and it
    predicts nothing, which is "no object" for certain and a mask of logit 0. Layer 1 takes it out from the start, as
    if its learned embeddings had been deleted; None lets it take part to the end and leaves it out of the result only.

    Attributes:
        query: its number.
        from_layer: the first layer without it, or None.
    """

    query: int
    from_layer: int | None = 1


@dataclass(frozen=True)
class ForceClass:
    """Give a query's mask to one class for certain, whatever the query predicts.

    Only results change, no layer runs again: the decoder is never told the classes that its queries predict.

    Attributes:
        query: its number.
        label: a class, by number or by name; number K and "no object" mean none.
        every_prediction: in the predictions after all layers instead of the last one only.
    """

    query: int
    label: int | str
    every_prediction: bool = False


@dataclass(frozen=True, eq=False)
class PaintAttention:
    """Set cell by cell what a layer hides from a query, in place of the mask that the query predicted.

    As in the model, a query from which everything is hidden is shown everything: the fallback opens its row.

    Attributes:
        layer: from 1.
        query: its number.
        blocked: True where the query must not look, over the whole padded image; see `Replay.grid`. bool [h, w]
    """

    layer: int
    query: int
    blocked: np.ndarray

    def __post_init__(self) -> None:
        given = self.blocked.cpu().numpy() if isinstance(self.blocked, Tensor) else np.asarray(self.blocked)
        if given.dtype != bool or given.ndim != 2:
            raise ValueError(
                f"PaintAttention.blocked must be a boolean map [h, w], True where the query must not look, got "
                f"{given.dtype} {list(given.shape)}."
            )
        kept = given.copy()
        kept.flags.writeable = False  # an edit that changed later would not be what the history shows
        object.__setattr__(self, "blocked", kept)


@dataclass(frozen=True)
class Unmask:
    """Switch masking off: a layer hides nothing.

    Attributes:
        layer: from 1.
        query: from which nothing is hidden; None means from all queries.
    """

    layer: int
    query: int | None = None


Edit = Mute | ForceClass | PaintAttention | Unmask


def first_layer(edit: Edit) -> int | None:
    """The first layer that an edit changes; None where it changes the result only."""
    return edit.from_layer if isinstance(edit, Mute) else getattr(edit, "layer", None)


def target(edit: Edit) -> tuple:
    """The thing that an edit changes; a later edit of the same thing takes its place."""
    kind = {Mute: "mute", ForceClass: "class"}.get(type(edit), "attention")
    return (kind, edit.layer, edit.query) if kind == "attention" else (kind, edit.query)


def class_number(label: int | str, names: Sequence[str]) -> int:
    """The number of a class that is given by number or name; K for "no object".

    Raises:
        ValueError: there is no such class.
    """
    known = [*names, NO_OBJECT]
    if isinstance(label, str):
        if label not in known:
            raise ValueError(f"There is no class {label!r}; there are {', '.join(known)}.")
        return known.index(label)
    if label not in range(len(names) + 1):
        raise ValueError(f"There is no class {label}; they are numbered 0…{len(names) - 1}, {len(names)}: {NO_OBJECT}.")
    return int(label)


def describe(edit: Edit, names: Sequence[str]) -> str:
    """An edit in words; `names` are those of the K classes."""
    match edit:
        case Mute(query, None):
            return f"query {query}: muted in the result only"
        case Mute(query, layer):
            return f"query {query}: muted from layer {layer} on"
        case ForceClass(query, label, every_prediction):
            name = [*names, NO_OBJECT][class_number(label, names)]
            return f"query {query}: called {name}" + (" in every prediction" if every_prediction else "")
        case PaintAttention(layer, query, blocked):
            cells = f"{blocked.sum()} of {blocked.size} cells hidden"
            return f"query {query}, layer {layer}: attention mask painted, {cells}"
        case Unmask(layer, query):
            whom = "all queries" if query is None else f"query {query}"
            return f"{whom}, layer {layer}: masking off"


def with_edit(edits: tuple[Edit, ...], edit: Edit) -> tuple[Edit, ...]:
    """Add an edit at the end, in place of an earlier one of the same query's attention, class or presence."""
    return (*(earlier for earlier in edits if target(earlier) != target(edit)), edit)


class EditHistory:
    """Edits that can be taken back and made again. A new edit ends what could be made again.

    Attributes:
        edits: those that are in force now, in order.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Edit, ...]] = [()]
        self._now = 0  # place of the step that is in force

    @property
    def edits(self) -> tuple[Edit, ...]:
        return self._steps[self._now]

    @property
    def can_undo(self) -> bool:
        return self._now > 0

    @property
    def can_redo(self) -> bool:
        return self._now + 1 < len(self._steps)

    def apply(self, edit: Edit) -> tuple[Edit, ...]:
        """Add one edit; see `with_edit`."""
        return self._go_to(with_edit(self.edits, edit))

    def reset(self) -> tuple[Edit, ...]:
        """Drop all edits; this can be undone."""
        return self._go_to(()) if self.edits else self.edits

    def undo(self) -> tuple[Edit, ...]:
        """Go one step back; at the beginning, nothing happens."""
        self._now -= self.can_undo
        return self.edits

    def redo(self) -> tuple[Edit, ...]:
        """Go forward again; where nothing was undone, nothing happens."""
        self._now += self.can_redo
        return self.edits

    def _go_to(self, edits: tuple[Edit, ...]) -> tuple[Edit, ...]:
        self._now += 1
        self._steps[self._now :] = [edits]
        return edits
