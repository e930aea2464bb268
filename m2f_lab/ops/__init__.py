"""Operations that exist for speed: each one twice, plain (the equation) and fast, under one name.

`with ops.plain():` runs the plain versions, `with ops.plain("deformable_sampling"):` that of one operation. Tests hold
the two together in values and gradients. Imports torch only.
"""

from m2f_lab.ops.deformable_sampling import deformable_sampling
from m2f_lab.ops.memory import checkpointed
from m2f_lab.ops.stochastic_depth import add_branch
from m2f_lab.ops.switch import OPERATIONS, is_plain, plain

__all__ = [
    "OPERATIONS",
    "add_branch",
    "checkpointed",
    "deformable_sampling",
    "is_plain",
    "plain",
]
