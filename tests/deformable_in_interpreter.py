"""Run the Triton kernels on the CPU, in Triton's interpreter: python deformable_in_interpreter.py CASES RESULTS.

CASES is a file of torch.save: a dict of (level_sizes, values, centres, offsets, scores, output_grad). RESULTS gets, for
each case and for both ways to add up the gradient of the values, the output and the gradients of values, offsets and
scores. A process of its own, because Triton decides at import whether it interprets.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from m2f_lab.ops import deformable_kernel
from m2f_lab.ops.deformable_kernel import sample_by_kernel


def main() -> None:
    results = {}
    for vectors in (True, False):
        deformable_kernel.adds_vectors = lambda device, answer=vectors: answer
        for name, (level_sizes, values, centres, offsets, scores, output_grad) in torch.load(sys.argv[1]).items():
            inputs = [x.detach().requires_grad_() for x in (values, offsets, scores)]
            output = sample_by_kernel(inputs[0], level_sizes, centres, *inputs[1:])
            grads = torch.autograd.grad(output, inputs, output_grad)
            results[name, vectors] = [output.detach(), *grads]
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
