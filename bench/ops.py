"""What the bench files of ops share: one measurement of one backend on one shape, forward or backward.

On a GPU `extra_info` has the median time with a cold L2 cache, GB/s and TFLOP/s of the least work (the op's cost) and the
fraction of what copying a large tensor and multiplying large matrices reach in the same run. On a CPU only the reference
runs, on the quickstart's shape. A backend whose results are wrong gets no number.
"""

import functools

import pytest
import torch

from kernels.dispatch import Device, Op

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BACKENDS = ("ref", "torch.compile", "triton") if CUDA else ("ref",)
COPY_BYTES = 2**30
GEMM = 8192
TOLERANCE = 0.02  # relative, of outputs and gradients against the reference: a gate, not the proof that tests give


def make(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(size, device=DEVICE, dtype=dtype)
    return torch.randn(size, device=DEVICE, dtype=dtype)


def median_ms(function) -> float:
    from triton.testing import do_bench  # empties the L2 cache before each call

    return do_bench(function, warmup=50, rep=200, return_mode="median")


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second read and written by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_ms(lambda: target.copy_(source)) * 1e-3)


@functools.cache
def gemm_speed() -> float:
    """FLOP per second of a large bf16 product of random numbers."""
    a, b = make(GEMM, GEMM), make(GEMM, GEMM)
    return 2 * GEMM**3 / (median_ms(lambda: a @ b) * 1e-3)


def parameters(op: Op, in_place: bool = False):
    """Parametrises a bench by backend, case, form and, but for an op that works in place, direction."""
    cases = list(op.cases) if CUDA else ["quickstart"]
    directions = [pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])]
    marks = (
        *(directions if not in_place else []),
        pytest.mark.parametrize("form", op.forms),
        pytest.mark.parametrize("case", cases),
        pytest.mark.parametrize("backend", BACKENDS),
    )
    return lambda test: functools.reduce(lambda t, mark: mark(t), marks, test)


def tensors(outputs) -> list[torch.Tensor]:
    return [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t is not None]


def implementation(op: Op, backend: str, shape: tuple[int, ...]):
    if backend == "torch.compile":
        torch.compiler.reset()
        return torch.compile(op.backends["ref"], fullgraph=True, dynamic=False)
    if obstacle := op.obstacle(backend, shape, DTYPE, Device.of(DEVICE)):
        pytest.skip(obstacle)
    return op.backends[backend]


def measure_in_place(benchmark, op: Op, backend: str, case: str, form: str) -> None:
    """An op that changes its inputs and has no gradients; what it changes is compared, and what it returns."""
    shape = op.cases[case]
    function, inputs = implementation(op, backend, shape), op.forms[form](make, *shape)
    given = tensors(tuple(t for t in inputs.values() if isinstance(t, torch.Tensor)))
    with torch.no_grad():
        copies = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in inputs.items()}
        want = tensors(op.backends["ref"](**copies))
        want += [t for t in copies.values() if isinstance(t, torch.Tensor)]
        # the low halves of masters are rounding noise to each other
        pairs = zip(tensors(function(**inputs)) + given, want, strict=True)
        compared = [(a, b) for a, b in pairs if b.is_floating_point()]
        check([a for a, _ in compared], [b for _, b in compared])
        del copies, want, compared
        report(benchmark, lambda: function(**inputs), shape, *op.cost(shape, DTYPE, form))


def measure(benchmark, op: Op, backend: str, case: str, form: str, backward: bool) -> None:
    shape = op.cases[case]
    function = implementation(op, backend, shape)
    inputs = op.forms[form](make, *shape)
    constants = {"scale", "cos", "sin"}
    leaves = [t.requires_grad_() for name, t in inputs.items() if isinstance(t, torch.Tensor) and name not in constants]
    outputs, want = tensors(function(**inputs)), tensors(op.backends["ref"](**inputs))
    heads = [t for t in outputs if t.requires_grad]
    grads = [torch.randn_like(t) for t in heads]
    check(outputs + list(torch.autograd.grad(heads, leaves, grads, retain_graph=True)),
          want + list(torch.autograd.grad([t for t in want if t.requires_grad], leaves, grads)))  # fmt: skip
    del want

    def forwards() -> None:
        with torch.no_grad():
            function(**inputs)

    def backwards() -> None:
        torch.autograd.grad(heads, leaves, grads, retain_graph=True)

    report(benchmark, backwards if backward else forwards, shape, *op.cost(shape, DTYPE, form, backward))


def report(benchmark, run, shape: tuple[int, ...], flops: int, nbytes: int) -> None:
    benchmark.extra_info |= {"device": Device.of(DEVICE).name, "shape": list(shape), "flops": flops, "bytes": nbytes}
    if not CUDA:
        benchmark(run)
        return
    ms = median_ms(run)
    gb_per_s, tflops = nbytes / ms / 1e6, flops / ms / 1e9
    benchmark.extra_info |= {"ms": ms, "gb_per_s": gb_per_s, "tflops": tflops}
    benchmark.extra_info |= {
        "copy_fraction": 1e9 * gb_per_s / copy_bandwidth(),
        "gemm_fraction": 1e12 * tflops / gemm_speed(),
    }
    benchmark.pedantic(lambda: (run(), torch.cuda.synchronize()), rounds=20, warmup_rounds=3)


def check(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        difference = (a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30)
        assert difference < TOLERANCE, f"{tuple(a.shape)} is off by {difference:.3g}"
