"""Reading tokenised samples from JSON Lines files by number, in any order, without holding them in memory.

Called by ``data.py`` and ``validation.py``. A line is what ``dataset/transfer_text2token.py`` writes, or the published
format ``{input_ids, prompt_length}``.
"""

import glob
import json
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dllm_var.diffusion.decoding_view import Bools, Ints

SCAN = 64 * 2**20  # bytes looked at a time while line starts are searched


@dataclass(frozen=True)
class Sample:
    """One tokenised sample: its key, its ids [n], and which of them belong to a response [n]."""

    key: str
    ids: Ints
    response: Bools

    @property
    def prompt(self) -> Ints:
        """What stands before the first response token."""
        return self.ids[: int(np.argmax(self.response))] if self.response.any() else self.ids


def find_files(option: str, given: Any) -> list[Path]:
    """The files that a setting names: a path, a glob or a list of them; sorted, without doubles.

    Raises:
        ValueError: nothing there, naming the setting.
    """
    wanted = [given] if isinstance(given, str) else given
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(entry, str) for entry in wanted):
        raise ValueError(f"{option}={given!r}: give one path, a glob or a list of them.")
    found: set[Path] = set()
    for entry in wanted:
        matches = {Path(match) for match in glob.glob(entry, recursive=True)} | (
            {Path(entry)} if Path(entry).exists() else set()
        )
        if not matches:
            raise ValueError(f"{option}: no file matches {entry!r} (seen from {Path.cwd()}).")
        folders = sorted(str(match) for match in matches if match.is_dir())
        if folders:
            raise ValueError(f"{option}: {folders[0]!r} is a folder; write {folders[0]}/*.jsonl for the files in it.")
        found |= matches
    return sorted(found)


class SampleFiles:
    """All samples of some files, numbered in file order. Only the line starts are kept: 10 bytes a sample.

    Args:
        files: tokenised JSON Lines files.
        vocabulary: embedding rows; an id outside is an error.
        mask_id: an id that no clean sample may hold.

    Raises:
        ValueError: a file without any sample; on reading, a malformed line, with file, line and reason.
    """

    def __init__(self, files: Sequence[Path], *, vocabulary: int, mask_id: int) -> None:
        self.files, self.vocabulary, self.mask_id = list(files), vocabulary, mask_id
        self._maps: list[mmap.mmap] = []
        starts, which = [], []
        for number, path in enumerate(self.files):
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty: it holds no sample.")
            with path.open("rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            begins = _line_starts(self._maps[-1])
            starts.append(begins)
            which.append(np.full(len(begins), number, np.uint16))
        self._starts, self._which = np.concatenate(starts), np.concatenate(which)
        self._first = np.cumsum([0, *(len(begins) for begins in starts)])

    def __len__(self) -> int:
        return len(self._starts)

    def fingerprint(self) -> list[list[Any]]:
        """Name, bytes and lines of every file: what must be the same when a run is taken up again."""
        lines = np.diff(self._first).tolist()
        return [[path.name, len(self._maps[i]), lines[i]] for i, path in enumerate(self.files)]

    def __getitem__(self, index: int) -> Sample:
        number = int(self._which[index])
        path, content, start = self.files[number], self._maps[number], int(self._starts[index])
        end = content.find(b"\n", start)
        line = index - int(self._first[number]) + 1
        try:
            return self._sample(json.loads(content[start : end if end >= 0 else len(content)]), f"{path.stem}:{line}")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, line {line} is not a tokenised sample: {reason}.") from error

    def _sample(self, record: Any, place: str) -> Sample:
        if not isinstance(record, dict):
            raise ValueError(f"a JSON object is needed, this is a {type(record).__name__}")
        ids = np.array(record["input_ids"])
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise ValueError("input_ids must be a list of at least one whole number")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise ValueError(f"input_ids reach from {ids.min()} to {ids.max()}, the model knows 0 to {self.vocabulary - 1}")
        if (ids == self.mask_id).any():
            raise ValueError(f"input_ids hold the mask token {self.mask_id}, which clean text must not")
        response = np.zeros(len(ids), dtype=bool)
        border = record["prompt_length"]
        runs = record.get("loss_runs", None)
        for start, length in [[border, len(ids) - border]] if runs is None else runs:
            if not 0 <= start <= start + length <= len(ids):
                raise ValueError(f"a response of {length} tokens from {start} on does not fit {len(ids)} tokens")
            response[start : start + length] = True
        return Sample(str(record.get("id", place)), ids.astype(np.int64), response)


def _line_starts(content: mmap.mmap) -> Ints:
    """Byte offset of every line; an empty last line counts for nothing."""
    breaks = [np.zeros(1, np.int64)]
    for begin in range(0, len(content), SCAN):
        chunk = np.frombuffer(content[begin : begin + SCAN], dtype=np.uint8)
        breaks.append(np.flatnonzero(chunk == ord("\n")) + (begin + 1))
    starts = np.concatenate(breaks)
    return starts[:-1] if starts[-1] == len(content) else starts
