"""Load, save and verify checkpoint folders in LLaDA's format: safetensors only, no remote code, never a pickle.

Called by `load_pretrained`, the Trainer and the exporter. Loading builds the model on the meta device and fills it shard by
shard, so that the peak is one copy of the weights. Saving writes beside what is there, reads every tensor back, and only
then puts the files in place, the config last: a folder in which a save was interrupted does not load.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import (
    INDEX_FILE,
    SHARD_PATTERN,
    WEIGHTS_FILE,
    StoredTensor,
    canonical_name,
    compare,
    is_leftover,
    read_json,
    some,
    survey,
)

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
PARTIAL = ".partial"
MAX_SHARD_BYTES = 5 * 10**9
LARGE = 2**30  # bytes of weights from which on the free memory is looked at first


@dataclass(frozen=True)
class CheckpointSummary:
    """What a checkpoint folder holds, as its headers say: counts, bytes and the dtypes that occur."""

    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[torch.dtype, ...]
    files: tuple[str, ...]


def load_config(folder: str | Path) -> LLaDAConfig:
    """The configuration in a checkpoint folder.

    Raises:
        ValueError: no such folder, no config.json, another kind of model, or a field that is missing or unsupported.
    """
    path = _existing(folder) / CONFIG_FILE
    if not path.is_file() and (path.parent / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter, not a whole model: merge it with its base first (python scripts/export.py)."
        )
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no {CONFIG_FILE}.")
    fields = read_json(path)
    kind = fields.pop("model_type", LLaDAConfig.model_type)
    if kind != LLaDAConfig.model_type:
        raise ValueError(f"{path}: model_type={kind!r} is not supported (only {LLaDAConfig.model_type!r} is).")
    try:
        return LLaDAConfig(**fields)
    except (ValueError, TypeError, AttributeError) as error:  # the last two from transformers, of fields that are its own
        raise ValueError(f"{path}: {error}") from error


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LLaDAModelLM:
    """The model of a checkpoint folder, in eval mode.

    Args:
        folder: a folder with config.json and safetensors weights, single or sharded.
        dtype: of the weights in memory; the stored one when not given.
        device: where they go.

    Raises:
        ValueError: see `load_config` and `verify_checkpoint`; weights of several dtypes and no dtype given; or too little
            free memory.
    """
    folder = _existing(folder)
    model = _skeleton(load_config(folder))
    found = survey(folder)
    compare(folder, found, _shapes(model))
    dtype = dtype if dtype is not None else _one_dtype(folder, found)
    _check_memory(sum(tensor.nbytes // tensor.dtype.itemsize for tensor in found.values()), dtype, torch.device(device))
    weights = {
        # A copy, although the file is mapped: memory of our own is aligned and outlives a file that is written again.
        name: value.to(device=device, dtype=dtype, copy=True)
        for name, value in _read(found)
    }
    model.load_state_dict(weights, strict=True, assign=True)
    model.config.dtype, model.config.name_or_path = dtype, str(folder)
    model.train(False)
    return model


def verify_checkpoint(folder: str | Path) -> CheckpointSummary:
    """Check config, index, names, shapes and total size of a folder without loading a weight.

    Raises:
        ValueError: what is wrong, naming fields, tensors or files (the first few and how many).
    """
    folder = _existing(folder)
    found = survey(folder)
    compare(folder, found, _shapes(_skeleton(load_config(folder))))
    nbytes = sum(tensor.nbytes for tensor in found.values())
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        about = index.get("metadata")
        said = about.get("total_size", nbytes) if isinstance(about, dict) else nbytes
        if said != nbytes and not any(is_leftover(name) for name in index["weight_map"]):
            raise ValueError(f"{folder / INDEX_FILE} says total_size={said}, but the shards hold {nbytes} bytes.")
    return CheckpointSummary(
        tensors=len(found),
        parameters=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in found.values()),
        nbytes=nbytes,
        dtypes=tuple(sorted({tensor.dtype for tensor in found.values()}, key=str)),
        files=tuple(sorted({tensor.file.name for tensor in found.values()})),
    )


def weights_hash(folder: str | Path) -> str:
    """SHA-256 of all weights of a folder, in hexadecimal: of names, shapes, dtypes and bytes, however cut into files.

    Raises:
        ValueError: see `survey`.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(survey(_existing(folder)).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with safe_open(tensor.file, framework="pt") as opened:
            digest.update(opened.get_tensor(tensor.stored_as).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def save_model(
    model: LLaDAModelLM,
    folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    config_fields: dict[str, Any] | None = None,
) -> CheckpointSummary:
    """Write a checkpoint folder in LLaDA's format and read it back.

    Args:
        model: what to save; names left by DDP, torch.compile or PEFT are stripped.
        folder: made if need be. Weights that are in it are replaced; other files (a tokenizer) stay.
        max_shard_bytes: the largest weight file, unless a single tensor is larger. One file carries no index.
        dtype: to store the weights in; their own when not given.
        config_fields: further fields for config.json, or other values.

    Raises:
        ValueError: a bad shard size, a state dict that is not that of the config's model (an adapter that was not merged,
            say), or weights that differ from the model's when read back.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be 1 or more.")
    weights = _named_weights(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: dtype or value.dtype for name, value in weights.items()}
    groups = _split({name: value.numel() * stored[name].itemsize for name, value in weights.items()}, max_shard_bytes)
    names = [WEIGHTS_FILE]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    try:
        for file, group in zip(names, groups, strict=True):
            _write_shard(folder / (file + PARTIAL), {name: weights[name].to("cpu", stored[name]) for name in group})
        _replace(folder, names)
    finally:
        for left in folder.glob(f"model*.safetensors{PARTIAL}"):
            left.unlink()
    if len(groups) > 1:
        total = sum(value.numel() * stored[name].itemsize for name, value in weights.items())
        weight_map = {name: file for file, group in zip(names, groups, strict=True) for name in group}
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    _write_config(model, folder, next(iter(stored.values())), config_fields or {})
    return verify_checkpoint(folder)


def _existing(folder: str | Path) -> Path:
    path = Path(folder)
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise ValueError(f"the checkpoint folder {folder} {what}.")
    return path


def _skeleton(config: LLaDAConfig) -> LLaDAModelLM:
    with torch.device("meta"):
        return LLaDAModelLM(config)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _one_dtype(folder: Path, found: dict[str, StoredTensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in found.values()}
    if len(dtypes) > 1:
        raise ValueError(f"{folder} holds weights of several dtypes ({some(map(str, dtypes))}): say which with dtype=.")
    return dtypes.pop()


def _read(found: dict[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, file by file; each is a view into the mapped file."""
    for file in sorted({tensor.file for tensor in found.values()}):
        with safe_open(file, framework="pt") as opened:
            for tensor in found.values():
                if tensor.file == file:
                    yield tensor.name, opened.get_tensor(tensor.stored_as)


CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device; None where there is no way to tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    bounds = []
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
        bounds.append(1024 * int(meminfo.split("MemAvailable:")[1].split()[0]))
    except (OSError, IndexError, ValueError):
        try:  # no Linux: the best that POSIX offers, which counts unused pages only
            bounds.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (AttributeError, OSError, ValueError):
            return None
    try:  # a container may be allowed less than the machine has
        limit, used = (int((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        kinds = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = sum(int(kinds.get(name, 0)) for name in ("active_file", "inactive_file"))  # of files; given up when needed
        bounds.append(max(limit - used + cached, 0))
    except (OSError, ValueError):  # no limit ("max") or no such file
        pass
    return min(bounds)


def _check_memory(parameters: int, dtype: torch.dtype, device: torch.device) -> None:
    needed = parameters * dtype.itemsize
    free = free_memory(device) if needed >= LARGE else None
    if free is not None and needed > free:
        raise ValueError(
            f"the model needs {needed / 1e9:.1f} GB of memory as {dtype}, but only {free / 1e9:.1f} GB are free on "
            f"{device}: close other programs, choose a smaller dtype or another device."
        )


def _named_weights(model: LLaDAModelLM) -> dict[str, Tensor]:
    weights = {canonical_name(name): value.detach() for name, value in model.state_dict().items() if not is_leftover(name)}
    here = {(name, tuple(value.shape)) for name, value in weights.items()}
    odd = here ^ set(_shapes(_skeleton(model.config)).items())
    if odd:
        raise ValueError(f"the model's tensors are not those of its config: {some(name for name, _ in odd)}.")
    return weights


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in their order, cut into runs of at most `most` bytes (a larger tensor makes its own)."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors lets only the owner read, whatever the umask says
    with safe_open(path, framework="pt") as opened:
        for name, value in tensors.items():
            if not torch.equal(opened.get_tensor(name).view(torch.uint8), value.view(torch.uint8)):
                raise ValueError(f"{path}: {name} was not written as it is in memory. Is the disk sound and not full?")


def _replace(folder: Path, names: list[str]) -> None:
    """Put the written shards in place of the old ones. Without a config.json the folder does not load meanwhile."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)
    for old in (folder / WEIGHTS_FILE, *folder.glob(SHARD_PATTERN)):
        old.unlink(missing_ok=True)
    for name in names:
        os.replace(folder / (name + PARTIAL), folder / name)


def _write_config(model: LLaDAModelLM, folder: Path, dtype: torch.dtype, more: dict[str, Any]) -> None:
    config = model.config
    fields = json.loads(config.to_json_string())
    fields.pop("auto_map", None)  # names code files, which only an export puts beside the weights
    spelled = str(dtype).removeprefix("torch.")
    # Both spellings: releases of transformers before and after 4.56 read different ones, and the default is float32.
    fields.update(model_type=config.model_type, architectures=["LLaDAModelLM"], dtype=spelled, torch_dtype=spelled)
    fields.update(more)
    ids = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if fields.get("eot_token_id") is not None:  # both end an answer
        ids["eos_token_id"] = [fields["eos_token_id"], fields["eot_token_id"]]
    generation = {name: value for name, value in ids.items() if value is not None}
    _write_json(
        folder / GENERATION_FILE,
        {"_from_model_config": True, **generation, "transformers_version": transformers.__version__},
    )
    _write_json(folder / CONFIG_FILE, fields)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    partial.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
