"""quantise_weight: both layouts bit for bit, weights of zeros, what is refused."""

import pytest
import torch

from bench.law import error
from kernels.fp8 import E4M3_MAX, empty_fp8
from kernels.quantise_weight import quantise_weight, quantise_weight_cost
from tests.harness import DEVICE

DTYPES = (torch.bfloat16, torch.float32)


def copies(w):
    found = []
    for quantise in quantise_weight.backends.values():
        found.append(empty_fp8(w))
        quantise(w, *found[-1])
    return found


@pytest.mark.parametrize("shape", [(112, 32), (101, 16), (70, 80)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top", [7.0, 7.3125, 5.90625])
def test_both_layouts_are_bit_for_bit_what_float64_rounds_to(shape, dtype, top):
    """With scales that are a power of two, where every division is exact, and that are not."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    w[0, 0] = top
    by_torch, by_triton = copies(w)
    bits = [t.contiguous().view(torch.uint8) for t in (by_torch.q, by_torch.q_t, by_triton.q, by_triton.q_t)]
    assert torch.equal(bits[0], bits[2]) and torch.equal(bits[1], bits[3]) and torch.equal(bits[0].T, bits[1])
    assert by_torch.scale == by_triton.scale == torch.tensor(top, device=DEVICE) / E4M3_MAX
    assert error(by_torch.q.float() * by_torch.scale, w.double()) < 0.03


def test_a_weight_of_zeros_is_quantised():
    for copy in copies(torch.zeros(16, 16, device=DEVICE)):
        assert copy.scale > 0 and not copy.q.float().any()


@pytest.mark.parametrize("backend", quantise_weight.backends)
def test_bad_calls_are_refused(backend):
    w = torch.ones(24, 32, device=DEVICE)
    for args, says in (
        ((w, *empty_fp8(w.T)), r"q of the copy .* is \(32, 24\)"),
        ((w.T, *empty_fp8(w.T)), "the last stride 1"),
        ((w.half(), *empty_fp8(w)), "float16"),
        ((w, *empty_fp8(w)[:2], torch.ones((), dtype=torch.float64, device=DEVICE)), "scale of the copy .*float64"),
        (
            (w, empty_fp8(w).q, torch.empty(32, 24, dtype=empty_fp8(w).q.dtype, device=DEVICE), w.new_empty(())),
            "16 bytes",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            quantise_weight.checked(backend)(*args)


def test_cost():
    assert quantise_weight_cost((10, 20), torch.bfloat16) == (600, 1200)
