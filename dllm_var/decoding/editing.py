"""Second thoughts: decided tokens of the open block follow the model's present choice (arXiv 2510.24605, "editing").

Composed by `dllm_var.decoding.compose` around the rule that says how many masks are decided.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from dllm_var.decoding.proposal import Measure
from dllm_var.decoding.selectors import Selector
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


class Editing(Selector):
    """Another rule, which also replaces tokens of the open block where the model now prefers another one.

    A block is open while it has masks. A replacement makes none and each forward decides at least one, so a block takes
    no more forwards than it has positions; a token of a full block, about to be stored, stays what it is. (The public
    code of the paper also edits a block while its keys and values are computed, from the tokens before the edit.)
    No figure is published for it, and the released model was not made for it.

    Args:
        inner: the rule for the masks. threshold: the confidence in the new token must be above it.
    """

    def __init__(self, inner: Selector, threshold: float) -> None:
        self.inner, self.threshold = inner, threshold

    @property
    def measures(self) -> Mapping[str, Measure]:
        return self.inner.measures

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        plan = self.inner.extend(plan, state)
        return replace(plan, wanted=plan.wanted | plan.real & state.tentative().gather(1, plan.positions))

    def select(self, view: StepView, score: Tensor) -> Action:
        state = view.state
        standing = view.real & state.tentative().gather(1, view.positions)
        other = view.ids != state.tokens.gather(1, view.positions)
        return replace(self.inner.select(view, score), replace=standing & other & (view.confidence > self.threshold))

    def observe(self, view: StepView, action: Action) -> None:
        self.inner.observe(view, action)
