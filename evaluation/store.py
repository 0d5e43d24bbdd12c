"""Every answer is on disk as soon as it is given, so that a run that was killed goes on where it stopped.

Used by ``harness.py`` (`ResponseStore`), and by ``report.py``, which counts over `Answer`s. A line of JSON per record, a
file per process. A record is found by a key: a hash of the prompt's ids and of every setting that could change the answer,
so that an answer to anything else is never taken for it.
"""

import fcntl
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

MERGED = "answers.jsonl"
OF_RANK = "answers-rank*.jsonl"


@dataclass(frozen=True)
class Answer:
    """A generated answer.

    Attributes:
        task: the harness's (sub)task. doc_id: the problem's number in it. request: the key of its random draws.
        prompt_length: tokens of the prompt. text: the answer, cut at the task's stop strings. tokens: its ids up to, not
            including, the first stop token.
        raw_length: positions of the canvas' response. stop_reason: "eos" or "length", see `dllm_var.Generation`.
        forwards, positions: model calls, and positions computed in them. decided: tokens that the answer took, its stop
            token included.
        seconds: of decoding, the batch's divided by its rows. latency: seconds from the batch's start to its end, when
            the answer was handed out.
    """

    task: str
    doc_id: int
    request: int
    prompt_length: int
    text: str
    tokens: list[int] = field(repr=False)
    raw_length: int
    stop_reason: str
    forwards: int
    positions: int
    decided: int
    seconds: float
    latency: float


@dataclass(frozen=True)
class Rating:
    """How likely the model finds a given answer.

    Attributes:
        choice: which of the problem's answers. length: its tokens. value: the bound on ln p in nats; standard_error: of it.
        samples: it is made of. greedy: the model itself would give this answer. Others: as for `Answer`.
    """

    task: str
    doc_id: int
    request: int
    choice: int
    prompt_length: int
    length: int
    value: float
    standard_error: float
    samples: int
    greedy: bool
    seconds: float


Record = Answer | Rating
KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Answer, Rating)}


def key_of(*parts: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class ResponseStore:
    """The records of one process, appended to its file of a folder; a context manager.

    Raises:
        ValueError: another run writes to that file.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._path = folder / OF_RANK.replace("*", str(rank))
        self._file = self._path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ValueError(f"another run writes to {self._path}: wait for its end, or give another output_dir.") from error
        content = self._path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)  # a line that was cut off when a run was killed

    def add(self, key: str, record: Record) -> None:
        """Append a record; it outlives the process from here on."""
        self._file.write(_line(key, record).encode())
        self._file.flush()

    def __enter__(self) -> "ResponseStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder by key, whichever processes wrote them; a last line that was cut off is left out.

    Raises:
        ValueError: a line that is no record.
    """
    found: dict[str, Record] = {}
    for path in [folder / MERGED, *sorted(folder.glob(OF_RANK))]:
        lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
        for number, line in enumerate(lines[:-1], start=1):
            try:
                values = json.loads(line)
                key, kind = values.pop("key"), values.pop("kind")
                found[key] = KINDS[kind](**values)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number} is not a stored answer: delete that line, or give another output_dir."
                ) from error
    return found


def merge(folder: Path) -> None:
    """Put the records of all processes into one file, ordered by task and problem; call it when no process writes."""
    found = sorted(read_records(folder).items(), key=lambda item: (item[1].task, item[1].doc_id, item[1].request, item[0]))
    partial = folder / f"{MERGED}.part"
    partial.write_text("".join(_line(key, record) for key, record in found), encoding="utf-8")
    partial.replace(folder / MERGED)
    for path in folder.glob(OF_RANK):
        path.unlink()


def _line(key: str, record: Record) -> str:
    return json.dumps({"key": key, "kind": type(record).__name__, **asdict(record)}) + "\n"
