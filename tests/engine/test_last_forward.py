"""What a budget, a lighter load or a late row must not change; on random networks, which waver more than trained ones."""

import itertools

import pytest
import torch

from dllm_var import GenerationConfig, Pretrained
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.engine import Engine
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.special_tokens import SpecialTokens

SPECIAL = SpecialTokens(mask=13, eos=12, pad=12, eot=11)
PROMPTS = ([1, 2, 3], [4, 5], [7, 8, 9, 10], [0, 3])


def network(seed: int, scale: float) -> LLaDAModelLM:
    """Random weights, the matrices multiplied by ``scale``."""
    torch.manual_seed(seed)
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=16, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=32, vocab_size=14, max_sequence_length=64,
            rope=True, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False, block_type="llama", layer_norm_type="rms",
            activation_type="silu", mask_token_id=13, eos_token_id=12, pad_token_id=12,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() == 2:
                weights.mul_(scale)
    return model


def test_a_budget_that_an_answer_does_not_exceed_changes_nothing_of_it_when_editing() -> None:
    edited = 0
    for seed, prompt, at in itertools.product(range(4), PROMPTS, (0.05, 0.1)):
        model = network(seed, 2.0)
        config = GenerationConfig(max_gen_length=6, block_length=6, enable_editing=True, threshold=0.25, edit_threshold=at)
        (free,) = decode(model, SPECIAL, config, [prompt])
        engine = Engine(Pretrained(model, None, SPECIAL), max_rows=1, max_length=64)
        engine.submit(prompt, config, forwards=free.forwards)
        (bound,) = engine.run().values()
        assert (bound.raw, bound.stop_reason) == (free.raw, free.stop_reason)
        edited += free.forwards > 1
    assert edited > 5


def test_an_answer_that_its_budget_kept_from_taking_tokens_back_says_so() -> None:
    cut = 0
    for seed, prompt in itertools.product(range(6), PROMPTS):
        model = network(seed, 1.5)
        config = GenerationConfig(method="wino", gen_length=6, wide_in_thres=0.15, narrow_out_thres=0.9)
        (free,) = decode(model, SPECIAL, config, [prompt])
        for budget in range(1, free.forwards):
            engine = Engine(Pretrained(model, None, SPECIAL), max_rows=1, max_length=64)
            engine.submit(prompt, config, forwards=budget)
            (bound,) = engine.run().values()
            assert bound.stop_reason == "forwards"
            cut += 1
    assert cut > 10


def test_under_guidance_a_request_after_the_load_is_over_gets_its_own_block_length_again() -> None:
    loads = [2]
    config = GenerationConfig(max_gen_length=8, block_length=8, cfg_scale=1.0)
    model = network(1, 2.0)
    engine = Engine(Pretrained(model, None, SPECIAL), max_rows=1, max_length=32, load=lambda _: {"block_length": loads[-1]})
    engine.submit([1, 2, 3], config)
    engine.run()
    loads.append(8)
    engine.submit([1, 2, 3], config)
    (later,) = engine.run().values()
    assert later.raw == decode(model, SPECIAL, config, [[1, 2, 3]])[0].raw


@pytest.mark.parametrize("cache", ["none", "d2cache"])
def test_a_row_admitted_to_a_running_loop_is_answered_as_it_is_alone(cache: str) -> None:
    options = {"d2cache": {"current_k": 3}}.get(cache, {})
    config = GenerationConfig(method="vanilla", gen_length=8, cache=cache, **options)
    model = network(1, 2.0)
    loop = DecodeLoop(model, SPECIAL, config, [[1, 2, 3]], [0], room=2, capacity=24)
    loop.step()
    loop.admit([[4, 5, 6, 7]], [1])
    answers = {event.request: event.result for event in loop if event.result is not None}
    (alone,) = decode(model, SPECIAL, config, [[4, 5, 6, 7]], [1])
    assert (answers[1].raw, answers[1].forwards, answers[1].positions) == (alone.raw, alone.forwards, alone.positions)
