"""Every op of this package."""

from kernels.adam_update import adam_update
from kernels.attention import attention
from kernels.decode_attention import decode_attention
from kernels.embedding import embedding
from kernels.fp8_linear import fp8_linear
from kernels.fp8_mlp import fp8_mlp
from kernels.linear import linear
from kernels.lm_head_loss import lm_head_loss
from kernels.muon_update import muon_apply, muon_momentum
from kernels.op import Op
from kernels.polar_express import polar_express
from kernels.quantise_weight import quantise_weight
from kernels.relu2_mlp import relu2_mlp
from kernels.rms_norm import rms_norm
from kernels.rope_qk_norm import rope_qk_norm

OPS: tuple[Op, ...] = (
    rms_norm,
    rope_qk_norm,
    attention,
    decode_attention,
    embedding,
    linear,
    fp8_linear,
    relu2_mlp,
    fp8_mlp,
    lm_head_loss,
    quantise_weight,
    polar_express,
    muon_momentum,
    muon_apply,
    adam_update,
)
BY_NAME = {op.name: op for op in OPS}
