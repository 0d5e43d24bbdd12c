"""An output file that is always either finished or unfinished under another name, and can be continued after any stop.

Called by ``dataset/transfer_text2token.py``. Beside ``NAME`` stand, while it is unfinished, ``NAME.part`` and
``NAME.progress.json`` (how much of the part counts, and what the caller needs to go on), afterwards
``NAME.summary.json``. All of them carry a hash of the settings; what was made under other settings is never continued.
"""

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any


class PartFile:
    """One output being written. Nothing that `append` was given is lost by a kill, and nothing is written twice.

    Args:
        path: the output.
        settings: a hash of everything that decides its content.
    """

    def __init__(self, path: Path, settings: str) -> None:
        self.path, self.settings = path, settings
        self.part, self.progress, self.summary = (
            path.with_name(path.name + suffix) for suffix in (".part", ".progress.json", ".summary.json")
        )
        self._file: IO[bytes] | None = None
        self._size = 0

    def finished(self) -> bool:
        """Whether the output is complete and was made under these very settings.

        Raises:
            ValueError: there is an output that was not made here, and that would be overwritten.
        """
        if not self.path.exists():
            return False
        if not self.summary.exists():
            raise ValueError(f"{str(self.path)!r} exists and is not an output of this script: remove it or name another.")
        summary = _read_json(self.summary)
        if summary.get("settings") != self.settings or summary.get("output_bytes") != self.path.stat().st_size:
            return False
        if _read_json(self.progress).get("settings") == self.settings:
            if self.part.exists():
                return False  # stopped after the summary and before the renaming: the output is an older one
            self.progress.unlink()
        return True

    def open(self) -> dict[str, Any] | None:
        """Locks the part file, cuts it back to what counts, and returns the state of the last `append`, if any.

        Raises:
            ValueError: another run is writing it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.part, "ab")  # noqa: SIM115 (close() closes it)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing {str(self.path)!r}: wait for it, or name another output.") from error
        if not self.part.exists() or not os.path.samestat(os.fstat(self._file.fileno()), self.part.stat()):
            raise ValueError(f"another run has just finished {str(self.path)!r}: start this one again.")
        saved = _read_json(self.progress)
        counted = saved.get("part_bytes", 0) if saved.get("settings") == self.settings else 0
        usable = 0 < counted <= os.path.getsize(self.part)
        self._size = counted if usable else 0
        self._file.truncate(self._size)
        return dict(saved["state"]) if usable else None

    def append(self, text: bytes, state: dict[str, Any]) -> None:
        """Adds finished text, then notes that it counts. In this order: the note never promises too much."""
        assert self._file is not None
        self._file.write(text)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._size += len(text)
        _write_json(self.progress, {"settings": self.settings, "part_bytes": self._size, "state": state})

    def finish(self, described: dict[str, Any]) -> int:
        """Writes the summary, gives the part its final name, and returns its bytes. Stopped inside, it can be done again."""
        _write_json(self.summary, {"settings": self.settings, "output_bytes": self._size} | described)
        os.replace(self.part, self.path)
        self.progress.unlink(missing_ok=True)
        return self._size

    def discard(self) -> None:
        """Removes unfinished work."""
        for leftover in (self.part, self.progress):
            leftover.unlink(missing_ok=True)

    def close(self) -> None:
        """Lets go of the part file; does nothing the second time."""
        if self._file is not None:
            self._file.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent, or not ours: then there is nothing to continue
    return value if isinstance(value, dict) else {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    passing = path.with_name(path.name + ".tmp")
    with open(passing, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(passing, path)
