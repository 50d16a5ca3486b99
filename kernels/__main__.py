"""What would run on this machine, and why: `python -m kernels [--json] [--kernels REQUEST] [--device cpu|cuda]`."""

import argparse
import json
import sys
from dataclasses import asdict

import torch
import triton

from kernels import extension
from kernels.dispatch import Backends
from kernels.op import UserError
from kernels.ops import OPS


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--kernels", default="auto", metavar="REQUEST", help="as for train.py")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="unset: cuda if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="unset: that of training on the device")
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device == "cuda" else "float32"))
    backends = Backends(args.kernels, device=torch.device(device), dtype=dtype)
    for op in OPS:
        for shape in op.cases.values():
            backends.choose(op, *shape)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if args.json:
        known = {"device": asdict(backends.device), "versions": versions, "csrc": extension.facts()}
        print(json.dumps(known | backends.facts()))
        return
    where = backends.device
    arch = f" (compute capability {'.'.join(map(str, where.capability))})" if where.capability else ""
    print(f"{where.name}{arch}, " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print(extension.summary())
    for choice in backends.choices:
        print(choice)
    for op_name, name, why in sorted({(c.op, name, why) for c in backends.choices for name, why in c.others.items()}):
        print(f"{op_name}, {name}: {why}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
