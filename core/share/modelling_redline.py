"""A model trained by Redline, for transformers: plain PyTorch, no other file of Redline is needed. Shipped with each
exported model, whose config.json holds every size and constant.

Dimensions   B batch, T sequence, C model, H query heads, G key/value heads, D head, V vocabulary
Text         opens with the BOS token, which ends it too. There is no KV cache: `generate` runs the whole text for each
             token, which Redline's own sampling does not
Precision    as trained: matrices in the type of config.json, scalars, norms, softmax and logits in fp32
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

SCALARS = ["resid_lambdas", "x0_lambdas", "smear_gate", "smear_lambda", "backout_lambda"]


class RedlineConfig(PretrainedConfig):
    model_type = "redline"
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_kv_head",
        "max_position_embeddings": "seq_len",
    }


class RedlineForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RedlineConfig
    _keep_in_fp32_modules_strict = SCALARS
    _no_split_modules: list[str] = []

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        c, on = config, config.switches
        L, C, F_, V = c.n_layer, c.d_model, c.d_ff, c.padded_vocab

        def matrices(n: int, rows: int, cols: int) -> nn.ParameterList:
            return nn.ParameterList(nn.Parameter(torch.empty(rows, cols)) for _ in range(n))

        def scalars(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.float32))

        self.wte = nn.Parameter(torch.empty(V, C))
        if on["untied_head"]:
            self.lm_head = nn.Parameter(torch.empty(V, C))
        self.attn_qkv = matrices(L, C + 2 * c.d_kv, C)
        self.attn_out = matrices(L, C, C)
        self.mlp_up = matrices(L, F_, C)
        self.mlp_down = matrices(L, F_, C)
        if on["value_embeds"]:
            self.value_embeds = nn.Parameter(torch.empty(V, len(c.ve_layers) * c.d_kv))
            self.ve_gate = matrices(len(c.ve_layers), c.n_kv_head, c.ve_gate_channels)
        if on["resid_lambdas"]:
            self.resid_lambdas = scalars(L)
        if on["x0_lambdas"]:
            self.x0_lambdas = scalars(L)
        if on["smear"]:
            self.smear_gate = scalars(1, c.smear_channels)
            self.smear_lambda = scalars(1)
        if on["backout"]:
            self.backout_lambda = scalars(1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are loaded, never drawn."""

    def get_input_embeddings(self) -> Any:
        raise NotImplementedError("the embedding is the parameter `wte` (V, C), not a module")

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Token ids (B, T) -> logits (B, T, V) fp32, of the last logits_to_keep tokens if that is not 0; with labels
        (B, T), of which -100 is ignored, the mean cross-entropy of each token after the first. Nothing sees padding on
        the right; ValueError where it is on the left."""
        if attention_mask is not None and not bool(attention_mask[:, 0].all()):
            raise ValueError("this model has no mask for padding on the left: pad on the right, or run texts apart")
        hidden = self.hidden(input_ids)
        head = self.lm_head if self.config.switches["untied_head"] else self.wte
        z = (hidden[:, -logits_to_keep:] @ head.T)[..., : self.config.vocab_size].float()
        cap = self.config.switches["logit_softcap"]
        logits = cap * torch.tanh(z / cap) if cap else z
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def hidden(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> normalised hidden states (B, T, C)."""
        c, on = self.config, self.config.switches
        B, T = idx.shape
        H, G, D = c.n_head, c.n_kv_head, c.d_head

        def norm(x: Tensor) -> Tensor:
            return F.rms_norm(x, (x.size(-1),), eps=c.eps)

        # positions, and what each layer's queries see: themselves and `window` keys before them
        j = torch.arange(D // 2, dtype=torch.float32, device=idx.device)
        t = torch.arange(T, device=idx.device)
        angle = t.float()[:, None] * c.rope_base ** (-2 * j / D)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # (T, 1, D/2)
        distance = t[:, None] - t
        seen = {window: (distance >= 0) & (distance <= window) for window in set(c.windows)}
        if on["within_documents"]:
            document = (idx == c.bos_token_id).cumsum(1)
            same = (document[:, :, None] == document[:, None, :])[:, None]  # (B, 1, T, T)
            seen = {window: mask & same for window, mask in seen.items()}

        def turned(z: Tensor) -> Tensor:
            z = z.float()
            if on["rope"]:
                z1, z2 = z.chunk(2, dim=-1)
                z = torch.cat((z1 * cos + z2 * sin, z2 * cos - z1 * sin), dim=-1)
            return c.qk_scale * norm(z) if on["qk_norm"] else z

        x = norm(F.embedding(idx, self.wte))  # (B, T, C)
        dtype = x.dtype
        if on["smear"]:
            gate = torch.sigmoid(x[:, 1:, : c.smear_channels] @ self.smear_gate.to(dtype).T)
            x = torch.cat((x[:, :1], x[:, 1:] + self.smear_lambda.to(dtype) * gate * x[:, :-1]), dim=1)
        x0, wide, x_mid = x, x.float(), x.float()
        for i in range(c.n_layer):
            # entry: the residual stream with what the last MLP added, summed in fp32 and rounded once
            if on["x0_lambdas"]:
                share = self.x0_lambdas[i] * x0.float()
                x = ((self.resid_lambdas[i] * wide if on["resid_lambdas"] else wide) + share).to(dtype)
            else:
                x = wide.to(dtype)
                x = self.resid_lambdas[i] * x if on["resid_lambdas"] else x
            y = norm(x)
            # attention
            q, k, v = (y @ self.attn_qkv[i].T).view(B, T, H + 2 * G, D).split((H, G, G), dim=2)
            if i in c.ve_layers:
                n = c.ve_layers.index(i)
                gate = c.ve_gate_range * torch.sigmoid(y[..., : c.ve_gate_channels] @ self.ve_gate[n].T)  # (B, T, G)
                values = F.embedding(idx, self.value_embeds[:, n * G * D : (n + 1) * G * D]).view(B, T, G, D)
                v = v.float() + gate.float()[..., None] * values.float()
            q, k, v = (z.to(dtype).transpose(1, 2) for z in (turned(q), turned(k), v))  # (B, heads, T, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[c.windows[i]], enable_gqa=G < H)
            x = (x.float() + (y.transpose(1, 2).reshape(B, T, -1) @ self.attn_out[i].T).float()).to(dtype)
            # MLP
            y = norm(x) @ self.mlp_up[i].T
            wide = x.float() + ((F.relu(y).square() if on["relu2"] else F.gelu(y)) @ self.mlp_down[i]).float()
            if i == c.n_layer // 2:
                wide = x_mid = wide.to(dtype).float()
        return norm((wide - self.backout_lambda * x_mid if on["backout"] else wide).to(dtype))
