"""How many tokens does a step commit, and may decided ones be taken back?

Composed by `dllm_var.decoding.loop.compose`. Every rule is per row (no row looks at another), chooses among eligible
columns only, and commits at least one token of every row that has an eligible one, so decoding always ends.

Legend: B rows, w columns of a view.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_var.decoding.proposal import Measure
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


class Selector:
    """What the loop asks of a selector; a rule overrides `select` and whatever else it needs."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Numbers wanted for every column, by name, found in `StepView.measures`; by default none."""
        return {}

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """The plan with further columns of the selector's own (shadow queries); by default as it is."""
        return plan

    def select(self, view: StepView, score: Tensor) -> Action:
        """What to change, given the view and the scores [B, w]."""
        raise NotImplementedError

    def observe(self, view: StepView, action: Action) -> None:
        """Called once the action has been applied, for rules with a memory; by default nothing."""


class Schedule(Selector):
    """The best n tokens of each row, n so that a block is filled in its given number of forwards (arXiv 2502.09992).

    The remainder goes first: ⌈masks left / forwards left⌉ is q + 1 for the first r forwards and q afterwards.

    Args:
        steps: forwards over all blocks. blocks: their number; earlier blocks get the remainder.
    """

    def __init__(self, steps: int, blocks: int) -> None:
        each, rest = divmod(steps, blocks)
        self.forwards = torch.tensor([each + (i < rest) for i in range(blocks)])

    def select(self, view: StepView, score: Tensor) -> Action:
        state = view.state
        masks = state.window().sum(1)
        left = (self.forwards[state.block_index] - state.block_forwards).clamp(min=1)
        return Action(commit=best(score, view.eligible, (masks + left - 1) // left))


class Threshold(Selector):
    """Every token whose confidence passes the threshold, and the best-scored one of a row where none does.

    Args:
        threshold: compared with the raw confidence.
        inclusive: whether equality passes (arXiv 2505.22618) or not (arXiv 2510.24605).
    """

    def __init__(self, threshold: float, inclusive: bool) -> None:
        self.threshold, self.inclusive = threshold, inclusive

    def select(self, view: StepView, score: Tensor) -> Action:
        c = view.confidence
        passed = view.eligible & (c >= self.threshold if self.inclusive else c > self.threshold)
        none = ~passed.any(1, keepdim=True)
        return Action(commit=passed | (none & best(score, view.eligible, torch.ones(len(c), dtype=torch.int64))))


def best(score: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """The `count` [B] best-scored eligible columns of each row as a bool [B, w]: all of them where there are fewer.

    Among equal scores the lowest position wins; eligible columns come before all others whatever their score.
    """
    lowest = torch.finfo(score.dtype).min
    order = score.clamp(min=lowest).masked_fill(~eligible, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).expand_as(order))
    return eligible & (rank < count[:, None])
