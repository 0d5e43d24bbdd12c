"""The LLaDA network: one bidirectional transformer, one forward for training, whole canvases and partial decoding.

Called by `dllm_var.decoding.executor` and by the Trainer. It maps (tokens, positions, key/value store) to logits and knows
nothing of masks, blocks, EOS or sampling. Architecture: pre-norm RMSNorm, rotary positions (halves), SwiGLU, no biases
(arXiv 2502.09992, and the tensor names of the released checkpoints).

Legend: B rows, n tokens of this call, K keys they may see, D model width, H heads, d head width, V vocabulary rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.kv_store import KVRows, KVStore, Placement

Rotation = tuple[Tensor, Tensor]


@dataclass
class LLaDAOutput(ModelOutput):
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
        for out in (self.attn_out, self.ff_out):
            out.writes_in_layer = layer  # type: ignore[assignment]

    def forward(
        self,
        h: Tensor,
        table: Rotation,
        mask: Tensor | None,
        kv: KVStore | KVRows | None,
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
            score = q @ k.transpose(-1, -2)
            score = score.to(torch.promote_types(score.dtype, torch.float32)) / self.head_dim**0.5
            share = (score if mask is None else score.masked_fill(~mask, float("-inf"))).softmax(-1)
            o, weights = share.to(v.dtype) @ v, share.mean(1)
        else:
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = h + self.attn_out(o.transpose(1, 2).reshape(rows, n, -1))
        return h + self.feed_forward(h), weights

    def feed_forward(self, h: Tensor) -> Tensor:
        """What the SwiGLU adds to the stream h [..., D]."""
        m = self.ff_norm(h)
        return cast(Tensor, self.ff_out(F.silu(self.ff_proj(m)) * self.up_proj(m)))


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
        """The output matrix [V, D] (the embedding itself when the weights are tied), with what a LoRA adapter adds to it."""
        head: Any = self.transformer["wte" if self.config.weight_tying else "ff_out"]
        weight: Tensor = head.weight
        if not getattr(head, "merged", True):  # peft's layer around the head, which `project` does not call
            weight = weight + sum(head.get_delta_weight(name) for name in head.active_adapters)
        return weight

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        kv: KVStore | KVRows | None,
        at: Placement | None,
        want_attention: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Hidden states [B, n, D] after the final norm, and the head-mean attention of each layer when asked for."""
        h = self.transformer["wte"](input_ids)
        table = rotation(positions, self.config)
        seen: list[Tensor] = []
        for block in cast(nn.ModuleList, self.transformer["blocks"]):
            arguments = (h, table, mask, kv, at, want_attention)
            if self.gradient_checkpointing and self.training and self._gradient_checkpointing_func is not None:
                h, weights = self._gradient_checkpointing_func(block.__call__, *arguments)
            else:
                h, weights = block(*arguments)
            if weights is not None:
                seen.append(weights)
        return self.transformer["ln_f"](h), tuple(seen) if want_attention else None


class LLaDAModelLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A LLaDA-family mask predictor; see `forward` for the one call that serves every use."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _tied_weights_keys = {}  # noqa: RUF012 (a tied head has no tensor of its own, so there is no second name)
    accepts_loss_kwargs = False  # the Trainer would else take **others for a loss that knows the global token count

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 1/√fan_in) for matrices, smaller where a block writes to the stream ("mitchell", 2502.09992 code).

        Only modules with parameters of their own get here: transformers counts one without, a block say, as done.
        """
        if isinstance(module, nn.Linear):
            layer = getattr(module, "writes_in_layer", None)
            share = 1 if layer is None else 2 * (layer + 1)
            nn.init.normal_(module.weight, std=(share * module.in_features) ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.model.transformer["wte"])

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return cast(nn.Module, self.model.transformer["wte" if self.config.weight_tying else "ff_out"])

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a tied head reads the embedding directly."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        kv: KVStore | KVRows | None = None,
        slots: Tensor | None = None,
        query_mask: Tensor | None = None,
        logits_for: Tensor | None = None,
        project: Callable[[Tensor, Tensor], Tensor] | None = None,
        step: int = 0,
        output_attentions: bool = False,
        **others: Any,
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
            logits_for: bool [B, n], best on the host; the head runs only on these M rows, in row-major order.
            project: ``f(hidden [M, D], head weight [V, D])`` in place of the plain projection (chunked losses).
            step: stamped on the slots that are written.
            output_attentions: also return the head-mean attention of each layer.
            others: arguments that libraries add on their own, accepted only with a value that asks for nothing.

        Raises:
            ValueError: shapes or arguments that contradict each other, or an argument this model does not know.
        """
        _refuse(others)
        if positions is None:
            positions = torch.arange(input_ids.shape[-1], device=input_ids.device)[None]
        _check(input_ids, attention_mask, positions, slots, logits_for)
        if (kv is None) != (slots is None):
            raise ValueError("kv and slots belong together: give both or neither.")
        if kv is not None and self.training and torch.is_grad_enabled():
            raise ValueError("kv is for inference and carries no gradient: call model.eval() or use torch.no_grad().")
        real = None if attention_mask is None else attention_mask.bool()
        if kv is not None and slots is not None:
            at = kv.place(slots.cpu(), None if real is None else real.cpu(), step)
            visible = at.visible
        else:
            at, visible = None, real
        mask = _combine(visible, query_mask, (*input_ids.shape, at.width if at is not None else input_ids.shape[1]))
        hidden, attentions = self.model(input_ids, positions, mask, kv, at, output_attentions)
        if logits_for is not None:
            # A mask on the host costs no synchronisation, so it is not moved to an accelerator.
            hidden = hidden[logits_for if logits_for.is_cpu else logits_for.to(hidden.device)]  # [M, D]
        return LLaDAOutput(logits=self._project(hidden, project), attentions=attentions)

    def _project(self, hidden: Tensor, project: Callable[[Tensor, Tensor], Tensor] | None) -> Tensor:
        if project is not None:
            return project(hidden, self.model.head_weight)
        if self.config.weight_tying:
            return F.linear(hidden, self.model.head_weight)
        # As a module, so that what others hang on it (device placement, adapters, quantisation) takes effect.
        return cast(Tensor, self.model.transformer["ff_out"](hidden))


# Arguments of the Hugging Face calling convention, and the values that ask for nothing this model does not do.
HARMLESS = {"use_cache": (None, False), "return_dict": (None, True), "output_hidden_states": (None, False)}
INSTEAD = {
    "past_key_values": "pass kv=KVStore(...) and slots",
    "position_ids": "the argument is called positions",
    "labels": "a mask predictor needs a forward process, see dllm_var.diffusion",
    "use_cache": "pass kv=KVStore(...) and slots",
}


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if value is not None and not any(value is harmless for harmless in HARMLESS.get(name, ())):
            hint = INSTEAD.get(name, "see the arguments of LLaDAModelLM.forward")
            raise ValueError(f"argument {name} is not supported by this model: {hint}.")


def _check(
    input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, slots: Tensor | None, logits_for: Tensor | None
) -> None:
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [rows, tokens], got the shape {tuple(input_ids.shape)}.")
    rows, n = input_ids.shape
    for name, given in (("attention_mask", attention_mask), ("slots", slots), ("logits_for", logits_for)):
        if given is not None and given.shape != input_ids.shape:
            raise ValueError(f"{name} {tuple(given.shape)} must have the shape of input_ids {(rows, n)}.")
    if logits_for is not None and logits_for.dtype != torch.bool:
        raise ValueError(f"logits_for must be bool, got {logits_for.dtype}: indices would pick other rows than meant.")
    if positions.shape not in ((rows, n), (1, n)):
        raise ValueError(f"positions {tuple(positions.shape)} must have the shape {(rows, n)} or {(1, n)}.")


def _combine(visible: Tensor | None, query_mask: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """One bool mask [B, 1, 1 or n, K]; a query that may see nothing sees everything, so that padding cannot make NaN."""
    mask = None if visible is None else visible[:, None, None, :]
    if query_mask is not None:
        if query_mask.shape != shape:
            raise ValueError(f"query_mask {tuple(query_mask.shape)} must be [rows, queries, keys] = {shape} in this call.")
        mask = query_mask[:, None].bool() if mask is None else mask & query_mask[:, None].bool()
    return None if mask is None else mask | ~mask.any(-1, keepdim=True)
