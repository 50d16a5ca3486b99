"""Runs every kernel of csrc/, in the emulated module that is its argument, on tensors of their exact sizes.

Built with AddressSanitizer, which then ends this process at the first access beyond a tensor: test_emulation.py.
"""

import os
import sys

os.environ["REDLINE_EMULATE"] = "1"
sys.path.insert(0, os.getcwd())

import torch  # noqa: E402

from bench.law import named  # noqa: E402
from csrc import build  # noqa: E402
from kernels import extension  # noqa: E402
from kernels.ops import OPS  # noqa: E402

SHAPES = {
    2: [(3, 40), (5, 33), (1, 600), (6, 8), (2, 1100)],  # M, N
    3: [(2, 16, 24), (1, 13, 20), (2, 300, 24), (1, 35, 1030), (35, 16, 48)],
    1: [(1,), (7,), (2048,), (2049,), (5000,)],
}


def make(*size, dtype=torch.float32):
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype)
    return torch.randn(size).to(dtype).requires_grad_()


def main(path):
    module = build.load(path, "_emulated")
    extension.module = lambda device: module
    for op in OPS:
        if "cuda" not in op.backends:
            continue
        call, ran = op.backends["cuda"], 0
        for shape in SHAPES[len(op.dims)]:
            for dtype in (torch.bfloat16, torch.float32):
                if op.obstacle("cuda", shape, dtype, extension.Device("cpu", "cpu", None)):
                    continue
                for form in op.forms.values():
                    outputs = call(**form(lambda *size, dtype=dtype: make(*size, dtype=dtype), *shape))
                    wanted = [t for t in named(outputs).values() if t.requires_grad]
                    if wanted:
                        torch.autograd.backward(wanted, [torch.randn_like(t) for t in wanted])
                    ran += 1
        assert ran, op.name
    print("every kernel stayed within")


if __name__ == "__main__":
    main(sys.argv[1])
