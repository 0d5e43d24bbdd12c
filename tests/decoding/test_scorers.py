"""In which order tokens are decided: scorers, and the priors that weigh them."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_var import GenerationConfig
from dllm_var.decoding.loop import decode
from dllm_var.decoding.priors import Calibrated, CertaintyPrior, PositionPrior
from dllm_var.decoding.scorers import Confidence, DecidedLast, LeftToRight, Margin, NegativeEntropy, Random, Scorer
from dllm_var.decoding.selectors import best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import StepView

PROMPT = 2


def _view(confidence: list[list[float]], ids: list[list[int]] | None = None, **measures: list[list[float]]) -> StepView:
    """A view of fresh rows of one block, every position a mask."""
    c = torch.tensor(confidence)
    rows, w = c.shape
    state = DecodeState.begin([[1] * PROMPT] * rows, range(rows), 11, w)
    state.open_block(torch.ones(rows, dtype=torch.bool), w)
    real = torch.ones(rows, w, dtype=torch.bool)
    return StepView(
        state=state,
        positions=PROMPT + torch.arange(w).expand(rows, w),
        real=real,
        eligible=real,
        ids=torch.zeros(rows, w, dtype=torch.int64) if ids is None else torch.tensor(ids),
        confidence=c,
        measures={name: torch.tensor(values) for name, values in measures.items()},
    )


def _decide(view: StepView, *columns: int) -> None:
    """Fix tokens at some columns of every row."""
    for row in range(view.state.rows):
        at = PROMPT + torch.tensor(columns)
        view.state.commit(torch.full_like(at, row), at, torch.full_like(at, 5), torch.ones(len(at)))


def _order(scorer: Scorer, view: StepView) -> list[int]:
    """The columns of the first row, first decided first."""
    return scorer(view)[0].argsort(descending=True, stable=True).tolist()


UNIFORM = torch.full((12,), 1 / 12, dtype=torch.float64)
confidences = st.lists(st.floats(0.015625, 1.0, width=32), min_size=1, max_size=8)


def test_confidence_margin_entropy_and_position_are_four_orders() -> None:
    view = _view([[0.5, 0.3, 0.4]], margin=[[0.1, 0.3, 0.2]], entropy=[[1.0, 2.0, 0.5]])
    assert _order(Confidence(), view) == [0, 2, 1]
    assert _order(Margin(), view) == [1, 2, 0]
    assert _order(NegativeEntropy(), view) == [2, 0, 1]
    assert _order(LeftToRight(), view) == [0, 1, 2]


def test_random_order_is_keyed_by_request_and_position_not_by_the_place_in_the_batch() -> None:
    pair, alone = _view([[0.0] * 6] * 2), _view([[0.0] * 6])
    alone.state.request = torch.tensor([1])
    score = Random(3)(pair)
    assert torch.equal(score[1], Random(3)(alone)[0])
    assert not torch.equal(score[0], score[1])
    assert not torch.equal(score, Random(4)(pair))


@pytest.mark.parametrize("inner", [Confidence(), Random(0)])
def test_tokens_decided_last_rank_behind_all_others_but_stay_choosable(inner: Confidence | Random) -> None:
    view = _view([[0.99, 0.1, 0.98, 0.2]], ids=[[10, 1, 9, 2]])
    score = DecidedLast(inner, (9, 10))(view)
    assert sorted(score[0].argsort(descending=True, stable=True)[:2].tolist()) == [1, 3]
    only_stops = replace(view, eligible=torch.tensor([[True, False, True, False]]))
    assert best(score, only_stops.eligible, torch.tensor([1])).tolist() == [[True, False, False, False]]


# Calibrated confidence (PC-Sampler).


def test_a_calibrated_score_is_confidence_times_information_up_to_a_clip() -> None:
    frequencies = torch.tensor([0.5, 0.25, 1e-9], dtype=torch.float64)
    view = _view([[0.8, 0.8, 0.8, 0.1]], ids=[[0, 1, 2, 2]])
    expected = torch.tensor([[0.8 * 0.693147, 0.8 * 1.386294, 10.0, 2.072327]], dtype=torch.float64)
    assert torch.allclose(Calibrated(frequencies, 10.0)(view).exp(), expected, rtol=1e-5)


def test_a_token_that_always_occurs_comes_last_and_can_be_chosen() -> None:
    view = _view([[0.9, 0.1]], ids=[[0, 1]])
    score = Calibrated(torch.tensor([1.0, 0.5]), 10.0)(view)
    assert score[0].tolist() == [float("-inf"), pytest.approx(torch.tensor(0.1 * 0.693147).log().item(), rel=1e-5)]
    assert best(score, torch.tensor([[True, False]]), torch.tensor([1])).tolist() == [[True, False]]


@given(c=confidences)
@settings(max_examples=60, deadline=None)
def test_uniform_frequencies_without_clip_and_position_are_plain_confidence(c: list[float]) -> None:
    view = _view([c])
    assert _order(Calibrated(UNIFORM, float("inf")), view) == _order(Confidence(), view)


@given(c=confidences, data=st.data())
@settings(max_examples=60, deadline=None)
def test_renaming_tokens_together_with_their_frequencies_changes_nothing(c: list[float], data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 11), min_size=len(c), max_size=len(c)))
    name = torch.tensor(data.draw(st.permutations(range(12))))
    frequencies = torch.arange(1, 13).double() / 78
    renamed = torch.empty_like(frequencies).scatter_(0, name, frequencies)
    score = PositionPrior(Calibrated(frequencies, 10.0), 0.25, "exponential")(_view([c], [ids]))
    other = PositionPrior(Calibrated(renamed, 10.0), 0.25, "exponential")(_view([c], [name[ids].tolist()]))
    assert torch.equal(score, other)


# Position.


@given(c=confidences)
@settings(max_examples=40, deadline=None)
def test_no_weight_of_the_position_is_the_plain_order_and_a_huge_one_is_left_to_right(c: list[float]) -> None:
    view = _view([c])
    assert _order(PositionPrior(Confidence(), 1e-9, "exponential"), view)[:1] == _order(Confidence(), view)[:1]
    assert _order(PositionPrior(Confidence(), 1e6, "exponential"), view) == list(range(len(c)))
    assert _order(PositionPrior(Confidence(), 1.0, "linear"), view) == list(range(len(c)))


def test_the_exponential_prior_multiplies_by_a_power_of_the_place_in_the_block() -> None:
    view = _view([[0.9, 0.8, 0.7]])
    scores = PositionPrior(Confidence(), 0.1, "exponential")(view).exp()[0]
    assert scores.tolist() == pytest.approx([0.9, 0.8 * math.exp(-0.1), 0.7 * math.exp(-0.2)])
    entropy = _view([[0.5] * 2], entropy=[[1.5, 0.5]])  # its logarithm as it is, not that of a negative number
    assert PositionPrior(NegativeEntropy(), 0.1, "exponential")(entropy)[0].tolist() == pytest.approx([-1.5, -0.6])
    view.state.block_start = view.state.block_start - 7  # any common offset
    assert _order(PositionPrior(Confidence(), 0.1, "exponential"), view) == [0, 1, 2]


def test_a_canvas_of_4096_positions_is_ordered_without_ties_or_nan() -> None:
    c = 0.5 + 0.4 * torch.rand(4096, generator=torch.Generator().manual_seed(0))
    view = _view([c.tolist()])
    for weight in (0.25, 1.0):
        score = PositionPrior(Calibrated(UNIFORM, 10.0), weight, "exponential")(view)[0]
        assert bool(score.isfinite().all())
        assert len(score.unique()) == 4096


def test_the_linear_prior_shares_between_scaled_score_and_position() -> None:
    view = _view([[0.2, 0.6, 0.4, 0.9, 0.1]])
    view = replace(view, eligible=torch.tensor([[True] * 3 + [False] * 2]))  # scaled over the eligible ones: 0, 1, ½
    scores = PositionPrior(Confidence(), 0.25, "linear")(view)[0, :3].tolist()
    assert scores == pytest.approx([0.25, 0.75 + 0.25 * 0.8, 0.375 + 0.25 * 0.6], abs=1e-6)


def test_a_linear_prior_over_equal_scores_is_left_to_right() -> None:
    assert _order(PositionPrior(Confidence(), 0.1, "linear"), _view([[0.5] * 4])) == [0, 1, 2, 3]


# Certainty.


def test_the_density_prior_prefers_tokens_beside_decided_ones() -> None:
    view = _view([[0.5, 0.5, 0.5, 0.5, 0.9, 0.5]])
    assert _order(CertaintyPrior(Confidence(), 1.0), view)[0] == 0  # the prompt is decided
    _decide(view, 3)
    order = [column for column in _order(CertaintyPrior(Confidence(), 1.0), view) if column != 3]
    assert order == [4, 0, 2, 1, 5]


@given(c=confidences)
@settings(max_examples=40, deadline=None)
def test_a_wide_density_is_the_plain_order_and_a_narrow_one_grows_from_the_prompt(c: list[float]) -> None:
    view = _view([c])
    wide = CertaintyPrior(Confidence(), 1e9)(view).exp()
    assert torch.allclose((wide / wide[0, 0]).float(), view.confidence / view.confidence[0, 0], rtol=1e-5)
    assert _order(CertaintyPrior(Confidence(), 0.05), view) == list(range(len(c)))


def test_the_density_raises_sure_tokens_by_entropy_too() -> None:
    view = _view([[0.5] * 4], entropy=[[1.0, 1.0, 1.0, 0.9]])
    assert _order(CertaintyPrior(NegativeEntropy(), 1.0), view)[0] == 0  # a product with −H would put the last one first


ALL = [Confidence(), Margin(), NegativeEntropy(), LeftToRight(), Random(1), Calibrated(UNIFORM, 3.0)]


@pytest.mark.parametrize("inner", ALL)
@pytest.mark.parametrize("prior", ["exponential", "linear", "density"])
def test_every_scorer_can_be_weighed_and_a_row_is_weighed_as_if_alone(inner: Scorer, prior: str) -> None:
    rows = [[0.5, 0.25, 0.75], [0.125, 0.5, 0.0625]]
    both = _view(rows, margin=rows, entropy=rows)
    alone = _view(rows[1:], margin=rows[1:], entropy=rows[1:])
    alone.state.request = torch.tensor([1])
    scorer = CertaintyPrior(inner, 2.0) if prior == "density" else PositionPrior(inner, 0.3, prior)
    assert scorer.measures.keys() == inner.measures.keys()
    score = scorer(both)
    assert bool(score.isfinite().all())
    assert torch.equal(score[1], scorer(alone)[0])


def _steps(rule_model: Any, special: Any, strengths: Tensor, **options: Any) -> list[int]:
    """The forward in which each of some positions is decided; token p % 3 is wanted at position p with a given strength."""

    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 12)
        return logits.scatter_(-1, (positions % 3)[..., None], strengths[positions - 2].where(positions > 1, 0.0)[..., None])

    config = GenerationConfig(method="vanilla", gen_length=len(strengths), **options)
    return decode(rule_model(rule), special, config, [[1, 1]])[0].steps


def test_the_options_reach_the_order(rule_model: Any, special: Any) -> None:
    strengths = torch.tensor([3.0, 5.0, 4.0, 6.0])
    assert _steps(rule_model, special, strengths) == [3, 1, 2, 0]
    assert _steps(rule_model, special, strengths, remasking="left_to_right") == [0, 1, 2, 3]
    assert _steps(rule_model, special, strengths, remasking="entropy") == [3, 1, 2, 0]
    assert _steps(rule_model, special, strengths, lambd=50.0) == [0, 1, 2, 3]
    assert _steps(rule_model, special, strengths, lambd=1.0, position_prior="linear") == [0, 1, 2, 3]
    assert _steps(rule_model, special, strengths, sigma=0.1) == [0, 1, 2, 3]
    assert _steps(rule_model, special, strengths, sigma=1e6) == [3, 1, 2, 0]
