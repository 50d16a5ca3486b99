"""Makes Triton's interpreter compute what the hardware would, so that a run on a CPU proves a kernel's arithmetic.

As released (3.6 to 3.9) it truncates fp32 to bf16, mis-rounds to fp8, multiplies bf16 operands of tl.dot as integers,
and so does every arithmetic operation on bf16 that was not converted to fp32 after its load. The last is an error here,
since it would be one in a kernel. Private functions of Triton are replaced: a Triton that renames them fails loudly at
import.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_TYPES = {
    tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
}  # fmt: skip
STORED_AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)


def as_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    """The numbers of an interpreter array, whose element may be bits in an integer."""
    bits = np.ascontiguousarray(data).view(f"int{dtype.primitive_bitwidth}")
    return torch.from_numpy(bits.copy()).view(TORCH_TYPES[dtype])


def convert_float(data, source, target, rounding_mode):
    """Replaces interpreter._convert_float: round to nearest even, fp8 saturates; returns bits as unsigned integers."""
    if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
        raise NotImplementedError(f"this interpreter rounds to nearest only, not {rounding_mode}")
    shape = np.shape(data)
    numbers = as_torch(np.asarray(data), source.scalar)
    target = target.scalar
    if target in (tl.float8e4nv, tl.float8e5):
        limit = torch.finfo(TORCH_TYPES[target]).max
        numbers = numbers.to(torch.float32).clamp(-limit, limit)
    width = target.primitive_bitwidth
    bits = numbers.to(TORCH_TYPES[target]).view(getattr(torch, f"int{width}")).numpy()
    return bits.view(f"uint{width}").reshape(shape)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """Replaces InterpreterBuilder.create_dot: operands of every float type as the numbers they are. Those of fp32 are
    summed in float64: in which order numpy adds them up, and so the error, depends on the CPU."""
    wide = torch.float64 if tl.float32 in (a.dtype.scalar, b.dtype.scalar) else torch.float32

    def numbers(x):
        return as_torch(x.data, x.dtype.scalar).to(wide).numpy() if x.dtype.is_floating() else x.data

    product = np.matmul(numbers(a), numbers(b)).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def create_fma(self, x, y, z):
    """Replaces what Triton 3.6 has, which rounds a product before it adds: fp32 by way of float64, whose products of
    fp32 numbers are exact."""
    if any(t.dtype.scalar != tl.float32 for t in (x, y, z)):
        raise TypeError(f"fma of {x.dtype}, {y.dtype}, {z.dtype}: convert to float32 right after the load")
    exact = np.multiply(x.data, y.data, dtype=np.float64) + z.data
    return interpreter.TensorHandle(exact.astype(np.float32), tl.float32)


def create_descriptor_reduce(self, kind, desc, value, indices):
    """What InterpreterBuilder lacks: the addition of a tile to memory, element by element."""
    ir = interpreter._ir
    if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.dtype.scalar != tl.float32:
        raise NotImplementedError(f"this interpreter adds float32 to memory, and nothing else: {kind}, {value.dtype}")
    pointers, mask = desc.materialize_pointers(indices)
    self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU)


def strict(name):
    original = getattr(interpreter.InterpreterBuilder, name)

    def checked(self, *operands_and_op):
        for x in operands_and_op[:-1]:
            if x.dtype.scalar in STORED_AS_BITS and operands_and_op[-1] is not np.where:
                raise TypeError(f"{operands_and_op[-1].__name__} of {x.dtype}: convert to float32 right after the load")
        return original(self, *operands_and_op)

    return checked


def install() -> None:
    builder = interpreter.InterpreterBuilder
    assert hasattr(interpreter, "_convert_float") and hasattr(builder, "create_dot")
    interpreter._convert_float = convert_float
    builder.create_dot = create_dot
    if not hasattr(interpreter._interpreter, "fma_fp32"):  # newer ones round once themselves
        builder.create_fma = create_fma
    assert getattr(builder, "create_descriptor_reduce", create_descriptor_reduce) is create_descriptor_reduce
    builder.create_descriptor_reduce = create_descriptor_reduce
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, strict(name))
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        # Triton 3.6 turns a one-element array into an index, which numpy 2.4 refuses
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_lang_tensor
