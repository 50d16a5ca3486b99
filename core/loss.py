"""Output projection, softcap and cross-entropy without the logits: rows in chunks, gradients in the forward pass.

z = x W^T,  y = c tanh(z / c),  loss = sum_i w (logsumexp(y_i) - y_i[target_i]) over targets >= 0
dz = w (softmax(y) - onehot(target)) (1 - tanh^2(z / c)),  dx = dz W,  dW = dz^T x

Only one chunk of logits exists at a time. Because the loss is a scalar, its gradients are known up to the upstream factor
when the forward ends; backward multiplies by that.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}  # logits of a chunk: 4 MiB of cache, 512 MiB of GPU memory in fp32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float, scale: Tensor) -> Tensor:
        need_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if need_grad else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if need_grad else None
        rows = max(1, CHUNK_LOGITS[x.device.type] // weight.size(0))
        for begin in range(0, x.size(0), rows):
            chunk = slice(begin, begin + rows)
            target = targets[chunk, None]
            counted = target >= 0
            target = target.clamp_min(0)
            z = (x[chunk] @ weight.T).float()
            t = z.mul_(1 / cap).tanh_() if cap else None
            logp = torch.log_softmax(t * cap if cap else z, dim=-1)
            loss -= torch.where(counted, logp.gather(1, target), 0.0).sum()
            if dx is None or dw is None:
                continue
            dz = logp.exp_()
            dz.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float32))
            if t is not None:
                dz.addcmul_(dz, t.square_(), value=-1)
            dz.mul_(counted * scale)
            dz = dz.to(x.dtype)
            torch.mm(dz, weight, out=dx[chunk])
            if weight.dtype == torch.float32:
                dw.addmm_(dz.T, x[chunk])
            else:
                dw += dz.T @ x[chunk]
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return loss * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dx, dw = ctx.saved_tensors
        (dloss,) = grads
        return dx * dloss.to(dx.dtype), (dw * dloss).to(ctx.weight_dtype), None, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, *, softcap: float, reduction: str) -> Tensor:
    """Cross-entropy in nats (fp32 scalar) of hidden states x (M, C) under the projection weight (V, C).

    targets (M,) int64, -1 is ignored; softcap c, 0 for none; reduction "mean" over the targets that count, or "sum".
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: expected 'mean' or 'sum'")
    count = (targets >= 0).sum().clamp_min(1) if reduction == "mean" else torch.ones((), device=x.device)
    return _LinearCrossEntropy.apply(x, weight, targets, softcap, count.float().reciprocal())
