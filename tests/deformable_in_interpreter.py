"""Run the Triton kernels on the CPU, in Triton's interpreter: python deformable_in_interpreter.py CASES RESULTS.

CASES is a file of torch.save: a dict of (level_sizes, values, locations, weights, output_grad). RESULTS gets the output
and the gradients of values, locations and weights of each. A process of its own, because Triton decides at import
whether it interprets.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from m2f_lab.ops.deformable_kernel import sample_by_kernel


def main() -> None:
    results = {}
    for name, (level_sizes, values, locations, weights, output_grad) in torch.load(sys.argv[1]).items():
        inputs = [x.requires_grad_() for x in (values, locations, weights)]
        output = sample_by_kernel(values, level_sizes, locations, weights)
        results[name] = [output.detach(), *torch.autograd.grad(output, inputs, output_grad)]
    torch.save(results, sys.argv[2])


if __name__ == "__main__":
    main()
