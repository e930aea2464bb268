"""MaskGrid: all masks of a stack at once, as thumbnails; a click chooses one.

N masks, h/w height/width of the masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import traitlets

from m2f_lab.explore.parts.assets import module
from m2f_lab.explore.parts.mask_view import MaskView
from m2f_lab.explore.parts.reading import AnyImage


class MaskGrid(MaskView):
    """Thumbnails of masks over an image; `index`, `stack` and `opacity` are those of `MaskView`.

    Left and right arrows go through the thumbnails as they are sorted, up and down through the stacks.

    Attributes:
        sort: the order that is shown, one of the names in `orders`.
    """

    _esm = module("mask_grid")

    orders = traitlets.Dict().tag(sync=True)  # name → the masks that are shown, in order
    sort = traitlets.Unicode().tag(sync=True)
    labels = traitlets.List().tag(sync=True)  # per stack, per mask
    thumbnail = traitlets.Int(84).tag(sync=True)  # least width in CSS pixels

    def __init__(
        self,
        image: AnyImage,
        masks: np.ndarray | Sequence[np.ndarray],
        *,
        labels: Sequence[Sequence[str]] = (),
        orders: Mapping[str, Sequence[int]] | None = None,
        **traits,
    ) -> None:
        """Lay masks over small copies of an image.

        Args:
            image, masks: as `MaskView` takes them. Few cells suffice: a thumbnail has few pixels.
            labels: a short text below each mask, for each stack.
            orders: name → masks in that order; one may leave masks out. The first is shown at first.
            traits: of `MaskView`, and `thumbnail`.

        Raises:
            ValueError: an order names a mask that is not there.
        """
        super().__init__(image, masks, **traits)
        num_masks = max(shape[0] for shape in self.shapes)
        orders = {"number": range(num_masks)} if orders is None else orders
        for name, order in orders.items():
            unknown = [int(index) for index in order if not 0 <= index < num_masks]
            if unknown:
                raise ValueError(f"The order {name!r} names masks {unknown}; there are masks 0…{num_masks - 1}.")
        self.labels = [list(row) for row in labels]
        self.orders = {name: [int(index) for index in order] for name, order in orders.items()}
        self.sort = next(iter(self.orders))

    @traitlets.validate("sort")
    def _known(self, proposal: dict) -> str:
        if proposal["value"] not in self.orders:
            raise traitlets.TraitError(f"There is no order {proposal['value']!r}; there are {', '.join(self.orders)}.")
        return proposal["value"]

    @property
    def order(self) -> list[int]:
        """The masks as they are sorted now."""
        return list(self.orders[self.sort])

    def __repr__(self) -> str:
        return f"MaskGrid({len(self.order)} thumbnails)"
