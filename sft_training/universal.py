"""Resuming a DeepSpeed run on another number of processes, through DeepSpeed's universal checkpoint format.

ZeRO writes one piece of the optimizer per process and reads only as many as there are processes. When the number differs,
the pieces are put together once, into ``global_step<N>_universal`` beside them, and loaded from there; the checkpoint keeps
its pieces. Plain checkpoints (ddp or one process) hold the whole optimizer and need none of this. Called by ``sft.py``.

DeepSpeed stores its state as pickles: go on only from checkpoints that you trust.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft_training.sharding import acting, inside
from sft_training.trainer import SftTrainer

PIECES = "*optim_states.pt"
READY = "latest_universal"  # the file that names the folder, written last by the converter


def needs_universal(checkpoint: Path, way: str, processes: int) -> bool:
    """Whether a checkpoint must be put together (`put_together`) before this run can load it.

    Args:
        way: how this run shares the model, see ``sharding.py``.

    Raises:
        ValueError: it was written under another way, whose optimizer state this one cannot read.
    """
    written, pieces = _written(checkpoint)
    if _family(written) != _family(way):
        raise ValueError(
            f"{checkpoint} was written under {written}, whose optimizer {way} cannot read: start as then, SHARD={written}, "
            f"or anew from its weights (model.path={checkpoint} and another output_dir)."
        )
    return written.startswith("zero") and pieces != processes


def ready_for(checkpoint: Path, way: str, args: TrainingArguments) -> bool:
    """`needs_universal`; and if so, the first process puts the checkpoint together while all others wait."""
    needed = needs_universal(checkpoint, way, args.world_size)
    with args.main_process_first(local=False):
        if needed and args.process_index == 0:
            put_together(checkpoint, args.world_size)
    return needed


def put_together(checkpoint: Path, processes: int) -> None:
    """Convert a checkpoint for any number of processes, once; a conversion that was interrupted is done anew.

    Raises:
        RuntimeError: the converter failed, with its last words.
    """
    (folder,) = _step_folders(checkpoint)
    made = folder.with_name(folder.name + "_universal")
    pieces = len(list(folder.glob(PIECES)))
    print(f"{checkpoint} comes from {pieces} process(es), this run has {processes}: ", end="", flush=True)
    if (checkpoint / READY).is_file():
        print(f"going on from {made.name}.", flush=True)
        return
    print(f"putting its pieces together in {made.name} …", flush=True)
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    done = subprocess.run(
        [*command, "--input_folder", str(folder), "--output_folder", str(made)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"putting {folder} together failed: {done.stderr[-2000:]}")


def load_universal(trainer: SftTrainer) -> None:
    """Let the engine, when it is built, read what `put_together` made."""
    trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config["checkpoint"] = {"load_universal": True}
    trainer.add_callback(SeparateGroups(trainer))


class SeparateGroups(TrainerCallback):
    """After DeepSpeed (0.19) has read a universal checkpoint under ZeRO-3, all groups of weights have one and the same step
    counter, which would run several times as fast: gives each its own."""

    def __init__(self, trainer: SftTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if acting(self.trainer) != "zero3":
            return
        for known in inside(self.trainer.optimizer).state.values():
            known["step"] = known["step"].clone()


def _written(checkpoint: Path) -> tuple[str, int]:
    """The way under which a checkpoint was written, and how many processes' pieces it holds."""
    for folder in _step_folders(checkpoint):
        stage = 2 if (folder / "mp_rank_00_model_states.pt").is_file() else 3
        return f"zero{stage}", len(list(folder.glob(PIECES)))
    if (checkpoint / "optimizer.bin").is_file():
        return "fsdp2", 0
    return "ddp", 0


def _step_folders(checkpoint: Path) -> list[Path]:
    return [path for path in checkpoint.glob("global_step*") if path.is_dir() and not path.name.endswith("_universal")]


def _family(way: str) -> str:
    return {"none": "ddp", "zero1": "zero2"}.get(way, way)
