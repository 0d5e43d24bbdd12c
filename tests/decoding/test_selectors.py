"""How many tokens a step commits, and which: per row, among eligible ones, at least one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_var.decoding.scorers import Confidence, NegativeEntropy
from dllm_var.decoding.selectors import EntropyBound, Factor, Quota, Schedule, Selector, Threshold, best, ranks
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import StepView


def _view(
    confidence: list[list[float]], eligible: list[list[bool]] | None = None, **measures: list[list[float]]
) -> StepView:
    c = torch.tensor(confidence)
    rows, w = c.shape
    state = DecodeState.begin([[1]] * rows, range(rows), 11, w)
    state.open_block(torch.ones(rows, dtype=torch.bool), w)
    real = torch.ones(rows, w, dtype=torch.bool)
    return StepView(
        state=state,
        positions=1 + torch.arange(w).expand(rows, w),
        real=real,
        eligible=real if eligible is None else torch.tensor(eligible),
        ids=torch.zeros(rows, w, dtype=torch.int64),
        confidence=c,
        measures={name: torch.tensor(values) for name, values in measures.items()},
    )


def _commits(rule: Selector, view: StepView, score: Tensor | None = None) -> list[list[int]]:
    chosen = rule.select(view, Confidence()(view) if score is None else score).commit
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
@given(masks=st.integers(1, 40), steps=st.integers(1, 40), catches_up=st.booleans())
def test_a_schedule_fills_a_block_in_its_forwards_with_the_remainder_first(masks: int, steps: int, catches_up: bool) -> None:
    view = _view([[0.5] * masks])
    state, rule, quotas = view.state, Schedule(steps, 1, catches_up), []
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
    assert _commits(Schedule(2, 1, catches_up=False), view) == [[2]]


confidences = st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=9)
entropies = st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.4, 1.0, 2.5]), min_size=1, max_size=9)


@given(c=confidences, rule=st.sampled_from([Threshold(0.5, True, 2), Factor(0.7, 2), EntropyBound(0.3), Quota(3)]))
@settings(max_examples=100, deadline=None)
def test_every_rule_decides_eligible_columns_only_and_at_least_one_of_a_row_that_has_any(
    c: list[float], rule: Selector
) -> None:
    eligible = [value < 0.8 for value in c]
    view = _view([c, c], [eligible, [True] * len(c)], entropy=[[1 - value for value in c]] * 2)
    chosen = rule.select(view, Confidence()(view)).commit
    assert not bool((chosen & ~view.eligible).any())
    assert chosen.any(1).tolist() == [any(eligible), True]
    alone = replace(_view([c], [eligible]), measures={name: value[:1] for name, value in view.measures.items()})
    assert torch.equal(rule.select(alone, Confidence()(alone)).commit[0], chosen[0])  # no row looks at another


def test_the_fewest_tokens_of_a_threshold_are_the_best_scored_ones() -> None:
    view = _view([[0.2, 0.95, 0.4, 0.1], [0.99, 0.98, 0.97, 0.1]])
    assert _commits(Threshold(0.9, inclusive=True, least=2), view) == [[1, 2], [0, 1, 2]]
    backwards = torch.arange(4.0).expand(2, 4)
    assert _commits(Threshold(0.9, inclusive=True, least=2), view, backwards) == [[2, 3], [0, 1, 2]]


def test_a_threshold_tests_raw_confidence_whatever_the_order() -> None:
    view = _view([[0.95, 0.5, 0.93]])
    assert _commits(Threshold(0.9, inclusive=True), view, torch.tensor([[-9.0, 3.0, -8.0]])) == [[0, 2]]


def test_a_threshold_can_test_the_margin() -> None:
    view = _view([[0.9, 0.6, 0.2]], margin=[[0.1, 0.55, 0.05]])
    assert _commits(Threshold(0.5, inclusive=True, by_margin=True), view) == [[1]]


@given(c=confidences, low=st.floats(0, 1), high=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_higher_threshold_never_decides_more(c: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    more, fewer = (set(_commits(Threshold(bound, inclusive=True), _view([c]))[0]) for bound in (low, high))
    assert fewer <= more


def test_a_threshold_above_one_is_one_token_and_zero_is_all_even_where_confidences_are_saturated() -> None:
    view = _view([[1.0, 1.0, 0.3]])
    assert _commits(Threshold(1.01, inclusive=True), view) == [[0]]
    assert _commits(Threshold(0.0, inclusive=True), view) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("c", "tokens"),
    [([0.99, 0.98, 0.20], 2), ([0.99, 0.10], 1), ([0.99, 0.98, 0.97], 3), ([0.20, 0.99, 0.10], 1), ([0.4, 0.3], 1)],
)
def test_a_factor_of_one_takes_what_the_paper_s_rule_takes(c: list[float], tokens: int) -> None:
    best_first = sorted(range(len(c)), key=lambda i: -c[i])
    assert _commits(Factor(1.0), _view([c])) == [sorted(best_first[:tokens])]


@given(c=confidences, factor=st.floats(0.01, 9))
@settings(max_examples=60, deadline=None)
def test_a_factor_takes_the_longest_run_of_ranks_that_fits(c: list[float], factor: float) -> None:
    descending = torch.tensor(sorted(c, reverse=True))
    fits = [n for n in range(1, len(c) + 1) if bool((n + 1) * (1.0 - descending[n - 1]) < factor)]
    assert len(_commits(Factor(factor), _view([c]))[0]) == max([1, *fits])


def test_a_tiny_factor_is_one_token_per_forward_and_an_endless_one_all() -> None:
    view = _view([[0.9, 0.99, 0.999], [0.1, 0.2, 0.3]], [[True] * 3, [True, True, False]])
    assert _commits(Factor(1e-9), view) == [[2], [1]]
    assert _commits(Factor(float("inf")), view) == [[0, 1, 2], [0, 1]]
    assert _commits(Factor(1e-9, least=2), view) == [[1, 2], [0, 1]]


def test_an_entropy_bound_subtracts_the_largest_entropy_so_far_not_the_last() -> None:
    view = _view([[0.4, 0.3, 0.2, 0.1]], entropy=[[0.5, 0.01, 0.01, 0.01]])
    assert _commits(EntropyBound(0.1), view) == [[0, 1, 2, 3]]  # in order of confidence: 0.53 − 0.5 is below the bound
    assert _commits(EntropyBound(0.015), view) == [[0, 1]]


@given(h=entropies, order=st.randoms(use_true_random=False), gamma=st.floats(0, 3))
@settings(max_examples=100, deadline=None)
def test_an_entropy_bound_takes_the_longest_run_of_its_order_that_fits(h: list[float], order: object, gamma: float) -> None:
    score = torch.tensor([order.sample(range(len(h)), len(h))]).double()  # type: ignore[attr-defined]
    ranked = sorted(range(len(h)), key=lambda i: -score[0, i])
    sums = [sum(h[i] for i in ranked[:n]) - max(h[i] for i in ranked[:n]) for n in range(1, len(h) + 1)]
    assume(all(abs(value - gamma) > 1e-6 for value in sums[1:]))  # not on the knife's edge of float32
    expected = sorted(ranked[: sum(value <= gamma for value in sums)])
    assert _commits(EntropyBound(gamma), _view([[0.5] * len(h)], entropy=[h]), score) == [expected]


def test_an_entropy_bound_of_zero_is_one_token_and_what_is_certain_and_an_endless_one_is_all() -> None:
    view = _view([[0.5] * 3, [0.5] * 3], entropy=[[0.3, 0.2, 0.4], [0.0, 0.2, 0.0]])
    score = NegativeEntropy()(view)
    assert _commits(EntropyBound(0.0), view, score) == [[1], [0, 1, 2]]  # 0 + 0 + 0.2 − 0.2 is 0
    assert _commits(EntropyBound(float("inf")), view, score) == [[0, 1, 2]] * 2


def test_entropies_of_columns_that_are_not_eligible_do_not_count() -> None:
    view = _view([[0.5] * 3], [[True, False, True]], entropy=[[0.1, 0.0, 0.2]])
    assert _commits(EntropyBound(0.05), view, NegativeEntropy()(view)) == [[0]]
    assert _commits(EntropyBound(0.11), view, NegativeEntropy()(view)) == [[0, 2]]


def test_a_quota_is_the_same_number_in_every_forward_and_less_where_there_are_fewer() -> None:
    view = _view([[0.1, 0.3, 0.2], [0.1, 0.3, 0.2]], [[True] * 3, [True, False, False]])
    assert _commits(Quota(2), view) == [[1, 2], [0]]


def test_ranks_are_a_permutation_with_eligible_columns_first_whatever_their_score() -> None:
    score = torch.tensor([[float("-inf"), 5.0, 9e99, 5.0, -1e300]], dtype=torch.float64)
    eligible = torch.tensor([[True, False, True, True, True]])
    assert ranks(score, eligible).tolist() == [[3, 4, 0, 1, 2]]
