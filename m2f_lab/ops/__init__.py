"""Operations that exist for speed: those of `OPERATIONS` twice, plain (the equation) and fast, under one name.

`with ops.plain():` runs the plain versions, `with ops.plain("deformable_sampling"):` that of one operation. Tests hold
the two together in values and gradients. Imports torch only.
"""

from m2f_lab.ops.at_once import images_at_once
from m2f_lab.ops.deformable_sampling import SamplingPlan, deformable_sampling
from m2f_lab.ops.kept import kept
from m2f_lab.ops.linear_map import Linear, linear, products, replace_linears
from m2f_lab.ops.mask_costs import mask_costs
from m2f_lab.ops.mask_losses import PairGroup, at_chosen_points, check_shape, compare_pairs, mask_and_dice, with_pairs
from m2f_lab.ops.memory import checkpointed
from m2f_lab.ops.point_sampling import PointSampler, sample_points, sample_segments
from m2f_lab.ops.selection import select_uncertain
from m2f_lab.ops.stochastic_depth import add_branch
from m2f_lab.ops.switch import OPERATIONS, is_plain, plain
from m2f_lab.ops.transfer import to_cpu, to_device
from m2f_lab.ops.weight_copies import autocast, copy_of, for_products, weight_copies
from m2f_lab.ops.windows import cut_windows, merge_windows, shift_mask, window_attention

__all__ = [
    "OPERATIONS",
    "Linear",
    "PairGroup",
    "PointSampler",
    "SamplingPlan",
    "add_branch",
    "at_chosen_points",
    "autocast",
    "check_shape",
    "checkpointed",
    "compare_pairs",
    "copy_of",
    "cut_windows",
    "deformable_sampling",
    "for_products",
    "images_at_once",
    "is_plain",
    "kept",
    "linear",
    "mask_and_dice",
    "mask_costs",
    "merge_windows",
    "plain",
    "products",
    "replace_linears",
    "sample_points",
    "sample_segments",
    "select_uncertain",
    "shift_mask",
    "to_cpu",
    "to_device",
    "weight_copies",
    "window_attention",
    "with_pairs",
]
