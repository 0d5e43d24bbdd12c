"""The shape of a LLaDA model, read from ``config.json`` without a single silent default.

The public remote class falls back to GPT-2-like values when a field is missing and so builds another model without a
word; here every field that decides shape, rotation, normalisation or tying must be given, and a variant of the
architecture that no released checkpoint uses is refused by name.
"""

from typing import Any

from transformers import PretrainedConfig

# Fields without which the network is not defined. `n_kv_heads` may be null, but it must be said.
REQUIRED = (
    "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "max_sequence_length",
    "rope", "rope_theta", "rms_norm_eps", "weight_tying", "block_type", "layer_norm_type", "activation_type",
    "mask_token_id", "eos_token_id",
)  # fmt: skip

# The one architecture that is implemented: field -> (accepted value, is it also meant when the field is absent?).
SUPPORTED: dict[str, tuple[Any, bool]] = {
    "block_type": ("llama", False),
    "layer_norm_type": ("rms", False),
    "activation_type": ("silu", False),
    "rope": (True, False),
    "rope_full_precision": (True, True),
    "alibi": (False, True),
    "include_bias": (False, True),
    "include_qkv_bias": (False, True),
    "bias_for_layer_norm": (False, True),
    "attention_layer_norm": (False, True),
    "input_emb_norm": (False, True),
    "scale_logits": (False, True),
    "block_group_size": (1, True),
}


class LLaDAConfig(PretrainedConfig):  # type: ignore[misc]
    """Configuration of a LLaDA-family mask predictor (arXiv 2502.09992); field names are those of the released checkpoints.

    Raises:
        ValueError: a required field is missing, a field asks for an unsupported variant, or shapes contradict each other.
    """

    model_type = "llada"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(self, **fields: Any) -> None:
        fields = {self.attribute_map.get(name, name): value for name, value in fields.items()}
        missing = [name for name in REQUIRED if name not in fields]
        if missing:
            raise ValueError(
                f"config.json lacks {', '.join(missing)}. Every shape-bearing field of a LLaDA checkpoint must be given: "
                "copy the missing ones from the config.json that the weights were trained with."
            )
        for name, (wanted, _) in SUPPORTED.items():
            if fields.get(name, wanted) not in (wanted, None):
                raise ValueError(
                    f"config field {name}={fields[name]!r} is not supported (only {wanted!r} is): "
                    "no released LLaDA checkpoint uses that variant."
                )
        ids = {name: fields.pop(name) for name in ("eos_token_id", "pad_token_id") if name in fields}
        use_cache = fields.pop("use_cache", False)
        fields.setdefault("tie_word_embeddings", bool(fields["weight_tying"]))
        super().__init__(**fields)
        # Set after the base class, whose releases disagree on which of these names they swallow.
        for name, value in fields.items():
            if name in REQUIRED or name in SUPPORTED or name in ("embedding_size", "mlp_ratio", "multi_query_attention"):
                setattr(self, name, value)
        self.eos_token_id = ids["eos_token_id"]
        self.pad_token_id = ids.get("pad_token_id", self.eos_token_id)
        self.use_cache = use_cache
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name in ("d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"config field {name}={getattr(self, name)!r} must be a positive integer.")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                f"d_model={self.d_model} over n_heads={self.n_heads} must give an even whole head width (rotary embedding)."
            )
        if self.n_heads % self.num_key_value_heads:
            raise ValueError(f"n_kv_heads={self.num_key_value_heads} must divide n_heads={self.n_heads}.")
        if self.mlp_hidden_size is None and getattr(self, "mlp_ratio", None) is None:
            raise ValueError("config field mlp_hidden_size is null and mlp_ratio is not given: give one of them.")
        if not 0 <= self.mask_token_id < self.embedding_rows:
            raise ValueError(f"mask_token_id={self.mask_token_id} lies outside the {self.embedding_rows} embedding rows.")

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
        return int(self.mlp_hidden_size if self.mlp_hidden_size is not None else self.mlp_ratio * self.d_model)

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the head (``embedding_size`` if set, else ``vocab_size``)."""
        return int(getattr(self, "embedding_size", None) or self.vocab_size)
