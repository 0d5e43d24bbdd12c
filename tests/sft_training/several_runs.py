"""Started by test_zero.py on one or two processes: several runs one after the other, so that the start is paid once.

The argument is a JSON file: a list of {"shard": a file of configs/accelerate, "settings": overrides of sft.py}. Each run
gets the environment that `accelerate launch` makes of that file.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import DistributedType, PartialState

from sft_training.overrides import compose_settings
from sft_training.sft import train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def gpus_of_gloo(self: PartialState, *given: Any, **named: Any) -> tuple[str, DistributedType]:
    """What accelerate finds out about the hardware, on a machine whose GPUs talk through gloo."""
    return "gloo", DistributedType.MULTI_GPU


def choose(shard: str) -> None:
    """The environment of that file. accelerate takes FSDP for a matter of GPUs, so here it is told that there are some."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(shard.startswith("zero")).lower()
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(CONFIGS / "deepspeed" / f"{shard}.json")
    if shard == "fsdp2":
        told = yaml.safe_load((CONFIGS / "accelerate" / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
        told["fsdp_transformer_cls_to_wrap"] = told.pop("fsdp_transformer_layer_cls_to_wrap")
        os.environ |= {key.upper(): str(value) for key, value in told.items()}
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        PartialState._prepare_backend = gpus_of_gloo  # type: ignore[method-assign]


def main() -> None:
    """Run them all; the first failure ends the process."""
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        choose(run["shard"])
        train(compose_settings(run["settings"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
