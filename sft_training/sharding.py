"""How the processes share the model: what the launcher asked for, whether that is what runs, and whole weights from shards.

`accelerate launch` passes a file of ``configs/accelerate`` on as environment variables, and on some machines quietly does
something else than the file says. So the written and the running way are compared. Called by ``sft.py`` and ``trainer.py``.

The ways: none (one process) · ddp (everybody holds everything) · zero1, zero2, zero3 (DeepSpeed) · fsdp2 (PyTorch).
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import read_json
from sft_training.config import SftConfig

# Keys of a DeepSpeed file that settings decide: it leaves them to the Trainer ("auto"), or there would be two truths.
OURS = {
    "train_batch_size": "training.local_batch_size, grad_accum_steps and the number of processes",
    "train_micro_batch_size_per_gpu": "training.local_batch_size",
    "gradient_accumulation_steps": "training.grad_accum_steps",
    "gradient_clipping": "training.max_grad_norm",
    "bf16": "precision.dtype",
    "fp16": "precision.dtype",
    "optimizer": "training.optimizer",
    "scheduler": "training.schedule",
}


def asked(processes: int) -> str:
    """The way that the launcher's files ask for.

    Raises:
        ValueError: a DeepSpeed file that decides what the settings decide.
    """
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        return f"zero{_deepspeed_file()['zero_optimization']['stage']}"
    if _flag("ACCELERATE_USE_FSDP"):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return "ddp" if processes > 1 else "none"


def acting(trainer: Trainer) -> str:
    """The way that runs, read from the built engine."""
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        return f"zero{int(trainer.deepspeed.zero_optimization_stage())}"
    if kind == DistributedType.FSDP:
        return f"fsdp{trainer.accelerator.state.fsdp_plugin.fsdp_version}"
    return "none" if kind == DistributedType.NO else "ddp"


def check_sharding(config: SftConfig, processes: int) -> str:
    """`asked`, checked against the settings before a model is built.

    Raises:
        ValueError: settings that cannot be had that way.
    """
    way = asked(processes)
    if way in ("none", "ddp"):
        return way
    if config.training.optimizer != "adamw":
        raise ValueError(
            f"training.optimizer={config.training.optimizer!r} needs whole matrices, which {way} cuts up: set "
            "training.optimizer=adamw, or start with SHARD=ddp."
        )
    if _flag("ACCELERATE_USE_CPU"):
        raise ValueError(f"ACCELERATE_USE_CPU is set, with which accelerate runs ddp and not {way}: unset it.")
    return way


class SameWay(TrainerCallback):
    """Stops a run before its first step when the way that runs is not the one that was asked for."""

    def __init__(self, trainer: Trainer, way: str) -> None:
        self.trainer, self.way = trainer, way

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if acting(self.trainer) != self.way:
            raise ValueError(
                f"the launcher's files ask for {self.way}, but {acting(self.trainer)} runs. accelerate shards with fsdp2 "
                "over GPUs only, and runs ddp instead of DeepSpeed where the environment asks it for the CPU."
            )


def masters(optimizer: Any) -> Tensor:
    """Some of the weights that the optimizer updates; their dtype is the one that counts."""
    flat = getattr(getattr(optimizer, "optimizer", None), "fp32_partitioned_groups_flat", None)  # ZeRO-3 keeps them aside
    found: Tensor = flat[0] if flat else inside(optimizer).param_groups[0]["params"][0]
    return found


def spare_the_compiler() -> None:
    """Keep DeepSpeed on CPUs from compiling its shared-memory reduction at the first start; gloo reduces as well.

    It takes minutes, wants a C++ compiler, and a start that is killed meanwhile leaves a lock at which all later ones wait.
    """
    import deepspeed  # takes seconds, which runs without it should not wait

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def shards_weights(way: str) -> bool:
    """Whether no process holds all weights, so that a forward is the work of all of them together."""
    return way == "zero3" or way.startswith("fsdp")


def weights_dtype(way: str, bf16: bool) -> torch.dtype:
    """In which dtype to load: DeepSpeed computes in bfloat16 weights and keeps float32 masters itself, in its shards."""
    return torch.bfloat16 if bf16 and way.startswith("zero") else torch.float32


def suit_fsdp(trainer: Trainer, network: LLaDAModelLM) -> None:
    """Two things that accelerate's FSDP2 would do to this model, set right before it shards it.

    It would gather embedding and head only while their own forward runs, but the loss reads the head's weight directly
    (`project`): so they stay with the rest of the model. And under bf16 it would round the loss and the sums of gradients.
    """
    network.get_input_embeddings = network.get_output_embeddings = lambda: None  # type: ignore[method-assign, assignment]
    if trainer.args.bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = policy


def inside(optimizer: Any) -> Any:
    """The optimizer that computes, without the wrappers around it (accelerate's, and DeepSpeed's inside that)."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def network_of(network: LLaDAModelLM, weights: dict[str, Tensor]) -> LLaDAModelLM:
    """The network with gathered weights (CPU) in place of its shards, to be saved."""
    with torch.device("meta"):
        whole = LLaDAModelLM(network.config)
    whole.load_state_dict(weights, strict=True, assign=True)
    return whole


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")


def _deepspeed_file() -> dict[str, Any]:
    given = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if given is None:
        raise ValueError("DeepSpeed without a file: add --deepspeed_config_file, naming one of configs/deepspeed.")
    if not Path(given).is_file():
        raise ValueError(f"the DeepSpeed file {given} does not exist (seen from {Path.cwd()}): give its full path.")
    found = read_json(Path(given))
    stage = found.get("zero_optimization", {})
    if not isinstance(stage, dict) or "stage" not in stage:
        raise ValueError(f"{given} names no zero_optimization.stage: take one of configs/deepspeed.")
    for key, setting in OURS.items():
        value = found.get(key, "auto")
        if value != "auto" and value != {"enabled": "auto"}:
            raise ValueError(f'{given} sets {key}={value!r}, which {setting} decides: write "auto" or leave it out.')
    return found
