"""Other libraries' kernels for the same work, measured beside ours where they are installed, else listed as absent.

Each is wrapped to take an op's inputs and return its outputs. A library's gain of RMSNorm is left out, or ones without
a gradient where it cannot be. QuACK's linear cross-entropy has no softcap: it is no peer of lm_head_loss. Peers of
fp8_linear and fp8_mlp round inputs and weights themselves, forward as they do in training, each by its own largest
size, and leave the fp8 copies and sites among the inputs alone: with their passes over memory, which in ours are a
neighbour's or once a step.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# relative RMS: on a CPU, emulated, fp8_linear's dx is off by 0.012 and the others by less; fp8_mlp's by 0.021 with
# 256 rows of 128 channels, and by less with more
FP8_ERROR = 0.03


@dataclass(frozen=True)
class Peer:
    """make: (form, inputs) -> function of the op's inputs.

    bound: of the relative error, where the precision is another.
    """

    package: str  # as it is imported
    project: str  # as it is installed
    forms: tuple[str, ...]
    make: Callable[[str, dict[str, Any]], Callable[..., Any]]
    bound: float | None = None

    def absent(self, device: str) -> str | None:
        if device != "cuda":
            return f"{self.project} needs an NVIDIA GPU"
        return None if importlib.util.find_spec(self.package) else f"{self.project} is not installed"


def _liger_rms_norm(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    from kernels.rms_norm import EPS, RMSNorm

    if form == "plain":
        return lambda x: RMSNorm(LigerRMSNormFunction.apply(x, None, EPS, 0.0, "gemma", False))
    gain = torch.ones_like(inputs["x"][0]).detach()

    def add(x: Tensor, x0: Tensor) -> RMSNorm:
        return RMSNorm(*LigerFusedAddRMSNormFunction.apply(x, x0, gain, EPS, 0.0, "gemma", False))

    return add


def _quack_rms_norm(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    from quack.rmsnorm import rmsnorm

    from kernels.rms_norm import EPS, RMSNorm

    if form == "plain":
        return lambda x: RMSNorm(rmsnorm(x, eps=EPS))
    return lambda x, x0: RMSNorm(*rmsnorm(x, residual=x0, eps=EPS, prenorm=True))


def _torchao_layers(**sizes: tuple[int, int]) -> Callable[..., Tensor]:
    """(name, x, w) -> x w^T by torchao's float8 layer of that name and features; scales are tensorwise, dynamic."""
    from torch.func import functional_call
    from torchao.float8 import convert_to_float8_training

    with torch.device("meta"):
        layers = {name: torch.nn.Linear(*features, bias=False) for name, features in sizes.items()}
        converted = convert_to_float8_training(torch.nn.ModuleDict(layers))
    return lambda name, x, w: functional_call(converted[name], {"weight": w}, (x,))


def _torchao_linear(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Compiled, as torchao recommends it. A sum takes the gradient that is made in w's dtype."""
    from kernels.gemm import summed

    N, K = inputs["w"].shape
    linear = _torchao_layers(linear=(K, N))

    @torch.compile(fullgraph=True, dynamic=False)
    def call(x: Tensor, w: Tensor, fp8: Any, dw_sum: Tensor | None = None) -> Tensor:
        return linear("linear", x, summed(w, dw_sum))

    return call


def _tensorwise(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """t in fp8 and the inverse of what it was multiplied by, as nanochat scales."""
    limit = torch.finfo(dtype).max
    scale = (limit / t.abs().amax().double().clamp_min(1e-12)).float()
    return (t.float() * scale).clamp(-limit, limit).to(dtype), 1 / scale


class _NanochatLinear(torch.autograd.Function):
    """nanochat's fp8 layer as the facts of 92d63d4 give it: three products by cuBLAS, x and w kept in fp8, and copies
    of w, dy and x in the layouts that the products of backward take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        (q_x, x_scale), (q_w, w_scale) = _tensorwise(x, E4M3), _tensorwise(w, E4M3)
        ctx.save_for_backward(q_x, x_scale, q_w, w_scale)
        return torch._scaled_mm(q_x, q_w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,) = grads
        q_x, x_scale, q_w, w_scale = ctx.saved_tensors
        q, scale = _tensorwise(dy.contiguous(), E5M2)

        def product(a: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
            columns = b.t().contiguous().t()
            return torch._scaled_mm(
                a, columns, scale_a=scale, scale_b=b_scale, out_dtype=dy.dtype, use_fast_accum=False
            )

        return product(q, q_w, w_scale), product(q.t().contiguous(), q_x, x_scale)


def _nanochat_linear(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Compiled, as nanochat's models are. A sum takes the gradient in bf16, as autograd adds it there."""
    from kernels.gemm import summed

    @torch.compile(fullgraph=True, dynamic=False)
    def call(x: Tensor, w: Tensor, fp8: Any, dw_sum: Tensor | None = None) -> Tensor:
        y: Tensor = _NanochatLinear.apply(x, summed(w, dw_sum))
        return y

    return call


def _torchao_mlp(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Compiled float8 linear layers, as torchao recommends them."""
    C, F = inputs["x"].size(-1), inputs["up"].size(0)
    linear = _torchao_layers(up=(C, F), down=(F, C))

    @torch.compile(fullgraph=True, dynamic=False)
    def call(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear("down", linear("up", x, up).relu().square(), down.mT)

    return call


def _in_fp8(linear: Callable[[str, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """Both linear layers, by (name, x, w) -> x w^T, as one function of fp8_mlp's inputs, compiled. Sums take gradients
    that are made in the weights' dtype."""
    from kernels.gemm import summed

    @torch.compile(fullgraph=True, dynamic=False)
    def call(
        x: Tensor,
        up: Tensor,
        down: Tensor,
        dup_sum: Tensor | None = None,
        ddown_sum: Tensor | None = None,
        **ours: Any,
    ) -> Tensor:
        post = linear("up", x, summed(up, dup_sum)).relu().square()
        return linear("down", post, summed(down, ddown_sum).mT)

    return call


def _torchao_fp8_mlp(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    C, F = inputs["x"].size(-1), inputs["up"].size(0)
    return _in_fp8(_torchao_layers(up=(C, F), down=(F, C)))


def _nanochat_fp8_mlp(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    def linear(name: str, x: Tensor, w: Tensor) -> Tensor:
        y: Tensor = _NanochatLinear.apply(x, w)
        return y

    return _in_fp8(linear)


def _liger_lm_head_loss(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Chunks of rows in Triton between cuBLAS's products; sums over chunks in fp32, as ours."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    cap = inputs["softcap"].height / 2

    def call(x: Tensor, w: Tensor, targets: Tensor, softcap: Any) -> Tensor:
        return liger_fused_linear_cross_entropy(x, w, targets, ignore_index=-1, softcap=cap, accum_dtype=torch.float32)

    return call


PEERS: dict[str, dict[str, Peer]] = {
    "rms_norm": {
        "liger": Peer("liger_kernel", "liger-kernel", ("plain", "add"), _liger_rms_norm),
        "quack": Peer("quack", "quack-kernels", ("plain", "add"), _quack_rms_norm),
    },
    "lm_head_loss": {"liger": Peer("liger_kernel", "liger-kernel", ("mean",), _liger_lm_head_loss)},
    "fp8_linear": {
        "torchao": Peer("torchao", "torchao", ("plain", "sum"), _torchao_linear, bound=FP8_ERROR),
        "nanochat": Peer("torch", "nanochat's fp8 layer", ("plain", "sum"), _nanochat_linear, bound=FP8_ERROR),
    },
    "fp8_mlp": {
        "torchao": Peer("torchao", "torchao", ("plain", "sum"), _torchao_fp8_mlp, bound=FP8_ERROR),
        "nanochat": Peer("torch", "nanochat's fp8 layers", ("plain", "sum"), _nanochat_fp8_mlp, bound=FP8_ERROR),
    },
    "relu2_mlp": {"torchao fp8": Peer("torchao", "torchao", ("plain",), _torchao_mlp, bound=FP8_ERROR)},
}
