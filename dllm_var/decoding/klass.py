"""Which tokens have stopped moving: confident ones whose distribution stayed the same over the last forwards (2511.05664).

Composed by `dllm_var.decoding.compose`. The distributions are compared where they are made, on the model's device.

Legend: B rows, w columns of a view, m rows of a chunk, V vocabulary, W remembered positions of a row.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dllm_var.decoding.proposal import Candidates, Measure
from dllm_var.decoding.scorers import Random
from dllm_var.decoding.selectors import Selector, best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView

# Names of the notes: log-probabilities of the last look float32 [B, W, V], a position's at its number modulo W; the row's
# forward of that look int64 [B, C]; how many looks in a row moved less than the bound int64 [B, C].
LOG_P, LOOKED, CALM = "klass_log_p", "klass_looked", "klass_calm"


class Klass(Selector):
    """Every token that is ready: confident, and moved less than a bound in each of the last forwards (arXiv 2511.05664).

    A token moved by KL(now ‖ one forward ago), in nats. A position that the last forward did not look at has moved without
    bound. Where no token is ready, another rule decides.

    Published (tables quoted second-hand): LLaDA-8B-Instruct, 256 tokens in blocks of 64, GSM8K 75.1 → 76.5 in 99 instead
    of 256 forwards, MATH 31.4 → 33.8 in 129. Here the movement is taken in float32 from log-softmax: in bfloat16, as in one
    public port, KL(p ‖ p) alone is as large as the bound. Public code may also overwrite decided tokens when fewer steps
    than tokens are scheduled; nothing decided is touched here.

    Args:
        threshold: the confidence must be above it. kl_threshold: the movement must be below it.
        history: how many forwards in a row. warmup: no token is ready in the first ``history − 1`` forwards of a block.
        strategy: of the ready tokens decide "all", or the one with "max_conf" or "min_kl", or one at "random".
        fallback: the rule for rows without a ready token.
        block_length, longest: the most positions of a block, and of a response. seed: of random choices.
    """

    def __init__(
        self,
        threshold: float,
        kl_threshold: float,
        history: int,
        warmup: bool,
        strategy: str,
        fallback: Selector,
        block_length: int,
        longest: int,
        seed: int = 0,
    ) -> None:
        self.threshold, self.kl_threshold, self.history = threshold, kl_threshold, history
        self.warmup, self.strategy, self.fallback = warmup, strategy, fallback
        self.draws = Random(seed)
        self.notes: dict[str, Tensor] = {}
        self.ahead = 1 if warmup else history  # blocks that are looked at before they open
        self.width, self.last = min((1 + self.ahead) * block_length, longest), torch.empty(0)

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {**self.fallback.measures, "movement": self._movement}

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        """Looks as well at those masks of later blocks whose movement may count when their block opens.

        A block takes at least one forward, so these are the masks of the next `history` blocks; of the next one alone
        with `warmup`, which never counts a movement from before it.
        """
        last = state.block_end + self.ahead * (state.block_end - state.block_start)
        if LOOKED not in state.notes:
            state.notes[LOOKED] = torch.full_like(state.tokens, -2)
            state.notes[CALM] = torch.zeros_like(state.tokens)
        self.notes, self.last = state.notes, last
        near = plan.real & (plan.positions < last[:, None]) & state.masked.gather(1, plan.positions)
        return replace(plan, wanted=plan.wanted | near)

    def _movement(self, seen: Candidates) -> Tensor:
        """KL(now ‖ last look) [m], float32; remembers what is seen now."""
        log_p = (seen.logits - seen.logsumexp[:, None]).clamp(min=torch.finfo(torch.float32).min)  # 0 · −inf is no number
        if LOG_P not in self.notes:
            shape = (len(self.notes[LOOKED]), self.width + 1, log_p.shape[1])  # the last one for what is not remembered
            self.notes[LOG_P] = torch.zeros(shape, dtype=torch.float32, device=log_p.device)
        rows, places = seen.rows, seen.positions % self.width
        before = self.notes[LOG_P][rows, places]
        # A cache may have looked further ahead than anything is remembered for.
        near = seen.positions < self.last.to(rows.device, non_blocking=True)[rows]
        self.notes[LOG_P][rows, places.where(near, self.width)] = log_p
        return (log_p.exp() * (log_p - before)).sum(-1).clamp(min=0.0)

    def select(self, view: StepView, score: Tensor) -> Action:
        state = view.state
        moved, calm = self._history(view)
        ready = view.eligible & (calm >= self.history) & (view.confidence > self.threshold)
        if self.warmup:
            ready = ready & (state.block_forwards >= self.history - 1)[:, None]
        none = ~ready.any(1, keepdim=True)
        if self.strategy != "all":
            order = {"max_conf": view.confidence, "min_kl": -moved, "random": self.draws(view)}[self.strategy]
            ready = best(order, ready, torch.ones_like(state.forwards))
        return Action(commit=torch.where(none, self.fallback.select(view, score).commit, ready))

    def _history(self, view: StepView) -> tuple[Tensor, Tensor]:
        """How far each column moved and in how many looks on end it moved little, [B, w] each; written down as well."""
        state, looked, calm = view.state, view.state.notes[LOOKED], view.state.notes[CALM]
        unbroken = looked.gather(1, view.positions) == state.forwards[:, None] - 1
        moved = view.measures["movement"].masked_fill(~unbroken, float("inf"))
        looks = torch.where(moved < self.kl_threshold, calm.gather(1, view.positions) + 1, 0)
        near = view.real & (view.positions < self.last[:, None])
        at = near.nonzero()[:, 0], view.positions[near]
        looked[at], calm[at] = state.forwards[at[0]], looks[near]
        return moved, looks
