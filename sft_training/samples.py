"""Samples by number: what the stream reads from, and its simplest kind, JSON Lines files.

Called by ``build.py``, ``mixture.py`` and ``validation.py``; Parquet files and hub datasets are in ``tables.py``. A record
is what ``dataset/transfer_text2token.py`` writes, or the published format ``{input_ids, prompt_length}``, or the text it is
made from (``instruction``, ``input``, ``output``), which is then tokenised when it is read.
"""

import glob
import hashlib
import json
import os
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from dllm_var.diffusion.decoding_view import Bools, Ints
from dllm_var.text.chat import render_sample
from dllm_var.text.instructions import check_record, to_messages

SCAN = 64 * 2**20  # bytes looked at a time while line starts are searched
SHORTEST = 30  # bytes of a record at the least, by its keys alone; what is shorter may be blank
ENDS = 64 * 2**10  # bytes at both ends of a file by which a changed one is recognised
OPEN_FILES = 128  # files kept open at a time


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


class Samples(Protocol):
    """What every source is: numbered samples, readable in any order, in bounded memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample of a number; a ValueError names the place of one that is not usable."""

    def fingerprint(self) -> list[list[Any]]:
        """What must be the same when a run is taken up again, as plain JSON types."""


@dataclass(frozen=True)
class SampleRules:
    """What makes a sample of a record.

    Attributes:
        vocabulary: embedding rows; an id outside is an error.
        mask_id: an id that no clean sample may hold.
        tokenizer, template: for records of text (`dllm_var.text.chat.render_sample`).
    """

    vocabulary: int
    mask_id: int
    tokenizer: PreTrainedTokenizerBase | None = None
    template: str = "chat"

    def sample(self, record: Any, key: str, *, text: bool) -> Sample:
        """The sample of a record, under the record's own id or else ``key``.

        Raises:
            ValueError: the reason why it is none, without the place.
        """
        try:
            if text:
                assert self.tokenizer is not None
                told = check_record(record)
                if unused := [name for name in told.unused if name != "id"]:
                    warnings.warn(
                        f"samples of text have fields that nothing reads: {', '.join(unused)}. Those that count are "
                        "instruction, input and output.",
                        stacklevel=2,
                    )
                prompt, answer = render_sample(self.tokenizer, to_messages(told, self.template), told.output, self.template)
                record = {**record, "input_ids": prompt + answer, "prompt_length": len(prompt), "loss_runs": None}
            return self._tokenised(record, key)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error

    def _tokenised(self, record: Any, key: str) -> Sample:
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
        runs = record.get("loss_runs")
        if runs is None:
            runs = [[record["prompt_length"], len(ids) - record["prompt_length"]]]
        for start, length in runs:
            if not 0 <= start <= start + length <= len(ids):
                raise ValueError(f"a response of {length} tokens from {start} on does not fit {len(ids)} tokens")
            response[start : start + length] = True
        own = "" if record.get("id") is None else str(record["id"])
        own.encode("utf-8")
        return Sample(own or key, ids.astype(np.int64), response)

    def fingerprint(self, *, text: bool) -> list[list[Any]]:
        """What else than the data decides the ids: template and tokenizer, when the records are text."""
        if not text:
            return []
        assert self.tokenizer is not None
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        known = json.dumps([self.tokenizer.backend_tokenizer.to_str(), ends])
        return [["text", self.template, hashlib.sha256(known.encode()).hexdigest()[:16]]]

    def need_tokenizer(self, place: str) -> None:
        """Stop at text that nothing can tokenise."""
        if self.tokenizer is None:
            raise ValueError(f"{place} holds text (instruction, input, output), and no tokenizer is given to read it with.")


def find_files(option: str, given: Any) -> list[Path]:
    """The files that a setting names: a path, a glob or a list of them; sorted, without doubles.

    Raises:
        ValueError: nothing there, naming the setting.
    """
    wanted = [given] if isinstance(given, str) else given
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(entry, str) for entry in wanted):
        raise ValueError(f"{option}={given!r}: give one path, a glob or a list of them.")
    found: dict[Path, Path] = {}  # by their real place
    for entry in wanted:
        matches = {Path(entry)} if Path(entry).exists() else {Path(match) for match in glob.glob(entry, recursive=True)}
        if not matches:
            hint = f" Several are a list: {option}=[{entry}]." if "," in entry else ""
            raise ValueError(f"{option}: no file matches {entry!r} (seen from {Path.cwd()}).{hint}")
        folders = sorted(str(match) for match in matches if match.is_dir())
        if folders:
            raise ValueError(f"{option}: {folders[0]!r} is a folder; write {folders[0]}/*.jsonl for the files in it.")
        found |= {match.resolve(): match for match in sorted(matches)}
    return sorted(found.values())


class SampleFiles:
    """All samples of some JSON Lines files, numbered in file order; blank lines are none. Only the line starts are kept: 8
    bytes a sample. Of several files, the number of its own stands before a sample's key: two files may use the same ids.

    Lines are read by position and not mapped into memory: where a mapped file becomes shorter, the process dies.

    Raises:
        ValueError: a file without any sample, or one that cannot be read; on reading, a malformed line (with file, line,
            byte and reason), and a file that was deleted or became shorter since.
    """

    def __init__(self, files: Sequence[Path], rules: SampleRules) -> None:
        self.files, self.rules = list(files), rules
        self._open: dict[int, FileIO] = {}
        self._sizes, starts, kinds = [], [], {}
        for number, path in enumerate(self.files):
            try:
                file = self._file(number)
                self._sizes.append(os.fstat(file.fileno()).st_size)
                starts.append(_line_starts(file))
            except OSError as error:
                raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
            if not len(starts[number]):
                raise ValueError(f"{path} is empty: it holds no sample.")
            kinds[_is_text(self._read(number, 0, int([*starts[number], self._sizes[number]][1])))] = path
        self._starts, self._first = np.concatenate(starts), [0, *np.cumsum([len(begins) for begins in starts]).tolist()]
        if len(kinds) > 1:
            raise ValueError(f"{kinds[True]} holds text and {kinds[False]} token ids: make two sources of them.")
        self.text = True in kinds
        if self.text:
            rules.need_tokenizer(str(kinds[True]))
        self._rules = rules.fingerprint(text=self.text)

    def __len__(self) -> int:
        return len(self._starts)

    def fingerprint(self) -> list[list[Any]]:
        """Name, bytes and lines of every file, and a hash of how it begins and ends."""
        lines = np.diff(self._first).tolist()
        files = [[path.name, self._sizes[i], lines[i], self._hash_of_ends(i)] for i, path in enumerate(self.files)]
        return files + self._rules

    def _hash_of_ends(self, number: int) -> str:
        size = self._sizes[number]
        begin, end = self._read(number, 0, min(ENDS, size)), self._read(number, max(0, size - ENDS), size)
        return hashlib.sha256(begin + end).hexdigest()[:16]

    def __getitem__(self, index: int) -> Sample:
        number = bisect_right(self._first, index) - 1
        sample = self._sample(index, number)
        return sample if len(self.files) == 1 else replace(sample, key=f"{number}/{sample.key}")

    def _sample(self, index: int, number: int) -> Sample:
        path, own, start = self.files[number], index - self._first[number] + 1, int(self._starts[index])
        last = index + 1 == self._first[number + 1]
        content = self._read(number, start, self._sizes[number] if last else int(self._starts[index + 1]))
        try:
            return self.rules.sample(json.loads(content), f"{path.stem}:{own}", text=self.text)
        except (ValueError, RecursionError) as error:
            kind = "an instruction record" if self.text else "a tokenised sample"
            before = (self._read(number, at, min(at + SCAN, start)) for at in range(0, start, SCAN))
            line, reason = 1 + sum(part.count(b"\n") for part in before), str(error).rstrip(".")
            raise ValueError(f"{path}, line {line} is not {kind}: {reason} (the line starts at byte {start}).") from error

    def _read(self, number: int, start: int, end: int) -> bytes:
        path, size = self.files[number], self._sizes[number]
        try:
            file = self._file(number)
            now = os.fstat(file.fileno())
            content = os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise ValueError(f"{path} cannot be read any more, at byte {start}: {error.strerror or error}.") from error
        if now.st_nlink == 0:
            raise ValueError(f"{path} was deleted or replaced while the run reads it: put it back and start the run again.")
        if now.st_size < size or len(content) < end - start:
            raise ValueError(
                f"{path} became shorter while the run reads it ({size} bytes at the start, {now.st_size} now; the line at "
                f"byte {start} is wanted): put it back as it was and start the run again."
            )
        return content

    def _file(self, number: int) -> FileIO:
        if number not in self._open:
            while len(self._open) >= OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = self.files[number].open("rb", buffering=0)
        return self._open[number]


def _line_starts(file: FileIO) -> Ints:
    """Byte offset of every line that is not blank."""
    breaks, length = [np.zeros(1, np.int64)], 0
    while chunk := file.read(SCAN):
        breaks.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (length + 1))
        length += len(chunk)
    starts = np.concatenate(breaks)
    lengths = np.diff(starts, append=length)
    short = np.flatnonzero(lengths < SHORTEST)
    blank = [i for i in short if not os.pread(file.fileno(), int(lengths[i]), int(starts[i])).strip()]
    return np.delete(starts, blank)


def _is_text(line: bytes) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "output" in record and "input_ids" not in record
