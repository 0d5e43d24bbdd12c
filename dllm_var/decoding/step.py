"""What the parts of one step tell each other: `Plan` (what to compute), `StepView` (what came of it), `Action` (what to do).

Made and read by the policies (`scorers`, `selectors`, `kv_policies`, `length_policies`) and carried by the loop. All of it
lies on the host except `StepView.attentions`.

Legend: B rows, n active positions (columns of one forward, right-padded), w wanted columns (those with logits,
right-padded), K keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_var.decoding.state import DecodeState


@dataclass(frozen=True)
class Plan:
    """The columns of one forward.

    Attributes:
        positions: int64 [B, n], the canvas position of each column.
        ids: int64 [B, n], the token fed at each column.
        real: bool [B, n], False for padding.
        wanted: bool [B, n], the columns whose logits are needed.
        slots: int64 [B, n], where keys and values are stored, −1 for nowhere; None: no store takes part.
        query_mask: bool [B, n, K], a further limit on what each column sees.
        attention: whether the head-mean attention of each layer is wanted.
    """

    positions: Tensor
    ids: Tensor
    real: Tensor
    wanted: Tensor
    slots: Tensor | None = None
    query_mask: Tensor | None = None
    attention: bool = False

    @classmethod
    def span(cls, state: DecodeState, start: Tensor, end: Tensor) -> "Plan":
        """Each row's canvas from `start` up to `end` (int64 [B]); logits for the masked positions of its window."""
        positions = start[:, None] + torch.arange(int((end - start).max()))  # [B, n]
        real = positions < end[:, None]
        positions = positions.masked_fill(~real, 0)
        wanted = real & state.window().gather(1, positions)
        return cls(positions=positions, ids=state.tokens.gather(1, positions), real=real, wanted=wanted)


@dataclass(frozen=True)
class StepView:
    """What a forward showed, one column for each wanted column of the plan, in its order: ascending
    positions, and behind them what a selector asked for beside.

    Everything here was computed in this very step. A column is *eligible* when its position is masked and in the window;
    a selector that asked for more (a shadow of a decided token, say) finds it as a column that is not eligible.

    Attributes:
        state: the rows, before this step's action.
        positions: int64 [B, w], canvas positions; 0 in padding.
        real: bool [B, w], False for padding.
        eligible: bool [B, w], the columns that may be committed.
        ids: int64 [B, w], the proposed token; never the mask.
        confidence: float32 [B, w], its probability before any prior (at temperature 1, unless score_distribution says
            "tempered").
        measures: further numbers per column [B, w] float32, those that a policy asked for by name.
        attentions: per layer [B, n, K] on the model's device, when the plan wanted them.
    """

    state: DecodeState
    positions: Tensor
    real: Tensor
    eligible: Tensor
    ids: Tensor
    confidence: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    attentions: tuple[Tensor, ...] | None = None

    @classmethod
    def build(
        cls,
        state: DecodeState,
        plan: Plan,
        readings: Tensor,
        names: tuple[str, ...] = (),
        attentions: tuple[Tensor, ...] | None = None,
    ) -> "StepView":
        """From the packed readings int32 [2 + len(names), M] of the M wanted columns, see `dllm_var.decoding.proposal`."""
        counts = plan.wanted.sum(1)
        real = torch.arange(int(counts.max())) < counts[:, None]  # [B, w]

        def spread(flat: Tensor) -> Tensor:
            return torch.zeros(real.shape, dtype=flat.dtype).masked_scatter_(real, flat)

        positions = spread(plan.positions[plan.wanted])
        numbers = [spread(row.view(torch.float32)) for row in readings[1:]]
        return cls(
            state=state,
            positions=positions,
            real=real,
            eligible=real & state.window().gather(1, positions),
            ids=spread(readings[0].long()),
            confidence=numbers[0],
            measures=dict(zip(names, numbers[1:], strict=True)),
            attentions=attentions,
        )


@dataclass(frozen=True)
class Action:
    """What a step changes.

    Attributes:
        commit: bool [B, w], the columns whose proposed token is fixed; a subset of the eligible ones.
        remask: bool [B, w], the columns whose decided token is taken back.
        replace: bool [B, w], the columns whose decided token gives way to the proposed one.
        insert_at: int64 [B], per row a masked position that is widened to ``insert_count + 1`` masks; −1 for none.
        insert_count: int64 [B], how many masks that adds.
    """

    commit: Tensor
    remask: Tensor | None = None
    replace: Tensor | None = None
    insert_at: Tensor | None = None
    insert_count: Tensor | None = None

    def filling(self, view: StepView, rows: Tensor, stop_ids: Sequence[int]) -> "Action":
        """The action with all eligible columns of the given rows (bool [B]) committed and none of theirs masked again.

        What lies behind the first stop token that is decided anyway is left as it is.
        """
        others = ~rows[:, None]
        ending = self.commit & torch.isin(view.ids, torch.tensor(stop_ids, dtype=torch.int64))
        ends = view.positions.where(ending, view.state.tokens.shape[1])
        first = torch.cat((view.state.stopped(stop_ids)[:, None], ends), dim=1).amin(1, keepdim=True)
        return Action(
            commit=self.commit | (view.eligible & rows[:, None] & (view.positions < first)),
            remask=None if self.remask is None else self.remask & others,
            replace=self.replace,
            insert_at=None if self.insert_at is None else self.insert_at.masked_fill(rows, -1),
            insert_count=self.insert_count,
        )

    def apply(self, view: StepView) -> None:
        """Change the rows of the view: first take tokens back, then commit and replace, then widen masks."""
        state = view.state
        if self.remask is not None:
            state.remask(*_cells(view, self.remask))
        fixed = self.commit if self.replace is None else self.commit | self.replace
        state.commit(*_cells(view, fixed), view.ids[fixed], view.confidence[fixed])
        if self.insert_at is not None and self.insert_count is not None:
            state.insert(self.insert_at, self.insert_count)


def _cells(view: StepView, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Row and canvas position of the chosen columns."""
    return chosen.nonzero()[:, 0], view.positions[chosen]
