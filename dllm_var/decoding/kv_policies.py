"""Which positions does a forward compute, and whose keys and values are kept?

Composed by `dllm_var.decoding.loop.compose`; asked for a plan before every forward and shown the result after it. A slot
of the store is the token's canvas position. Under full attention every reuse is approximate, since a stored entry has
not seen later tokens; `Recompute` is the yardstick.
"""

from dataclasses import replace

import torch

from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


class KVPolicy:
    """What the loop asks of a KV policy.

    Attributes:
        scratch: the largest number of columns of a plan with slot −1; None: the policy keeps nothing.
    """

    scratch: int | None = None

    def plan(self, state: DecodeState) -> Plan:
        """The columns of the next forward."""
        raise NotImplementedError

    def observe(self, view: StepView, action: Action) -> None:
        """Called once the action has been applied; by default nothing."""


class Recompute(KVPolicy):
    """Nothing is kept: every forward computes the whole canvas."""

    def plan(self, state: DecodeState) -> Plan:
        return Plan.span(state, torch.zeros_like(state.end), state.end)


class BlockCommit(KVPolicy):
    """A finished block is stored in the forward that takes the first look at the next one (arXiv 2510.24605).

    One rule covers the three phases of a row: compute everything from the first position that is not stored up to the end
    of the current block, and store what lies before that block. That makes the prompt and the first block a *prefill*,
    the block alone a *refinement*, and the finished block together with the next one a *commit*. So every stored entry is
    computed exactly once, from final tokens, with the next mask block visible. The last block is never stored.

    Args:
        block_length: the most positions of a block.
    """

    def __init__(self, block_length: int) -> None:
        self.scratch = block_length

    def plan(self, state: DecodeState) -> Plan:
        plan = Plan.span(state, state.stored, state.block_end)
        final = plan.real & (plan.positions < state.block_start[:, None])
        return replace(plan, slots=plan.positions.where(final, -1))

    def observe(self, view: StepView, action: Action) -> None:
        view.state.stored = view.state.block_start
