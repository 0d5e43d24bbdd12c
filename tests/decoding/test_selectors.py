"""How many tokens a step commits, and which: per row, among eligible ones, at least one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_var.decoding.scorers import Confidence, DecidedLast, Random
from dllm_var.decoding.selectors import Schedule, Threshold, best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import StepView


def _view(confidence: list[list[float]], eligible: list[list[bool]] | None = None, ids: Tensor | None = None) -> StepView:
    c = torch.tensor(confidence)
    rows, w = c.shape
    state = DecodeState.begin([[1]] * rows, range(rows), 11, w, 64)
    state.open_block(torch.ones(rows, dtype=torch.bool), w)
    real = torch.ones(rows, w, dtype=torch.bool)
    return StepView(
        state=state,
        positions=1 + torch.arange(w).expand(rows, w),
        real=real,
        eligible=real if eligible is None else torch.tensor(eligible),
        ids=torch.zeros(rows, w, dtype=torch.int64) if ids is None else ids,
        confidence=c,
    )


def _commits(rule: Threshold | Schedule, view: StepView) -> list[list[int]]:
    chosen = rule.select(view, Confidence()(view)).commit
    return [row.nonzero()[:, 0].tolist() for row in chosen]


def test_the_published_threshold_is_strict_and_the_older_one_inclusive() -> None:
    view = _view([[0.5, 0.75, 0.25, 0.875]])
    assert _commits(Threshold(0.75, inclusive=False), view) == [[3]]
    assert _commits(Threshold(0.75, inclusive=True), view) == [[1, 3]]


def test_a_row_where_nothing_passes_commits_its_best_whatever_other_rows_do() -> None:
    view = _view([[0.1, 0.3, 0.2], [0.99, 0.98, 0.1]])
    assert _commits(Threshold(0.9, inclusive=False), view) == [[1], [0, 1]]


def test_ineligible_columns_are_never_chosen_however_confident() -> None:
    view = _view([[0.99, 0.2, 0.1], [1.0, 1.0, 1.0]], [[False, True, True], [False, False, False]])
    assert _commits(Threshold(0.9, inclusive=True), view) == [[1], []]
    assert _commits(Schedule(1, 1), view) == [[1, 2], []]


def test_equal_scores_are_decided_from_left_to_right() -> None:
    assert _commits(Threshold(2.0, inclusive=True), _view([[0.5, 0.5, 0.5]])) == [[0]]
    assert best(torch.zeros(1, 5), torch.ones(1, 5, dtype=torch.bool), torch.tensor([3])).tolist() == [
        [True] * 3 + [False] * 2
    ]


def test_an_eligible_column_of_score_minus_infinity_comes_before_an_ineligible_one() -> None:
    score = torch.tensor([[0.3, float("-inf"), float("-inf")]])
    eligible = torch.tensor([[False, False, True]])
    assert best(score, eligible, torch.tensor([1])).tolist() == [[False, False, True]]


@settings(max_examples=60, deadline=None)
@given(masks=st.integers(1, 40), steps=st.integers(1, 40))
def test_a_schedule_fills_a_block_in_its_forwards_with_the_remainder_first(masks: int, steps: int) -> None:
    view = _view([[0.5] * masks])
    state, rule, quotas = view.state, Schedule(steps, 1), []
    while bool(state.window().any()):
        view = replace(view, eligible=state.window()[:, 1:])
        action = rule.select(view, view.confidence)
        quotas.append(int(action.commit.sum()))
        action.apply(view)
        state.count_forward(torch.zeros(1, dtype=torch.int64))
    each, rest = divmod(masks, steps)
    assert quotas == [q for q in [each + 1] * rest + [each] * (steps - rest) if q]


def test_steps_are_spread_over_the_blocks_earlier_blocks_first() -> None:
    assert Schedule(8, 3).forwards.tolist() == [3, 3, 2]


def test_a_row_that_fell_behind_its_schedule_still_commits_one_token_per_forward() -> None:
    view = _view([[0.1, 0.2, 0.3]])
    view.state.block_forwards = torch.tensor([99])
    assert _commits(Schedule(1, 1), view) == [[0, 1, 2]]


def test_random_order_is_keyed_by_request_and_position_not_by_the_place_in_the_batch() -> None:
    pair, alone = _view([[0.0] * 6] * 2), _view([[0.0] * 6])
    alone.state.request = torch.tensor([1])
    score = Random(3)(pair)
    assert torch.equal(score[1], Random(3)(alone)[0])
    assert not torch.equal(score[0], score[1])
    assert not torch.equal(score, Random(4)(pair))


@pytest.mark.parametrize("inner", [Confidence(), Random(0)])
def test_tokens_decided_last_rank_behind_all_others_but_stay_choosable(inner: Confidence | Random) -> None:
    view = _view([[0.99, 0.1, 0.98, 0.2]], ids=torch.tensor([[10, 1, 9, 2]]))
    score = DecidedLast(inner, (9, 10))(view)
    assert sorted(score[0].argsort(descending=True, stable=True)[:2].tolist()) == [1, 3]
    only_stops = replace(view, eligible=torch.tensor([[True, False, True, False]]))
    assert best(score, only_stops.eligible, torch.tensor([1])).tolist() == [[True, False, False, False]]
