"""The training data: one global stream of packed rows, the same for every rank, that can be taken up at any row.

Built by ``build.py``. Mixture → decoding view → packer → row → corruption. Every draw is
keyed by the seed and by what it is for, so a row is the same whatever rank, batch or restart it comes from. `Trainer` gives
each rank its slice of every global batch; the stream itself must not be cut up by rank again.

Legend: B rows of a micro-batch, L tokens of a row.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from dllm_var.diffusion.corruption import Corrupted, ForwardProcess, corrupt, uniforms
from dllm_var.diffusion.decoding_view import DecodingView
from dllm_var.diffusion.decoding_view import sees as stage_sees
from dllm_var.diffusion.packing import Packer, Row, cut
from sft_training.mixture import Mixture, source_of
from sft_training.prefetch import read_ahead


@dataclass(frozen=True)
class Position:
    """Where the stream stands: how many samples were taken of each source and how many of them left out, the packer before
    the last sample, and how many of that sample's rows are out already."""

    taken: tuple[int, ...]
    dropped: tuple[int, ...]
    packer: Packer
    emitted: int


class RowStream(IterableDataset[Row]):
    """Packed rows of all samples.

    Args:
        mixture: what is read. view, packer: how a sample is shown and packed. seed: of the draws of the view.
        mask_id: what a mask-only tail is made of. eos_id: what `view.fill` fills rows with, and what
            `view.tail_eos` trains behind an answer.
        epochs: ends after epochs * len(mixture) samples, which for a single source are that many passes; None: never.
        rows_per_step: rows of an optimizer step over all ranks. They come in whole groups of that size, so a finite stream
            ends with a full step; `left_over` counts the rows that make none.
        ahead: groups that a background thread makes while the caller works; 0: none.
    """

    def __init__(
        self,
        mixture: Mixture,
        view: DecodingView,
        packer: Packer,
        *,
        seed: int,
        mask_id: int,
        eos_id: int | None = None,
        epochs: int | None = None,
        rows_per_step: int = 1,
        ahead: int = 0,
    ) -> None:
        super().__init__()
        self.mixture, self.view, self.seed, self.epochs = mixture, view, seed, epochs
        self.mask_id, self.eos_id = mask_id, eos_id
        self.rows_per_step, self.ahead, self.left_over = rows_per_step, ahead, 0
        nothing = (0,) * len(mixture.names)
        self._go_on_from(Position(nothing, nothing, packer, 0))

    def _go_on_from(self, start: Position) -> None:
        self._start = start
        self._recent = OrderedDict({self.first_row: start})

    def __iter__(self) -> Iterator[Row]:
        if get_worker_info() is not None:
            raise ValueError(
                "the stream of rows is the same in every worker of a DataLoader, and knows its position only in its own "
                "process: use num_workers=0 (dataset.prefetch_steps reads ahead in the background)."
            )
        rows = self._rows()
        groups = iter(lambda: list(islice(rows, self.rows_per_step)), [])
        for group in read_ahead(groups, self.ahead) if self.ahead else groups:
            if len(group) < self.rows_per_step:
                self.left_over = len(group)
                return
            for row, position in group:
                self._remember(row.index + 1, position)
                yield row

    def _rows(self) -> Iterator[tuple[Row, Position]]:
        at = self._start
        taken, dropped, packer, emitted = list(at.taken), list(at.dropped), at.packer.snapshot(), at.emitted
        sources, end = self.mixture.sources, None if self.epochs is None else self.epochs * len(self.mixture)
        while True:
            before, number = packer.snapshot(), sum(taken)
            over = end is not None and number >= end
            which = self.mixture.draw(number)
            rows = packer.flush() if over else self._place(packer, which, taken[which])
            for count, row in enumerate(rows[emitted:], start=emitted + 1):
                yield row, Position(tuple(taken), tuple(dropped), before, count)
            emitted = 0
            if over:
                return
            taken[which] += 1
            dropped[which] += packer.dropped - before.dropped
            if packer.dropped > number and all(n >= len(source.samples) for n, source in zip(taken, sources, strict=True)):
                raise ValueError(f"no sample has at most packing.max_length={packer.length} tokens: raise max_length.")

    def _place(self, packer: Packer, which: int, taken: int) -> list[Row]:
        sample, epoch = self.mixture.sample(which, taken)
        piece = self.view.apply(
            sample.key, epoch, sample.ids, sample.response,
            seed=self.seed, mask_id=self.mask_id, longest=packer.length, eos_id=self.eos_id,
        )  # fmt: skip
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

    def _remember(self, rows: int, position: Position) -> None:
        self._recent[rows] = position
        while len(self._recent) > 4 * self.rows_per_step + 1:  # the loader runs ahead by less than that
            self._recent.popitem(last=False)

    @property
    def first_row(self) -> int:
        """Number of the row with which iteration starts: 0, or more after `restore`."""
        return self._start.packer.rows + self._start.emitted

    def progress(self, rows: int) -> float:
        """Samples that the first ``rows`` rows took, in units of all samples (for a single source: passes)."""
        return sum(self._at(rows).taken) / len(self.mixture)

    def sources(self, rows: int) -> dict[str, dict[str, float]]:
        """For each source, after the first ``rows`` rows: its samples, its share of the draws, its passes so far, and how
        many samples were left out because they are longer than a row."""
        at = self._at(rows)
        return {
            source.name: {"samples": len(source.samples), "share": share, "passes": n / len(source.samples), "dropped": out}
            for source, share, n, out in zip(self.mixture.sources, self.mixture.shares, at.taken, at.dropped, strict=True)
        }

    def metrics(self, rows: int) -> dict[str, float]:
        """What a log line says of the data: samples left out so far, and of several sources also the passes."""
        sources = self.sources(rows)
        logs: dict[str, float] = {"data/dropped_samples": sum(source["dropped"] for source in sources.values())}
        if len(sources) > 1:
            for name, source in sources.items():
                logs |= {f"data/dropped_{name}": source["dropped"], f"data/passes_{name}": source["passes"]}
        return logs

    def _at(self, rows: int) -> Position:
        if rows not in self._recent:
            raise ValueError(f"the stream cannot tell its state after {rows} rows: it has moved on too far from there.")
        return self._recent[rows]

    def state(self, rows: int) -> dict[str, Any]:
        """What `restore` needs to go on after the first ``rows`` rows of the stream, as plain JSON types."""
        at = self._at(rows)
        places = {}
        for source, taken, dropped in zip(self.mixture.sources, at.taken, at.dropped, strict=True):
            epoch, cursor = divmod(taken, len(source.samples))
            places[source.name] = {"epoch": epoch, "cursor": cursor, "dropped": dropped}
        return {
            "sources": places,
            "draws": sum(at.taken),
            "emitted": at.emitted,
            "packer": at.packer.state(),
            "samples": self.mixture.fingerprint(),
            "settings": self._settings(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, bit for bit.

        Raises:
            ValueError: the files or the settings that decide the rows are not those of the saved run.
        """
        for name, ours in (("samples", self.mixture.fingerprint()), ("settings", self._settings())):
            if state[name] != ours or list(state[name]) != list(ours):  # draws go by the order of the sources
                raise ValueError(
                    f"the saved run had other {name} of the data, so it cannot be taken up exactly: {state[name]} there, "
                    f"{ours} here. Give the same files and settings, or start anew with resume=never."
                )
        packer = self._start.packer.snapshot()
        packer.restore(state["packer"])
        places = [(state["sources"][source.name], len(source.samples)) for source in self.mixture.sources]
        taken = tuple(place["epoch"] * size + place["cursor"] for place, size in places)
        self._go_on_from(Position(taken, tuple(place["dropped"] for place, _ in places), packer, state["emitted"]))

    def _settings(self) -> dict[str, Any]:
        packer, mixture = self._start.packer, self.mixture
        view = {**vars(self.view), "block_lengths": list(self.view.block_lengths)}
        packing = [packer.length, packer.mode, packer.open_rows]
        shares = dict(zip(mixture.names, mixture.shares, strict=True))
        return {
            "seed": self.seed, "shuffle_seed": mixture.shuffle_seed, "view": view, "packing": packing, "shares": shares,
        }  # fmt: skip


@dataclass(frozen=True)
class Counts:
    """What a micro-batch holds; EOS counts every masked stop token.

    With several sources, `by_source` has each one's prompt, response, masked and eos tokens.
    """

    rows: tuple[int, ...]
    samples: tuple[str, ...]
    prompt: int
    response: int
    masked: int
    eos: int
    by_source: tuple[tuple[int, ...], ...] = ()


class Collate:
    """Rows → one corrupted micro-batch. Corruption happens here, when a batch is fetched, and nowhere else.

    Returns tensors noisy, clean int64 [B, L], masked bool [B, L], t float32 [B, L], real bool [B, L] or None when no row is
    padded, positions int64 [B, L] or None when they just run on, sees bool [B, L, L] (which position sees which) or None
    when all see all, source int64 [B, L] (of the token that a position is asked for, an index into ``sources``; −1: none)
    or None when there is only one, and `Counts`. With ``always_real`` there is always a tensor of real ones, so that a
    compiled network is compiled once. ``staged``: the rows hold pieces whose tokens do not all see each other.
    "masked" are the positions of the loss: the masked ones, and the visible ones that an edit_share checks. With
    ``next_token`` nothing is corrupted: "clean" holds the token that follows each position, "masked" the positions that a
    response token follows.
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
        staged: bool = False,
        sources: tuple[str, ...] = (),
    ) -> None:
        self.process, self.seed, self.mask_id, self.stop = process, seed, mask_id, stop
        self.always_real, self.next_token, self.within_sample = always_real, next_token, within_sample
        self.staged = staged
        self.sources = sources if len(sources) > 1 else ()

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor | Counts | None]:
        clean = torch.from_numpy(np.stack([row.ids for row in rows]))
        response = torch.from_numpy(np.stack([row.response for row in rows]))
        real = torch.from_numpy(np.stack([row.real for row in rows]))
        made = self._predict_next(clean, response) if self.next_token else self._corrupt(rows, clean, response)
        targets = clean.roll(-1, dims=1) if self.next_token else clean
        prompt = real & ~response & (clean != self.mask_id)
        wanted = made.masked | made.checked
        eos = torch.isin(targets, torch.tensor(self.stop)) & wanted
        source = self._source(rows)
        asked = source.roll(-1, dims=1) if self.next_token and source is not None else source
        counts = Counts(
            rows=tuple(row.index for row in rows),
            samples=tuple(key for row in rows for key, *_ in row.pieces),
            prompt=int(prompt.sum()),
            response=int(response.sum()),
            masked=int(wanted.sum()),
            eos=int(eos.sum()),
            by_source=tuple(
                tuple(
                    int((kind & (place == number)).sum())
                    for kind, place in ((prompt, source), (response, source), (wanted, asked), (eos, asked))
                )
                for number in range(len(self.sources))
            ),
        )
        seen = real if self.always_real or not bool(real.all()) else None
        return {
            "noisy": made.noisy, "clean": targets, "masked": wanted, "t": made.t, "real": seen,
            "positions": torch.from_numpy(np.stack([row.positions for row in rows])) if self.staged else None,
            "sees": self._sees(rows), "source": asked, "counts": counts,
        }  # fmt: skip

    def _source(self, rows: Sequence[Row]) -> Tensor | None:
        """Which source each token comes from, [B, L]; −1 for padding."""
        if not self.sources:
            return None
        source = torch.full((len(rows), len(rows[0].ids)), -1)
        for number, row in enumerate(rows):
            for key, first, length, _ in row.pieces:
                source[number, first : first + length] = source_of(key, self.sources)
        return source

    def _sees(self, rows: Sequence[Row]) -> Tensor | None:
        length, sees = len(rows[0].ids), None
        if self.within_sample:
            sample = torch.from_numpy(np.stack([row.sample for row in rows]))
            sees = sample[:, :, None] == sample[:, None, :]
            if self.staged:
                stage = np.stack([row.stage for row in rows])
                sees = sees & torch.from_numpy(stage_sees(stage[:, :, None], stage[:, None, :]))
        if self.next_token:
            causal = torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), -1, -1)
            sees = causal if sees is None else causal & sees
        return sees

    @staticmethod
    def _predict_next(clean: Tensor, response: Tensor) -> Corrupted:
        predicts = torch.zeros_like(response)
        predicts[:, :-1] = response[:, 1:]  # what opens a row (the rest of a split sample) has nothing before it
        return Corrupted(noisy=clean, masked=predicts, t=torch.ones(clean.shape), checked=torch.zeros_like(predicts))

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
            edit_share=self.process.edit_share,
        )  # fmt: skip
