"""How long is a row's canvas, and when is the row done?

Composed by `dllm_var.decoding.compose`. Before each forward `before` moves a row whose block is full on to its next
block; after it `after` ends rows. Every row has its own block pointer.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_var.decoding.proposal import Measure
from dllm_var.decoding.state import EOS, LENGTH, DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


class LengthPolicy:
    """What the loop asks of a length policy, and what ours share.

    Args:
        block_length: positions of a block; the last one may be shorter.
        stop_ids: the tokens that end an answer.
        early_stop: end a row as soon as everything before its first stop token is final.
        revocable: whether a decided token may be taken back or replaced while its block is open, so that it is final only
            with its block.
        stop_until_eos: decide nothing behind the first stop token; this ends rows like `early_stop`.
    """

    # Whether a stop token ends the row once its block is full, also without early stop.
    stops_at_block_end = False

    def __init__(
        self,
        block_length: int,
        stop_ids: tuple[int, ...],
        early_stop: bool,
        revocable: bool = False,
        stop_until_eos: bool = False,
    ) -> None:
        self.block_length, self.stop_ids, self.stop_until_eos = block_length, stop_ids, stop_until_eos
        self.early_stop, self.revocable = early_stop or stop_until_eos, revocable

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Numbers wanted for every column, by name, found in `StepView.measures`; by default none."""
        return {}

    def before(self, state: DecodeState) -> None:
        """Open the next block of every row whose block is full (at the start: the first block of every row)."""
        full = ~state.window().any(1)
        if bool(full.any()):
            state.open_block(full, self.block_length)

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """The plan with further wanted columns; by default as it is."""
        return plan

    def adjust(self, action: Action, view: StepView) -> Action:
        """The action with insertions, or with commits withheld; by default as it is."""
        return action

    def complete(self, state: DecodeState, full: Tensor) -> Tensor:
        """Bool [B]: the rows with nothing left to decide, given those whose block is full."""
        return full & (state.block_end == state.limit)

    def after(self, state: DecodeState) -> None:
        """End the rows that are done."""
        if self.stop_until_eos:
            state.closed = state.closed.minimum(state.stopped(self.stop_ids))
        full = ~state.window().any(1)
        may_stop = torch.ones_like(full) if self.early_stop and not self.revocable else full
        may_stop = may_stop & (self.early_stop or self.stops_at_block_end)
        over = self.complete(state, full)
        if not bool((may_stop | over).any()):
            return
        stopped = state.stopped(self.stop_ids) < state.settled()
        state.finish(over, LENGTH)
        state.finish(stopped & (may_stop | over), EOS)


class Fixed(LengthPolicy):
    """A canvas of fixed length that the model sees as a whole from the first forward on (arXiv 2502.09992)."""

    def before(self, state: DecodeState) -> None:
        state.end = state.limit
        super().before(state)


class EosBlocks(LengthPolicy):
    """A canvas that grows by one block of masks at a time until a stop token is decided (arXiv 2510.24605)."""

    stops_at_block_end = True
