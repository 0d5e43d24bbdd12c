"""What decoding hands out: an `Event` per row and forward while it runs, a `Generation` per row at its end.

Made by `dllm_var.decoding.loop`; `dllm_var.generation` adds the text. Positions are counted from the start of the
response here.
"""

from dataclasses import dataclass, field
from itertools import compress

import torch

from dllm_var.decoding.state import LIVE, STOP_REASONS, DecodeState
from dllm_var.decoding.step import Action, StepView
from dllm_var.text.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Commit:
    """A token that was fixed: its response position, its id, and the model's probability for it."""

    position: int
    id: int
    confidence: float


@dataclass(frozen=True)
class Generation:
    """One finished answer.

    Attributes:
        tokens: ids up to, not including, the first stop token.
        raw: every id of the canvas' response, whole blocks. After an early stop the masks that were left are EOS.
        stop_reason: "eos": a stop token was decided; "length": the canvas could not grow further; of the engine also
            "stop_string", "forwards", "deadline", "cancelled".
        forwards: model calls that this row took part in, the prefill included (a guidance pair counts once).
        positions: positions computed, summed over those calls (both streams of guidance).
        steps: per id of `raw`, the call (from 0) that fixed it; −1 where none did.
        confidence: per id of `raw`, its probability in that call. blocks: the block it was decided in; −1 where none.
        text: the answer as text, where a tokenizer is known.
    """

    tokens: list[int]
    raw: list[int]
    stop_reason: str
    forwards: int
    positions: int
    steps: list[int] = field(repr=False)
    confidence: list[float] = field(repr=False)
    blocks: list[int] = field(repr=False)
    text: str | None = None

    @property
    def decided(self) -> int:
        """Tokens that the answer took: those of `tokens` and the stop token, if one ended it."""
        return len(self.tokens) + (self.stop_reason == "eos")

    @property
    def tokens_per_forward(self) -> float:
        """`decided` over `forwards`; 0 for an answer that never had one."""
        return self.decided / max(1, self.forwards)


@dataclass(frozen=True)
class Event:
    """What one forward did to one row.

    Attributes:
        request: the row's number. step: the row's forward, from 0.
        committed: the tokens fixed in it, where they stood before any insertion. remasked, inserted: positions taken
            back, and of the masks added.
        response: the ids of the response as it stands; the mask id where nothing is decided.
        length: how many of them stand before the first stop token: what would be the answer, masks included.
        settled: how many of these are decided for good, without a gap from the start: the answer so far.
        replaced: the tokens that took the place of others.
        result: the answer, in the row's last event.
        text: the settled part as text, where a tokenizer is known.
        provisional: the rest of the would-be answer as text, with a sign for each mask.
    """

    request: int
    step: int
    committed: tuple[Commit, ...]
    remasked: tuple[int, ...]
    inserted: tuple[int, ...]
    response: list[int] = field(repr=False)
    length: int
    settled: int
    replaced: tuple[Commit, ...] = ()
    result: Generation | None = None
    text: str | None = None
    provisional: str | None = None


def events(
    state: DecodeState, view: StepView, action: Action, special: SpecialTokens, revocable: bool = False
) -> list[Event]:
    """What the forward behind `view` did, one event per row; `state` is that after the action.

    `revocable`: decided tokens may be taken back or replaced while their block has masks.
    """
    length = state.stopped(special.stop).minimum(state.end) - state.prompt
    final = state.settled()
    if revocable:
        final = torch.where(state.window().any(1) & (state.stop == LIVE), state.block_start, final)
    settled = length.minimum(final - state.prompt)
    none = torch.zeros_like(action.commit)
    chosen = action.commit.tolist()
    taken, replaced = ((none if flags is None else flags).tolist() for flags in (action.remask, action.replace))
    positions = (view.positions - state.prompt[:, None]).tolist()
    ids, confidence = view.ids.tolist(), view.confidence.tolist()
    inserted = _inserted(state, action)
    made = []
    for row in range(state.rows):
        columns = list(map(Commit, positions[row], ids[row], confidence[row]))
        made.append(
            Event(
                request=int(state.request[row]),
                step=int(state.forwards[row]) - 1,
                committed=tuple(compress(columns, chosen[row])),
                remasked=tuple(commit.position for commit in compress(columns, taken[row])),
                inserted=inserted[row],
                response=state.tokens[row, int(state.prompt[row]) : int(state.end[row])].tolist(),
                length=int(length[row]),
                settled=int(settled[row]),
                replaced=tuple(compress(columns, replaced[row])),
                result=generation(state, row, special) if int(state.stop[row]) != LIVE else None,
            )
        )
    return made


def _inserted(state: DecodeState, action: Action) -> list[tuple[int, ...]]:
    """Per row the response positions of the masks that the action added."""
    if action.insert_at is None or action.insert_count is None:
        return [()] * state.rows
    first = (action.insert_at - state.prompt + 1).tolist()
    count = ((action.insert_at >= 0) * action.insert_count).tolist()
    return [tuple(range(at, at + more)) for at, more in zip(first, count, strict=True)]


def generation(state: DecodeState, row: int, special: SpecialTokens) -> Generation:
    """The answer of a finished row."""
    response = slice(int(state.prompt[row]), int(state.end[row]))
    raw = state.tokens[row, response].masked_fill(state.masked[row, response], special.eos).tolist()
    length = next((i for i, token in enumerate(raw) if token in special.stop), len(raw))
    return Generation(
        tokens=raw[:length],
        raw=raw,
        stop_reason=STOP_REASONS[int(state.stop[row])],
        forwards=int(state.forwards[row]),
        positions=int(state.computed[row]),
        steps=state.step[row, response].tolist(),
        confidence=state.confidence[row, response].tolist(),
        blocks=state.block[row, response].tolist(),
    )
