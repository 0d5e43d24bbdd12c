"""Looks at every optimizer step before it is taken: is its loss a number, and has someone asked the run to stop?

Called by ``trainer.py`` and ``sft.py``. Both questions are settled by one small reduction, so that all processes leave out
the same step and stop after the same step, and the device is waited for once a step.
"""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from sft_training.checkpoints import RunStopped, last_saved
from sft_training.data import Counts

IN_A_ROW = 10  # steps left out one after the other that end a run
SHOWN = 4  # micro-batches, and samples of each, named in a sentence

log = logging.getLogger(__name__)


class StepGuard(TrainerCallback, ExportableState):
    """Part of a trainer. The library saves its counts in trainer_state.json.

    Args:
        on_nan: stop | skip, what to do about a loss or gradient that is not finite.
    """

    def __init__(self, on_nan: str) -> None:
        self.on_nan = on_nan
        self.skipped = self.in_a_row = 0  # steps left out: of the whole run, and directly before this one
        self.taken = self.left_out = 0  # since the last log line
        self.stopped_by: str | None = None  # the signal that ended the run
        self._signal: signal.Signals | None = None
        self._schedule_waits = False  # DeepSpeed left a step out by itself, and the Trainer with it the schedule
        self._micro: list[tuple[Counts, Tensor]] = []  # the present step's micro-batches with their losses

    def state(self) -> dict[str, Any]:
        """What stands in trainer_state.json."""
        return {"args": {"on_nan": self.on_nan}, "attributes": {"skipped": self.skipped, "in_a_row": self.in_a_row}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        saved = state.stateful_callbacks[type(self).__name__]["attributes"]
        self.skipped, self.in_a_row = saved["skipped"], saved["in_a_row"]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        self._micro = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self._schedule_waits:
            others["lr_scheduler"].step()
            self._schedule_waits = False
        if self.stopped_by is not None:
            control.should_training_stop = control.should_save = True
        if control.should_save:
            control.should_log = True  # no log line spans a checkpoint: the half behind it would be lost on resuming

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGTERM (a cluster wants the machine back) and SIGINT (Ctrl-C) stop the run after the present step, saved.

        They may come several times, from the terminal and from the launcher, so only SIGKILL is quicker.
        """

        def note(number: int, frame: FrameType | None) -> None:
            if self._signal is None:
                self._signal = signal.Signals(number)
                log.warning("%s: the run stops after this step, and saves it.", self._signal.name)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, counts: Counts, loss: Tensor) -> None:
        """Remember a micro-batch of the present step, and its loss."""
        self._micro.append((counts, loss.detach()))

    def refuses(self, accelerator: Accelerator, norm: Tensor | float, step: int, run: Path) -> bool:
        """Whether the step must be left out; every process asks once a step, and all get the same answer.

        Args:
            norm: of the gradient over all processes. step: its number. run: the folder with the checkpoints.

        Raises:
            RunStopped: something is not finite and training.on_nan=stop, or too often in a row, or DeepSpeed, which decides
                by the gradient alone, has taken the step.
        """
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2; not run: it needs GPUs
        losses = torch.stack([loss for _, loss in self._micro])
        broken = ~(torch.isfinite(losses).all() & torch.isfinite(torch.as_tensor(norm, device=losses.device)))
        flags = torch.stack([broken, torch.full_like(broken, self._signal is not None)]).float()
        refused, asked = accelerator.reduce(flags, "sum").tolist()
        if asked:
            self.stopped_by = "a signal to another process" if self._signal is None else self._signal.name
        if not refused:
            self.taken, self.in_a_row = self.taken + 1, 0
            return False
        self.skipped, self.in_a_row, self.left_out = self.skipped + 1, self.in_a_row + 1, self.left_out + 1
        taken = accelerator.distributed_type == DistributedType.DEEPSPEED and not accelerator.optimizer_step_was_skipped
        if self.on_nan == "stop" or taken or self.in_a_row >= IN_A_ROW:
            raise RunStopped(self._sentence(step, gather_object(self._broken()), run))
        self._schedule_waits = accelerator.optimizer_step_was_skipped
        return True

    def correct(self, logs: dict[str, float]) -> None:
        """Make a log line's mean loss that of the steps taken; where none was taken there is no loss to log."""
        if self.left_out and not self.taken:
            del logs["loss"]
        elif self.left_out:
            logs["loss"] *= (self.taken + self.left_out) / self.taken
        logs["data/skipped_steps"] = self.skipped
        self.taken = self.left_out = 0

    def _broken(self) -> list[str]:
        """The micro-batches of this process whose loss is not finite, in words."""
        found = []
        for counts, loss in self._micro:
            if not torch.isfinite(loss):
                more = f" and {len(counts.samples) - SHOWN} more" if len(counts.samples) > SHOWN else ""
                rows, samples = ", ".join(map(str, counts.rows)), ", ".join(counts.samples[:SHOWN])
                found.append(f"{loss.item()} on rows {rows} with the samples {samples}{more}")
        return found

    def _sentence(self, step: int, broken: list[str], run: Path) -> str:
        what = f"the loss of step {step} is {'; '.join(broken[:SHOWN])}"
        if not broken:
            what = f"the gradient of step {step} is not finite, though its losses are"
        often = f", as in the {self.in_a_row - 1} steps before it" if self.in_a_row > 1 else ""
        fix = "" if self.on_nan == "skip" else ", or leave such steps out with training.on_nan=skip"
        return (
            f"{what}{often}. Nothing of it was saved: {last_saved(run)}. Look at these samples, lower "
            f"training.learning_rate{fix}; the same command goes on from there, and "
            "resume=FOLDER from an earlier checkpoint."
        )
