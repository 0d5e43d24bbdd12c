"""KLASS: a token is ready when it is confident and its distribution has stopped moving."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding.klass import LOG_P
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.decoding.noise import keys, uniform
from dllm_var.decoding.proposal import Candidates
from dllm_var.engine import Engine

V, MASK = 12, 11
PROMPT = [5, 5]
SETTINGS = [
    {"kl_history_length": 1, "kl_warmup": False},
    {"kl_history_length": 2},
    {"kl_history_length": 2, "kl_warmup": False, "unmask_strategy": "max_conf"},
    {"kl_history_length": 2, "kl_warmup": False, "unmask_strategy": "min_kl", "num_transfer_tokens": 2},
    {"kl_history_length": 1, "kl_warmup": False, "unmask_strategy": "random", "seed": 7},
    {"kl_history_length": 3, "kl_warmup": False},
    {"kl_history_length": 3, "num_transfer_tokens": 2},
]


def _config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"method": "klass", "gen_length": 15, "threshold": 0.5, "kl_threshold": 0.05} | options)


def _tables(seed: int, count: int = 1) -> list[Tensor]:
    """Logits [forwards, positions, V] that mostly stand still and now and then jump."""
    draw = torch.Generator().manual_seed(seed)
    shape = (20, 20, V)
    base = 2.0 * torch.randn(shape[1:], generator=draw)
    jump = torch.rand(shape[:2], generator=draw) < 0.15
    drift = torch.where(jump, 1.5, 0.05)[..., None] * torch.randn(shape, generator=draw)
    return [base + i + (1 + i) * drift for i in range(count)]


def _scripted(rule_model: Any, tables: list[Tensor]) -> Any:
    """A model that says in its t-th forward what the tables say; the second one where the prompt is hidden."""

    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        now = torch.stack([table[len(model.calls) - 1] for table in tables])
        return now[torch.arange(len(ids))[:, None].expand_as(positions), positions]

    model = rule_model(rule)
    return model


def _obvious(logits: Tensor, config: GenerationConfig, behind: bool = True) -> tuple[list[int], list[int]]:
    """Tokens and steps of one prompt; everything is remembered. `behind`: later forwards of a block look behind it."""
    p = logits.double().softmax(-1)
    first, end, history = len(PROMPT), len(PROMPT) + config.gen_length, config.kl_history_length
    tokens, steps, moves, t = [0] * end, [0] * end, [[] for _ in range(end)], 0
    last: dict[int, Tensor] = {}
    for start in range(first, end, config.block_length):
        window, age = list(range(start, min(start + config.block_length, end))), 0
        while window:
            looked = range(first, end) if behind or age == 0 else range(start, min(start + config.block_length, end))
            for g in range(first, end):
                known = g in looked and g in last
                moves[g].append(float((p[t, g] * (p[t, g] / last[g]).log()).sum()) if known else float("inf"))
            last = {g: p[t, g] for g in looked}
            choice = {g: int(p[t, g, :MASK].argmax()) for g in window}
            sure = {g: float(p[t, g, choice[g]]) for g in window}
            ready = [
                g
                for g in window
                if len(moves[g]) >= history
                and all(move < config.kl_threshold for move in moves[g][-history:])
                and sure[g] > config.threshold
                and (not config.kl_warmup or age >= history - 1)
            ]
            if ready and config.unmask_strategy != "all":
                draws = uniform(keys(~config.seed, torch.zeros(1, dtype=torch.int64), torch.tensor([t]), torch.arange(end)))
                cost = {
                    "max_conf": {g: -sure[g] for g in ready},
                    "min_kl": {g: moves[g][-1] for g in ready},
                    "random": {g: -float(draws[g]) for g in ready},
                }
                ready = [min(ready, key=cost[config.unmask_strategy].__getitem__)]
            for g in ready or sorted(window, key=lambda g: -sure[g])[: config.num_transfer_tokens or 1]:
                tokens[g], steps[g] = choice[g], t
                window.remove(g)
            t, age = t + 1, age + 1
    return tokens[first:], steps[first:]


def _run(model: Any, special: Any, config: GenerationConfig) -> Generation:
    return decode(model, special, config, [PROMPT])[0]


@pytest.mark.parametrize("setting", SETTINGS, ids=range(len(SETTINGS)))
def test_decoding_is_that_of_an_implementation_that_remembers_everything(
    setting: dict[str, Any], rule_model: Any, special: Any
) -> None:
    differs = False
    for block in (2, 4, 15):
        config = _config(block_length=block, **setting)
        for seed in range(3):
            [table] = _tables(seed)
            answer = _run(_scripted(rule_model, [table]), special, config)
            assert (answer.raw, answer.steps) == _obvious(table, config)
            differs |= answer.steps != _obvious(table, replace(config, threshold=1.0))[1]
    assert differs  # some token was ready


def test_with_a_prefix_cache_it_is_the_same_and_a_dual_cache_breaks_the_history(rule_model: Any, special: Any) -> None:
    config = _config(block_length=5, kl_warmup=False, cache="prefix")
    dual = replace(config, use_dual=True)
    forwards = []
    for seed in range(4):
        [table] = _tables(seed)
        prefix, both = (_run(_scripted(rule_model, [table]), special, use) for use in (config, dual))
        assert (prefix.raw, prefix.steps) == _obvious(table, config)
        assert (both.raw, both.steps) == _obvious(table, dual, behind=False)
        forwards.append((prefix.forwards, both.forwards))
    assert sum(a for a, _ in forwards) < sum(b for _, b in forwards)


def test_with_a_cache_that_looks_at_every_mask_it_is_as_without(recorded64: Pretrained) -> None:
    config = _config(gen_length=12, block_length=2, kl_warmup=False, kl_threshold=0.05, threshold=0.5)
    renewed = replace(config, cache="d2cache", current_k=64, rollout_p=1.0)
    for prompt in PROMPTS:
        plain, cached = (generate(recorded64, [prompt], use)[0] for use in (config, renewed))
        assert (cached.raw, cached.steps) == (plain.raw, plain.steps)


def test_guided_logits_are_what_must_stand_still(rule_model: Any, special: Any) -> None:
    config = _config(block_length=5, cfg_scale=0.5)
    for seed in range(4):
        plain, hidden = _tables(seed, 2)
        answer = _run(_scripted(rule_model, [plain, hidden]), special, config)
        assert (answer.raw, answer.steps) == _obvious(hidden + 1.5 * (plain - hidden), config)


@pytest.mark.parametrize("never", [{"kl_threshold": 0.0}, {"threshold": 1.0}])
def test_without_a_ready_token_the_schedule_decides(never: dict[str, float], rule_model: Any, special: Any) -> None:
    still = torch.full((20, 20, V), -50.0)
    still[..., 3] = 50.0  # a probability of exactly 1, and not the least movement
    config = _config(block_length=6, steps=12, **never)
    schedule = GenerationConfig(method="vanilla", gen_length=15, block_length=6, steps=12)
    one, other = (_run(_scripted(rule_model, [still]), special, use) for use in (config, schedule))
    assert one.steps == other.steps
    assert one.forwards == 11
    ready = _run(_scripted(rule_model, [still]), special, _config(block_length=6, steps=12))
    assert ready.forwards == 3 + 2 + 2  # the first ones of a block by schedule, the others at once


def test_the_schedule_is_that_of_the_full_block_however_many_were_decided_before(rule_model: Any, special: Any) -> None:
    sure = torch.zeros(20, 20, V)
    sure[:, 4:10, 3] = 50.0  # six tokens are ready in the second forward, the others never
    config = _config(gen_length=16, steps=4, kl_history_length=1)
    steps = _run(_scripted(rule_model, [sure]), special, config).steps
    assert [steps.count(t) for t in range(5)] == [4, 2, 4, 4, 2]


@pytest.mark.parametrize(("history", "warm"), [(1, 4), (2, 7), (3, 10)])
def test_what_stands_still_is_ready_as_soon_as_it_was_seen_often_enough(
    history: int, warm: int, rule_model: Any, says: Any, special: Any
) -> None:
    model = rule_model(says({}, default=(3, 5.0)))
    config = _config(block_length=5, kl_history_length=history, kl_threshold=1e-9)
    assert _run(model, special, config).forwards == warm  # every later block waits for its history-th forward
    answer = _run(model, special, replace(config, kl_warmup=False))
    assert answer.steps == [*range(history), *[history] * (5 - history), *[history + 1] * 5, *[history + 2] * 5]


def test_any_movement_is_allowed_then_it_is_the_strict_threshold_from_the_second_look_on(
    rule_model: Any, special: Any
) -> None:
    [table] = _tables(1)
    config = _config(kl_threshold=float("inf"), kl_history_length=1, kl_warmup=False)
    answer = _run(_scripted(rule_model, [table]), special, config)
    confidence = table[1, 2:17].softmax(-1)[:, :MASK].max(-1).values
    later = [g for g in range(15) if answer.steps[g] > 0]
    assert len(later) == 14  # nothing has a history in the first forward
    assert [g for g in later if answer.steps[g] == 1] == [g for g in later if confidence[g] > 0.5]


def _candidates(logits: Tensor, positions: list[int]) -> Candidates:
    logits = logits - logits.max(-1, keepdim=True).values
    rows = torch.zeros(len(positions), dtype=torch.int64)
    return Candidates(logits, logits.logsumexp(-1), logits.argmax(-1), rows.float(), rows, torch.tensor(positions), MASK)


@torch.inference_mode()
def test_movement_is_the_divergence_of_now_from_before_also_with_forbidden_tokens(rule_model: Any, special: Any) -> None:
    loop = DecodeLoop(_scripted(rule_model, _tables(0)), special, _config(), [PROMPT])
    loop.step()
    moved = loop.policies.selector.measures["movement"]
    before, now = 3 * torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    before[:, 4] = now[:, 4] = float("-inf")
    moved(_candidates(before, [2, 9, 16]))
    seen = moved(_candidates(now[[2, 0]], [16, 2]))
    p, q = now.double().softmax(-1), before.double().softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    assert seen.dtype == torch.float32
    assert torch.allclose(seen.double(), expected[[2, 0]], atol=1e-6)
    assert moved(_candidates(now[[2]], [16])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "width"), [({}, 8), ({"kl_warmup": False, "kl_history_length": 3}, 15), ({"block_length": 15}, 15)]
)
def test_no_more_is_remembered_than_may_count(options: dict[str, Any], width: int, rule_model: Any, special: Any) -> None:
    config = _config(**{"block_length": 4} | options)
    loop = DecodeLoop(_scripted(rule_model, _tables(0)), special, config, [PROMPT])
    loop.step()
    remembered = loop.state.notes[LOG_P]
    assert (remembered.shape, remembered.dtype) == (
        (1, width + 1, V),
        torch.float32,
    )  # one to spare


PROMPTS = [[258, 259, *text, 257, 260] for text in (b"rev abc", b"rep xy 3 times", b"")]


@pytest.mark.parametrize(
    "config",
    [
        _config(gen_length=12, block_length=4),
        _config(gen_length=12, block_length=6, kl_warmup=False, cache="prefix", early_stop=True, steps=8),
        _config(gen_length=12, block_length=6, kl_history_length=1, cfg_scale=0.5),
        GenerationConfig(block_length=5, max_gen_length=12, kl_threshold=0.05, threshold=0.5, kl_history_length=1),
    ],
    ids=range(4),
)
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(config: GenerationConfig, recorded64: Pretrained) -> None:
    together = generate(recorded64, PROMPTS, config)
    alone = [generate(recorded64, [prompt], config, requests=[i])[0] for i, prompt in enumerate(PROMPTS)]
    assert [(a.raw, a.steps) for a in together] == [(a.raw, a.steps) for a in alone]
    assert len({a.forwards for a in together}) > 1  # rows leave at different times
    assert any(a.forwards < len(a.raw) for a in together)


def test_rows_with_less_room_than_a_block_join_the_others(recorded64: Pretrained) -> None:
    config = GenerationConfig(block_length=32, max_gen_length=64, kl_threshold=0.05, threshold=0.4)
    configs = [config, replace(config, max_gen_length=7), config]
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[1]]
    engine = Engine(recorded64, max_rows=3, max_length=128)
    numbers = [engine.submit(prompt, own) for prompt, own in zip(prompts, configs, strict=True)]
    answers = engine.run()
    assert len(engine.lanes) == 1
    together = [answers[number] for number in numbers]
    alone = [generate(recorded64, [prompts[i]], configs[i], requests=[i])[0] for i in range(3)]
    assert [(a.raw, a.steps) for a in together] == [(a.raw, a.steps) for a in alone]
    assert len(together[1].raw) == 7


def test_one_token_and_a_model_that_loves_the_mask(rule_model: Any, says: Any, special: Any) -> None:
    for length in (1, 5):
        config = _config(gen_length=length, block_length=2)
        answer = decode(rule_model(says({}, default=(special.mask, 50.0))), special, config, [[1], [1, 2]])[1]
        assert len(answer.raw) == answer.forwards == length
        assert special.mask not in answer.raw
