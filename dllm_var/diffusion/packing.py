"""Many samples into rows of one fixed length; positions run on from sample to sample.

In the published recipe attention is full: no mask stands between samples. `Row.sample` is there for the alternative, where
each sample sees itself alone.

Called by ``sft_training/data.py``. `Packer` is a small state machine over pieces (`dllm_var.diffusion.decoding_view`):
`add` takes one and returns the rows it completed; `state` holds the unfinished rest, so that a resumed run packs the
very same rows. Which piece goes where depends only on the order of the pieces.

Legend: L tokens of a row.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dllm_var.diffusion.corruption import Floats
from dllm_var.diffusion.decoding_view import Bools, Ints, Piece

# The arrays of a piece.
ARRAYS = {"ids": np.int64, "response": np.bool_, "noise": np.float32, "positions": np.int64, "stage": np.int64}


@dataclass(frozen=True)
class Row:
    """One packed training sequence.

    Attributes:
        index: its number in the stream.
        ids: clean ids [L]. response: which may be masked and trained [L]. real: False marks padding [L].
        noise: U[0, 1) per position [L]. level: the sample's level draw per position [L].
        pieces: (sample key, first position in the row, length, start within the sample) in order.
        positions: of each token [L], running on from piece to piece. stage: see `dllm_var.diffusion.decoding_view.sees` [L].
    """

    index: int
    ids: Ints
    response: Bools
    real: Bools
    noise: Floats
    level: Floats
    pieces: tuple[tuple[str, int, int, int], ...]
    positions: Ints
    stage: Ints

    @property
    def sample(self) -> Ints:
        """Which piece each position belongs to, [L]: 0, 1, …; −1 for padding."""
        runs = [np.full(n, i) for i, (_, _, n, _) in enumerate(self.pieces)]
        return np.concatenate([*runs, np.full(int((~self.real).sum()), -1)])


@dataclass
class Packer:
    """Packs pieces into rows of ``length`` tokens.

    * ``split`` (reference): rows are cut from one endless token stream, 100 % full; a piece that crosses the border goes
      on in the next row, its prompt left behind.
    * ``whole``: no piece is cut. A piece goes to the fullest of up to ``open_rows`` unfinished rows that still holds it;
      what stays free at the end of a row is padding, which nothing attends to.

    Attributes:
        dropped: pieces longer than a row, which ``whole`` cannot place (counted, and reported by the caller).
    """

    length: int
    mode: str = "whole"
    pad_id: int = 0
    open_rows: int = 8
    rows: int = 0
    dropped: int = 0
    open: list[list[Piece]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in ("split", "whole"):
            raise ValueError(f"packing={self.mode!r}: choose 'split' (reference) or 'whole' (no sample is cut).")
        if self.length < 2:
            raise ValueError(f"max_length={self.length}: a row needs at least 2 tokens.")
        if self.open_rows < 1:
            raise ValueError(f"open_rows={self.open_rows}: at least 1 row must be open.")

    def add(self, piece: Piece) -> list[Row]:
        """Place one piece; return the rows that are complete now."""
        return self._add_split(piece) if self.mode == "split" else self._add_whole(piece)

    def _add_split(self, piece: Piece) -> list[Row]:
        done: list[Row] = []
        current = self.open.pop() if self.open else []
        while True:
            room = self.length - sum(map(len, current))
            current.append(cut(piece, 0, room))
            if len(piece) < room:
                break
            done.append(self._finish(current))
            current = []
            if len(piece) == room:
                break
            piece = cut(piece, room, len(piece))
        self.open = [current] if current else []
        return done

    def _add_whole(self, piece: Piece) -> list[Row]:
        if len(piece) > self.length:
            self.dropped += 1
            return []
        used = [sum(map(len, row)) for row in self.open]
        fitting = [i for i, n in enumerate(used) if n + len(piece) <= self.length]
        if fitting:
            self.open[max(fitting, key=lambda i: (used[i], -i))].append(piece)
            return []
        self.open.append([piece])
        if len(self.open) <= self.open_rows:
            return []
        fullest = max(range(len(used)), key=lambda i: (used[i], -i))
        return [self._finish(self.open.pop(fullest))]

    def flush(self) -> list[Row]:
        """Finish every open row (the end of a finite stream); nothing is left behind."""
        done = [self._finish(row) for row in self.open]
        self.open = []
        return done

    def _finish(self, pieces: list[Piece]) -> Row:
        free = self.length - sum(map(len, pieces))
        ends = np.cumsum([len(p) for p in pieces])
        row = Row(
            index=self.rows,
            ids=np.concatenate([*(p.ids for p in pieces), np.full(free, self.pad_id, dtype=np.int64)]),
            response=np.concatenate([*(p.response for p in pieces), np.zeros(free, dtype=bool)]),
            real=np.arange(self.length) < ends[-1],
            noise=np.concatenate([*(p.noise for p in pieces), np.ones(free, dtype=np.float32)]),
            level=np.concatenate([*(np.full(len(p), p.level, np.float32) for p in pieces), np.zeros(free, np.float32)]),
            pieces=tuple((p.key, int(end) - len(p), len(p), p.start) for p, end in zip(pieces, ends, strict=True)),
            positions=_joined([p.positions for p in pieces], pieces, np.arange(self.length)),
            stage=_joined([p.stage for p in pieces], pieces, np.zeros(self.length, np.int64), first=False),
        )
        self.rows += 1
        return row

    def snapshot(self) -> "Packer":
        """A packer that goes on from here independently; cheap, since pieces are never changed."""
        return replace(self, open=[list(row) for row in self.open])

    def state(self) -> dict[str, Any]:
        """What a resumed packer needs, as plain JSON types."""
        plain = [
            [{name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in vars(p).items()} for p in row]
            for row in self.open
        ]
        return {"rows": self.rows, "dropped": self.dropped, "open": plain}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state` (bit for bit: float32 survives the way through JSON)."""
        self.rows, self.dropped = state["rows"], state["dropped"]
        self.open = [
            [Piece(**{name: np.array(v, ARRAYS[name]) if isinstance(v, list) else v for name, v in p.items()}) for p in row]
            for row in state["open"]
        ]


def cut(piece: Piece, start: int, end: int) -> Piece:
    """The run [start, end) of a piece."""
    return replace(
        piece,
        ids=piece.ids[start:end],
        response=piece.response[start:end],
        noise=piece.noise[start:end],
        start=piece.start + start,
        positions=None if piece.positions is None else piece.positions[start:end],
        stage=None if piece.stage is None else piece.stage[start:end],
    )


def _joined(parts: list[Ints | None], pieces: list[Piece], usual: Ints, *, first: bool = True) -> Ints:
    """The usual array of a row with the parts of those pieces that have their own, counted from their first position."""
    made, at = usual.copy(), 0
    for part, piece in zip(parts, pieces, strict=True):
        if part is not None:
            made[at : at + len(piece)] = part + (at if first else 0)
        at += len(piece)
    return made
