"""Keys and values of tokens that need not be computed again: preallocated, written by slot, stamped with their step.

Used by the attention of `dllm_var.model.llada`; which position is stored when is decided elsewhere
(`dllm_var.decoding.kv_policies`). Nothing here grows: a forward writes into columns of one buffer per layer and attends
to a slice of it. Tokens that a forward needs but must not keep (slot −1) are parked behind the highest filled slot,
where the next forward overwrites them; no one sees them after the call because their columns carry no stamp.

Legend: B rows, n tokens of one call, C slots, Hkv key/value heads, d head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_var.model.config import LLaDAConfig

EMPTY = -1
CLEARED_AT_ONCE = 256  # columns


@dataclass(frozen=True)
class Placement:
    """Where one call's tokens go and what its queries may see; the same for every layer."""

    columns: Tensor  # [B, n] int64, on the device of the store
    start: int | None  # first column when all rows write the same contiguous run, else None
    width: int  # keys 0..width-1 take part in this call
    visible: Tensor | None  # [B, width] bool; None when every key is visible
    rows: Tensor | None = None  # [B] int64, the rows of the store, on its device; None: all of them, in order


class KVStore:
    """Rotated keys and values of ``rows`` sequences with ``capacity`` slots each, and room for ``scratch`` passing tokens.

    Args:
        config: the model's configuration.
        rows: B, the number of sequences.
        capacity: C, stored slots per row. A slot is the token's absolute position unless a policy says otherwise.
        scratch: the largest number of slot −1 tokens of a row in one call.
        dtype: of keys and values. device: where they live.
        room: how many sequences may be held at a time (`admit`); default `rows`.

    A store is for inference: what it hands out carries no gradient to earlier calls or to this call's keys and values.

    Attributes:
        stamp: int32 [B, C] on the host; the step in which each slot was written, −1 while empty.
    """

    def __init__(
        self,
        config: LLaDAConfig,
        rows: int,
        capacity: int,
        scratch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        room: int | None = None,
    ) -> None:
        self.capacity, self.scratch = capacity, scratch
        self.room = rows if room is None else room
        shape = (self.room, config.num_key_value_heads, capacity + scratch + 1, config.head_dim)  # +1: a column for pads
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self._cleared = 0  # columns that hold numbers; most answers need few of those that there is room for
        self.stamp = torch.full((rows, capacity), EMPTY, dtype=torch.int32)

    @property
    def rows(self) -> int:
        """Rows that are held now."""
        return self.stamp.shape[0]

    def nbytes(self) -> int:
        """Bytes of the key and value buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def place(self, slots: Tensor, real: Tensor | None, step: int, chosen: Tensor | None = None) -> Placement:
        """Reserve columns for the tokens of one call and stamp those that will be stored.

        Args:
            slots: int64 [B, n] on the host; the slot of each token, −1 for a token that is only visible to this call.
            real: bool [B, n] on the host; False marks padding, which is neither stored nor seen. None: no padding.
            step: stamped on the stored slots; 0 or more.
            chosen: int64 [B] on the host, the rows that take part, all different; None: every row.

        The keys of a call are ordered: column c is slot c up to the highest slot filled in any row (this call's
        included), then each row's passing tokens in the order they were given. A `query_mask` counts them so.

        Raises:
            ValueError: rows differ from the store's, a slot lies outside it, two tokens of a row share one, the scratch
                room is too small, or the step is negative. Nothing is stamped then.
        """
        rows, n = slots.shape
        if step < 0:
            raise ValueError(f"step={step} must be 0 or more (−1 stands for an empty slot).")
        held = self.rows if chosen is None else len(chosen)
        if rows != held:
            raise ValueError(f"slots has {rows} rows, the key/value store holds {held}.")
        if n and (int(slots.max()) >= self.capacity or int(slots.min()) < EMPTY):
            raise ValueError(f"slots must lie in −1..{self.capacity - 1}, got {int(slots.min())}..{int(slots.max())}.")
        real = torch.ones_like(slots, dtype=torch.bool) if real is None else real
        kept = real & (slots != EMPTY)
        passing = real & (slots == EMPTY)
        ordered = slots.masked_fill(~kept, EMPTY).sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != EMPTY)).any()):
            raise ValueError("two tokens of one row were given the same slot.")
        row = torch.arange(rows)[:, None].expand(rows, n)
        rank = passing.cumsum(dim=1) - 1
        parked = int(passing.sum(dim=1).max()) if n else 0
        if parked > self.scratch:
            raise ValueError(f"{parked} passing tokens in one call, but the store was made with scratch={self.scratch}.")

        where = row if chosen is None else chosen[row]
        self.stamp[where[kept], slots[kept]] = step
        stamp = self.stamp if chosen is None else self.stamp[chosen]
        extent = _extent(stamp)
        trash = self.capacity + self.scratch
        columns = torch.where(kept, slots, torch.where(passing, extent + rank, trash))
        width = extent + parked
        self._clear(width)

        seen = torch.zeros(rows, width, dtype=torch.bool)
        seen[:, :extent] = stamp[:, :extent] != EMPTY
        seen[row[passing], columns[passing]] = True
        device = self.keys[0].device
        first = int(columns[0, 0]) if n else 0
        contiguous = bool((columns == first + torch.arange(n)).all())
        return Placement(
            columns=columns.to(device, non_blocking=True),
            start=first if contiguous else None,
            width=width,
            visible=None if bool(seen.all()) else seen.to(device, non_blocking=True),
            rows=None if chosen is None else chosen.to(device, non_blocking=True),
        )

    def _clear(self, width: int) -> None:
        """Zero the columns below `width` that were not yet: also what no query sees must be finite, as 0 × NaN is NaN."""
        if width > self._cleared:
            reach = -(-width // CLEARED_AT_ONCE) * CLEARED_AT_ONCE
            for buffer in (*self.keys, *self.values):
                buffer[:, :, self._cleared : reach].zero_()
            self._cleared = reach

    def exchange(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Write a call's keys and values [B, Hkv, n, d] of one layer; return all its queries may see [B, Hkv, width, d].

        They come back in the dtype of the call, whatever the store keeps.
        """
        seen = []
        for buffer, fresh in ((self.keys[layer], key.detach()), (self.values[layer], value.detach())):
            if at.start is not None:
                held = slice(self.rows) if at.rows is None else at.rows
                buffer[held, :, at.start : at.start + fresh.shape[2]] = fresh.to(buffer.dtype)
            else:
                row = torch.arange(self.rows, device=fresh.device) if at.rows is None else at.rows
                buffer[row[:, None], :, at.columns] = fresh.transpose(1, 2).to(buffer.dtype)
            shown = buffer[: self.rows, :, : at.width]
            if at.rows is not None:
                shown = shown.index_select(0, at.rows)  # three times as fast on a CPU as shown[at.rows]
            seen.append(shown.to(fresh.dtype))
        return seen[0], seen[1]

    def admit(self, rows: int) -> None:
        """Take further rows in, behind those that are held; their slots are empty.

        Raises:
            ValueError: there is no room for them.
        """
        if self.rows + rows > self.room:
            raise ValueError(
                f"the key/value store holds {self.rows} rows and has room for {self.room}, not for {rows} more."
            )
        self.stamp = torch.cat((self.stamp, torch.full((rows, self.capacity), EMPTY, dtype=torch.int32)))

    def keep(self, rows: Tensor) -> None:
        """Keep only the given rows (int64 indices, in their new order). What is filled and changes place is moved."""
        rows = rows.cpu()
        self.stamp = self.stamp[rows]
        moved = (rows != torch.arange(len(rows))).nonzero()[:, 0]
        extent = _extent(self.stamp[moved])
        source, target = (index.to(self.keys[0].device) for index in (rows[moved], moved))
        for buffer in (*self.keys, *self.values) if extent else ():
            buffer[target, :, :extent] = buffer[source, :, :extent]

    def some(self, rows: Tensor) -> "KVRows":
        """The given rows (int64 [B] on the host, all different) as a store of their own, for one call of the model."""
        return KVRows(self, rows)


def _extent(stamp: Tensor) -> int:
    """The highest filled slot of any row, plus 1."""
    filled = (stamp != EMPTY).any(dim=0).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0


@dataclass(frozen=True)
class KVRows:
    """Some rows of a store; a call writes through to it."""

    store: KVStore
    chosen: Tensor

    def place(self, slots: Tensor, real: Tensor | None, step: int) -> Placement:
        """See `KVStore.place`."""
        return self.store.place(slots, real, step, self.chosen)

    def exchange(self, layer: int, key: Tensor, value: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """See `KVStore.exchange`."""
        return self.store.exchange(layer, key, value, at)
