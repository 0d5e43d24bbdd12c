"""The shape of a LLaDA model, read from ``config.json`` without a single silent default.

The public remote class falls back to GPT-2-like values when a field is missing and so builds another model without a
word; here every field that decides shape, rotation, normalisation or tying must be given, and a variant of the
architecture that no released checkpoint uses is refused by name. Used by everything that builds or loads a model.
"""

import math
import warnings
from typing import Any, ClassVar

from transformers import PretrainedConfig

# Fields without which the network is not defined. `n_kv_heads` may be null, but it must be said.
REQUIRED = (
    "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length",
    "rope", "rope_theta", "rms_norm_eps", "weight_tying", "block_type", "layer_norm_type", "activation_type",
    "mask_token_id", "eos_token_id",
)  # fmt: skip

# The one architecture that is implemented. A field that is not in REQUIRED may also be absent or null: it then means this.
SUPPORTED: dict[str, Any] = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "activation_type": "silu",
    "rope": True,
    "rope_full_precision": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}

POSITIVE = ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length")
MAY_BE_NULL = ("n_kv_heads", "mlp_hidden_size", "embedding_size")

# Kept out of the base class, whose releases disagree on which of these names they swallow.
SET_BY_US = (
    *REQUIRED,
    *SUPPORTED,
    "embedding_size",
    "mlp_ratio",
    "multi_query_attention",
    "eot_token_id",
    "known_tokens",
    "bos_token_id",
)


class LLaDAConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a LLaDA-family mask predictor (arXiv 2502.09992); field names are those of the released checkpoints.

    Every other field is kept as it is and written back on saving. Two are our additions, written when a model is exported so
    that its folder decodes without asking the tokenizer: `eot_token_id`, the second id that ends an answer, and
    `known_tokens`, the first row of the embedding that no token has, if there are such.

    Raises:
        ValueError: a required field is missing, a field asks for an unsupported variant, or shapes contradict each other.
    """

    model_type = "llada"
    has_no_defaults_at_init = True
    is_composition = True  # the same, as releases of transformers before 4.52 call it
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(self, **fields: Any) -> None:
        fields = _own_names(fields, {**self.attribute_map, "num_key_value_heads": "n_kv_heads"})
        head_dim = fields.pop("head_dim", None)  # other software writes it; here it follows
        missing = [name for name in REQUIRED if name not in fields]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}. Every shape-bearing field of a LLaDA checkpoint must be given: "
                "copy the missing ones from the config.json that the weights were trained with."
            )
        for name, wanted in SUPPORTED.items():
            given = fields.get(name, wanted)
            if given != wanted and (given is not None or name in REQUIRED):
                raise ValueError(
                    f"config field {name}={given!r} is not supported (only {wanted!r} is): "
                    "no released LLaDA checkpoint uses that variant."
                )
        ours = {name: fields.pop(name) for name in SET_BY_US if name in fields}
        for name in ("mask_token_id", "eos_token_id"):
            if isinstance(ours[name], list) and len(ours[name]) == 1:
                ours[name] = ours[name][0]
        pad_token_id = fields.pop("pad_token_id", None)
        use_cache = fields.pop("use_cache", False)
        if not isinstance(ours["weight_tying"], bool):
            raise ValueError(f"config field weight_tying={ours['weight_tying']!r} must be true or false.")
        fields.setdefault("tie_word_embeddings", ours["weight_tying"])
        super().__init__(**fields)
        for name, value in ours.items():
            setattr(self, name, value)
        self.pad_token_id = ours["eos_token_id"] if pad_token_id is None else pad_token_id
        self.use_cache = use_cache
        self._check_shapes()
        if head_dim not in (None, self.head_dim):
            raise ValueError(f"config field head_dim={head_dim!r} contradicts d_model over n_heads, {self.head_dim}.")

    def _check_shapes(self) -> None:
        for name in (*POSITIVE, *MAY_BE_NULL):
            value = getattr(self, name, None)
            if name in MAY_BE_NULL and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"config field {name}={value!r} must be a positive integer.")
        for name in ("rope_theta", "rms_norm_eps", "mlp_ratio"):
            value = getattr(self, name, None)
            if name == "mlp_ratio" and value is None:
                continue
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"config field {name}={value!r} must be a positive number.")
        if self.mlp_width < 1:
            raise ValueError(f"config field mlp_ratio={self.mlp_ratio!r} leaves no width for d_model={self.d_model}.")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} over n_heads={self.n_heads} must give an even whole head width (rotary embedding)."
            )
        if self.n_heads % self.num_key_value_heads:
            raise ValueError(f"n_kv_heads={self.num_key_value_heads} must divide n_heads={self.n_heads}.")
        if not isinstance(self.mask_token_id, int) or not 0 <= self.mask_token_id < self.embedding_rows:
            raise ValueError(f"mask_token_id={self.mask_token_id!r} lies outside the {self.embedding_rows} embedding rows.")

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads in effect (``n_kv_heads``, or 1 under ``multi_query_attention``, else ``n_heads``)."""
        if self.n_kv_heads is not None:
            return int(self.n_kv_heads)
        return 1 if getattr(self, "multi_query_attention", None) else int(self.n_heads)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return int(self.d_model) // int(self.n_heads)

    @property
    def mlp_width(self) -> int:
        """Inner width of the gated MLP (``mlp_hidden_size``, else ``mlp_ratio * d_model``)."""
        if self.mlp_hidden_size is not None:
            return int(self.mlp_hidden_size)
        ratio = getattr(self, "mlp_ratio", None)
        if ratio is None:
            raise ValueError("config field mlp_hidden_size is null and mlp_ratio is not given: give one of them.")
        return int(ratio * self.d_model)

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the head (``embedding_size`` if set, else ``vocab_size``)."""
        return int(getattr(self, "embedding_size", None) or self.vocab_size)


def warn_beyond_context(config: "LLaDAConfig", positions: int, what: str = "a prompt and its longest answer reach") -> None:
    """Warns of rows that are longer than the model's configuration says it was made for; rotary positions have no end."""
    if positions > config.max_sequence_length:
        warnings.warn(
            f"{what} beyond the {config.max_sequence_length} positions that "
            "max_sequence_length in the model's config.json names: the model may not have been trained that far.",
            stacklevel=3,
        )


def _own_names(fields: dict[str, Any], aliases: dict[str, str]) -> dict[str, Any]:
    """The fields under LLaDA's names; an alias that contradicts the field itself is refused."""
    named: dict[str, Any] = {}
    for name, value in fields.items():
        own = aliases.get(name, name)
        if own in named and named[own] != value:
            raise ValueError(f"config gives {own} twice: {named[own]!r} and {value!r} (as {name}).")
        named[own] = value
    return named
