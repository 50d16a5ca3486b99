"""Compile the Triton kernels of ops for GPUs that are not there: `python -m bench.aot [OP@CAPABILITY ...]`.

An op is called forward and backward with real shapes on memory that is never touched; each launch is compiled instead
of run. For sm_90 that is every case, for other GPUs one (`cases`). Each OP@CAPABILITY is a process of its own, since
Triton keeps its first target, as many at a time as there are cores. Prints an object for each as it ends: {"op",
"capability", "error", "kernels"}; kernels has the facts of every launch in order, error says why something does not
compile, and is null otherwise.
"""

import argparse
import bisect
import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels.op
from bench.kernel_model import LIBRARY, traffic
from bench.law import named
from csrc import build
from kernels import gemm, lm_head_loss
from kernels.ops import BY_NAME

MAIN = 90  # the capability that everything is compiled for
LEAST = {
    ("rms_norm", "mix_fp8"): 89,
    ("rms_norm", "mix3_fp8"): 89,
    ("lm_head_loss", "fp8"): 89,
    ("fp8_linear", "plain"): 89,
    ("fp8_linear", "delayed"): 89,
    ("fp8_mlp", "sum"): 89,
    ("quantise_weight", "plain"): 89,
}  # form of an op: least capability, Triton has no e4m3 below
# forms whose kernels are all among those of the op's others, or of fp8_mlp
KNOWN = {("fp8_linear", "sum"), ("fp8_linear", "given"), ("fp8_linear", "transposed"), ("fp8_mlp", "plain")}
TENSOR = re.compile(r"(UTC)?[BDHIOQ]G?MMA")  # Ampere and sm_120 HMMA, QMMA; sm_90 HGMMA, QGMMA; sm_100 UTCHMMA, UTCQMMA
BULK = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED")
ACCESSES = ("LDG", "LDGSTS", "STG")  # .E.128 is counted beside them, for 16 bytes or more
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
OTHERS = ("USETMAXREG", "LDL", "STL", "BAR", *ATOMICS)


def environment() -> dict[str, str]:
    """Of a process that compiles, also when this one interprets."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # the default of fused multiply-add changes in Triton 3.10
    return env | {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@contextlib.contextmanager
def no_products(seen: list[dict[str, Any]]):
    """Matrix products of real sizes would take minutes on a CPU, and nobody reads them here, nor largest sizes. Notes
    both by what they cost."""
    honest_product, honest_norm = gemm.add_product, torch.linalg.vector_norm
    honest, users = (torch.Tensor.__matmul__, torch.mm), (gemm, lm_head_loss)

    def add_product(a, b, total, add=True):
        mm(a.T, b)

    def mm(a, b, *, out=None):
        sizes = (math.prod(a.shape[:-2]), a.size(-2), b.size(-1), a.size(-1))
        seen.append({"kernel": LIBRARY, "product": (*sizes, a.itemsize)})
        return a.new_empty(*a.shape[:-1], b.size(-1)) if out is None else out

    def vector_norm(t, *, ord, dim=None):
        seen.append({"kernel": LIBRARY, "bytes": t.nbytes})
        return t.new_empty(t.shape[: t.dim() - len(dim)] if dim else ())

    torch.Tensor.__matmul__ = torch.mm = mm
    torch.linalg.vector_norm = vector_norm
    for module in users:
        module.add_product = add_product
    try:
        yield
    finally:
        torch.Tensor.__matmul__, torch.mm = honest
        torch.linalg.vector_norm = honest_norm
        for module in users:
            module.add_product = honest_product


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
def compile_only(capability: int = MAIN):
    """Inside, a launch compiles for sm_<capability> and does not run. Yields the list of what was compiled.

    Its facts are those that the compiler tells, and the code itself as "cubin", for `with_instructions`.
    """
    compiled: list[dict[str, Any]] = []
    run = JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        given = dict(zip(self.arg_names, args)) | {name: v for name, v in kwargs.items() if name in self.arg_names}
        here = {
            "programs": math.prod(grid),
            "bytes": traffic(given),
            "itemsize": next((t.itemsize for t in operands(given)), 0),
            "arguments": {name: int(v) for name, v in given.items() if isinstance(v, (int, bool))},
        }
        if kernel not in _KNOWN:  # Triton compiles each specialisation once a process
            _KNOWN[kernel] = {
                "kernel": self.__name__,
                "variant": len(_KNOWN),
                "num_warps": kernel.metadata.num_warps,
                "shared_bytes": kernel.metadata.shared,
                "tensor_memory": kernel.metadata.tmem_size or 0,  # columns, of 512
                "cubin": kernel.asm["cubin"],
                **read_log(self.__name__, log.getvalue()),
            }
        compiled.append(_KNOWN[kernel] | here)

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


def operands(given: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors of a launch, those of descriptors first."""
    described = [t.base for t in given.values() if isinstance(t, TensorDescriptor)]
    return described + [t for t in given.values() if isinstance(t, torch.Tensor)]


def with_instructions(compiled: Sequence[dict[str, Any]], capability: int = MAIN) -> list[dict[str, Any]]:
    """What `compile_only` yielded, with instruction counts and the length of the loop in place of the code."""
    code = {f["variant"]: next(iter(sections(f["cubin"]).values())) for f in compiled if "cubin" in f}
    read = dict(zip(code, map(read_sass, disassemble(list(code.values()), capability))))
    return [{k: v for k, v in f.items() if k != "cubin"} | read.get(f.get("variant"), {}) for f in compiled]


def sections(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel in an ELF file [System V ABI, gABI 4.1, section header table]."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length in headers:
        start = headers[names][4] + name
        title = cubin[start : cubin.index(b"\0", start)].decode()
        if title.startswith(".text."):
            found[title.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def disassemble(kernels: Sequence[bytes], capability: int) -> list[str]:
    """The instructions of each kernel, a line each, with the address of each branch's target.

    All in one call: nvdisasm takes 0.3 s to start and 10 ms a kernel.
    """
    if not kernels:
        return []
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    # wgmma, tcgen05 and their like are of the architecture's own set, which "a" stands for
    binary = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(kernels))
        file.flush()
        command = [tool, "--binary", binary, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    starts = [0, *itertools.accumulate(map(len, kernels))]
    parts: list[list[str]] = [[] for _ in kernels]
    for line in text.splitlines():
        if found := _LINE.match(line):
            parts[bisect.bisect(starts, int(found["address"], 16)) - 1].append(line)
    return ["\n".join(part) for part in parts]


def read_log(name: str, log: str) -> dict[str, Any]:
    """What ptxas says of a kernel."""
    usage = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)  # of functions it calls too
    if not usage or not spills:
        raise RuntimeError(f"no resource usage in the log of {name}: {log!r}")
    return {
        "registers": int(usage[1]),
        "spill_bytes": sum(int(stores) + int(loads) for stores, loads in spills),
        "serialized": "wgmma" in log and "serializ" in log,
    }


_LINE = re.compile(r"\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<guard>@!?U?P\w+ )?\s*(?P<opcode>[A-Z][\w.]*)(?P<rest>.*)")


def read_sass(sass: str) -> dict[str, Any]:
    """Instruction counts and the length of the loop that matters, of one kernel as `disassemble` gives it."""
    lines = [found for line in sass.splitlines() if (found := _LINE.match(line))]
    index = {int(line["address"], 16): i for i, line in enumerate(lines)}
    opcodes = [line["opcode"] for line in lines]
    ends: list[int] = []  # where control does not go on to the next instruction
    backward: list[tuple[int, int]] = []
    skips: list[tuple[int, int]] = []  # what a branch may leave out
    for here, line in enumerate(lines):
        # the disassembler of Triton 3.6 writes notes behind the target: "0x200   &req={1}   ?trans10;"
        target = re.search(r"\b0x([0-9a-f]+)\b", line["rest"])
        if line["opcode"].startswith("BRA") and target:
            there = index.get(int(target[1], 16), len(lines))
            (backward if there <= here else skips).append((min(there, here), max(there, here)))
        if line["opcode"].startswith(("EXIT", "RET")) and not line["guard"]:
            ends.append(here)
    counts: Counter[str] = Counter()
    for opcode in opcodes:
        base, *modifiers = opcode.split(".")
        if base in ACCESSES or base in BULK or base in OTHERS or TENSOR.fullmatch(base):
            counts[base] += 1
        if base in ACCESSES and not {"128", "256"}.isdisjoint(modifiers):
            counts[f"{base}.E.128"] += 1
    (start, end), (first, last) = the_loop(opcodes, backward, ends)
    facts = {"loop": end - start + 1, "epilogue": 0, "flat": False}
    if last > end:
        facts["epilogue"] = (last - first) - (end - start)
    elif any(TENSOR.fullmatch(op.split(".")[0]) for op in opcodes[start : end + 1]):
        # in a flattened loop the epilogue is what steps without one leave out
        inside = [(a, b) for a, b in skips if start <= a and b <= end]
        plain = [(a, b) for a, b in inside if not any(TENSOR.fullmatch(op.split(".")[0]) for op in opcodes[a:b])]
        facts["epilogue"] = max((b - a - 1 for a, b in plain), default=0)
        facts["flat"] = True
    # padding follows a branch to itself
    facts["length"] = min((a for a, b in backward if a == b), default=len(opcodes))
    return {"instructions": dict(sorted(counts.items()))} | facts


def the_loop(
    opcodes: Sequence[str], backward: Sequence[tuple[int, int]], ends: Sequence[int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last instruction of the innermost loop with the most tensor-core instructions; without any, of the
    longest innermost one. Then of the loop around it, or the same again: of a persistent product, over its tiles.

    Not loops: a way back from code that stands after the kernel's end, where slow paths are moved to; waiting at a
    barrier.
    """

    def products(loop: tuple[int, int]) -> int:
        return sum(bool(TENSOR.fullmatch(op.split(".")[0])) for op in opcodes[loop[0] : loop[1] + 1])

    def waits(loop: tuple[int, int]) -> bool:
        body = opcodes[loop[0] : loop[1] + 1]
        return len(body) <= 4 and not products(loop) and any(op.endswith("TRYWAIT") for op in body)

    loops = {loop for loop in backward if loop[0] < loop[1] and not any(loop[0] <= end < loop[1] for end in ends)}
    loops = {loop for loop in loops if not waits(loop)}
    loops = {loop for loop in loops if products(loop)} or loops
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    start, end = max(inner, key=lambda loop: (products(loop), loop[1] - loop[0]), default=(0, -1))
    around = [(a, b) for a, b in loops if (a, b) != (start, end) and a <= start and end <= b]
    return (start, end), min(around, key=lambda loop: loop[1] - loop[0], default=(start, end))


def launches(
    op: kernels.op.Op, shape: tuple[int, ...], dtype: torch.dtype, form: str, capability: int
) -> list[dict[str, Any]]:
    """What forward and backward of one form would launch."""

    def make(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=dtype.is_floating_point)

    inputs = op.forms[form](make, *shape)  # whose copies in fp8 are not the op's work
    with compile_only(capability) as compiled, no_products(compiled):
        outputs = op.backends["triton"](**inputs)
        forward = len(compiled)
        wanted = [t for t in named(outputs).values() if t.requires_grad]
        if wanted:
            torch.autograd.backward(wanted, [torch.empty_like(t) for t in wanted])
    return [facts | {"backward": i >= forward} for i, facts in enumerate(compiled)]


def cases(op: kernels.op.Op, capability: int) -> list[tuple[str, torch.dtype]]:
    """Cases and dtypes to compile: all in bf16, which the tracks train in, and the first in fp32 if the op takes it.

    Elsewhere than on sm_90 only the last of depth 24.
    """
    if capability != MAIN:
        deep = [case for case in op.cases if "depth 24" in case] or list(op.cases)
        return [(deep[-1], torch.bfloat16)]
    found = [(next(iter(op.cases)), torch.float32), *((case, torch.bfloat16) for case in op.cases)]
    limits = op.backends["triton"].limits
    return [(case, dtype) for case, dtype in found if limits(op.cases[case], dtype) is None]


def forms(op: kernels.op.Op, capability: int) -> list[str]:
    """Those to compile: that the GPU has the types for, with kernels of their own."""
    return [f for f in op.forms if capability >= LEAST.get((op.name, f), 0) and (op.name, f) not in KNOWN]


def compile_op(name: str, capability: int, file: Path, log: Path) -> None:
    """Runs in a process of its own."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    kernels.op.COMPILED_FOR = divmod(capability, 10)
    op, found = BY_NAME[name], []
    for case, dtype in cases(op, capability):
        for form in forms(op, capability):
            where = {"op": name, "capability": capability, "case": case, "shape": op.cases[case], "form": form}
            for facts in launches(op, op.cases[case], dtype, form, capability):
                found.append(where | {"dtype": str(dtype).removeprefix("torch.")} | facts)
    file.write_text(json.dumps(with_instructions(found, capability)))


def compile_cuda(source: Path, nvcc: build.Nvcc) -> list[dict[str, Any]]:
    """The same facts of the kernels of a .cu file, for sm_90a, by the kernels' names.

    A case is nvcc's release. Unknown are what a launch adds of shared memory, and without __launch_bounds__ the warps.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        compiler = [f"-ccbin={found}"] if (found := build.host_compiler()) else []
        options = [*build.CUDA_FLAGS, *compiler, "-arch=sm_90a", "-cubin", "-Xptxas=-v", "-keep", "-keep-dir", folder]
        done = subprocess.run([nvcc.path, *options, "-o", cubin, source], capture_output=True, text=True)
        if done.returncode:
            raise build.BuildError(f"nvcc: {(done.stderr + done.stdout).strip()}")
        ptx = "".join(file.read_text() for file in Path(folder).glob("*.ptx"))
        code = sections(cubin.read_bytes())
    sass = dict(zip(code, disassemble(list(code.values()), MAIN)))
    logs = {part.split("'")[0]: part for part in done.stderr.split("Compiling entry function '")[1:]}
    where = {"op": f"csrc/{source.name}", "capability": MAIN, "case": f"nvcc {nvcc.release}", "form": "", "dtype": ""}
    rows = []
    for name, log in logs.items():
        entry = rf"\.entry {re.escape(name)}\([^)]*\)[^{{]*"
        threads = re.search(entry + r"\.(?:maxntid|reqntid) (\d+)(?:, *(\d+))?(?:, *(\d+))?", ptx)
        shared = re.search(r"(\d+) bytes smem", log)
        sizes = {
            "num_warps": -(-math.prod(int(n or 1) for n in threads.groups()) // 32) if threads else 0,
            "shared_bytes": int(shared[1]) if shared else 0,
            "tensor_memory": 0,
        }
        rows.append(where | sizes | read_log(name, log) | read_sass(sass[name]))
    names = demangled(list(logs))
    # one name may stand for two kernels, of two namespaces
    order = sorted(range(len(rows)), key=lambda i: (names[i], list(logs)[i]))
    return [{"kernel": names[i], "variant": n} | rows[i] for n, i in enumerate(order)]


def demangled(symbols: Sequence[str]) -> list[str]:
    """Kernels as their source calls them, such as forward<bf16, 8, true>: no namespaces, parameters or return type."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [short_name(name) for name in text.splitlines()]


def short_name(signature: str) -> str:
    """`void redline::(anonymous namespace)::forward<__nv_bfloat16, 8>(float*)` is forward<bf16, 8>."""
    name = signature.replace("(anonymous namespace)::", "").replace("> >", ">>")
    for long, short in (("__nv_bfloat16", "bf16"), ("__nv_fp8_e4m3", "e4m3"), ("__nv_fp8_e5m2", "e5m2")):
        name = name.replace(long, short)
    name = re.sub(r"\b(?:\w+::)+(?=\w)", "", name)
    depths = itertools.accumulate({"<": 1, ">": -1}.get(c, 0) for c in name)
    end = next((i for i, (c, depth) in enumerate(zip(name, depths)) if c == "(" and not depth), len(name))
    head, bracket, arguments = name[:end].partition("<")
    return head.split(" ")[-1] + bracket + arguments  # templates have their return type in front


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="OP@CAPABILITY", help=f"unset: every op for {MAIN}")
    args = parser.parse_args(argv)
    assert not kernels.op.interpreted(), "unset TRITON_INTERPRET"
    tasks = [task.split("@") for task in args.tasks]
    tasks = tasks or [[name, MAIN] for name, op in BY_NAME.items() if "triton" in op.backends]
    # forked, so that torch and Triton are imported once; nothing here has asked Triton for its target
    fork, running = multiprocessing.get_context("fork"), {}
    with tempfile.TemporaryDirectory() as folder:
        while tasks or running:
            while tasks and len(running) < (os.cpu_count() or 1):
                name, capability = tasks.pop(0)
                file, log = (Path(folder) / f"{name}@{capability}.{end}" for end in ("json", "log"))
                process = fork.Process(target=compile_op, args=(name, int(capability), file, log))
                process.start()
                running[process.sentinel] = process, {"op": name, "capability": int(capability)}, file, log
            for sentinel in wait(list(running)):
                process, task, file, log = running.pop(sentinel)
                process.join()
                failed = process.exitcode != 0
                error = f"exit status {process.exitcode}: {log.read_text()[-3000:].strip()}" if failed else None
                print(json.dumps(task | {"error": error, "kernels": [] if failed else json.loads(file.read_text())}))
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
