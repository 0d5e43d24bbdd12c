"""The LLaDA network: one bidirectional transformer, one forward for training, whole canvases and partial decoding.

Called by `dllm_var.decoding.loop` and by the Trainer. It maps (tokens, positions, key/value store) to logits and knows
nothing of masks, blocks, EOS or sampling. Architecture: pre-norm RMSNorm, rotary positions (halves), SwiGLU, no biases
(arXiv 2502.09992, and the tensor names of the released checkpoints).

Legend: B rows, n tokens of this call, K keys they may see, D model width, H heads, d head width, V vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.kv_store import KVStore, Placement

Rotation = tuple[Tensor, Tensor]


@dataclass
class LLaDAOutput(ModelOutput):  # type: ignore[misc]
    """What a forward returns.

    Attributes:
        logits: [B, n, V], or [M, V] for the M rows that `logits_for` asked for; with `project` whatever that returned.
        attentions: per layer the mean over heads [B, n, K] float32, when asked for.
    """

    logits: Tensor | None = None
    attentions: tuple[Tensor, ...] | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, cast back *before* the weight is applied, as the checkpoints expect."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = x.float()
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return wide.to(x.dtype) * self.weight.to(x.dtype)


def rotation(positions: Tensor, config: LLaDAConfig) -> Rotation:
    """Cosine and sine tables [B, 1, n, d] in float32 for absolute positions [B, n].

    Computed for each call instead of kept in a buffer: a non-persistent buffer is garbage after a meta-device load.
    """
    half = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    inverse = 1.0 / (config.rope_theta ** (half / config.head_dim))
    angle = positions[:, None, :, None].float() * inverse
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: Rotation) -> Tensor:
    """Rotary embedding of [B, heads, n, d] by halves, in float32, returned in the dtype of x."""
    cos, sin = table
    wide = x.float()
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class LLaDABlock(nn.Module):
    """One transformer block: attention and SwiGLU, each behind an RMSNorm and added to the stream."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.d_model, config.num_key_value_heads * config.head_dim
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_width, bias=False)
        self.ff_out = nn.Linear(config.mlp_width, width, bias=False)

    def forward(
        self,
        h: Tensor,
        table: Rotation,
        mask: Tensor | None,
        kv: KVStore | None,
        at: Placement | None,
        want_attention: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """h [B, n, D], mask bool broadcastable to [B, 1, n, K] → (h, head-mean attention [B, n, K] or None)."""
        rows, n, _ = h.shape
        a = self.attn_norm(h)
        q = rotate(self.q_proj(a).view(rows, n, -1, self.head_dim).transpose(1, 2), table)  # [B, H, n, d]
        k = rotate(self.k_proj(a).view(rows, n, -1, self.head_dim).transpose(1, 2), table)  # [B, Hkv, n, d]
        v = self.v_proj(a).view(rows, n, -1, self.head_dim).transpose(1, 2)
        if kv is not None and at is not None:
            k, v = kv.exchange(self.layer, k, v, at)  # [B, Hkv, K, d]
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        weights = None
        if want_attention:
            score = (q @ k.transpose(-1, -2)).float() / self.head_dim**0.5
            share = (score if mask is None else score.masked_fill(~mask, float("-inf"))).softmax(-1)
            o, weights = share.to(v.dtype) @ v, share.mean(1)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.attn_out(o.transpose(1, 2).reshape(rows, n, -1))
        m = self.ff_norm(h)
        return h + self.ff_out(F.silu(self.ff_proj(m)) * self.up_proj(m)), weights


class LLaDAModel(nn.Module):
    """Embedding, blocks, final norm and head, under the names of the released checkpoints (``transformer.*``)."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_rows, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, i) for i in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_rows, bias=False)
        self.transformer = nn.ModuleDict(parts)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, D] (the embedding itself when the weights are tied)."""
        return self.transformer["wte" if self.config.weight_tying else "ff_out"].weight  # type: ignore[return-value]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        kv: KVStore | None,
        at: Placement | None,
        want_attention: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states [B, n, D] after the final norm, and the head-mean attention of each layer when asked for."""
        h = self.transformer["wte"](input_ids)
        table = rotation(positions, self.config)
        seen: list[Tensor] = []
        for block in self.transformer["blocks"]:  # type: ignore[union-attr]
            arguments = (h, table, mask, kv, at, want_attention)
            if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
                h, weights = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                h, weights = block(*arguments)
            if weights is not None:
                seen.append(weights)
        return self.transformer["ln_f"](h), tuple(seen) if want_attention else None


class LLaDAModelLM(PreTrainedModel):  # type: ignore[misc]
    """A LLaDA-family mask predictor; see `forward` for the one call that serves every use."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LLaDABlock"]
    _tied_weights_keys: dict[str, str] = {}  # tied weights share one tensor by construction: there is no second name

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 1/√fan_in) for matrices, smaller where a block writes to the stream ("mitchell", 2502.09992 code)."""
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, LLaDABlock):
            for out in (module.attn_out, module.ff_out):
                nn.init.normal_(out.weight, std=(2 * out.in_features * (module.layer + 1)) ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"]

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a tied head reads the embedding directly."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        kv: KVStore | None = None,
        slots: Tensor | None = None,
        query_mask: Tensor | None = None,
        logits_for: Tensor | None = None,
        project: Callable[[Tensor, Tensor], Tensor] | None = None,
        step: int = 0,
        output_attentions: bool = False,
        **unused: Any,
    ) -> LLaDAOutput:
        """Logits of the given tokens under full (bidirectional) attention.

        Args:
            input_ids: int64 [B, n].
            attention_mask: [B, n]; 0 marks padding, which no query sees. Honoured with and without a store.
            positions: int64 [B, n] or [1, n], absolute; default 0…n−1 for every row.
            kv: a store of earlier keys/values: the queries see its filled slots and this call's tokens.
            slots: int64 [B, n], required with `kv`; where each token is stored, −1 for a token that is visible to this
                call but not kept. A slot that is written again is replaced.
            query_mask: bool [B, n, K], a further limit per query. K counts the call's n tokens; with a store the
                stored columns come first (see `KVStore.place`).
            logits_for: bool [B, n]; the head runs only on these M rows, in row-major order.
            project: ``f(hidden [M, D], head weight [V, D])`` in place of the plain projection (chunked losses).
            step: stamped on the slots that are written.
            output_attentions: also return the head-mean attention of each layer.

        Raises:
            ValueError: shapes or arguments that contradict each other.
        """
        if unused.get("past_key_values") is not None or unused.get("inputs_embeds") is not None:
            raise ValueError("past_key_values and inputs_embeds are not supported: pass kv=KVStore(...) and slots.")
        if unused.get("labels") is not None:
            raise ValueError("labels are not supported: a mask predictor needs a forward process, see dllm_var.diffusion.")
        rows, n = input_ids.shape
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask {tuple(attention_mask.shape)} must have the shape of input_ids {(rows, n)}.")
        if (kv is None) != (slots is None):
            raise ValueError("kv and slots belong together: give both or neither.")
        if positions is None:
            positions = torch.arange(n, device=input_ids.device)[None]
        real = None if attention_mask is None else attention_mask.bool()
        if kv is not None and slots is not None:
            at = kv.place(slots.cpu(), None if real is None else real.cpu(), step)
            visible = at.visible
        else:
            at, visible = None, real
        hidden, attentions = self.model(input_ids, positions, _combine(visible, query_mask), kv, at, output_attentions)
        if logits_for is not None:
            hidden = hidden[logits_for]  # [M, D]
        logits = F.linear(hidden, self.model.head_weight) if project is None else project(hidden, self.model.head_weight)
        return LLaDAOutput(logits=logits, attentions=attentions)


def _combine(visible: Tensor | None, query_mask: Tensor | None) -> Tensor | None:
    """One bool mask [B, 1, 1 or n, K]; a query that may see nothing sees everything, so that padding cannot make NaN."""
    mask = None if visible is None else visible[:, None, None, :]
    if query_mask is not None:
        mask = query_mask[:, None].bool() if mask is None else mask & query_mask[:, None].bool()
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)
