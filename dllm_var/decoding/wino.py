"""Draft widely, take back what a second look doubts: the second look costs no forward of its own (arXiv 2507.18578).

Composed by `dllm_var.decoding.compose`. The second look is a *shadow* of the block: its positions once more, fed with
masks, behind the columns of the plan. A shadow sees the other shadows and everything but the token at its own position;
nothing else sees a shadow, and it is never stored. So it says what the model thinks of a decided token from its
surroundings alone (nearly: behind the first layer the neighbours have taken the token in).

Legend: B rows, n columns of the plan, S shadow columns, K keys, w columns of a view, m rows of a chunk.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_var.decoding.proposal import Candidates, Measure
from dllm_var.decoding.selectors import Selector, best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView

# Name of a note: int64 [B], the tokens that a row drafted in its last forward.
DRAFTED = "wino_drafted"


class Wino(Selector):
    """Decides every token above a low bar and takes earlier ones of the block back that their shadow finds unlikely.

    At most 0.7 of the masks are drafted, within 5 … 20, and at least one. Tokens are taken back only where two or more
    are drafted, and fewer than were drafted, so that a block takes no more forwards than it has positions. What the last
    forward of a block drafts gets no second look; earlier blocks and given tokens never do.

    Published (tables quoted second-hand): LLaDA-8B-Instruct, 256 tokens in blocks of 128, GSM8K 73.2 → 75.8 in 42 instead
    of 256 forwards. Here rows of a batch draft each for themselves, shadows also read stored keys (prefix, dual, and
    dLLM-Var's blocks), which the public code leaves out, and the first forward of a block, where there is nothing to
    verify, has no shadow.

    Args:
        wide: the confidence of a draft must be above it.
        narrow: a token is taken back where its shadow gives it a probability below it; the least likely ones first.
        budget: fewer tokens are taken back than were drafted in the "previous" forward, or in the "current" one.
    """

    def __init__(self, wide: float, narrow: float, budget: str) -> None:
        self.wide, self.narrow, self.budget = wide, narrow, budget
        self.tokens = torch.empty(0)

    def scratch(self, block_length: int) -> int:
        return block_length

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"decided": self._decided}

    def _decided(self, seen: Candidates) -> Tensor:
        """The probability [m] of the token that stands at the position."""
        tokens = self.tokens.to(seen.rows.device, non_blocking=True)[seen.rows, seen.positions]
        return (seen.logits.gather(1, tokens[:, None])[:, 0] - seen.logsumexp).exp()

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """The plan with a shadow of each row's block, but for its first forward; logits for that of decided tokens.

        Every position of the block has one: the shadows see each other, as in the published decoder.
        """
        self.tokens = state.tokens
        again = state.block_forwards > 0
        length = (state.block_end - state.block_start) * again
        shadows = int(length.max())
        if not shadows:
            return plan
        real = torch.arange(shadows) < length[:, None]  # [B, S]
        positions = (state.block_start[:, None] + torch.arange(shadows)).masked_fill(~real, 0)
        shadowed = replace(
            plan,
            positions=torch.cat((plan.positions, positions), 1),
            ids=torch.cat((plan.ids, torch.full_like(positions, state.mask)), 1),
            real=torch.cat((plan.real, real), 1),
            wanted=torch.cat((plan.wanted, real & state.tentative().gather(1, positions)), 1),
            slots=None if plan.slots is None else F.pad(plan.slots, (0, shadows), value=-1),
        )
        return replace(shadowed, query_mask=_sight(shadowed, shadows, state))

    def select(self, view: StepView, score: Tensor) -> Action:
        state = view.state
        assert bool((state.block_forwards < state.block_end - state.block_start).all()), "a forward per position at most"
        above = view.eligible & (view.confidence > self.wide)
        few = ~above.any(1)
        cap = (state.window().sum(1) * 7 // 10).clamp(5, 20).masked_fill(few, 1)
        draft = best(score, torch.where(few[:, None], view.eligible, above), cap)
        drafted = draft.sum(1)
        last = drafted if self.budget == "current" else state.notes.get(DRAFTED, drafted)
        state.notes[DRAFTED] = drafted
        p = view.measures["decided"]
        doubted = view.real & ~view.eligible & (p < self.narrow)
        return Action(commit=draft, remask=best(-p, doubted, (last - 1).masked_fill(drafted < 2, 0)))


def _sight(plan: Plan, shadows: int, state: DecodeState) -> Tensor:
    """What each column sees, bool [B, n + S, K], when the last S of the plan are shadows.

    The keys of a forward are its columns; with a store they are its slots as far as any row has filled them, and then
    the passing columns of each row (`KVStore.place`). The plan's columns are a run of positions, the block among them.
    """
    rows, columns = plan.ids.shape
    n, keys = columns - shadows, columns
    key = torch.arange(columns).expand(rows, columns)  # of each column
    if plan.slots is not None:
        passing = plan.real & (plan.slots < 0)
        extent = int(torch.maximum(state.stored, plan.slots.amax(1) + 1).max())
        keys = extent + int(passing.sum(1).max())
        key = torch.where(passing, extent + passing.cumsum(1) - 1, plan.slots)
    shadow_key = torch.zeros(rows, keys + 1, dtype=torch.bool)  # one more for padding
    shadow_key = shadow_key.scatter_(1, key[:, n:].masked_fill(~plan.real[:, n:], keys), True)[:, :keys]
    main = (plan.positions[:, n:] - plan.positions[:, :1]).clamp(min=0)  # [B, S], the column of the decided token
    sight = torch.ones(rows, columns, keys, dtype=torch.bool)
    sight[:, :n] = ~shadow_key[:, None]
    sight[:, n:].scatter_(2, key.gather(1, main)[..., None], False)
    return sight
