"""LoRA adapters in peft's format: ``adapter_model.safetensors`` and ``adapter_config.json``, which names the base model.

Called by `load_pretrained`, which finds the base, and by ``sft_training/adapters.py``, which trains and saves adapters. Ours
also carry a hash of the base's weights (`weights_hash`), so that another base is refused. peft itself is needed only when
an adapter is applied. Nothing but LoRA on linear layers is opened, and never a pickle.
"""

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dllm_var.model.checkpoint import weights_hash
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import read_json, some

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HASH = "base_sha256"  # in the field auto_mapping, where peft keeps what helps to find the base
# The fields of adapter_config.json that are honoured. A field that peft knows beside them must have its default.
HONOURED = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora")
ABOUT = ("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version")


@dataclass(frozen=True)
class Adapter:
    """What an adapter folder says of itself.

    Attributes:
        folder: where it lies. base: name or folder of the model that it belongs to, None if it does not say.
        base_hash: of that model's weights; None for an adapter that other software wrote. fields: its adapter_config.json.
    """

    folder: Path
    base: str | None
    base_hash: str | None
    fields: dict[str, Any]


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG_FILE).is_file()


def read_adapter(folder: str | Path) -> Adapter:
    """What an adapter folder says of itself.

    Raises:
        ValueError: no readable adapter_config.json, no weights as safetensors, or another kind of adapter than LoRA.
    """
    folder = Path(folder)
    fields = read_json(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(f"{folder} holds {CONFIG_FILE} but no {WEIGHTS_FILE}; pickles are never read.")
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG_FILE}: peft_type={fields.get('peft_type')!r} is not supported, only 'LORA' is.")
    known = fields.get("auto_mapping")
    return Adapter(
        folder, fields.get("base_model_name_or_path"), known.get(HASH) if isinstance(known, dict) else None, fields
    )


def check_base(adapter: Adapter, base: Path) -> None:
    """Compare the weights of a base folder with those that the adapter was trained on; this reads all of them once.

    Raises:
        ValueError: they differ.
    """
    if adapter.base_hash is not None and (found := weights_hash(base)) != adapter.base_hash:
        raise ValueError(
            f"{adapter.folder} was trained on other weights than those in {base}: their hash is {found[:16]}…, it needs "
            f"{adapter.base_hash[:16]}… ({adapter.base}). Give the right folder as its base."
        )


def apply_adapter(model: LLaDAModelLM, adapter: Adapter, merge: bool = True) -> LLaDAModelLM:
    """Put an adapter on its base, in place.

    Args:
        model: the base. adapter: from `read_adapter`.
        merge: add it to the base's matrices, one rounding to their dtype each, so that it costs nothing afterwards; else
            it stays beside them in float32.

    Raises:
        ValueError: peft is missing, an unreadable file, a field that is not supported, or tensors that are not those that
            the fields ask of this model.
    """
    peft = import_peft()
    settings = _settings(peft, adapter)
    try:
        wrapped = peft.get_peft_model(model, settings)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise ValueError(f"{adapter.folder / CONFIG_FILE} does not fit this model: {error}") from error
    expected = {name: tuple(value.shape) for name, value in state(wrapped).items()}
    try:
        tensors = load_file(adapter.folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{adapter.folder / WEIGHTS_FILE} is not a whole safetensors file: {error}") from error
    odd = expected.items() ^ {(name, tuple(value.shape)) for name, value in tensors.items()}
    if odd:
        raise ValueError(
            f"{adapter.folder / WEIGHTS_FILE} does not hold the tensors that {CONFIG_FILE} asks of this model: "
            f"{some(name for name, _ in odd)}. Do the two files and the base belong together?"
        )
    peft.set_peft_model_state_dict(wrapped, tensors)
    bare = wrapped.merge_and_unload() if merge else wrapped.get_base_model()
    return cast(LLaDAModelLM, bare.requires_grad_(False).train(False))


def save_adapter(wrapped: nn.Module, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the adapter of a `peft.PeftModel` into a folder, the configuration last.

    Args:
        wrapped: its configuration names the base. folder: made if need be. dtype: to store in; its own when not given.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    tensors = {name: value.detach().to("cpu", dtype or value.dtype).contiguous() for name, value in state(wrapped).items()}
    file = folder / WEIGHTS_FILE
    file.touch()
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)  # safetensors lets only the owner read, whatever the umask says
    cast(Any, wrapped).peft_config["default"].save_pretrained(str(folder))


def state(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's own tensors under peft's names."""
    found = import_peft().get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return cast(dict[str, torch.Tensor], found)


def import_peft() -> ModuleType:
    """The package peft.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise ValueError("adapters need the package peft, which is not installed: pip install peft.") from error


def _settings(peft: ModuleType, adapter: Adapter) -> Any:
    """The adapter's fields as peft's configuration, nothing in them ignored."""
    defaults = peft.LoraConfig().to_dict()
    told = {name: value for name, value in adapter.fields.items() if name not in (*HONOURED, *ABOUT)}
    odd = [name for name, value in told.items() if value and value not in (defaults.get(name), "gaussian")]
    if odd:
        raise ValueError(f"{adapter.folder / CONFIG_FILE} uses {some(odd)}, which is not supported: only plain LoRA is.")
    if not adapter.fields.get("target_modules"):
        raise ValueError(f"{adapter.folder / CONFIG_FILE} names no target_modules.")
    try:
        return peft.LoraConfig(**{name: adapter.fields[name] for name in HONOURED if name in adapter.fields})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{adapter.folder / CONFIG_FILE} cannot be used: {error}") from error
