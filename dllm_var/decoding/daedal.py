"""A canvas that sizes itself: it grows until the model expects an end, then wherever the model is in doubt (DAEDAL).

Composed by `dllm_var.decoding.compose`, together with a strict threshold on the confidence. After arXiv 2508.00819.

Legend: B rows, w columns of a view.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.length_policies import LengthPolicy
from dllm_var.decoding.proposal import Candidates, Measure
from dllm_var.decoding.state import LIVE, NEVER, DecodeState
from dllm_var.decoding.step import Action, Plan, StepView
from dllm_var.text.special_tokens import SpecialTokens


class Daedal(LengthPolicy):
    """Grows the canvas by masks at its end before the first block, and by masks in place of a doubtful one after that.

    Both are led by the EOS confidence: over the last `num_check_last_eot` columns whose likeliest token is EOS, the sum of
    its probabilities divided by `num_check_last_eot` (not by how many there are).

    1. While it is below `initial_eot_expand_thres`, a row gets `expansion_factor` masks per forward, and decides nothing.
       Then `eos_tail` visible EOS tokens are put behind them.
    2. While it is below `decode_eot_expand_thres`, the least confident mask of the block that is not decided in this very
       forward, if below `low_conf_expand_thres`, is replaced by `expansion_factor` masks. What follows moves right, out of
       the block if need be: a block is a range of positions.

    No row outgrows its limit. Where masks are inserted without room, EOS tokens of the tail, which nobody decided, give
    way, and where that is not enough fewer masks are inserted (the public code drops decided tokens at the right end as
    well). A row in the first stage has no block yet: its block index is −1.

    Published: LLaDA-Instruct-8B from 64 masks, against the best fixed length: GSM8K 85.8 (83.8), MATH-500 44.2 (39.6),
    MBPP 40.8 (38.8), HumanEval 48.2 (47.6). Beside the cap, two things differ here: rows of a batch size themselves, and
    the prefix cache goes with it, since insertions never touch what lies before the block (the search for EOS then sees
    the block and what follows it only).

    Args:
        config: what the names above stand for. special: mask, EOS and stop tokens.
    """

    def __init__(self, config: GenerationConfig, special: SpecialTokens) -> None:
        super().__init__(config.block_length, special.stop, config.early_stop)
        self.config, self.special = config, special

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"eos": self._eos}

    def _eos(self, seen: Candidates) -> Tensor:
        """The probability of EOS where it is the likeliest token of those that can be proposed, else 0 [m]."""
        probability = (seen.logits[:, self.special.eos] - seen.logsumexp).exp()
        return torch.where(seen.proposable.argmax(-1) == self.special.eos, probability, 0.0)

    def before(self, state: DecodeState) -> None:
        """Begin or grow the canvas of rows in the first stage; open the next block of rows that are ready for one."""
        growing = state.block_index < 0
        opens = ~growing & ~state.window().any(1)
        if bool(growing.any()):
            opens = opens | self._size(state, growing)
        while bool(opens.any()):  # a block may hold nothing but EOS from behind the masks
            state.open_block(opens, self.block_length, state.end)
            opens = opens & ~state.window().any(1)
        # Forwards before the first block belong to none.
        state.block_forwards = state.block_forwards.masked_fill(state.block_index < 0, 0)

    def _size(self, state: DecodeState, growing: Tensor) -> Tensor:
        """Give the rows of the first stage (bool [B]) masks; returns those that have enough now and got their EOS tail."""
        use, room = self.config, state.limit - state.end
        fresh = growing & (state.forwards == 0)
        confidence = state.notes.setdefault("eos_confidence", torch.zeros(state.rows, dtype=torch.float64))
        short = growing & ~fresh & (confidence < use.initial_eot_expand_thres) & (room > 0)
        state.end = state.end + room.minimum(fresh * use.initial_gen_length + short * use.expansion_factor)
        sized = growing & ~fresh & ~short
        state.append(self.special.eos, sized * room.clamp(max=use.eos_tail))
        return sized

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """Every computed position of the response is wanted, decided ones as well."""
        return replace(plan, wanted=plan.real & (plan.positions >= state.prompt[:, None]))

    def adjust(self, action: Action, view: StepView) -> Action:
        use, state = self.config, view.state
        confidence = eos_confidence(view.measures["eos"], use.num_check_last_eot)
        state.notes["eos_confidence"] = confidence
        room = state.limit - state.end
        doubtful = view.eligible & ~action.commit & (view.confidence < use.low_conf_expand_thres)
        widens = (confidence < use.decode_eot_expand_thres) & (room > 0) & doubtful.any(1) & (state.last == LIVE)
        if not bool(widens.any()):
            return action
        least = view.confidence.masked_fill(~doubtful, float("inf")).argmin(1, keepdim=True)
        at = view.positions.gather(1, least)[:, 0]
        more = use.expansion_factor - 1
        dropped = widens * (more - room).clamp(min=0).minimum(_tail(state))
        state.drop(dropped)
        return replace(action, insert_at=at.where(widens, -1), insert_count=(room + dropped).clamp(max=more))

    def complete(self, state: DecodeState, full: Tensor) -> Tensor:
        return state.settled() >= state.end

    def after(self, state: DecodeState) -> None:
        # A block that the end of the canvas had cut short gets what was inserted.
        whole = (state.block_start + self.block_length).minimum(state.end)
        state.block_end = whole.where(state.block_index >= 0, state.block_end)
        super().after(state)


def _tail(state: DecodeState) -> Tensor:
    """How many tokens at the end of each row's canvas nobody decided, int64 [B]."""
    return (state.within(state.prompt, state.end) & ~state.masked & (state.step == NEVER)).sum(1)


def eos_confidence(eos: Tensor, count: int) -> Tensor:
    """Σ over the last `count` columns with an EOS probability above 0, divided by `count`; [B, w] → float64 [B]."""
    found = eos > 0
    from_end = found.flip(1).cumsum(1).flip(1)  # 1 for the last column with one, and so on
    # In float64 the sum of so few float32 numbers is exact, so the width of the batch does not matter.
    return (eos.double() * (found & (from_end <= count))).sum(1) / count
