"""What every method owes its user, whatever the cache: checked on each pair that the compatibility matrix allows."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding.compose import compose
from dllm_var.decoding.kv_policies import Prefix
from dllm_var.decoding.loop import DecodeLoop
from dllm_var.decoding.methods import COLUMNS, MATRIX
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Plan

# Every policy of the matrix, as options of a configuration.
VARIANTS: dict[str, dict[str, Any]] = {
    "dllm_var": {"method": "dllm_var"},
    "dllm_var factor": {"method": "dllm_var", "factor": 1.0},
    "dllm_var gamma": {"method": "dllm_var", "gamma": 0.1, "remasking": "entropy"},
    "dllm_var klass": {"method": "dllm_var", "kl_threshold": 0.05, "threshold": 0.5},
    "dllm_var wino": {"method": "dllm_var", "wide_in_thres": 0.3},
    "dllm_var editing": {"method": "dllm_var", "enable_editing": True, "threshold": 0.5},
    "dllm_var prior": {"method": "dllm_var", "sigma": 3.0},
    "vanilla": {"method": "vanilla"},
    "vanilla guided": {"method": "vanilla", "cfg_scale": 0.7},
    "vanilla random": {"method": "vanilla", "remasking": "random"},
    "vanilla threshold": {"method": "vanilla", "threshold": 0.5},
    "vanilla factor": {"method": "vanilla", "factor": 1.0},
    "vanilla prior": {"method": "vanilla", "sigma": 3.0, "num_transfer_tokens": 2},
    "vanilla until EOS": {"method": "vanilla", "stop_until_eos": True, "threshold": 0.5},
    "vanilla sampled": {"method": "vanilla", "temperature": 0.8, "top_p": 0.9, "top_k": 20},
    "ar": {"method": "ar"},
    "pc_sampler": {"method": "pc_sampler", "frequency_file": "FREQUENCIES"},
    "klass": {"method": "klass", "kl_threshold": 0.05, "threshold": 0.5},
    "eb_sampler": {"method": "eb_sampler", "gamma": 0.1},
    "wino": {"method": "wino", "wide_in_thres": 0.3},
    "daedal": {"method": "daedal", "threshold": 0.5, "low_conf_expand_thres": 0.5, "expansion_factor": 3},
}
CACHES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "prefix", "use_dual": True},
    "d2cache": {"cache": "d2cache", "current_k": 4, "cache_sigma": 3.0, "inflate_w": 1},
    "dllm": {"cache": "dllm", "kp": 4, "kr": 2, "rou": 0.25},
    "block_commit": {"cache": "block_commit"},
}
GROWING = [name for name, options in VARIANTS.items() if options["method"] == "dllm_var"]
PAIRS = [
    (variant, column)
    for variant in VARIANTS
    for column in COLUMNS
    if column == "none" or (column == "block_commit") == (variant in GROWING)
    if not (variant == "daedal" and column not in ("none", "prefix"))
    if not (variant == "klass" and column == "dllm")
    if not (variant == "wino" and column in ("d2cache", "dllm"))
]
MASK, VOCABULARY = 270, 288


@pytest.fixture(scope="module")
def frequencies(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("frequencies") / "token_freq.json"
    counts = {str(token): 1 + 7 * token % 50 for token in range(32, 123)}
    file.write_text(json.dumps({"num_token": sum(counts.values()), "p_baseline_dict": counts}), encoding="utf-8")
    return str(file)


def config_of(variant: str, column: str, frequencies: str, length: int = 12, block: int = 5) -> GenerationConfig:
    options = {**VARIANTS[variant], **CACHES[column]}
    if "frequency_file" in options:
        options["frequency_file"] = frequencies
    if options["method"] == "daedal":
        options |= {"initial_gen_length": min(4, length), "max_gen_length": length, "num_check_last_eot": 4}
    else:
        options["max_gen_length" if variant in GROWING else "gen_length"] = length
    return GenerationConfig(block_length=min(block, length) if variant not in GROWING else block, **options)


def question(text: str) -> list[int]:
    return [258, 259, *text.encode(), 257, 260]


def check_sound(config: GenerationConfig, prompts: Sequence[list[int]], answers: Sequence[Generation]) -> None:
    """What holds for any answer of any method."""
    for answer in answers:
        assert len(answer.raw) <= config.response_limit
        assert all(0 <= token < VOCABULARY and token != MASK for token in answer.raw)
        assert answer.raw[: len(answer.tokens)] == answer.tokens
        assert answer.stop_reason in ("eos", "length")
        assert answer.stop_reason == "length" or answer.raw[len(answer.tokens)] in (256, 257)
        decided = [step for step in answer.steps if step >= 0]
        assert all(step < answer.forwards for step in decided)
        # Every forward but those that size a canvas decides something, so there are at most as many as there were masks.
        sizing = config.response_limit if config.method == "daedal" else 0
        assert answer.forwards <= config.response_limit + sizing + 1
        assert answer.positions >= answer.forwards
        assert all(0.0 <= c <= 1.0 + 1e-6 for c in answer.confidence)
    assert len(answers) == len(prompts)


def test_the_pairs_tested_here_are_those_that_the_matrix_allows(frequencies: str) -> None:
    for variant in VARIANTS:
        for column in COLUMNS:
            if (variant, column) in PAIRS:
                policies = config_of(variant, column, frequencies).policies
                assert all(MATRIX[policy][column].verdict != "refused" for policy in policies)
            else:
                with pytest.raises(ValueError, match=r"does not go with method=.*use cache="):
                    config_of(variant, column, frequencies)
    tested = {policy for pair in PAIRS for policy in config_of(*pair, frequencies).policies}
    assert tested == set(MATRIX)


@pytest.mark.parametrize(("variant", "column"), PAIRS)
def test_a_batch_of_unequal_prompts_answers_each_as_if_it_were_alone(
    recorded64: Pretrained, frequencies: str, variant: str, column: str
) -> None:
    config = config_of(variant, column, frequencies)
    prompts = [question("add 12 and 7"), question("rev abc"), [], question("say hello world again")]
    together = generate(recorded64, prompts, config)
    check_sound(config, prompts, together)
    for number, prompt in enumerate(prompts):
        assert generate(recorded64, [prompt], config, requests=[number])[0] == together[number]
    backwards = generate(recorded64, prompts[::-1], config, requests=[3, 2, 1, 0])
    assert backwards[::-1] == together


@given(
    st.sampled_from(PAIRS),
    st.lists(st.text("abc123 ", max_size=9), min_size=1, max_size=3),
    st.integers(1, 11),
    st.integers(1, 13),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lengths_and_blocks_give_sound_answers_that_no_neighbour_changes(
    recorded64: Pretrained, frequencies: str, pair: tuple[str, str], texts: list[str], length: int, block: int
) -> None:
    config = config_of(*pair, frequencies, length, block)
    prompts = [question(text) for text in texts]
    together = generate(recorded64, prompts, config)
    check_sound(config, prompts, together)
    last = len(prompts) - 1
    assert generate(recorded64, prompts[last:], config, requests=[last])[0] == together[last]


@pytest.mark.parametrize(("variant", "column"), PAIRS)
def test_a_model_that_loves_the_mask_neither_writes_it_nor_goes_on_for_ever(
    recorded: Pretrained, frequencies: str, variant: str, column: str
) -> None:
    model = copy.deepcopy(recorded.model)
    with torch.no_grad():
        model.model.transformer["ff_out"].weight[MASK] *= -1000  # training has made its logit the smallest by far
    config, prompts = config_of(variant, column, frequencies), [question("dup a"), question("count 3")]
    logits = model(torch.tensor([prompts[0] + 12 * [MASK]])).logits
    assert bool((logits[0, len(prompts[0]) :].argmax(-1) == MASK).all()), "the model does love it"
    check_sound(config, prompts, generate(replace(recorded, model=model), prompts, config))


@pytest.mark.parametrize(("variant", "column"), PAIRS)
def test_a_bfloat16_model_decodes_soundly(recorded: Pretrained, frequencies: str, variant: str, column: str) -> None:
    model = copy.deepcopy(recorded.model).to(torch.bfloat16)
    config, prompts = config_of(variant, column, frequencies), [question("sub 9 4"), question("seq 3")]
    check_sound(config, prompts, generate(replace(recorded, model=model), prompts, config))


class EveryForward(Prefix):
    """A prefix cache that is renewed in every forward."""

    def plan(self, state: DecodeState) -> Plan:
        plan = Plan.span(state, torch.zeros_like(state.end), state.end)
        return replace(plan, slots=plan.positions.where(plan.real, -1))


@pytest.mark.parametrize("variant", [v for v, column in PAIRS if column == "prefix"])
def test_a_cache_that_is_renewed_in_every_forward_changes_nothing(
    recorded64: Pretrained, frequencies: str, variant: str
) -> None:
    none, prefix = (config_of(variant, column, frequencies) for column in ("none", "prefix"))
    prompts = [question("add 12 and 7"), question("rev abc")]
    policies = compose(prefix, recorded64.special, recorded64.model.config)
    policies = replace(policies, kv=EveryForward(dual=False))
    loop = DecodeLoop(recorded64.model, recorded64.special, prefix, prompts, policies=policies)
    kept = {event.request: event.result for event in loop if event.result is not None}
    for number, answer in enumerate(generate(recorded64, prompts, none)):
        found = kept[number]
        assert found is not None
        assert (found.raw, found.steps, found.forwards) == (answer.raw, answer.steps, answer.forwards)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("vanilla random", "vanilla sampled", "pc_sampler")])
def test_where_nothing_distinguishes_the_tokens_they_are_decided_from_left_to_right(
    rule_model: Any, special: Any, frequencies: str, variant: str
) -> None:
    config = config_of(variant, "none", frequencies, length=8, block=4)
    loop = DecodeLoop(rule_model(lambda ids, positions: torch.zeros(*ids.shape, 12)), special, config, [[1, 2]])
    (answer,) = (event.result for event in loop if event.result is not None)
    steps = [step for step in answer.steps if step >= 0]
    assert steps == sorted(steps)
