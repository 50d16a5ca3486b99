"""Compiles the Triton kernels of ops for a GPU that is not there: `python -m tests.aot [OP ...]` prints an object per kernel.

An op is called forward and backward with real shapes on memory that is never touched; each launch is compiled for sm_90
instead of run. A process of its own, since Triton decides between interpreting and compiling when a kernel is defined.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kernels import dispatch

INSTRUCTIONS = (
    "LDG.E.128", "STG.E.128", "LDG", "STG", "HGMMA", "QGMMA", "UTMALDG", "UTMASTG", "USETMAXREG", "LDL", "STL", "BAR",
)  # fmt: skip


@contextlib.contextmanager
def no_products():
    """Matrix products of real sizes would take minutes on a CPU, and nobody reads them here."""
    honest = torch.Tensor.__matmul__
    torch.Tensor.__matmul__ = lambda a, b: a.new_empty(*a.shape[:-1], b.size(-1))
    try:
        yield
    finally:
        torch.Tensor.__matmul__ = honest


class Driver:
    """Stands for the GPU: says which one it would be, and no more."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


_KNOWN: dict[Any, dict[str, Any]] = {}  # kernel: its facts


@contextlib.contextmanager
def compile_only(capability: int = 90):
    """Inside, a launch compiles for sm_<capability> and does not run. Yields the list of what was compiled."""
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in _KNOWN:  # Triton compiles each specialisation once a process
            _KNOWN[kernel] = describe(self, kernel, log.getvalue())
        compiled.append(_KNOWN[kernel])

    triton.runtime.driver.set_active(Driver(capability))
    JITFunction.run = warm_up
    try:
        # a kernel out of the cache would come without its log
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
            triton.knobs.nvidia.dump_ptxas_log = True
            triton.knobs.compilation.always_compile = True
            yield compiled
    finally:
        JITFunction.run = run


def describe(function: JITFunction, kernel: Any, log: str) -> dict[str, Any]:
    """Facts of one compiled kernel: registers, spills and shared memory in bytes, instruction counts."""
    usage = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not usage or not spills:
        raise RuntimeError(f"no resource usage in the log of {function.__name__}: {log!r}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        sass = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout
    opcodes = Counter()
    for opcode in re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", sass, re.MULTILINE):
        opcodes.update(name for name in INSTRUCTIONS if opcode.startswith(name) or is_wide(opcode, name))
    return {
        "kernel": function.__name__,
        "num_warps": kernel.metadata.num_warps,
        "registers": int(usage[1]),
        "spill_bytes": int(spills[1]) + int(spills[2]),
        "shared_bytes": kernel.metadata.shared,
        "serialized": "wgmma" in log and "serializ" in log,
        "instructions": {name: opcodes[name] for name in INSTRUCTIONS if opcodes[name]},
    }


def is_wide(opcode: str, name: str) -> bool:
    """LDG.E.EF.128 and the like count as LDG.E.128."""
    return name.endswith(".128") and opcode.startswith(name[:3]) and opcode.endswith(".128")


def launches(
    op: dispatch.Op, shape: tuple[int, ...], dtype: torch.dtype, form: str, capability: int
) -> list[dict[str, Any]]:
    """What forward and backward of one form would launch."""

    def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=dtype.is_floating_point)

    with compile_only(capability) as compiled, no_products():
        outputs = op.backends["triton"](**op.forms[form](make, *shape))
        outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None]
        wanted = [t for t in outputs if t.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.empty_like(t) for t in wanted])
    return compiled


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.aot", description=__doc__)
    parser.add_argument("ops", nargs="*", help="unset: all")
    parser.add_argument("--capability", type=int, default=90, help="one a process: Triton keeps its first target")
    parser.add_argument("--case", help="only this one")
    args = parser.parse_args(argv)
    assert not dispatch.interpreted(), "unset TRITON_INTERPRET"
    dispatch.COMPILED_FOR = divmod(args.capability, 10)
    for name, op in dispatch.ops().items():
        if "triton" not in op.backends or (args.ops and name not in args.ops):
            continue
        for i, (case, shape) in enumerate(op.cases.items()):
            if args.case not in (None, case):
                continue
            for form in op.forms:
                for dtype in (torch.bfloat16, torch.float32)[: 1 if i else 2]:  # the tracks train in bf16
                    for facts in launches(op, shape, dtype, form, args.capability):
                        where = {"op": name, "case": case, "shape": shape, "form": form, "dtype": str(dtype)[6:]}
                        print(json.dumps(where | facts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
