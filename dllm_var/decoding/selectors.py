"""How many tokens does a step commit, and may decided ones be taken back?

Composed by `dllm_var.decoding.compose`. Every rule is per row (no row looks at another), chooses among eligible
columns only, and commits at least one token of every row that has an eligible one, so decoding always ends.

Legend: B rows, w columns of a view.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_var.decoding.proposal import Measure, entropy, margin
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


class Selector(ABC):
    """What the loop asks of a selector; a rule overrides `select` and whatever else it needs."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Numbers wanted for every column, by name, found in `StepView.measures`; by default none."""
        return {}

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """The plan with further columns of the selector's own (shadow queries); by default as it is."""
        return plan

    def scratch(self, block_length: int) -> int:
        """How many columns it adds to a plan at most, given the most positions of a block; by default none."""
        return 0

    @abstractmethod
    def select(self, view: StepView, score: Tensor) -> Action:
        """What to change, given the view and the scores [B, w]."""

    def observe(self, view: StepView, action: Action) -> None:  # noqa: B027 (a hook, empty by default)
        """Called once the action has been applied, for rules with a memory; by default nothing."""


class Schedule(Selector):
    """The best n tokens of each row, n so that a block is filled in its given number of forwards (arXiv 2502.09992).

    The remainder goes first: ⌈masks left / forwards left⌉ is q + 1 for the first r forwards and q afterwards, and where a
    forward could decide less (few positions were computed) the next ones catch up.

    Published for LLaDA-8B-Instruct: GSM8K 69.4 with one block of 512 tokens, 78.6 with 256 tokens in blocks of 8. Here any
    block length will do, forwards without a quota are not made, and the switches for EOS act at any temperature.

    Args:
        steps: forwards over all blocks. blocks: their number; earlier blocks get the remainder.
        catches_up: as above; without it the quota of a forward is that of the full block, whatever another rule decided
            before it.
    """

    def __init__(self, steps: int, blocks: int, catches_up: bool = True) -> None:
        each, rest = divmod(steps, blocks)
        self.forwards = torch.tensor([each + (i < rest) for i in range(blocks)])
        self.catches_up = catches_up

    def select(self, view: StepView, score: Tensor) -> Action:
        state = view.state
        forwards = self.forwards[state.block_index]
        if self.catches_up:
            left = (forwards - state.block_forwards).clamp(min=1)
            quota = (state.window().sum(1) + left - 1) // left
        else:
            length = state.block_end - state.block_start
            quota = (length // forwards + (state.block_forwards < length % forwards)).clamp(min=1)
        return Action(commit=best(score, view.eligible, quota))


class Quota(Selector):
    """The same number of tokens in every forward, fewer when a row has no more.

    Args:
        count: tokens per forward.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def select(self, view: StepView, score: Tensor) -> Action:
        return Action(commit=best(score, view.eligible, _each(view, self.count)))


class Threshold(Selector):
    """Every token whose confidence passes the threshold; the best-scored ones of a row where fewer than `least` do.

    Published (2505.22618, threshold 0.9): see `dllm_var.decoding.kv_policies.Prefix`; without a cache 4 to 6 times faster.
    Some public code tests the score after priors have weighed it; here priors only rank.

    Args:
        threshold: compared with the raw confidence, whatever priors weigh the order.
        inclusive: whether equality passes (arXiv 2505.22618) or not (arXiv 2510.24605).
        least: the fewest tokens of a forward.
        by_margin: compare the margin to the runner-up instead.
    """

    def __init__(self, threshold: float, inclusive: bool, least: int = 1, by_margin: bool = False) -> None:
        self.threshold, self.inclusive, self.least, self.by_margin = threshold, inclusive, least, by_margin

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"margin": margin} if self.by_margin else {}

    def select(self, view: StepView, score: Tensor) -> Action:
        c = view.measures["margin"] if self.by_margin else view.confidence
        passed = view.eligible & (c >= self.threshold if self.inclusive else c > self.threshold)
        few = passed.sum(1, keepdim=True) < self.least
        return Action(commit=torch.where(few, best(score, view.eligible, _each(view, self.least)), passed))


class Factor(Selector):
    """The n most confident tokens, n as large as (n + 1)(1 − c of the n-th) < factor allows (arXiv 2505.22618).

    The left side does not fall with n, so n is how many ranks satisfy it. The public code of the paper takes the last token
    as well when only that one fails; the paper's rule, and this one, does not.

    Args:
        factor: the bound. least: the fewest tokens of a forward.
    """

    def __init__(self, factor: float, least: int = 1) -> None:
        self.factor, self.least = factor, least

    def select(self, view: StepView, score: Tensor) -> Action:
        c = view.confidence.masked_fill(~view.eligible, float("-inf")).sort(dim=1, descending=True).values
        rank = torch.arange(1, c.shape[1] + 1)
        fits = ((rank + 1) * (1.0 - c) < self.factor).sum(1)
        return Action(commit=best(score, view.eligible, fits.clamp(min=self.least)))


class EntropyBound(Selector):
    """The longest run of tokens, best-scored first, whose entropies without the largest sum to at most gamma (2505.24857).

    Σ h − max h bounds the error of deciding them together as if they were independent.

    Published: two to three times fewer forwards at equal accuracy; Dream-7B on MBPP with stopping at the end of the answer
    1.66 times (gamma 0.001) and 3.05 times (0.1). The largest entropy is that of the run so far in its own row; one public
    port takes it over the rows of the batch.

    Args:
        gamma: the bound in nats.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"entropy": entropy}

    def select(self, view: StepView, score: Tensor) -> Action:
        h = view.measures["entropy"].double()
        h = torch.empty_like(h).scatter_(1, ranks(score, view.eligible), h)  # [B, w] in order of rank, eligible ones first
        error = h.cumsum(1) - h.cummax(1).values
        return Action(commit=best(score, view.eligible, (error <= self.gamma).sum(1)))


def best(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] best-scored eligible columns of each row as a bool [B, w]: all of them where there are fewer."""
    return eligible & (ranks(score, eligible) < count[:, None])


def ranks(score: Tensor, eligible: Tensor) -> Tensor:
    """Int64 [B, w]: 0 for the best-scored eligible column of its row, and so on; a permutation of the columns.

    Among equal scores the lowest position wins; eligible columns come before all others whatever their score.
    """
    lowest = torch.finfo(score.dtype).min
    order = score.clamp(min=lowest).masked_fill(~eligible, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def _each(view: StepView, count: int) -> Tensor:
    return torch.full((len(view.eligible),), count)
