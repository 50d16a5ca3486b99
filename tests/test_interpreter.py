"""Triton's interpreter, as these tests use it, computes what the hardware would: roundings, fp8, tl.dot, loops."""

import pytest
import torch
import triton
import triton.language as tl

from tests.harness import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels run on the GPU here, not in the interpreter")


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK):  # a run-time bound
        a = tl.load(a_ptr + offs[:, None] * K + k + offs[None, :])
        b = tl.load(b_ptr + (k + offs)[:, None] * BLOCK + offs[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * BLOCK + offs[None, :], acc)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)
    tl.store(z_ptr + offs, tl.fma(x, y, z))


@triton.jit
def _add_kernel(x_ptr, y_ptr, M, N, BLOCK: tl.constexpr):
    x_desc = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    y_desc = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK, BLOCK])
    at = [tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK]
    y_desc.atomic_add(at, x_desc.load(at))


@triton.jit
def _narrow_sum_kernel(x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr + tl.arange(0, BLOCK), x + x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_casts_round_to_nearest_even_and_fp8_saturates(dtype):
    x = torch.randn(1024) * torch.logspace(-6, 3, 1024)
    x[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    y = torch.empty(1024, dtype=dtype)
    _cast_kernel[(1,)](x, y, BLOCK=1024)
    want = x
    if dtype.itemsize == 1:
        want = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    assert torch.equal(y.float()[:3], want.to(dtype).float()[:3]) and y[3].float().isnan()
    assert torch.equal(y.float()[4:], want.to(dtype).float()[4:])
    back = torch.empty(1024)
    _cast_kernel[(1,)](y, back, BLOCK=1024)
    assert torch.equal(back[4:], y.float()[4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
def test_dot_multiplies_numbers(dtype):
    a, b, c = torch.randn(16, 48).to(dtype), torch.randn(48, 16).to(dtype), torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, 48, BLOCK=16)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-4, rtol=1e-4)


def test_fma_rounds_once():
    """(1 + 2^-12)^2 - 1 - 2^-11 is 2^-24, which a rounded product has lost."""
    x, z = torch.full((16,), 1 + 2.0**-12), torch.full((16,), -1 - 2.0**-11)
    _fma_kernel[(1,)](x, x, z, BLOCK=16, num_warps=1)
    assert (z == 2.0**-24).all()


def test_a_descriptor_adds_to_memory():
    """Ragged tiles, and two launches after each other."""
    x, y = torch.randn(20, 36), torch.randn(20, 36)
    want = y + x + x
    for _ in range(2):
        _add_kernel[(2, 3)](x, y, 20, 36, BLOCK=16)
    assert torch.equal(y, want)


def test_a_descriptor_adds_fp32_only():
    x = torch.ones(16, 16, dtype=torch.int32)
    with pytest.raises(Exception, match="adds float32 to memory, and nothing else"):
        _add_kernel[(1, 1)](x, x.clone(), 16, 16, BLOCK=16)


def test_arithmetic_on_bf16_is_an_error():
    with pytest.raises(Exception, match="convert to float32") as caught:
        _narrow_sum_kernel[(1,)](torch.ones(16, dtype=torch.bfloat16), BLOCK=16)
    assert isinstance(caught.value, TypeError) or isinstance(caught.value.__cause__, TypeError)
