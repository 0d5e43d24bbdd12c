"""Checkpoints that are whole or do not count: written under another name, renamed when complete, verified before use.

Called by ``trainer.py`` (writing) and ``sft.py`` (choosing). What stands in a checkpoint is the library's business and the
trainer's; here is what makes it one. Names in a run folder: ``checkpoint-<step>`` is complete, ``partial-checkpoint-<step>``
is being written or deleted, ``aside-<time>-checkpoint-<step>`` came after the step from which a run went on.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from dllm_var.model.shards import file_hash
from sft_training.data import RowStream

POSITION_FILE = "data_position.json"
STATE_FILE = "trainer_state.json"
MANIFEST_FILE = "manifest.json"
PARTIAL = "partial-"
T = TypeVar("T")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

log = logging.getLogger(__name__)


class RunStopped(Exception):
    """The run ended before its last step, for the reason that its sentence gives; what was saved is good."""


def first_decides(decide: Callable[[], T]) -> T:
    """What the first process answers, for all of them: each may see another clock, or another state of a disk.

    Raises:
        ValueError: as the first process raised it, on every process.
    """
    said: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            said[0] = decide()
        except ValueError as error:
            said[1] = str(error)
    broadcast_object_list(said)
    if said[1] is not None:
        raise ValueError(said[1])
    answer: T = said[0]
    return answer


def step_of(folder: Path) -> int:
    """The optimizer step of a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def checkpoints_in(run: Path) -> list[Path]:
    """The folders of a run that are called checkpoints, newest first."""
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of, reverse=True)


def staging(run: Path, step: int) -> Path:
    """The stand-in for the run folder while a checkpoint is written: it is written to ``staging(...)/checkpoint-<step>``."""
    return run / f"{PARTIAL}checkpoint-{step}"


def complete(run: Path, step: int, keep: int | None) -> Path:
    """Make what was written to `staging` a checkpoint, then delete all but the newest ``keep`` (None: keep all).

    The manifest (bytes and SHA-256 of every file) is written last, everything is on the disk before the new name is given,
    and an older checkpoint goes only after that.
    """
    written, folder = staging(run, step) / f"checkpoint-{step}", run / f"checkpoint-{step}"
    names = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    digests = _digests(written, names)
    files = {
        name: {"bytes": (written / name).stat().st_size, "sha256": digest}
        for name, digest in zip(names, digests, strict=True)
    }
    manifest = written / MANIFEST_FILE
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (*(written / name for name in names), manifest, written):
        _to_disk(path)
    os.replace(written, folder)
    _to_disk(run)
    written.parent.rmdir()
    for old in checkpoints_in(run)[keep:] if keep is not None else []:
        doomed = old.rename(old.with_name(PARTIAL + old.name))  # half deleted it must not look like a checkpoint
        shutil.rmtree(doomed, ignore_errors=True)
    return folder


def faults(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, file by file; nothing when it is whole."""
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        return [f"{MANIFEST_FILE} is missing"]
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
        digests = {name: str(entry["sha256"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST_FILE} cannot be read ({error})"]
    found = [_fault_of_size(folder / name, name, size) for name, size in sizes.items()]
    wrong = [fault for fault in found if fault is not None]
    if wrong:
        return wrong
    now = _digests(folder, list(digests))
    return [
        f"{name} has other contents than were written (SHA-256 differs)"
        for name, digest in zip(digests, now, strict=True)
        if digest != digests[name]
    ]


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, None when it has none at all; every one passed over is reported.

    Raises:
        ValueError: there are checkpoints, but not one is whole.
    """
    reports = []
    for folder in checkpoints_in(run):
        wrong = faults(folder)
        if not wrong:
            return folder
        reports.append(f"{folder.name}: {', '.join(wrong)}")
        log.warning("%s is damaged and is not used: %s.", folder, ", ".join(wrong))
    if reports:
        raise ValueError(
            f"no checkpoint in {run} is whole ({'; '.join(reports)}). Put the damaged files back, or start anew with "
            "resume=never, which sets these checkpoints aside."
        )
    return None


def choose(run: Path, resume: str) -> Path | None:
    """The checkpoint from which a run goes on, None for a fresh start.

    Raises:
        ValueError: ``resume`` names a folder that is no whole checkpoint, or auto finds only damaged ones.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return newest_checkpoint(run)
    chosen = Path(resume)
    wrong = faults(chosen) if chosen in checkpoints_in(chosen.parent) else ["there is no such checkpoint"]
    if wrong:
        raise ValueError(
            f"resume={resume!r}: choose auto, never, or the folder of a complete checkpoint ({', '.join(wrong)})."
        )
    return chosen


def checkpoint_to_resume(run: Path, resume: str) -> Path | None:
    """`choose`, by the first process for all of them; the process group exists already.

    Raises:
        ValueError: as `choose`, on every process.
    """
    return first_decides(lambda: choose(run, resume))


def resume_stream(stream: RowStream, checkpoint: Path) -> None:
    """Put the data where the checkpoint left it.

    Raises:
        ValueError: other data or other settings of the rows than then, or another number of rows in a step.
    """
    stream.restore(json.loads((checkpoint / POSITION_FILE).read_text(encoding="utf-8")))
    steps = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    if stream.first_row != steps * stream.rows_per_step:
        raise ValueError(
            f"{checkpoint} took {stream.first_row} rows for {steps} steps, this run takes {stream.rows_per_step} a step: "
            "keep training.local_batch_size * training.grad_accum_steps * processes as it was, or start anew with "
            "resume=never."
        )


def last_saved(run: Path) -> str:
    """The newest checkpoint of a run that is going on, in words."""
    found = checkpoints_in(run)
    return f"the newest checkpoint is {found[0]}" if found else "no checkpoint had been written yet"


def could_not_write(what: str, run: Path, error: object, needed: int | None = None) -> RunStopped:
    """The end of a run whose disk is full or fails. ``needed``: bytes that ``what`` takes."""
    size = "" if needed is None else f"{what} takes about {needed:,} bytes; "
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    if "inline_container" in reason:  # PyTorch's writer does not pass the system's reason on
        reason = "fewer bytes were taken than given, as by a full disk"
    return RunStopped(
        f"{what} could not be written to {run} ({reason}): {size}{shutil.disk_usage(run).free:,} bytes are free there. "
        f"Nothing that was saved before is lost: {last_saved(run)}. Make room and start the same command again."
    )


def is_full(error: Exception) -> bool:
    """Whether a disk is full (or a quota, or a limit of file sizes); the libraries in Rust say so in words alone."""
    return getattr(error, "errno", None) in FULL or any(f"(os error {number})" in str(error) for number in FULL)


@contextmanager
def full_disk_told(run: Path) -> Iterator[None]:
    """Inside, a full disk ends the run with a sentence."""
    try:
        yield
    except RunStopped:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise could_not_write(getattr(error, "filename", None) or "a file", run, error) from error


def _digests(folder: Path, names: Sequence[str]) -> list[str]:
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return list(pool.map(lambda name: file_hash(folder / name), names))


def _fault_of_size(path: Path, name: str, size: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{name} has {found} bytes instead of {size}"


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
