"""d2Cache: which positions a forward renews, what attention rollout and certainty density are, and that rows stand alone."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding.d2cache import ACTIVE, CONFIDENCE, IMPORTANCE, D2Cache, columns, rollout
from dllm_var.decoding.loop import DecodeLoop
from dllm_var.decoding.priors import certainty_log_density
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import StepView

PROMPTS = [[258, 259, *text.encode(), 257, 260] for text in ("add 2 3", "say hello to the world", "x")]


def _density(known: list[bool], sigma: float, open_end: bool = False) -> list[float]:
    """ln D by the sum of the definition, term by term."""
    length = len(known)
    cells = [True] * length + known + [known[-1] and not open_end] * length  # response indices −G … 2G−1
    total = math.fsum(math.exp(-(d**2) / (2 * sigma**2)) for d in range(-3 * length, 3 * length))
    logs = []
    for g in range(length):
        terms = [-((length + g - j) ** 2) / (2 * sigma**2) for j, cell in enumerate(cells) if cell]
        top = max(terms)
        logs.append(top + math.log(math.fsum(math.exp(term - top) for term in terms)) - math.log(total))
    return logs


def _log_density(known: list[bool], sigma: float, open_end: bool = False) -> list[float]:
    tensor = torch.tensor([known])
    return certainty_log_density(tensor, torch.tensor([0]), torch.tensor([len(known)]), sigma, open_end)[0].tolist()


@pytest.mark.parametrize(("length", "sigma"), [(1, 3.0), (2, 0.1), (9, 1.0), (40, 10.0), (40, 1e4), (330, 6.0), (90, 0.5)])
@pytest.mark.parametrize("open_end", [False, True])
def test_the_density_is_the_sum_of_its_definition_also_where_that_underflows(
    length: int, sigma: float, open_end: bool
) -> None:
    draw = random.Random(length)
    for share in (0.0, 0.02, 0.5, 1.0):
        known = [draw.random() < share for _ in range(length)]
        got, expected = _log_density(known, sigma, open_end), _density(known, sigma, open_end)
        for one, other in zip(got, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-13, abs=1e-12)  # of a logarithm: 1e-12 relative of D above 1e-250


def test_the_density_falls_strictly_with_the_distance_however_far() -> None:
    for sigma in (0.3, 2.0, 10.0, 60.0):
        far = _log_density([False] * 1024, sigma)
        assert all(later < earlier for earlier, later in pairwise(far))


def test_the_density_is_one_amid_known_tokens_and_tends_to_a_half_for_wide_kernels() -> None:
    assert _log_density([True] * 200, 3.0) == pytest.approx([0.0] * 200, abs=1e-12)
    assert _log_density([True] * 9, 1e6) == pytest.approx([math.log(0.5)] * 9)


def test_the_density_of_a_row_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(5, 90, generator=generator) < 0.1
    start, end = torch.tensor([0, 7, 30, 30, 61]), torch.tensor([90, 50, 31, 62, 90])
    together = certainty_log_density(known, start, end, 1.5)
    for row in range(5):
        one = slice(row, row + 1)
        alone = certainty_log_density(known[one, : end[row]], start[one], end[one], 1.5)
        assert torch.equal(together[row, start[row] : end[row]], alone[0, start[row] :])


def _state(draw: random.Random, rows: int = 3, length: int = 13, block: int = 4) -> DecodeState:
    """Rows in the middle of decoding: full blocks, an open one, the last token of some just decided."""
    state = DecodeState.begin([[1] * draw.choice([0, 2, 5]) for _ in range(rows)], range(rows), 11, length)
    state.end = state.limit
    for row in range(rows):
        for _ in range(draw.randint(1, -(-length // block))):
            state.open_block(torch.arange(rows) == row, block)
        state.masked[row, : int(state.block_start[row])] = False
    state.forwards = torch.tensor([draw.randint(3, 6) for _ in range(rows)])
    capacity = state.tokens.shape[1]
    column = torch.arange(capacity)
    state.masked &= (torch.rand(rows, capacity, generator=_torch(draw)) < 0.8) | (column >= state.end[:, None])
    state.masked[torch.arange(rows), state.block_start] = True
    response = column >= state.prompt[:, None]
    state.step = torch.randint(0, 6, state.step.shape, generator=_torch(draw), dtype=torch.int32)
    state.step = state.step.minimum(state.forwards[:, None].int() - 1).masked_fill(state.masked | ~response, -1)
    state.closed = torch.tensor([draw.choice([capacity, capacity, int(end) - 2]) for end in state.end]).maximum(
        state.block_start + 1
    )
    state.notes[CONFIDENCE] = torch.rand(rows, capacity, generator=_torch(draw))
    state.notes[IMPORTANCE] = torch.rand(rows, capacity, generator=_torch(draw)).double()
    return state


def _torch(draw: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(draw.randrange(1 << 30))


def _chosen(state: DecodeState, row: int, rule: D2Cache) -> list[int]:
    """The positions of a row's next forward, by the words of the paper."""
    start, end, prompt = int(state.block_start[row]), int(state.end[row]), int(state.prompt[row])
    block, last = int(state.block_end[row]) - start, min(end, int(state.closed[row]))
    masks = [i for i in range(end) if state.masked[row, i] and i < last]
    reach = start + block
    while reach < end and len([i for i in masks if i < reach]) < rule.current_k:
        reach += block
    density = _density([not bool(state.masked[row, i]) for i in range(prompt, end)], rule.sigma)
    worth = {i: math.log(state.notes[CONFIDENCE][row, i]) + density[i - prompt] for i in masks if i < reach}
    ranked = sorted(worth, key=lambda i: (i >= start + block, -worth[i], i))
    chosen = set(ranked[: rule.current_k])
    chosen |= {i for i in range(end) if int(state.step[row, i]) == int(state.forwards[row]) - 1}
    others = [i for i in range(end) if i not in chosen and (rule.include_masked or not state.masked[row, i])]
    importance = state.notes[IMPORTANCE][row].tolist()
    others.sort(key=lambda i: (-importance[i], i))
    mass = [math.fsum(importance[i] for i in others[: n + 1]) for n in range(len(others))]
    kept = max(1, len([m for m in mass if m <= rule.rollout_p * mass[-1] * (1 + 1e-12)]))
    chosen |= set(others[:kept])
    ordered = sorted(chosen)
    for one, other in pairwise(ordered):
        if other - one <= rule.inflate_w:
            chosen |= set(range(one, other))
    return sorted(chosen)


@pytest.mark.parametrize("include_masked", [False, True])
@pytest.mark.parametrize("rollout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("current_k", [1, 3, 7, 100])
def test_the_chosen_positions_are_those_of_the_paper_row_by_row(
    current_k: int, rollout_p: float, include_masked: bool
) -> None:
    draw = random.Random(current_k)
    for inflate_w in (0, 1, 3, 3):
        rule, state = D2Cache(rollout_p, current_k, 2.0, inflate_w, include_masked), _state(draw)
        expected = [_chosen(state, row, rule) for row in range(state.rows)]
        plan = rule.plan(state)
        assert [p[r].tolist() for p, r in zip(plan.positions, plan.real, strict=True)] == expected
        assert [bool(w.any()) for w in plan.wanted & state.window().gather(1, plan.positions)] == [True] * state.rows
        assert torch.equal(plan.wanted, plan.real & state.masked.gather(1, plan.positions))
        assert plan.slots is not None
        assert torch.equal(plan.slots, plan.positions.masked_fill(~plan.real, -1))


def test_the_rollout_is_the_column_sum_of_the_product_of_its_matrices() -> None:
    generator = torch.Generator().manual_seed(1)
    canvas = torch.arange(9) < torch.tensor([[9], [6]])
    active = torch.tensor([[0, 2, 3, 8], [1, 5, 5, 5]])
    active = torch.zeros(2, 9, dtype=torch.bool).scatter_(1, active, True)
    positions, real = columns(active)
    attentions = []
    for _ in range(3):
        scores = torch.rand(2, positions.shape[1], 9, generator=generator, dtype=torch.float64)
        attentions.append((3 * scores).masked_fill(~canvas[:, None], float("-inf")).softmax(-1))
    for row in range(2):
        product = torch.eye(9, dtype=torch.float64)
        for attention in attentions:
            matrix = torch.eye(9, dtype=torch.float64)
            for column, position in enumerate(positions[row][real[row]].tolist()):
                matrix[position] += attention[row, column]
            product = matrix / matrix.sum(1, keepdim=True) @ product
        assert torch.allclose(rollout(attentions, canvas, active)[row], product[canvas[row]].sum(0))


class Spy(D2Cache):
    """Remembers the notes around every forward."""

    def observe(self, view: StepView, action: Any) -> None:
        notes = view.state.notes
        self.before: Tensor = notes.get(CONFIDENCE, torch.zeros_like(view.state.confidence)).clone()
        super().observe(view, action)
        self.view, self.active = view, notes[ACTIVE]


def test_a_forward_renews_stores_and_believes_only_what_it_computes(recorded: Pretrained) -> None:
    config = GenerationConfig(method="vanilla", cache="d2cache", gen_length=24, block_length=8, num_transfer_tokens=1)
    loop = DecodeLoop(recorded.model, recorded.special, config, PROMPTS)
    spy = Spy(0.1, 3, 10.0, 0)
    loop.policies = replace(loop.policies, kv=spy)
    canvas = sum(len(prompt) + 24 for prompt in PROMPTS)
    improved = False
    while loop.state.rows:
        call, fresh = loop.executor.calls, loop.state.step == loop.state.forwards[:, None] - 1
        for event in loop.step():
            assert len(event.committed) == 1  # so every new block has a mask that is computed
        state = spy.view.state
        if not state.rows:
            break
        masked = state.masked
        changed = state.notes[CONFIDENCE] != spy.before
        improved |= call > 0 and bool((changed & masked).any())
        assert loop.executor.store is not None
        assert torch.equal(loop.executor.store.stamp[:, : masked.shape[1]] == call, spy.active)
        if call:
            assert not bool((changed & ~spy.active).any())
            assert bool(spy.active[fresh].all())
            assert int(spy.active.sum()) < canvas / 3
        else:
            assert int(spy.active.sum()) == canvas
    assert improved


def _same(one: Generation, other: Generation) -> bool:
    names = ("raw", "stop_reason", "forwards", "positions", "steps", "blocks")
    return all(getattr(one, n) == getattr(other, n) for n in names) and one.confidence == pytest.approx(other.confidence)


@pytest.mark.parametrize(
    "options",
    [
        {"num_transfer_tokens": 1, "sigma": 5.0, "inflate_w": 2, "current_k": 4},
        {"threshold": 0.5, "block_length": 4, "current_k": 6, "early_stop": True},
        {"threshold": 0.6, "block_length": 5, "current_k": 3, "cfg_scale": 0.5, "stop_until_eos": True},
    ],
    ids=["density", "threshold", "guidance"],
)
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(options: dict[str, Any], recorded64: Pretrained) -> None:
    config = GenerationConfig(method="vanilla", cache="d2cache", gen_length=18, **options)
    together = generate(recorded64, PROMPTS, config)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(recorded64, [prompt], config)[0]
        assert _same(together[i], alone)
        whole = (len(prompt) + 18) * (2 if config.cfg_scale else 1)
        assert alone.positions < alone.forwards * whole or alone.forwards == 1


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_renewing_everything_equals_keeping_nothing(cfg_scale: float, recorded64: Pretrained) -> None:
    options: dict[str, Any] = {"gen_length": 14, "block_length": 6, "threshold": 0.6, "cfg_scale": cfg_scale}
    plain = GenerationConfig(method="vanilla", **options)
    cached = GenerationConfig(method="vanilla", cache="d2cache", current_k=14, rollout_p=1.0, **options)
    for one, other in zip(generate(recorded64, PROMPTS, cached), generate(recorded64, PROMPTS, plain), strict=True):
        assert (one.raw, one.steps, one.positions) == (other.raw, other.steps, other.positions)


def test_a_very_wide_density_ranks_by_confidence_alone() -> None:
    narrow_differs = False
    for seed in range(5):
        state = _state(random.Random(seed), rows=8)
        confidence = state.notes[CONFIDENCE]
        wide, narrow = [], []
        for power in (0.02, 1.0, 4.0):  # other scales, the same order
            state.notes[CONFIDENCE] = confidence**power
            wide.append(D2Cache(0.1, 2, 1e9, 0).plan(state).positions.tolist())
            narrow.append(D2Cache(0.1, 2, 1.0, 0).plan(state).positions.tolist())
        assert wide[0] == wide[1] == wide[2]
        narrow_differs |= narrow[0] != narrow[2]
    assert narrow_differs


@pytest.mark.parametrize(("gen_length", "block_length", "current_k"), [(1, 1, 1), (10, 4, 1), (10, 4, 5), (7, 7, 2)])
def test_a_model_that_loves_the_mask_still_fills_every_block(
    gen_length: int, block_length: int, current_k: int, rule_model: Any, says: Any, special: Any
) -> None:
    config = GenerationConfig(
        method="vanilla", cache="d2cache", gen_length=gen_length, block_length=block_length, current_k=current_k,
        num_transfer_tokens=1,
    )  # fmt: skip
    model = rule_model(says({}, default=(special.mask, 500.0)))
    for event in DecodeLoop(model, special, config, [[1, 2], []]):
        assert len(event.committed) == 1
        if event.result is not None:
            assert special.mask not in event.result.raw
            assert event.result.forwards == gen_length
            assert event.result.blocks == [i // block_length for i in range(gen_length)]
