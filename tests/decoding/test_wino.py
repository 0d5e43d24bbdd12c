"""WINO: many drafts, a second look at each from a shadow of the block, and no block longer than its positions."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import GenerationConfig, Pretrained
from dllm_var.decoding.compose import compose
from dllm_var.decoding.kv_policies import KVPolicy, Prefix, Recompute
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.decoding.results import Event
from dllm_var.decoding.selectors import Selector, best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView
from dllm_var.decoding.wino import DRAFTED, Wino
from dllm_var.model.llada import LLaDAModelLM

PROMPTS = [[258, 259, *text, 257, 260] for text in (b"rev abcde", b"rep xy 3", b"")]


def _config(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"method": "wino", "gen_length": 14, "block_length": 9, "wide_in_thres": 0.2} | options)


def _growing(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"block_length": 9, "max_gen_length": 14, "wide_in_thres": 0.2} | options)


@pytest.fixture(scope="module")
def shallow(recorded64: Pretrained) -> Pretrained:
    """The recorded model's first layer alone: keys and values do not depend on what is around them, so no cache is stale."""
    model = deepcopy(recorded64.model)
    model.config.n_layers = 1
    model.model.transformer["blocks"] = model.model.transformer["blocks"][:1]
    return replace(recorded64, model=model)


def _events(model: Pretrained, config: GenerationConfig, prompts: list[list[int]], first: int = 0) -> list[list[Event]]:
    """Per row all of its events."""
    requests = range(first, first + len(prompts))
    loop = DecodeLoop(model.model, model.special, config, prompts, requests)
    made = list(loop)
    return [[event for event in made if event.request == request] for request in requests]


def _trace(events: list[Event]) -> list[tuple[list[tuple[int, int]], list[int]]]:
    """Per forward what was drafted, position and id, and what was taken back."""
    return [([(c.position, c.id) for c in event.committed], sorted(event.remasked)) for event in events]


def _obvious(model: LLaDAModelLM, prompt: list[int], config: GenerationConfig, mask: int) -> list[Any]:
    """The trace of one prompt, with a shadow behind the whole canvas in every forward and an attention mask in loops."""
    first, end = len(prompt), len(prompt) + config.gen_length
    x, trace = [*prompt, *[mask] * config.gen_length], []
    for a in range(first, end, config.block_length):
        b, before, decided = min(a + config.block_length, end), 30, set()
        while mask in x[a:b]:
            size = end + b - a
            sees = torch.zeros(1, size, size, dtype=torch.bool)
            for q in range(size):
                for k in range(size):
                    own = q >= end and k == a + q - end
                    sees[0, q, k] = not own and (q >= end or k < end)
            ids = torch.tensor([x + [mask] * (b - a)])
            positions = torch.tensor([[*range(end), *range(a, b)]])
            p = model(ids, positions=positions, query_mask=sees).logits[0].softmax(-1)
            p_token = p.clone()
            p_token[:, mask] = 0.0
            masked = [g for g in range(a, b) if x[g] == mask]
            sure = {g: float(p_token[g].max()) for g in masked}
            order = sorted(masked, key=lambda g: -sure[g])
            draft = [g for g in order if sure[g] > config.wide_in_thres] or order[:1]
            draft = draft[: min(20, max(5, int(0.7 * len(masked))))]
            v = {g: float(p[end + g - a, x[g]]) for g in decided}
            doubted = sorted((g for g in decided if v[g] < config.narrow_out_thres), key=lambda g: v[g])
            room = (len(draft) if config.remask_budget == "current" else before) - 1
            doubted = doubted[:room] if len(draft) > 1 else []
            for g in draft:
                x[g] = int(p_token[g].argmax())
            trace.append((sorted((g - first, x[g]) for g in draft), sorted(g - first for g in doubted)))
            for g in doubted:
                x[g] = mask
            decided = decided.union(draft).difference(doubted)
            before = len(draft)
    return trace


@pytest.mark.parametrize(
    "config",
    [
        _config(),
        _config(narrow_out_thres=0.8, remask_budget="current"),
        _config(wide_in_thres=0.05, narrow_out_thres=0.3),
    ],
    ids=range(3),
)
@torch.inference_mode()
def test_decoding_is_that_of_an_obvious_implementation(config: GenerationConfig, recorded64: Pretrained) -> None:
    taken = 0
    for prompt in PROMPTS:
        [events] = _events(recorded64, config, [prompt])
        assert _trace(events) == _obvious(recorded64.model, prompt, config, recorded64.special.mask)
        taken += sum(len(event.remasked) for event in events)
    assert taken


CACHED = [
    (_config(wide_in_thres=0.05, narrow_out_thres=0.3, cfg_scale=0.5), {"cache": "prefix"}),
    (_config(wide_in_thres=0.05, narrow_out_thres=0.3), {"cache": "prefix", "use_dual": True}),
    (_growing(wide_in_thres=0.05, narrow_out_thres=0.3, cache="none"), {"cache": "block_commit"}),
]


@pytest.mark.parametrize(("config", "cache"), CACHED, ids=["prefix", "dual", "block_commit"])
def test_shadows_see_the_same_through_a_store(config: GenerationConfig, cache: dict[str, Any], shallow: Pretrained) -> None:
    """Rows of different length enter their blocks at different times, so that a forward has shadows of some rows only."""
    plain, cached = (_events(shallow, use, PROMPTS) for use in (config, replace(config, **cache)))
    assert [_trace(row) for row in plain] == [_trace(row) for row in cached]
    last = [(one[-1].result, other[-1].result) for one, other in zip(plain, cached, strict=True)]
    assert all(a.confidence == pytest.approx(b.confidence) for a, b in last)
    assert all(a.positions > b.positions for a, b in last)
    assert len({len(row) for row in plain}) > 1
    assert any(event.remasked for row in plain for event in row)


@pytest.mark.parametrize("config", [use for use, _ in CACHED] + [replace(use, **cache) for use, cache in CACHED])
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(config: GenerationConfig, recorded64: Pretrained) -> None:
    together = _events(recorded64, config, PROMPTS)
    alone = [_events(recorded64, config, [prompt], request)[0] for request, prompt in enumerate(PROMPTS)]
    assert [_trace(row) for row in together] == [_trace(row) for row in alone]
    assert [row[-1].result.positions for row in together] == [row[-1].result.positions for row in alone]


class Capped(Selector):
    """The drafting half of `Wino`, without a shadow."""

    def __init__(self, wide: float) -> None:
        self.wide = wide

    def select(self, view: StepView, score: Tensor) -> Action:
        above = view.eligible & (view.confidence > self.wide)
        few = ~above.any(1, keepdim=True)
        cap = (view.eligible.sum(1) * 7 // 10).clamp(5, 20)
        return Action(commit=best(score, torch.where(few, view.eligible, above), cap.masked_fill(few[:, 0], 1)))


@pytest.mark.parametrize(("config", "cache"), [(_config(), {}), *CACHED], ids=["none", "prefix", "dual", "block_commit"])
def test_if_nothing_is_doubted_it_is_a_threshold_and_no_token_sees_a_shadow(
    config: GenerationConfig, cache: dict[str, Any], recorded64: Pretrained
) -> None:
    config = replace(config, narrow_out_thres=0.0, **cache)
    policies = replace(compose(config, recorded64.special), selector=Capped(config.wide_in_thres))
    loop = DecodeLoop(recorded64.model, recorded64.special, config, PROMPTS, policies=policies)
    without = {event.request: event.result for event in loop if event.result is not None}
    for request, events in enumerate(_events(recorded64, config, PROMPTS)):
        one, other = events[-1].result, without[request]
        assert (one.raw, one.steps) == (other.raw, other.steps)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-6)
        assert one.positions > other.positions


def test_a_bar_that_nothing_reaches_drafts_one_token_per_forward(recorded: Pretrained) -> None:
    config = _config(wide_in_thres=1.1, narrow_out_thres=1.1)
    [events] = _events(recorded, config, PROMPTS[:1])
    assert [len(event.committed) for event in events] == [1] * 14
    assert not any(event.remasked for event in events)


def _half_decided(special: Any, kv: KVPolicy, tokens: dict[int, int]) -> tuple[DecodeState, Plan]:
    """A row of 3 + 8 positions in its second forward of the block 3 … 6, with shadows."""
    state = DecodeState.begin([[65, 66, 67]], [0], special.mask, 8)
    state.end = state.limit
    state.open_block(torch.tensor([True]), 4)
    state.block_forwards = torch.tensor([1])
    state.stored = state.end
    for position, token in tokens.items():
        state.commit(torch.tensor([0]), torch.tensor([position]), torch.tensor([token]), torch.tensor([0.5]))
    return state, Wino(0.5, 0.5, "previous").extend(kv.plan(state), state)


@torch.inference_mode()
def test_a_shadow_sees_everything_but_its_own_token_and_no_token_sees_a_shadow(shallow: Pretrained) -> None:
    def logits(tokens: dict[int, int]) -> Tensor:
        _, plan = _half_decided(shallow.special, Recompute(), tokens)
        return shallow.model(plan.ids, positions=plan.positions, query_mask=plan.query_mask).logits[0]

    decided = {3: 70, 5: 71}
    whole = logits(decided)
    ids = torch.tensor([[65, 66, 67, 70, 270, 71, *[270] * 5]])
    assert torch.allclose(whole[:11], shallow.model(ids).logits[0])
    for at, token in decided.items():
        moved = (logits({**decided, at: token + 9}) - whole).abs().amax(-1) > 1e-9
        assert moved.tolist() == [True] * 11 + [position != at for position in (3, 4, 5, 6)]


def test_shadows_are_asked_about_decided_tokens_only_and_fed_with_masks(special: Any) -> None:
    state, plan = _half_decided(special, Prefix(dual=True), {3: 1, 5: 2})
    assert plan.positions[0, -4:].tolist() == [3, 4, 5, 6]
    assert plan.ids[0, -4:].tolist() == [special.mask] * 4
    assert plan.wanted[0].tolist() == [False, True, False, True, True, False, True, False]
    assert plan.slots is not None
    assert plan.slots[0].tolist() == [3, 4, 5, 6, -1, -1, -1, -1]
    state.block[0, 3] = -1  # a token that was given, not decided
    assert Wino(0.5, 0.5, "previous").extend(Recompute().plan(state), state).wanted[0, -4:].tolist() == [
        False,
        False,
        True,
        False,
    ]
    state.block_forwards = torch.tensor([0])
    first = Recompute().plan(state)
    assert Wino(0.5, 0.5, "previous").extend(first, state) is first


def _choice(
    budget: str, confidence: list[float], second: list[float], before: int = 30, masks: int = 0
) -> tuple[list[int], list[int]]:
    """Columns that are drafted and taken back: first the masks with a confidence, then the decided with a second look."""
    total = len(confidence) + masks + len(second)
    state = DecodeState.begin([[1]], [0], 11, total)
    state.end = state.limit
    state.open_block(torch.tensor([True]), total)
    state.block_forwards = torch.tensor([1])
    state.notes[DRAFTED] = torch.tensor([before])
    state.masked[0, 1 + len(confidence) + masks :] = False
    c = torch.tensor([confidence + [0.0] * masks + [1.0] * len(second)])
    view = StepView(
        state=state,
        positions=1 + torch.arange(total)[None],
        real=torch.ones(1, total, dtype=torch.bool),
        eligible=state.window()[:, 1:],
        ids=torch.zeros(1, total, dtype=torch.int64),
        confidence=c,
        measures={"decided": torch.tensor([[0.0] * (len(confidence) + masks) + second])},
    )
    action = Wino(0.5, 0.9, budget).select(view, c)
    assert action.remask is not None
    drafted, taken = (flags[0].nonzero()[:, 0].tolist() for flags in (action.commit, action.remask))
    assert state.notes[DRAFTED].tolist() == [len(drafted)]
    return drafted, [column - len(confidence) - masks for column in taken]


@pytest.mark.parametrize(("masks", "cap"), [(6, 5), (8, 5), (9, 6), (10, 7), (20, 14), (28, 19), (29, 20), (60, 20)])
def test_no_more_is_drafted_than_the_masks_allow_the_surest_first(masks: int, cap: int) -> None:
    confidence = [0.6 + 0.001 * i for i in range(masks)]
    assert _choice("previous", confidence, [])[0] == list(range(masks - cap, masks))


def test_a_draft_must_be_above_the_bar_and_a_doubt_below_the_other() -> None:
    assert _choice("previous", [0.5, 0.51, 0.75], [0.9, 0.89, 0.95]) == ([1, 2], [1])
    assert _choice("previous", [0.5, 0.3], [0.1]) == ([0], [])  # nothing is taken back beside a single draft


def test_fewer_are_taken_back_than_were_drafted_the_least_likely_first() -> None:
    doubts = [0.4, 0.2, 0.3, 0.1]
    assert _choice("previous", [0.6, 0.7], doubts, before=5)[1] == [0, 1, 2, 3]
    assert _choice("previous", [0.6, 0.7], doubts, before=4)[1] == [1, 2, 3]
    assert _choice("previous", [0.6, 0.7], doubts, before=1)[1] == []
    assert _choice("current", [0.6, 0.7], doubts)[1] == [3]
    assert _choice("current", [0.6, 0.7, 0.8], doubts)[1] == [1, 3]


@pytest.mark.parametrize("budget", ["previous", "current"])
def test_a_block_takes_no_more_forwards_than_positions_however_much_is_doubted(
    budget: str, rule_model: Any, special: Any
) -> None:
    """A model that is sure of everything it has not said, and changes its mind with every token."""

    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(int((ids[0] * 31 + positions[0]).sum()))
        return 2 * torch.randn(*ids.shape, 12, generator=draw) + 9 * (torch.arange(12) == special.mask)

    taken = 0
    for length, block in ((40, 17), (12, 12), (1, 1)):
        config = _config(
            gen_length=length, block_length=block, wide_in_thres=0.0, narrow_out_thres=1.1, remask_budget=budget
        )
        loop = DecodeLoop(rule_model(rule), special, config, [[1, 2]])
        events = list(loop)
        taken += sum(len(event.remasked) for event in events)
        result = events[-1].result
        assert result is not None
        assert len(result.raw) == length
        assert special.mask not in result.raw
        assert len(events) <= length
    assert taken > 10


def test_drafts_of_a_sampled_answer_are_verified_by_their_own_probability(recorded: Pretrained) -> None:
    config = _config(temperature=1.5, wide_in_thres=0.01, narrow_out_thres=0.5, gen_length=12, block_length=12)
    answer = decode(recorded.model, recorded.special, config, PROMPTS)[0]
    assert answer == decode(recorded.model, recorded.special, config, PROMPTS[:1])[0]
    assert recorded.special.mask not in answer.raw
