"""Other libraries' kernels for the same work, measured beside ours where they are installed, else listed as absent.

Each is wrapped to take an op's inputs and return its outputs. A library's gain of RMSNorm is left out, or ones without
a gradient where it cannot be. QuACK's linear cross-entropy has no softcap: it is no peer of lm_head_loss.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FP8_ERROR = 0.03  # relative RMS: on a CPU, emulated, it is 0.012 for dx and less for the others


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


def _torchao_mlp(form: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """Float8 linear layers with tensorwise dynamic scales, compiled, as torchao recommends them."""
    from torch.func import functional_call
    from torchao.float8 import convert_to_float8_training

    C, F = inputs["x"].size(-1), inputs["up"].size(0)
    with torch.device("meta"):
        layers = {"up": torch.nn.Linear(C, F, bias=False), "down": torch.nn.Linear(F, C, bias=False)}
        mlp = convert_to_float8_training(torch.nn.ModuleDict(layers))

    @torch.compile(fullgraph=True, dynamic=False)
    def call(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        post = functional_call(mlp["up"], {"weight": up}, (x,)).relu().square()
        return functional_call(mlp["down"], {"weight": down.mT}, (post,))

    return call


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
    "relu2_mlp": {"torchao fp8": Peer("torchao", "torchao", ("plain",), _torchao_mlp, bound=FP8_ERROR)},
}
