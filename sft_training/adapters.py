"""LoRA adapters in training: which layers get one, how the frozen base is held, and what a checkpoint of the run contains.

Called by ``sft.py`` (before and after the base is loaded) and ``trainer.py`` (saving, dropout). The adapters are peft's, in
float32. The head shares the name ``ff_out`` with a layer of every block, so targets are resolved to full paths.

4-bit bases (qlora) are bitsandbytes' and need CUDA. The tests put a stand-in in its place; quantising, peft's layers on top
and training steps were also run with the real package (0.50) on a CPU, its CUDA kernels were not.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dllm_var.diffusion.corruption import uniforms
from dllm_var.model.adapter import HASH, import_peft, is_adapter, read_adapter, save_adapter
from dllm_var.model.checkpoint import load_config, save_model, weights_hash
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import canonical_name
from dllm_var.pretrained import HUB_NAME, resolve_folder
from sft_training.config import AdapterSection, SftConfig
from sft_training.sharding import shards_weights


@dataclass(frozen=True)
class Plan:
    """A run's adapter, settled before any weight is loaded: its layers by full path, and the base by name and hash."""

    section: AdapterSection
    targets: tuple[str, ...]
    base: str
    base_hash: str


def plan_adapter(config: SftConfig, checkpoint: Path | None, way: str) -> Plan | None:
    """What `attach` is to build; None when all weights are trained. ``way``: see ``sharding.py``.

    Raises:
        ValueError: a missing package or device, a target that matches nothing, or a checkpoint of a run with another
            adapter, another base, or none.
    """
    section = config.adapter
    saved = checkpoint is not None and is_adapter(checkpoint)
    if checkpoint is not None and saved != (section.kind != "none"):
        holds = "an adapter" if saved else "whole weights"
        raise ValueError(
            f"adapter.kind={section.kind!r}, but {checkpoint} holds {holds}: choose the run's own adapter=, or start anew "
            "with resume=never."
        )
    if section.kind == "none":
        return None
    if shards_weights(way):
        raise ValueError(f"adapter.kind={section.kind!r} with {way}: adapters need a whole base, take SHARD=zero2 or ddp.")
    import_peft()
    if section.kind == "qlora":
        check_bitsandbytes(cuda=torch.cuda.is_available() and config.training.device != "cpu")
    folder = resolve_folder(str(config.model.path))
    targets = resolve_targets(load_config(folder), section.targets)
    plan = Plan(section, targets, base_name(str(config.model.path), folder), weights_hash(folder))
    if checkpoint is not None:
        _check_same(plan, checkpoint)
    return plan


def base_name(given: str, folder: Path) -> str:
    """How an adapter names its base: 'tiny' and hub names as they are, a folder by its full path."""
    is_name = not Path(given).expanduser().is_dir() and (HUB_NAME.fullmatch(given) or given == "tiny")
    return given if is_name else str(folder.resolve())


def resolve_targets(config: LLaDAConfig, targets: list[str]) -> tuple[str, ...]:
    """Full paths of the linear layers that are meant, in the network's order.

    Args:
        config: the model's shape.
        targets: bare names, which mean that layer of every block, or full paths.

    Raises:
        ValueError: one of them matches nothing; lists what there is.
    """
    with torch.device("meta"):
        network = LLaDAModelLM(config)
    there = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in there if ".blocks." in name]
    chosen: set[str] = set()
    for target in targets:
        full = canonical_name(target)
        found = [name for name in there if name == full] or [name for name in inside if name.rpartition(".")[2] == target]
        if not found:
            names = dict.fromkeys(name.rpartition(".")[2] for name in inside)
            others = [name for name in there if name not in inside]
            raise ValueError(
                f"adapter.targets: {target!r} matches no linear layer. By name, in every block: {', '.join(names)}; by full "
                f"path, one of them ({inside[0]}){''.join(f' or the head ({name})' for name in others)}."
            )
        chosen.update(found)
    return tuple(name for name in there if name in chosen)


def attach(network: LLaDAModelLM, plan: Plan, seed: int, device: torch.device) -> nn.Module:
    """Freeze a network and put adapters on it, in place; returns the `peft.PeftModel` around it.

    Args:
        network: the base. plan: from `plan_adapter`. seed: of the adapters' first weights.
        device: where a 4-bit base goes; the Trainer moves the others.
    """
    peft, section = import_peft(), plan.section
    network.requires_grad_(False)
    if section.kind == "qlora":
        quantize_blocks(network, device)
    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=list(plan.targets),
        auto_mapping={
            "base_model_class": LLaDAModelLM.__name__, "parent_library": LLaDAModelLM.__module__, HASH: plan.base_hash,
        },
    )  # fmt: skip
    wrapped: nn.Module = peft.get_peft_model(network, settings)
    settings.base_model_name_or_path = plan.base  # peft puts the folder there from which the weights were read,
    settings.target_modules = list(plan.targets)  # and shortens the paths
    return wrapped


def check_bitsandbytes(cuda: bool) -> None:
    """Whether a base can be held in 4 bits here.

    Raises:
        ValueError: bitsandbytes is not installed, or the run is not on a CUDA device.
    """
    if not cuda:
        raise ValueError("adapter.kind='qlora' needs a CUDA GPU (and training.device=auto): use adapter=lora here.")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            "adapter.kind='qlora' needs the package bitsandbytes, which is not installed: pip install bitsandbytes, or use "
            "adapter=lora."
        )


def quantize_blocks(network: LLaDAModelLM, device: torch.device) -> None:
    """Hold the linear layers of all blocks in 4 bits (NF4, double quantisation, products in bfloat16), in place.

    Norms, embedding and head stay as they are. bitsandbytes quantises a layer when it is moved to a CUDA device.
    """
    import bitsandbytes

    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Linear) or ".blocks." not in name:
            continue
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        small.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        network.set_submodule(name, small.to(device))
    network.is_loaded_in_4bit = True  # peft and accelerate ask for it


def seed_dropout(seed: int, rows: tuple[int, ...]) -> None:
    """Key the adapters' dropout by the rows of the micro-batch, so that restarts and ranks do not change it."""
    torch.manual_seed(int(uniforms(1, seed, min(rows), "dropout")[0] * 2**24))


def save_network(network: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write what the run trains: the adapter if there is one, else the whole model."""
    if isinstance(network, LLaDAModelLM):
        save_model(network, folder, dtype=dtype)
    else:
        save_adapter(network, folder, dtype)


def adapter_facts(network: nn.Module) -> dict[str, Any]:
    """For run.json: how many weights are trained and, of an adapter, where it sits. Read from the built model."""
    trained = {"trained_parameters": sum(value.numel() for value in network.parameters() if value.requires_grad)}
    settings = getattr(network, "peft_config", {}).get("default")
    if settings is None:
        return trained
    layers = [name.removeprefix("base_model.model.") for name, part in network.named_modules() if hasattr(part, "lora_A")]
    return trained | {
        "adapter": {
            "r": settings.r, "alpha": settings.lora_alpha, "dropout": settings.lora_dropout, "layers": layers,
            "base": settings.base_model_name_or_path, HASH: settings.auto_mapping[HASH],
        }
    }  # fmt: skip


def _check_same(plan: Plan, checkpoint: Path) -> None:
    saved = read_adapter(checkpoint)
    if saved.base_hash != plan.base_hash:
        raise ValueError(
            f"{checkpoint} was trained on other weights than those of model.path={plan.base!r}: give that run's base "
            f"({saved.base}), or start anew with resume=never."
        )
    section = plan.section
    ours = {"r": section.r, "lora_alpha": section.alpha, "lora_dropout": section.dropout, "target_modules": [*plan.targets]}
    theirs = {name: saved.fields.get(name) for name in ours}
    if ours != theirs:
        raise ValueError(f"{checkpoint} has an adapter with {theirs}, this run asks for {ours}: keep them as they were.")
