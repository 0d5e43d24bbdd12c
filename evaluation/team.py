"""The processes of a run, as a launcher started them: one hands out work, all do their share, one gathers the results.

Used by ``eval.py`` and ``harness.py``. Only Python objects pass between them, over gloo, so that any devices go together.
The launcher says who is who in RANK, WORLD_SIZE and LOCAL_RANK; without it there is one process.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=30)  # the others wait while one runs programs or has the longest answers


class Team:
    """This process and its number among `size`; number 0 leads."""

    def __init__(self) -> None:
        self.rank, self.size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        self._waiting = True  # the others wait to be handed something
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=PATIENCE)

    def hand_out(self, shares: Sequence[Any] | None = None) -> Any:
        """This process's share. shares: one for each process, from the leader; None from the others."""
        if self.size == 1:
            assert shares is not None
            return shares[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, None if shares is None else list(shares), src=0)
        self._waiting = False
        return mine[0]

    def bring_together(self, result: Any) -> list[Any]:
        """For the leader everyone's result, for the others nothing."""
        if self.size == 1:
            return [result]
        results: list[Any] = [None] * self.size
        dist.gather_object(result, results if self.rank == 0 else None, dst=0)
        self._waiting = True
        return results

    def dismiss(self) -> None:
        """Called at a run's end, also an early one: the leader hands None to the others if they wait for work."""
        if self.size > 1 and self.rank == 0 and self._waiting:
            self.hand_out([None] * self.size)


def part() -> None:
    """Called once, at a program's end: the processes part while Python still runs; at its exit a thread of the group can
    abort one that is done. No team can be made after it: a second group would find the addresses of the first.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def device() -> torch.device:
    """The device of this process: a GPU of its own where there are GPUs.

    Raises:
        ValueError: more processes on this machine than GPUs.
    """
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
    if not gpus:
        return torch.device("cpu")
    if local >= gpus:
        raise ValueError(f"process {local + 1} of this machine has no GPU of its own, of {gpus}: start {gpus} process(es).")
    return torch.device("cuda", local)


def launcher_warning() -> str | None:
    """What to say when `accelerate launch` was asked for several processes and started a single one, without a word.

    It does so unless there are several GPUs; all that shows is an address to meet at without a number of processes.
    """
    if "MASTER_ADDR" not in os.environ or "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    return (
        "accelerate was asked for several processes and started ONE, as it does unless it finds several GPUs. The results "
        "are the same. For several processes on CPUs add --multi_gpu, or use torchrun --nproc_per_node N."
    )
