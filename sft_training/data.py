"""The training data: one global stream of packed rows, the same for every rank, that can be taken up at any row.

Called by ``sft.py`` and ``dataset/inspect_rows.py``. Sample → decoding view → packer → row → corruption. Every draw is keyed
by the seed and by what it is for, so a row is the same whatever rank, batch or restart it comes from. `Trainer` gives each
rank its slice of every global batch; the stream itself must not be cut up by rank again.

Legend: B rows of a micro-batch, L tokens of a row.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from dllm_var.diffusion.corruption import Corrupted, ForwardProcess, corrupt, uniforms
from dllm_var.diffusion.decoding_view import DecodingView, Ints
from dllm_var.diffusion.packing import Packer, Row, cut
from sft_training.samples import SampleFiles


@dataclass(frozen=True)
class Position:
    """Where the stream stands: the packer before a piece, that piece's place, and how many of its rows are out already."""

    epoch: int
    cursor: int
    packer: Packer
    emitted: int


class RowStream(IterableDataset[Row]):
    """Packed rows of all samples, epoch after epoch.

    Args:
        samples: what is read. view, packer: how a sample is shown and packed. seed: of all draws but the order.
        epochs: passes over the samples, None: for ever.
        shuffle_seed: epoch e is in the order drawn with shuffle_seed + e; None keeps the order of the files.
        rows_per_step: rows of an optimizer step over all ranks. They come in whole groups of that size, so a finite stream
            ends with a full step; `left_over` counts the rows that make none.
    """

    def __init__(
        self,
        samples: SampleFiles,
        view: DecodingView,
        packer: Packer,
        *,
        seed: int,
        epochs: int | None = None,
        shuffle_seed: int | None = None,
        rows_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.samples, self.view, self.seed, self.epochs, self.shuffle_seed = samples, view, seed, epochs, shuffle_seed
        self.rows_per_step, self.left_over = rows_per_step, 0
        self._start = Position(0, 0, packer, 0)
        self._recent: OrderedDict[int, Position] = OrderedDict({self.first_row: self._start})
        self._now = self._start
        self._order: tuple[int, Ints] | None = None

    def __iter__(self) -> Iterator[Row]:
        group: list[tuple[Row, Position]] = []
        for row, after in self._rows():
            group.append((row, after))
            if len(group) == self.rows_per_step:
                for done, position in group:
                    self._remember(done.index + 1, position)
                    yield done
                group = []
        self.left_over = len(group)

    def _rows(self) -> Iterator[tuple[Row, Position]]:
        at = self._start
        epoch, cursor, packer, emitted = at.epoch, at.cursor, at.packer.snapshot(), at.emitted
        while True:
            before = packer.snapshot()
            over = self.epochs is not None and epoch >= self.epochs
            rows = packer.flush() if over else self._place(packer, epoch, cursor)
            self._now = Position(epoch, cursor, packer, 0)
            for count, row in enumerate(rows[emitted:], start=emitted + 1):
                yield row, Position(epoch, cursor, before, count)
            emitted = 0
            if over:
                return
            cursor += 1
            if cursor == len(self.samples):
                epoch, cursor = epoch + 1, 0

    def _place(self, packer: Packer, epoch: int, cursor: int) -> list[Row]:
        sample = self.samples[int(self.order(epoch)[cursor])]
        piece = self.view.apply(sample.key, epoch, sample.ids, sample.response, seed=self.seed, mask_id=self.samples.mask_id)
        if packer.mode == "whole" and len(piece) > packer.length >= len(sample.ids):
            piece = cut(piece, 0, packer.length)  # the sample fits; only its mask-only tail is shortened
        dropped = packer.dropped
        rows = packer.add(piece)
        if packer.dropped > dropped == 0:
            warnings.warn(
                f"sample {sample.key} has {len(sample.ids)} tokens, more than packing.max_length={packer.length}: it is "
                "left out, as are all like it (run.json counts them). Raise max_length, or use packing.mode=split.",
                stacklevel=2,
            )
        return rows

    def order(self, epoch: int) -> Ints:
        """Sample numbers of an epoch in the order in which they are read."""
        if self._order is None or self._order[0] != epoch:
            everyone = np.arange(len(self.samples))
            if self.shuffle_seed is not None:
                everyone = np.argsort(uniforms(len(self.samples), self.shuffle_seed + epoch, "order"), kind="stable")
            self._order = (epoch, everyone)
        return self._order[1]

    def _remember(self, rows: int, position: Position) -> None:
        self._recent[rows] = position
        while len(self._recent) > 4 * self.rows_per_step + 1:  # the loader runs ahead by less than that
            self._recent.popitem(last=False)

    @property
    def first_row(self) -> int:
        """Number of the row with which iteration starts: 0, or more after `restore`."""
        return self._start.packer.rows + self._start.emitted

    @property
    def dropped(self) -> int:
        """Samples too long for a row, so far."""
        return self._now.packer.dropped

    def progress(self, rows: int) -> float:
        """Passes over the samples that the first ``rows`` rows took, as a fraction."""
        at = self._at(rows)
        return at.epoch + at.cursor / len(self.samples)

    def _at(self, rows: int) -> Position:
        if rows not in self._recent:
            raise ValueError(f"the stream cannot tell its state after {rows} rows: it has moved on too far from there.")
        return self._recent[rows]

    def state(self, rows: int) -> dict[str, Any]:
        """What `restore` needs to go on after the first ``rows`` rows of the stream, as plain JSON types."""
        at = self._at(rows)
        return {
            "epoch": at.epoch,
            "cursor": at.cursor,
            "emitted": at.emitted,
            "packer": at.packer.state(),
            "samples": self.samples.fingerprint(),
            "settings": self._settings(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, bit for bit.

        Raises:
            ValueError: the files or the settings that decide the rows are not those of the saved run.
        """
        for name, ours in (("samples", self.samples.fingerprint()), ("settings", self._settings())):
            if state[name] != ours:
                raise ValueError(
                    f"the saved run had other {name} of the data, so it cannot be taken up exactly: {state[name]} there, "
                    f"{ours} here. Give the same files and settings, or start anew with resume=never."
                )
        packer = self._start.packer.snapshot()
        packer.restore(state["packer"])
        self._start = Position(state["epoch"], state["cursor"], packer, state["emitted"])
        self._now = self._start
        self._recent = OrderedDict({self.first_row: self._start})

    def _settings(self) -> dict[str, Any]:
        packer = self._start.packer
        view = {**vars(self.view), "block_lengths": list(self.view.block_lengths)}
        packing = [packer.length, packer.mode, packer.open_rows]
        return {"seed": self.seed, "shuffle_seed": self.shuffle_seed, "view": view, "packing": packing}


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds; EOS counts every masked stop token."""

    rows: tuple[int, ...]
    samples: tuple[str, ...]
    prompt: int
    response: int
    masked: int
    eos: int


class Collate:
    """Rows → one corrupted micro-batch. Corruption happens here, when a batch is fetched, and nowhere else.

    Returns tensors noisy, clean int64 [B, L], masked bool [B, L], t float32 [B, L], real bool [B, L] or None when no row is
    padded, sees bool [B, L, L] (which position sees which) or None when all see all, and `Counts`. With ``always_real``
    there is always a tensor of real ones, so that a compiled network is compiled once.
    With ``next_token`` nothing is corrupted: "clean" holds the token that follows each position, "masked" the positions that
    a response token follows.
    """

    def __init__(
        self,
        process: ForwardProcess,
        *,
        seed: int,
        mask_id: int,
        stop: tuple[int, ...],
        always_real: bool = False,
        next_token: bool = False,
        within_sample: bool = False,
    ) -> None:
        self.process, self.seed, self.mask_id, self.stop = process, seed, mask_id, stop
        self.always_real, self.next_token, self.within_sample = always_real, next_token, within_sample

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor | Counts | None]:
        clean = torch.from_numpy(np.stack([row.ids for row in rows]))
        response = torch.from_numpy(np.stack([row.response for row in rows]))
        real = torch.from_numpy(np.stack([row.real for row in rows]))
        made = self._predict_next(clean, response) if self.next_token else self._corrupt(rows, clean, response)
        targets = clean.roll(-1, dims=1) if self.next_token else clean
        eos = torch.isin(targets, torch.tensor(self.stop)) & made.masked
        counts = Counts(
            rows=tuple(row.index for row in rows),
            samples=tuple(key for row in rows for key, *_ in row.pieces),
            prompt=int((real & ~response & (clean != self.mask_id)).sum()),
            response=int(response.sum()),
            masked=int(made.masked.sum()),
            eos=int(eos.sum()),
        )
        seen = real if self.always_real or not bool(real.all()) else None
        return {
            "noisy": made.noisy, "clean": targets, "masked": made.masked, "t": made.t, "real": seen,
            "sees": self._sees(rows), "counts": counts,
        }  # fmt: skip

    def _sees(self, rows: Sequence[Row]) -> Tensor | None:
        length, sees = len(rows[0].ids), None
        if self.within_sample:
            sample = torch.from_numpy(np.stack([row.sample for row in rows]))
            sees = sample[:, :, None] == sample[:, None, :]
        if self.next_token:
            causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), -1, -1)
            sees = causal if sees is None else causal & sees
        return sees

    @staticmethod
    def _predict_next(clean: Tensor, response: Tensor) -> Corrupted:
        predicts = torch.zeros_like(response)
        predicts[:, :-1] = response[:, 1:]  # what opens a row (the rest of a split sample) has nothing before it
        return Corrupted(noisy=clean, masked=predicts, t=torch.ones(clean.shape))

    def _corrupt(self, rows: Sequence[Row], clean: Tensor, response: Tensor) -> Corrupted:
        if self.process.t_per == "row":
            drawn = [np.broadcast_to(uniforms(1, self.seed, row.index, "t"), row.ids.shape) for row in rows]
        else:
            drawn = [row.level for row in rows]
        t = self.process.level(torch.from_numpy(np.stack(drawn)))
        noise = torch.from_numpy(np.stack([row.noise for row in rows]))
        return corrupt(
            clean, response, noise, t,
            mask_id=self.mask_id, stop=self.stop, always_mask_eos=self.process.always_mask_eos,
        )  # fmt: skip
