"""DAEDAL: the canvas grows until the model expects an end, then where it is in doubt; nothing decided is ever lost."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding.compose import compose
from dllm_var.decoding.daedal import eos_confidence
from dllm_var.decoding.kv_policies import Prefix
from dllm_var.decoding.loop import DecodeLoop
from dllm_var.decoding.proposal import Candidates
from dllm_var.decoding.results import Event
from dllm_var.decoding.state import FORWARDS, DecodeState
from dllm_var.decoding.step import Plan
from dllm_var.text.special_tokens import SpecialTokens

PROMPTS = [[258, 259, *text, 257, 260] for text in (b"add 12 7=", b"rev abc", b"say a long thing")]
SMALL: dict[str, Any] = {"method": "daedal", "initial_gen_length": 6, "num_check_last_eot": 4, "expansion_factor": 3}
# Together they reach every branch: growth in both stages, the limit in each, short last blocks, no tail, a long tail.
CONFIGS = [
    GenerationConfig(**SMALL, max_gen_length=26, block_length=8, threshold=0.7, low_conf_expand_thres=0.4),
    GenerationConfig(**SMALL, max_gen_length=23, block_length=5, threshold=0.5, low_conf_expand_thres=0.9, eos_tail=0),
    GenerationConfig(**SMALL, max_gen_length=14, block_length=4, initial_eot_expand_thres=2.0, low_conf_expand_thres=0.9),
    GenerationConfig(**SMALL, max_gen_length=30, block_length=32, threshold=0.6, low_conf_expand_thres=0.5, eos_tail=7),
    GenerationConfig(**SMALL, max_gen_length=6, block_length=4, threshold=2.0),
]
EVERYWHERE = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


def _slowly(model: Pretrained, prompt: list[int], config: GenerationConfig) -> tuple[list[int], list[int], list[int]]:
    """One prompt by the published algorithm over plain lists: the response, its length in every forward, cap hits."""
    use, mask, eos = config, model.special.mask, model.special.eos
    lengths: list[int] = []
    capped: list[int] = []

    def look(response: list[int]) -> tuple[Tensor, Tensor, float]:
        lengths.append(len(response))
        with torch.inference_mode():
            logits = model.model(torch.tensor([prompt + response])).logits[0, len(prompt) :]
        p = logits.float().softmax(-1)
        p_eos = p[:, eos].tolist()
        p[:, mask] = -1.0
        best, ids = p.max(-1)
        ends = [p_eos[i] for i in reversed(range(len(response))) if ids[i] == eos]
        return ids, best, sum(ends[: use.num_check_last_eot]) / use.num_check_last_eot

    response = [mask] * use.initial_gen_length
    while look(response)[2] < use.initial_eot_expand_thres and len(response) < use.max_gen_length:
        response += [mask] * min(use.expansion_factor, use.max_gen_length - len(response))
    tail = min(use.eos_tail or 0, use.max_gen_length - len(response))
    response += [eos] * tail
    start = 0
    while mask in response:
        window = [i for i in range(start, min(start + use.block_length, len(response))) if response[i] == mask]
        if not window:
            start += use.block_length
            continue
        ids, best, confidence = look(response)
        sure = [i for i in window if best[i] > use.threshold] or [max(window, key=lambda i: float(best[i]))]
        doubtful = [i for i in window if i not in sure and best[i] < use.low_conf_expand_thres]
        room = use.max_gen_length - len(response)
        for i in sure:
            response[i] = int(ids[i])
        if confidence < use.decode_eot_expand_thres and room and doubtful:
            at = min(doubtful, key=lambda i: float(best[i]))
            dropped = min(tail, max(0, use.expansion_factor - 1 - room))
            tail -= dropped
            del response[len(response) - dropped :]
            response[at : at + 1] = [mask] * min(use.expansion_factor, 1 + room + dropped)
            if room + dropped < use.expansion_factor - 1:
                capped.append(len(lengths))
    return response, lengths, capped


def _lengths(loop: DecodeLoop) -> tuple[list[int], Generation]:
    """The response length that each forward of a single row saw, and its answer."""
    watched = _watch(loop)
    events = list(loop)
    return [len(seen.response) for seen in watched], _answer(events)


@dataclass(frozen=True)
class Seen:
    """What one forward of a single row was given: the response, the first column computed, the block and where it starts."""

    response: list[int]
    first: int
    block: int
    start: int


def _watch(loop: DecodeLoop) -> list[Seen]:
    """Filled while a loop of a single row runs, one for each forward."""
    seen: list[Seen] = []
    extend = loop.policies.length.extend

    def note(plan: Plan, state: DecodeState) -> Plan:
        response = state.tokens[0, int(state.prompt[0]) : int(state.end[0])].tolist()
        assert int(plan.positions.max()) == int(state.end[0]) - 1
        seen.append(Seen(response, int(plan.positions[0, 0]), int(state.block_index[0]), int(state.block_start[0])))
        return extend(plan, state)

    loop.policies.length.extend = note  # type: ignore[method-assign]
    return seen


def _answer(events: list[Event]) -> Generation:
    return next(event.result for event in events if event.result is not None)


@EVERYWHERE
def test_it_is_the_published_algorithm(config: GenerationConfig, recorded: Pretrained) -> None:
    for prompt in PROMPTS:
        tokens, lengths, _ = _slowly(recorded, prompt, config)
        seen, answer = _lengths(DecodeLoop(recorded.model, recorded.special, config, [prompt]))
        assert (answer.raw, seen) == (tokens, lengths)


def test_the_configurations_of_these_tests_reach_every_branch(recorded: Pretrained) -> None:
    runs = [(config, *_slowly(recorded, prompt, config)) for config in CONFIGS for prompt in PROMPTS]
    first, second = 0, 0
    for config, tokens, lengths, _ in runs:
        steps = [b - a for a, b in pairwise(lengths)]
        first += 3 in steps  # only the first stage adds expansion_factor masks, the second one fewer
        second += 2 in steps
        assert recorded.special.mask not in tokens
        assert len(tokens) <= config.max_gen_length
    assert first > 4
    assert second > 4
    assert any(capped for *_, capped in runs)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (CONFIGS[0], {"cache": "prefix"}),
        (CONFIGS[1], {"cache": "prefix", "temperature": 0.7}),
        (CONFIGS[2], {"cfg_scale": 0.5, "cache": "prefix"}),
        (CONFIGS[3], {"cfg_scale": 0.5}),
        (CONFIGS[0], {"early_stop": True}),
    ],
    ids=range(5),
)
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(
    config: GenerationConfig, more: dict[str, Any], recorded64: Pretrained
) -> None:
    config = replace(config, **more)
    for answer, number in zip(generate(recorded64, PROMPTS, config), range(len(PROMPTS)), strict=True):
        alone = generate(recorded64, [PROMPTS[number]], config, requests=[number])[0]
        for name in ("raw", "steps", "blocks", "forwards", "positions", "stop_reason"):
            assert getattr(answer, name) == getattr(alone, name)


@EVERYWHERE
def test_no_forward_loses_reorders_or_outgrows_anything(config: GenerationConfig, recorded: Pretrained) -> None:
    mask = recorded.special.mask
    for prompt in PROMPTS:
        loop = DecodeLoop(recorded.model, recorded.special, config, [prompt])
        watched = _watch(loop)
        for event in loop:
            before = watched[-1].response
            for token in event.committed:
                assert before[token.position] == mask
                before[token.position] = token.id
            kept = [token for i, token in enumerate(event.response) if i not in event.inserted]
            assert kept == before[: len(kept)]
            assert before[len(kept) :] in [[recorded.special.eos] * n for n in range((config.eos_tail or 0) + 1)]
            assert all(event.response[i] == mask for i in event.inserted)
            assert len(event.response) <= config.max_gen_length


def test_growing_nowhere_is_threshold_decoding_of_a_fixed_canvas(recorded: Pretrained) -> None:
    still = GenerationConfig(
        method="daedal", initial_gen_length=13, max_gen_length=40, block_length=5, threshold=0.6, eos_tail=0,
        initial_eot_expand_thres=0.0, decode_eot_expand_thres=0.0,
    )  # fmt: skip
    fixed = GenerationConfig(method="vanilla", gen_length=13, block_length=5, threshold=0.6)
    for ours, plain in zip(generate(recorded, PROMPTS, still), generate(recorded, PROMPTS, fixed), strict=True):
        assert ours.raw == plain.raw
        assert [step - 1 for step in ours.steps] == plain.steps  # the first forward only looks for EOS
        assert ours.blocks == plain.blocks


class Refreshed(Prefix):
    """The prefix cache with every forward as if it were the first of its block."""

    def plan(self, state: DecodeState) -> Plan:
        state.block_forwards = torch.zeros_like(state.block_forwards)
        return super().plan(state)


@EVERYWHERE
def test_a_prefix_cache_that_is_renewed_in_every_forward_changes_nothing(
    config: GenerationConfig, recorded64: Pretrained
) -> None:
    special, model = recorded64.special, recorded64.model
    cached = replace(config, cache="prefix")
    policies = replace(compose(cached, special), kv=Refreshed(dual=False))
    events = list(DecodeLoop(model, special, cached, PROMPTS, policies=policies))
    for number, plain in enumerate(generate(recorded64, PROMPTS, config)):
        answer = _answer([event for event in events if event.request == number])
        assert (answer.raw, answer.steps, answer.forwards) == (plain.raw, plain.steps, plain.forwards)


def test_a_prefix_cache_computes_the_whole_canvas_at_block_starts_and_the_rest_from_the_block_on(
    recorded: Pretrained,
) -> None:
    loop = DecodeLoop(recorded.model, recorded.special, replace(CONFIGS[0], cache="prefix"), PROMPTS[:1])
    watched = _watch(loop)
    events = list(loop)
    assert any(event.inserted for event in events)
    blocks = [seen.block for seen in watched]
    for number, seen in enumerate(watched):
        renewed = seen.block < 0 or seen.block not in blocks[:number]
        assert seen.first == (0 if renewed else seen.start)
    assert max(blocks) > 1


def test_an_early_stop_saves_forwards_and_keeps_the_text(recorded: Pretrained) -> None:
    saved = 0
    for config in CONFIGS[:2]:
        whole, early = generate(recorded, PROMPTS, config), generate(recorded, PROMPTS, replace(config, early_stop=True))
        for long, short in zip(whole, early, strict=True):
            assert short.tokens == long.tokens
            assert short.forwards <= long.forwards
            saved += long.forwards - short.forwards
    assert saved > 0


def test_the_eos_confidence_averages_over_a_fixed_number_of_the_last_columns_with_eos() -> None:
    eos = torch.tensor([[0.9, 0.0, 0.5, 0.8, 0.0], [0.0, 0.0, 0.7, 0.0, 0.0], [0.0] * 5])
    assert eos_confidence(eos, 2).tolist() == pytest.approx([(0.5 + 0.8) / 2, 0.7 / 2, 0.0])
    assert eos_confidence(eos, 4).tolist() == pytest.approx([(0.9 + 0.5 + 0.8) / 4, 0.7 / 4, 0.0])


def _confidence(model: Any, special: Any, **more: Any) -> float:
    config = GenerationConfig(**{**SMALL, "max_gen_length": 20, **more})
    loop = DecodeLoop(model, special, config, [[1, 2]])
    loop.step()
    return float(loop.state.notes["eos_confidence"])


def test_what_is_sampled_does_not_touch_the_eos_confidence(rule_model: Any, says: Any, special: Any) -> None:
    model = rule_model(says({6: (special.eos, 1.0), 7: (special.eos, 2.0)}))
    expected = sum(torch.tensor(s).exp() / (torch.tensor(s).exp() + 11) for s in (1.0, 2.0)) / 4
    assert _confidence(model, special) == pytest.approx(float(expected))
    for seed in range(3):
        assert _confidence(model, special, temperature=5.0, seed=seed) == pytest.approx(float(expected))


def test_a_model_that_loves_the_mask_expects_no_end_less_and_comes_to_one(rule_model: Any, special: Any) -> None:
    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 12)
        logits[..., special.mask], logits[..., special.eos] = 5.0, 3.0
        return logits

    share = float(torch.tensor([3.0]).exp() / (torch.tensor([5.0]).exp() + torch.tensor([3.0]).exp() + 10))
    assert _confidence(rule_model(rule), special) == pytest.approx(share)
    config = GenerationConfig(**SMALL, max_gen_length=20, low_conf_expand_thres=1.0)
    answer = _answer(list(DecodeLoop(rule_model(rule), special, config, [[1]])))
    assert answer.raw == [special.eos] * 20


def test_the_canvas_grows_to_its_limit_by_the_factor_and_decides_nothing_until_then(
    rule_model: Any, says: Any, special: Any
) -> None:
    config = GenerationConfig(**SMALL, max_gen_length=14, block_length=4)
    seen, answer = _lengths(DecodeLoop(rule_model(says({})), special, config, [[5, 5]]))
    assert seen[:4] == [6, 9, 12, 14]
    assert set(seen[4:]) == {14}
    assert min(answer.steps) == 4


def test_visible_eos_follow_the_masks_once_there_are_enough(rule_model: Any, says: Any, special: Any) -> None:
    # Four positions from the fifth on expect EOS, so six masks are too few and nine are enough.
    model = rule_model(says(dict.fromkeys((6, 7, 8, 9), (special.eos, 9.0))))
    config = GenerationConfig(**SMALL, max_gen_length=20, block_length=20, threshold=0.99, decode_eot_expand_thres=0.0)
    loop = DecodeLoop(model, special, config, [[5, 5]])
    first, second, third = loop.step()[0], loop.step()[0], loop.step()[0]
    assert [len(event.response) for event in (first, second, third)] == [6, 9, 11]
    assert third.response[9:] == [special.eos] * 2
    assert {token.position for token in third.committed} == {4, 5, 6, 7}


def test_a_last_forward_widens_nothing_and_so_drops_no_end_that_would_make_room(
    rule_model: Any, says: Any, special: Any
) -> None:
    model = rule_model(says(dict.fromkeys((6, 7, 8, 9), (special.eos, 9.0))))
    config = GenerationConfig(
        **SMALL, max_gen_length=12, block_length=20, threshold=0.99, decode_eot_expand_thres=2.0, low_conf_expand_thres=1.0
    )
    free, bound = (DecodeLoop(model, special, config, [[5, 5]]) for _ in range(2))
    for loop in (free, bound):
        loop.step()
        loop.step()
    widened, last = free.step()[0], bound.step(ending={0: FORWARDS})[0]
    assert (widened.inserted, len(widened.response)) == ((1, 2), 12)  # one of the two EOS at the end made room
    assert last.result is not None
    assert (len(last.result.raw), last.result.raw[9:]) == (11, [special.eos] * 2)


def test_the_least_sure_mask_that_is_not_decided_is_widened_and_the_rest_moves_on(
    rule_model: Any, says: Any, special: Any
) -> None:
    table = {2: (3, 9.0), 3: (4, 2.0), 4: (4, 1.5), 5: (5, 9.0), 6: (6, 0.2)}
    config = GenerationConfig(
        method="daedal", initial_gen_length=5, max_gen_length=12, block_length=4, threshold=0.9, eos_tail=0,
        expansion_factor=3, initial_eot_expand_thres=0.0, low_conf_expand_thres=0.5,
    )  # fmt: skip
    loop = DecodeLoop(rule_model(says(table)), special, config, [[1, 1]])
    loop.step()
    event = loop.step()[0]
    m = special.mask
    assert [token.position for token in event.committed] == [0, 3]
    assert event.inserted == (3, 4)  # in place of response position 2; position 4 is less sure, but in the next block
    assert event.response == [3, m, m, m, m, 5, m]
    assert loop.state.block_end.tolist() == [6]  # the block is a range: the decided token has left it


def test_the_only_mask_of_a_window_is_decided_not_widened(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(**SMALL, max_gen_length=30, block_length=1, initial_eot_expand_thres=0.0)
    events = list(DecodeLoop(rule_model(says({})), special, config, [[1]]))
    assert not any(event.inserted for event in events)


def test_masks_inserted_into_a_short_last_block_belong_to_it(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(**SMALL, max_gen_length=30, initial_eot_expand_thres=0.0, low_conf_expand_thres=1.0)
    config = replace(config, block_length=10, eos_tail=0)
    loop = DecodeLoop(rule_model(says({})), special, config, [[1]])
    loop.step()
    assert loop.step()[0].inserted == (2, 3)  # all are equally unsure: the first is decided, the second widened
    assert loop.state.block_end.tolist() == [1 + 8]
    answer = _answer(list(loop))
    assert answer.blocks[:10] == [0] * 10
    assert set(answer.blocks[10:]) == {1, 2}


def test_a_canvas_of_one_token_is_decided(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(method="daedal", initial_gen_length=1, max_gen_length=1)
    answer = _answer(list(DecodeLoop(rule_model(says({})), special, config, [[]])))
    assert (answer.raw, answer.forwards, answer.stop_reason) == ([1], 2, "length")


def test_every_row_has_a_limit_of_its_own(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(**SMALL, max_gen_length=50, low_conf_expand_thres=1.0)
    loop = DecodeLoop(rule_model(says({})), special, config, room=2, capacity=60)
    loop.admit([[1] * 4, [1] * 8], [0, 1], limits=[8, 4])
    answers = {e.request: e.result for e in loop if e.result}
    assert {number: len(answer.raw) for number, answer in answers.items() if answer} == {0: 8, 1: 4}


def test_an_id_that_no_token_has_hides_no_eos_from_the_search_for_a_length() -> None:
    special = SpecialTokens(mask=5, eos=1, pad=1, known=4)
    length = compose(GenerationConfig(method="daedal"), special).length
    logits = torch.tensor([[-3.0, -1.0, -2.0, -3.0, 0.0, -1.0], [-1.0, -2.0, -3.0, -3.0, 0.0, -1.0]])
    rows = torch.arange(2)
    seen = Candidates(logits, logits.logsumexp(-1), rows, logits[:, 0], rows, rows, mask=5, known=4)
    probability = length.measures["eos"](seen)
    assert probability.tolist() == pytest.approx([float(logits[0].softmax(-1)[1]), 0.0])
