"""Deformable sampling without atomics: every weighted bilinear sum is a weighted bag of rows.

B batch, S cells of all levels, Q positions, L levels, P points per head and level, D channels of a head, H/W
height/width of a level, N = Q * heads.

One position and head sums L * P points, each a bilinear mean of four cells: 4 * L * P rows of a table, weighted. That
is what `embedding_bag` computes in one pass, without storing the rows it reads. Three ideas make the rest cheap:

- A canvas with a border. The levels lie below each other on one canvas of zeros, a cell apart. A location outside the
  image is moved onto the border, reads zeros there, and needs no case of its own. As the levels share one pitch, the
  four corners of any point are the row of the first plus 0, 1, pitch and pitch + 1.
- The gradient of the values is a sum of bags, too. Points are sorted by the cell of their first corner; each cell then
  sums the output gradients of its points, corner by corner. Nothing is scattered.
- The gradients of locations and weights follow from one dot product of value and output gradient for every corner.

Images are done one after the other, which keeps temporaries small and in cache; backward finds cells and shares again
instead of keeping them. Made for CPUs; as sums have a fixed order, it serves CUDA where that is asked for.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

with warnings.catch_warnings():  # torch says once per process that CSR tensors are in beta; here they are tested
    warnings.simplefilter("ignore")
    torch.zeros(1, 1).to_sparse_csr()


def sample_by_bags(values: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """`deformable_sampling` on a CPU, or in a fixed order. Half precision is read as it is and summed in float32."""
    return BagSampling.apply(values, locations, weights, level_sizes)


class BagSampling(torch.autograd.Function):
    """Reads and sums the bags of every image."""

    @staticmethod
    def forward(ctx, values: Tensor, locations: Tensor, weights: Tensor, level_sizes: list[tuple[int, int]]) -> Tensor:
        ctx.save_for_backward(values, locations, weights)
        ctx.level_sizes = level_sizes
        canvas = Canvas(level_sizes, weights.shape[2], weights.shape[4], accumulated_as(values), values.device)
        output = values.new_empty(*weights.shape[:3], values.shape[3])
        for value, location, weight, total in zip(values, locations, weights, output, strict=True):
            cells, fractions = canvas.place(canvas.pixels(location))
            shares = corner_shares(fractions, weight.flatten(2).flatten(0, 1).to(canvas.dtype))
            bags = F.embedding_bag(
                canvas.rows(cells), canvas.paint(value), mode="sum", per_sample_weights=shares.flatten(1)
            )  # (N, D)
            total.copy_(bags.view_as(total))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, locations, weights = ctx.saved_tensors
        canvas = Canvas(ctx.level_sizes, weights.shape[2], weights.shape[4], accumulated_as(values), values.device)
        grads = torch.empty_like(values), torch.empty_like(locations), torch.empty_like(weights)
        for value, location, weight, grad, value_grad, location_grad, weight_grad in zip(
            values, locations, weights, output_grad, *grads, strict=True
        ):
            pixels = canvas.pixels(location)
            cells, fractions = canvas.place(pixels)
            weight = weight.flatten(2).flatten(0, 1).to(canvas.dtype)  # (N, L * P)
            grad = grad.flatten(0, 1).to(canvas.dtype)  # (N, D)

            right, below = fractions.unbind(2)
            dots = corner_dots(canvas.rows(cells), canvas.paint(value), grad).unflatten(1, (2, 2, -1))
            slopes = dots[:, :, 1] - dots[:, :, 0]  # along x, in the upper and in the lower row
            upper, lower = torch.addcmul(dots[:, :, 0], slopes, right[:, None]).unbind(1)
            along_x = torch.lerp(slopes[:, 0], slopes[:, 1], below)
            along_y = lower - upper
            weight_grad.copy_(torch.addcmul(upper, along_y, below).view_as(weight_grad))
            pixel_grad = torch.stack([along_x * weight, along_y * weight], dim=2)  # (N, L * P, 2)
            location_grad.copy_(canvas.location_grad(pixel_grad, pixels).view_as(location_grad))

            table_grad = canvas.table_grad(cells, fractions, weight, grad)
            for part, level in zip(canvas.split(value_grad), canvas.levels(table_grad), strict=True):
                part.copy_(level)
        return *grads, None


class Canvas:
    """Layout of the cells of all levels in one table of rows, [heads * height * pitch, D]; one image at a time."""

    def __init__(
        self, level_sizes: list[tuple[int, int]], heads: int, points: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.level_sizes, self.heads, self.dtype = level_sizes, heads, dtype
        self.pitch = max(w for _, w in level_sizes) + 1  # a row's border on the right is the next one's on the left
        self.tops = [sum(h + 1 for h, _ in level_sizes[:i]) for i in range(len(level_sizes))]  # of the borders
        self.height = sum(h + 1 for h, _ in level_sizes) + 2
        self.corners = (0, 1, self.pitch, self.pitch + 1)
        # Rows of the table that can be a first corner, so that all four are there.
        self.num_cells = heads * self.height * self.pitch - self.corners[-1]
        self.extent = torch.tensor([(w, h) for h, w in level_sizes], dtype=dtype, device=device)
        self.extent = self.extent.repeat_interleave(points, dim=0)
        planes = torch.arange(heads, dtype=torch.int32, device=device) * (self.height * self.pitch)
        tops = torch.tensor(self.tops, dtype=torch.int32, device=device) * self.pitch
        self.origins = planes[:, None] + tops.repeat_interleave(points)  # (heads, L * P)

    def levels(self, table: Tensor) -> list[Tensor]:
        """Views of the levels within their borders. [H, W, heads, D]"""
        planes = table.unflatten(0, (self.heads, self.height, self.pitch))
        return [
            planes[:, top + 1 : top + 1 + height, 1 : 1 + width].permute(1, 2, 0, 3)
            for top, (height, width) in zip(self.tops, self.level_sizes, strict=True)
        ]

    def split(self, values: Tensor) -> list[Tensor]:
        """Views of the levels in the values [S, heads, D] of an image. [H, W, heads, D]"""
        parts = values.split([h * w for h, w in self.level_sizes])
        return [part.unflatten(0, size) for part, size in zip(parts, self.level_sizes, strict=True)]

    def paint(self, values: Tensor) -> Tensor:
        """The table of an image's values [S, heads, D]."""
        table = values.new_zeros(self.heads * self.height * self.pitch, values.shape[2], dtype=self.dtype)
        for level, value in zip(self.levels(table), self.split(values), strict=True):
            level.copy_(value)
        return table

    def pixels(self, locations: Tensor) -> Tensor:
        """Locations [Q, heads, L, P, 2] in cells, 0 in the middle of the border's first. [Q, heads, L * P, 2]"""
        return torch.addcmul(self.extent.new_tensor(0.5), locations.flatten(2, 3).to(self.dtype), self.extent)

    def place(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the first of a point's four corners, int32 [N, L * P], and how far right and below it lies."""
        pixels = pixels.clamp(torch.zeros_like(self.extent), self.extent + 1)
        corner = pixels.floor()
        cells = torch.add(corner[..., 0], corner[..., 1], alpha=self.pitch).int().add_(self.origins)
        # The end of the last border lacks corners: a cell before it reads the same zeros. NaN locations give NaN;
        # clamping keeps the index in bounds.
        cells.clamp_(0, self.num_cells - 1)
        return cells.flatten(0, 1), pixels.sub_(corner).flatten(0, 1)

    def rows(self, cells: Tensor) -> Tensor:
        """The rows of all four corners, top left, top right, bottom left, bottom right. [N, 4 * L * P]"""
        return (cells[:, None] + cells.new_tensor(self.corners)[:, None]).flatten(1)

    def location_grad(self, pixel_grad: Tensor, pixels: Tensor) -> Tensor:
        """From the gradient by pixel [N, L * P, 2]; where the border was moved to, nothing changes."""
        inside = (pixels >= 0) & (pixels < self.extent + 1)
        return pixel_grad.mul_(inside.flatten(0, 1)).mul_(self.extent)

    def table_grad(self, cells: Tensor, fractions: Tensor, weights: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the table from that of the output, [N, D]."""
        points = cells.shape[1]
        cells = cells.flatten()
        order = cells.argsort(stable=cells.is_cuda)  # as they come, where any order could come
        ends = torch.bincount(cells, minlength=self.num_cells).cumsum(0)
        starts = F.pad(ends[:-1], (1, 0))
        bags = order // points  # the row of `grad` of every point
        shares = corner_shares(F.embedding(order, fractions.flatten(0, 1))[None], weights.flatten()[order][None])[0]
        table_grad = grad.new_zeros(self.num_cells + self.corners[-1], grad.shape[1])
        for corner, share in zip(self.corners, shares, strict=True):
            sums = F.embedding_bag(bags, grad, starts, mode="sum", per_sample_weights=share)
            table_grad[corner : corner + self.num_cells] += sums
        return table_grad


def corner_shares(fractions: Tensor, weights: Tensor) -> Tensor:
    """Share of each of a point's four corners, from fractions [N, M, 2] and weights [N, M]. [N, 4, M]"""
    right, below = fractions.unbind(2)
    lower = weights * below
    rows = torch.stack([weights - lower, lower], dim=1)
    columns = torch.stack([1 - right, right], dim=1)
    return (rows[:, :, None] * columns[:, None]).flatten(1, 2)


def corner_dots(rows: Tensor, table: Tensor, grad: Tensor) -> Tensor:
    """The dot product of the n-th output gradient with every row of the n-th bag. [N, 4 * L * P]"""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    pattern = torch.sparse_csr_tensor(
        starts, rows.flatten(), table.new_zeros(rows.numel()), (len(rows), len(table)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, grad, table.t(), beta=0).values().view(rows.shape)


def accumulated_as(values: Tensor) -> torch.dtype:
    """The type to compute in."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32
