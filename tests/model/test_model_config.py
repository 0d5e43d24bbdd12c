"""The config reader: nothing that decides the network is guessed, and nothing that a checkpoint says is lost."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var.model.config import REQUIRED, SUPPORTED, LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM

LLADA_8B = json.loads("""{
  "activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
  "attention_dropout": 0.0, "attention_layer_norm": false, "attention_layer_norm_with_affine": true,
  "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
               "AutoModel": "modeling_llada.LLaDAModelLM"},
  "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "d_model": 4096, "embedding_dropout": 0.0,
  "embedding_size": 126464, "eos_token_id": 126081, "flash_attention": false, "include_bias": false,
  "include_qkv_bias": false, "init_cutoff_factor": null, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02,
  "input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true, "mask_token_id": 126336,
  "max_sequence_length": 4096, "mlp_hidden_size": 12288, "mlp_ratio": 4, "model_type": "llada",
  "multi_query_attention": null, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "pad_token_id": 126081,
  "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": true, "rope_full_precision": true,
  "rope_theta": 500000.0, "scale_logits": false, "transformers_version": "4.46.3", "use_cache": false,
  "vocab_size": 126464, "weight_tying": false
}""")


def test_llada_8b_has_291_tensors_and_8015581184_parameters() -> None:
    with torch.device("meta"):
        model = LLaDAModelLM(LLaDAConfig(**LLADA_8B))
    weights = model.state_dict()
    assert len(weights) == 291
    assert sum(value.numel() for value in weights.values()) == 8_015_581_184
    assert weights["model.transformer.blocks.31.ff_out.weight"].shape == (4096, 12288)
    assert weights["model.transformer.ff_out.weight"].shape == (126464, 4096)
    assert not list(model.buffers())


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_field_is_named(golden_fields: dict[str, Any], name: str) -> None:
    fields = {key: value for key, value in golden_fields.items() if key != name}
    with pytest.raises(ValueError, match=rf"lacks {name}\."):
        LLaDAConfig(**fields)


def test_all_missing_fields_are_named_at_once() -> None:
    with pytest.raises(ValueError, match="lacks " + ", ".join(REQUIRED)):
        LLaDAConfig()


@pytest.mark.parametrize("name", SUPPORTED)
def test_an_unsupported_variant_is_named(golden_fields: dict[str, Any], name: str) -> None:
    other = {str: "other", bool: not SUPPORTED[name], int: 2, float: 0.1}[type(SUPPORTED[name])]
    with pytest.raises(ValueError, match=f"{name}={other!r} is not supported"):
        LLaDAConfig(**{**golden_fields, name: other})
    if name in REQUIRED:
        with pytest.raises(ValueError, match=f"{name}=None is not supported"):
            LLaDAConfig(**{**golden_fields, name: None})
    else:
        LLaDAConfig(**{**golden_fields, name: None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model=0 must be a positive integer"),
        ({"n_layers": 2.5}, "n_layers=2.5 must be a positive integer"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a positive number"),
        ({"n_heads": 3}, "d_model=64 over n_heads=3"),
        ({"d_model": 4}, "d_model=4 over n_heads=4 must give an even"),
        ({"n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 must be a positive integer"),
        ({"mlp_hidden_size": None, "mlp_ratio": None}, "mlp_hidden_size is null and mlp_ratio is not given"),
        ({"mask_token_id": 288}, "mask_token_id=288 lies outside the 288 embedding rows"),
        ({"mask_token_id": None}, "mask_token_id=None lies outside"),
        ({"hidden_size": 32}, "gives d_model twice: 64 and 32"),
        ({"head_dim": 64}, "head_dim=64 contradicts d_model over n_heads, 16"),
        ({"embedding_size": [448]}, r"embedding_size=\[448\] must be a positive integer"),
        ({"n_kv_heads": 6.5}, "n_kv_heads=6.5 must be a positive integer"),
        ({"mlp_hidden_size": True}, "mlp_hidden_size=True must be a positive integer"),
        ({"weight_tying": "false"}, "weight_tying='false' must be true or false"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a positive number"),
    ],
)
def test_contradicting_shapes_are_named(golden_fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**{**golden_fields, **changes})


def test_derived_widths_follow_the_published_rules(golden_fields: dict[str, Any]) -> None:
    config = LLaDAConfig(**{**golden_fields, "n_kv_heads": None, "mlp_hidden_size": None, "embedding_size": None})
    assert (config.num_key_value_heads, config.mlp_width, config.embedding_rows) == (4, 256, 288)
    assert LLaDAConfig(**{**golden_fields, "n_kv_heads": 2}).num_key_value_heads == 2
    assert LLaDAConfig(**{**golden_fields, "embedding_size": 320}).embedding_rows == 320


def test_names_of_other_libraries_read_and_write_the_same_fields(golden_fields: dict[str, Any]) -> None:
    aliases = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    named = {aliases.get(name, name): value for name, value in golden_fields.items()}
    config = LLaDAConfig(**{**named, "head_dim": 16, "eos_token_id": [golden_fields["eos_token_id"]]})
    assert config.eos_token_id == golden_fields["eos_token_id"]
    assert (config.d_model, config.n_layers, config.n_heads) == (64, 3, 4)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 3, 4)
    assert config.max_position_embeddings == 512


def test_padding_is_eos_where_the_config_names_none(golden_fields: dict[str, Any]) -> None:
    assert LLaDAConfig(**{**golden_fields, "pad_token_id": None}).pad_token_id == 256
    assert LLaDAConfig(**{**golden_fields, "pad_token_id": 261}).pad_token_id == 261


def test_every_field_survives_a_round_trip(golden_fields: dict[str, Any], tmp_path: Path) -> None:
    given = {**golden_fields, "bos_token_id": 258, "eot_token_id": 257, "pad_token_id": 261, "a_field_of_someone": [1, "x"]}
    config = LLaDAConfig(**given)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in given.items() if name not in ("torch_dtype", "transformers_version")}
    assert {name: written.get(name) for name in kept} == kept
    assert written["dtype"] == given["torch_dtype"]
    again = LLaDAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert copy.deepcopy(config).to_dict() == config.to_dict()
