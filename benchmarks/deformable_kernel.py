"""Registers and instructions of the kernels of deformable attention, compiled for GPUs that need not be there.

    python -m benchmarks.deformable_kernel

One layer of the published models: 8 heads of 32 channels, 3 levels, 4 points; offsets and scores in float32. Triton and
its ptxas compile, the nvdisasm that comes with them reads. Counted is what one warp executes, loops as often as they
run, over the rows (positions and heads) that a warp computes.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.report import Table
from m2f_lab.ops.deformable_kernel import rows_of, sum_points, sum_points_backward

CAPABILITIES = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class Shape:
    """Architecture that a kernel is compiled for."""

    heads: int = 8
    dim: int = 32
    levels: int = 3
    points: int = 4


PUBLISHED = Shape()


@dataclass(frozen=True)
class Cost:
    """Resources of a compiled kernel.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's registers kept in memory, and of its stack.
        shared: bytes of shared memory of a program.
        instructions: executed by a warp, for each row that it computes.
        operations: how often each instruction stands in the listing.
    """

    registers: int
    spilled: int
    shared: int
    instructions: float
    operations: Counter[str]


def cost(
    backward: bool, capability: int, dtype: torch.dtype, shape: Shape = PUBLISHED, config: int = 0, maps: str = "*fp32"
) -> Cost:
    """Compile one of the kernels and read what came out.

    Args:
        backward: the gradients' kernel rather than the sum's.
        capability: compute capability of the GPU, times ten.
        dtype: of the values.
        shape: of the model.
        config: place of the configuration among those that are tried on a device.
        maps: Triton's name for the type of offsets and scores.
    """
    tuner = sum_points_backward if backward else sum_points
    chosen = tuner.configs[config]
    wide = max(8, triton.next_power_of_2(shape.dim))
    constants = dict(
        HEADS=shape.heads, DIM=shape.dim, LEVELS=shape.levels, POINTS=shape.points, WIDE=wide,
        PADDED=triton.next_power_of_2(shape.levels * shape.points), **chosen.kwargs,
    )  # fmt: skip
    if backward:
        constants |= dict(SPREAD=capability < 90)
    else:
        constants |= dict(VECTOR=16 // dtype.itemsize)
    kernel = tuner.fn
    names = [parameter.name for parameter in kernel.params]
    types = dict.fromkeys(("values", "output", "output_grad"), TYPES[dtype]) | dict(levels="*i32", S="i32", Q="i32")
    types |= dict.fromkeys(("centres", "values_grad"), "*fp32") | dict(MARGIN="i32")
    signature = {name: "constexpr" if name in constants else types.get(name, maps) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=chosen.num_warps)
    )
    executed, operations, registers, spilled = read_binary(compiled.asm["cubin"], loops=shape.levels)
    rows = rows_of(constants, wide) / chosen.num_warps
    return Cost(registers, spilled, compiled.metadata.shared, executed / rows, operations)


def read_binary(cubin: bytes, loops: int) -> tuple[int, Counter[str], int, int]:
    """Instructions executed, how often each is listed, registers, and bytes spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run("cuobjdump", "-res-usage", file.name)
        listing = run("nvdisasm", "-c", file.name)
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    executed, operations = executed_instructions(listing, loops)
    return executed, operations, numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def run(tool: str, *arguments: str) -> str:
    """Output of one of the tools that come with Triton."""
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def executed_instructions(listing: str, loops: int) -> tuple[int, Counter[str]]:
    """Instructions that a warp executes, and how often each is listed.

    A jump back is a loop, and every loop runs as often as there are levels. Jumps forward are counted as not taken.
    What fills up the end (NOP, a jump to itself) is not counted.
    """
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", line):
            instructions.append(instruction[1])
    names = [instruction.split()[0] for instruction in instructions]
    times = [int(name != "NOP") for name in names]
    for i, instruction in enumerate(instructions):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", instruction)
        begin = labels[target[1]] if target else len(instructions)
        if begin == i:
            times[i] = 0
        for inside in range(begin, i + 1) if begin < i else ():
            times[inside] *= loops
    return sum(times), Counter(names)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="two GPUs and one type")
    small = parser.parse_args(arguments).small
    columns = ("kernel", "sm", "configuration", "registers", "spilled bytes", "shared bytes", "instructions per row")
    table = Table("deformable_kernel", columns)
    for backward, tuner in ((False, sum_points), (True, sum_points_backward)):
        for dtype in DTYPES[:1] if small else DTYPES:
            for capability in (80, 90) if small else CAPABILITIES:
                found = cost(backward, capability, dtype)
                name = f"{'backward' if backward else 'forward'}, {str(dtype).removeprefix('torch.')}"
                config = ", ".join(f"{value} {key.lower()}" for key, value in tuner.configs[0].kwargs.items())
                numbers = (found.registers, found.spilled, found.shared)
                table.add(name, str(capability), config, *map(str, numbers), f"{found.instructions:.0f}")
    table.finish()


if __name__ == "__main__":
    main()
