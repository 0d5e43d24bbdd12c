"""Int8 weights and compiled networks: what they change, and how little."""

import sys
from pathlib import Path

import pytest
import torch

from dllm_var import GenerationConfig, Pretrained, generate, load_pretrained
from dllm_var.model.checkpoint import load_model
from dllm_var.model.speed import FASTEST, compile_network, quantize_int8

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_llada"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_take_a_byte_each_and_barely_move_the_logits(dtype: torch.dtype) -> None:
    plain, small = (load_model(GOLDEN, dtype=dtype) for _ in range(2))
    quantize_int8(small)
    ids = torch.arange(40)[None] + 60
    with torch.no_grad():
        exact, rounded = plain(ids).logits.float(), small(ids).logits.float()
    assert rounded.shape == exact.shape
    assert 0 < float((exact - rounded).norm() / exact.norm()) < 0.05
    for block, before in zip(small.model.transformer["blocks"], plain.model.transformer["blocks"], strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"):
            stored = getattr(block, name).weight.qdata
            assert (stored.dtype, stored.shape) == (torch.int8, getattr(before, name).weight.shape)
    assert small.dtype == dtype  # embedding, norms and head stay as they are
    assert type(small.model.head_weight) is type(plain.model.head_weight)


def test_int8_weights_decode_the_very_tokens_of_their_rounded_values(recorded: Pretrained) -> None:
    small, rounded = (Pretrained(load_model(GOLDEN), None, recorded.special) for _ in range(2))
    quantize_int8(small.model)
    for name, module in small.model.named_modules():
        if hasattr(getattr(module, "weight", None), "qdata"):
            rounded.model.get_submodule(name).weight.data.copy_(module.weight.dequantize())
    config = GenerationConfig(max_gen_length=16, block_length=8)
    ours, theirs = (generate(model, [[97, 98, 99], [100] * 9], config) for model in (small, rounded))
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]


def test_a_compiled_network_gives_the_same_answers(recorded: Pretrained) -> None:
    compiled = Pretrained(load_model(GOLDEN), None, recorded.special)
    compile_network(compiled.model, dynamic=True, backend="eager")  # the graph; making kernels of it would take minutes
    prompts = [[97, 98, 99], [100] * 9]
    config = GenerationConfig(max_gen_length=16, block_length=8, threshold=0.6)
    ours, theirs = (generate(model, prompts, config) for model in (compiled, recorded))
    assert [a.tokens for a in ours] == [a.tokens for a in theirs]


def test_both_are_options_of_opening_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr("dllm_var.pretrained.quantize_int8", lambda model: called.append("int8"))
    monkeypatch.setattr("dllm_var.pretrained.compile_network", lambda model, dynamic: called.append(f"compile {dynamic}"))
    load_pretrained("tiny")
    assert called == []
    load_pretrained("tiny", int8=True, compile=True)
    assert called == ["int8", "compile True"]  # what is compiled is what will run


def test_without_torchao_int8_says_what_to_install(recorded: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match="int8=True needs torchao: pip install torchao"):
        quantize_int8(recorded.model)


def test_a_device_without_an_entry_keeps_the_stored_format() -> None:
    assert FASTEST["cpu"] == torch.float32
    assert FASTEST.get("cuda") is FASTEST.get("mps") is None
