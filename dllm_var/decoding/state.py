"""The rows of a batch while they are decoded: tokens, block pointers, stop reasons and where every token came from.

`DecodeState` is the single owner of all of it, on the host. Policies read it; what changes it is the loop (through
`Action.apply`, `count_forward` and `keep`), the length policy (`open_block`, `append`, `finish`) and the KV policy
(`stored`). A position is absolute in its own row: prompt first, response after it, no padding on the left.

Legend: B rows, C capacity (canvas positions of the longest possible row).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

LIVE, EOS, LENGTH, STOP_STRING, FORWARDS, DEADLINE, CANCELLED = range(7)
STOP_REASONS = {
    EOS: "eos", LENGTH: "length", STOP_STRING: "stop_string", FORWARDS: "forwards", DEADLINE: "deadline",
    CANCELLED: "cancelled",
}  # fmt: skip
NEVER = -1


@dataclass
class DecodeState:
    """Every array is [B] or [B, C]; the rows are in the order of the forward batch. Arrays [B] are replaced, never written.

    Attributes:
        mask: the mask id.
        tokens: int64 [B, C], the canvas; the mask id where nothing is decided.
        masked: bool [B, C], response positions without a decided token. (A prompt may contain the mask id.)
        step: int32 [B, C], the row's forward in which each token was fixed, −1 for none.
        confidence: float32 [B, C], of each token when it was fixed.
        block: int32 [B, C], the block in which each token was fixed, −1 for none.
        request: int64 [B], the caller's number of each row.
        prompt: int64 [B], prompt length. limit: int64 [B], where its canvas ends at the latest.
        end: int64 [B], the canvas as the model sees it now.
        block_start, block_end, block_index: int64 [B], the current block (the window).
        block_forwards: int64 [B], forwards that this row's current block has had. forwards: in all.
        computed: int64 [B], positions computed, summed over forwards.
        stored: int64 [B], leading positions that forwards need not compute again; a KV policy's own account.
        closed: int64 [B], the position from which on nothing is decided any more (C: none).
        stop: int64 [B], LIVE or a key of `STOP_REASONS`.
        last: int64 [B], LIVE, or why the present forward is the row's last one whatever it shows.
        notes: further [B, ...] tensors of policies, by name: they follow the rows. Those of shape [B, C] also follow
            insertions.
    """

    mask: int
    tokens: Tensor
    masked: Tensor
    step: Tensor
    confidence: Tensor
    block: Tensor
    request: Tensor
    prompt: Tensor
    limit: Tensor
    end: Tensor
    block_start: Tensor
    block_end: Tensor
    block_index: Tensor
    block_forwards: Tensor
    forwards: Tensor
    computed: Tensor
    stored: Tensor
    closed: Tensor
    stop: Tensor
    last: Tensor
    notes: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[int],
        mask: int,
        response_limit: int | Sequence[int],
        capacity: int | None = None,
    ) -> "DecodeState":
        """Rows of prompt tokens with room for `response_limit` more each.

        The limit is one for all rows or one for each; `capacity` is C, by default as little as these rows need.
        """
        rows = len(prompts)
        prompt = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        limit = prompt + torch.tensor(response_limit)
        capacity = max(limit.tolist(), default=0) if capacity is None else capacity
        tokens = torch.full((rows, capacity), mask)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        zeros = torch.zeros(rows, dtype=torch.int64)
        return cls(
            mask=mask,
            tokens=tokens,
            masked=torch.arange(capacity) >= prompt[:, None],
            step=torch.full((rows, capacity), NEVER, dtype=torch.int32),
            confidence=torch.zeros(rows, capacity),
            block=torch.full((rows, capacity), NEVER, dtype=torch.int32),
            request=torch.tensor(list(requests), dtype=torch.int64),
            prompt=prompt,
            limit=limit,
            end=prompt,
            block_start=prompt,
            block_end=prompt,
            block_index=zeros - 1,
            block_forwards=zeros,
            forwards=zeros,
            computed=zeros,
            stored=zeros,
            closed=zeros + capacity,
            stop=zeros,
            last=zeros,
        )

    @property
    def rows(self) -> int:
        """Rows that are being decoded."""
        return self.tokens.shape[0]

    def within(self, start: Tensor, end: Tensor) -> Tensor:
        """Bool [B, C]: the positions from `start` up to `end` (int64 [B])."""
        column = torch.arange(self.tokens.shape[1])
        return (column >= start[:, None]) & (column < end[:, None])

    def window(self) -> Tensor:
        """Bool [B, C]: the masked positions of each row's current block."""
        return self.masked & self.within(self.block_start, self.block_end.minimum(self.closed))

    def tentative(self) -> Tensor:
        """Bool [B, C]: the tokens decided since each row's current block opened: what may be taken back or replaced."""
        return (self.block == self.block_index[:, None]) & (self.block != NEVER)

    def settled(self) -> Tensor:
        """Int64 [B]: the first response position that is still masked (C if none is): what lies before it is decided."""
        return _first(self.masked)

    def stopped(self, stop_ids: Sequence[int]) -> Tensor:
        """Int64 [B]: the position of the first decided stop token of the response (C if there is none)."""
        column = torch.arange(self.tokens.shape[1])
        hit = torch.isin(self.tokens, torch.tensor(stop_ids, dtype=torch.int64)) & ~self.masked
        return _first(hit & (column >= self.prompt[:, None]))

    def open_block(self, rows: Tensor, length: int, bound: Tensor | None = None) -> None:
        """Move the block pointer of the given rows (bool [B]) on by `length`, as far as `bound` (default the limit)."""
        following = (self.block_end + length).minimum(self.limit if bound is None else bound)
        self.block_start = torch.where(rows, self.block_end, self.block_start)
        self.block_end = torch.where(rows, following, self.block_end)
        self.end = self.end.maximum(self.block_end)
        self.block_index = self.block_index + rows
        self.block_forwards = self.block_forwards.masked_fill(rows, 0)

    def finish(self, rows: Tensor, reason: int) -> None:
        """End the given rows (bool [B]); they leave the batch after this step."""
        self.stop = self.stop.masked_fill(rows, reason)

    def commit(self, row: Tensor, position: Tensor, ids: Tensor, confidence: Tensor) -> None:
        """Fix tokens (all int64 or float32 [k]) and write down where they came from."""
        self.tokens[row, position] = ids
        self.masked[row, position] = False
        self.step[row, position] = self.forwards[row].int()
        self.block[row, position] = self.block_index[row].int()
        self.confidence[row, position] = confidence

    def remask(self, row: Tensor, position: Tensor) -> None:
        """Take decided tokens (int64 [k] each) back."""
        self.tokens[row, position] = self.mask
        self.masked[row, position] = True
        self.step[row, position] = self.block[row, position] = NEVER
        self.confidence[row, position] = 0.0

    def append(self, token: int, count: Tensor) -> None:
        """Put count[b] copies of a token that nobody decided behind the canvas of row b."""
        added = self.within(self.end, self.end + count)
        self.tokens, self.masked = self.tokens.masked_fill(added, token), self.masked & ~added
        self.end = self.end + count

    def drop(self, count: Tensor) -> None:
        """Take the last count[b] positions off the canvas of row b."""
        self.end = self.end - count
        gone = torch.arange(self.tokens.shape[1]) >= self.end[:, None]
        self.tokens, self.masked = self.tokens.masked_fill(gone, self.mask), self.masked | gone

    def insert(self, at: Tensor, count: Tensor) -> None:
        """Widen the masked position at[b] of row b by count[b] masks (at[b] = −1: none); what lies behind it moves right."""
        column = torch.arange(self.tokens.shape[1])
        grown = (at >= 0) * count
        behind = (at >= 0)[:, None] & (column > at[:, None])
        source = torch.where(behind, (column - grown[:, None]).maximum(at[:, None]), column)  # new position -> old position
        self.end = self.end + grown
        assert bool((self.end <= self.limit).all()), "an insertion needs room below the limit"
        for holder, name, array in self._arrays():
            if array.shape[1:] == column.shape:
                holder[name] = array.gather(1, source)

    def count_forward(self, active: Tensor) -> None:
        """Book one forward over `active` (int64 [B]) positions of each row."""
        self.forwards = self.forwards + 1
        self.block_forwards = self.block_forwards + 1
        self.computed = self.computed + active

    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows (int64 indices, in their new order)."""
        for holder, name, array in self._arrays():
            holder[name] = array[rows.to(array.device)]

    def some(self, rows: Tensor) -> "DecodeState":
        """A copy of the given rows (int64 indices): all of them before their first forward, or none."""
        fresh = not bool(self.forwards[rows].any())
        own: dict[str, Any] = {name: array[rows] for name, array in vars(self).items() if isinstance(array, Tensor)}
        return replace(self, **own, notes={} if fresh else {name: a[rows.to(a.device)] for name, a in self.notes.items()})

    def put(self, rows: Tensor, part: "DecodeState") -> None:
        """Write rows that `some` gave out back to their places."""
        for holder, name, array in part._arrays():
            mine: dict[str, Tensor] = vars(self) if holder is vars(part) else self.notes
            if name not in mine:
                mine[name] = array.new_zeros(self.rows, *array.shape[1:])  # rows without a forward do not read it
            # Arrays [B] are replaced, never written: an earlier copy may still be read.
            mine[name] = mine[name].index_copy(0, rows.to(array.device), array)

    def extend(self, others: "DecodeState") -> None:
        """Take further rows in, behind the others; all before their first forward, and of the same capacity."""
        for name, array in vars(others).items():
            if isinstance(array, Tensor):
                setattr(self, name, torch.cat((getattr(self, name), array)))
        for name, note in self.notes.items():
            self.notes[name] = torch.cat((note, note.new_zeros(others.rows, *note.shape[1:])))

    def _arrays(self) -> list[tuple[dict[str, Tensor], str, Tensor]]:
        """Every per-row tensor with the dictionary and the name that hold it."""
        own = vars(self)
        held = [(own, name) for name in own if isinstance(own[name], Tensor)] + [(self.notes, name) for name in self.notes]
        return [(holder, name, holder[name]) for holder, name in held]


def _first(flags: Tensor) -> Tensor:
    """The first True of each row of a bool [B, C]; C where there is none."""
    return torch.where(flags.any(1), flags.int().argmax(1), flags.shape[1])
