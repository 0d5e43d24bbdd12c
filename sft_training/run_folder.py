"""Whose a run folder is, and what becomes of the things that an earlier start left in it.

Called by ``sft.py``. Besides checkpoints a run folder holds what is in `LEFT`; ``.lock`` is held by the run that works
there. ``aside-<time>…`` is what a later start did not go on from: nothing that was saved is deleted.
"""

import fcntl
import logging
import shutil
import time
from pathlib import Path
from typing import TextIO

from sft_training.checkpoints import PARTIAL, POSITION_FILE, checkpoints_in, first_decides, step_of
from sft_training.config import ModelSection
from sft_training.overrides import check_folder
from sft_training.records import CONFIG_FILE, CURVE_FILE, METRICS_FILE, RUN_FILE, read_run, read_settings, write_run

FINAL = "final"
LOCK_FILE = ".lock"
LEFT = ("checkpoint-*", FINAL, CONFIG_FILE, CURVE_FILE, METRICS_FILE, RUN_FILE, "tensorboard", "rows-rank*.jsonl")

log = logging.getLogger(__name__)
_held: list[TextIO] = []  # locks, until the process ends


def same_folder(run: str) -> str:
    """The run folder of the first process, for all of them: each may have read another clock into its name."""
    return first_decides(lambda: run)


def finished(run: Path, step: int) -> bool:
    """Whether the first process finds the final model of this step, for all of them."""
    return first_decides(lambda: (run / FINAL).is_dir() and read_run(run).get("steps") == step)


def take(run: Path) -> None:
    """Make a folder the run folder of these processes; the process group exists already.

    Raises:
        ValueError: it cannot be made, holds files that no run of ours wrote, or another run works in it.
    """
    first_decides(lambda: _take(run))


def _take(run: Path) -> None:
    check_place(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / LOCK_FILE).open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output_dir={run}: nothing can be written there ({error.strerror}).") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"output_dir={run}: another run works there. Wait for its end, or give this one a folder of its own."
        ) from error
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): start no second run there before this one ends.", run, error.strerror)
    _held.append(lock)
    if not (run / RUN_FILE).exists():
        write_run(run, {})  # from now on it is ours


def check_place(run: Path) -> None:
    """Look at a run folder without touching it.

    Raises:
        ValueError: it cannot be a folder, or holds what a run would take for its own, but no run of ours wrote.
    """
    check_folder("output_dir", run)
    found = [] if (run / RUN_FILE).is_file() else sorted(path for name in LEFT for path in run.glob(name))
    theirs = [path.name for path in found if not (path / POSITION_FILE).is_file()]  # our own may have moved here
    if theirs:
        raise ValueError(
            f"output_dir={run} holds {', '.join(theirs[:4])}, but no {RUN_FILE}, so no run of this program wrote it, and a "
            "run would write over it: give another folder."
        )


def check_origin(checkpoint: Path, model: ModelSection) -> None:
    """Whether a run goes on from the model that it began with; the weights are those of the checkpoint in any case.

    Raises:
        ValueError: the settings name another one, which would not be read.
    """
    began = read_settings(checkpoint.parent).get("model", {})
    for name in ("path", "config"):
        now, then = getattr(model, name), began.get(name, getattr(model, name))
        if now != then and (None in (now, then) or Path(now).resolve() != Path(then).resolve()):
            raise ValueError(
                f"model.{name}={now}, but {checkpoint} goes on from model.{name}={then}, and its weights are what counts. "
                f"Give model.{name}={then}, or another output_dir to begin with {now}. If the folder only moved, "
                f"say so in {checkpoint.parent / CONFIG_FILE}."
            )


def make_ready(run: Path, chosen: Path | None) -> None:
    """Tidy a run folder, on the first process, before the run goes on from ``chosen`` (None: starts).

    What an interrupted writing left is removed. Checkpoints of later steps (damaged, or of a run that is given up) are set
    aside under another name: the run will come to these steps again. A start sets everything aside that is there.
    """
    for left in (*run.glob(f"{PARTIAL}checkpoint-*"), *run.glob(f"{PARTIAL}{FINAL}")):
        log.warning("%s is what an interrupted writing (or deleting) left; it is removed.", left)
        shutil.rmtree(left)
    aside = run / f"aside-{time.strftime('%Y%m%d-%H%M%S')}"
    if chosen is not None:
        for later in checkpoints_in(run):
            if step_of(later) > step_of(chosen):
                moved = later.rename(f"{aside}-{later.name}")
                log.warning(
                    "The run goes on from %s: %s is set aside as %s; delete it at will.", chosen.name, later, moved.name
                )
    elif checkpoints_in(run) or any((run / name).exists() for name in (FINAL, METRICS_FILE)):
        aside.mkdir()
        for earlier in sorted(path for name in LEFT for path in run.glob(name)):
            earlier.rename(aside / earlier.name)
        write_run(run, {})
        log.warning(
            "The run starts anew: what an earlier one left in %s is set aside in %s; delete it at will.", run, aside.name
        )
