"""What tensors a checkpoint folder holds, and in which file: read from headers alone, so that nothing is loaded to find out.

Used by `dllm_var.model.checkpoint`. Released LLaDA shards group tensors by kind, not by layer, so the index is followed to
the letter; an index that disagrees with its shards is an error that names the tensors.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_PATTERN = "model-*-of-*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")  # DDP, torch.compile, PEFT


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a folder: its name in LLaDA's own form, and where and how it is stored."""

    name: str
    stored_as: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the values as stored."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def canonical_name(name: str) -> str:
    """A tensor's name as LLaDA writes it (``model.transformer.…``), whatever wrapped the model that was saved.

    Prefixes of DDP, torch.compile and PEFT go, in any combination, and a compiled part inside the model too; a bare
    backbone gets the leading ``model.`` that it lacks.
    """
    wrapper = next((prefix for prefix in WRAPPERS if name.startswith(prefix)), None)
    if wrapper is not None:
        return canonical_name(name[len(wrapper) :])
    name = name.replace("._orig_mod.", ".")
    return f"model.{name}" if name.startswith("transformer.") else name


def some(names: Iterable[str]) -> str:
    """The first few names and how many there are, for an error message."""
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f", … ({len(ordered)} in all)" if len(ordered) > 4 else "")


def is_leftover(name: str) -> bool:
    """Whether a tensor is what TransformerEngine's FP8 layers remember of their scales, and no weight of the model."""
    return name.endswith("_extra_state")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a ValueError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}.")
    return content


def survey(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder by canonical name.

    Raises:
        ValueError: no safetensors weights, an unreadable file, an index that disagrees with its shards, an unknown dtype,
            or two tensors that mean the same parameter.
    """
    found: dict[str, StoredTensor] = {}
    for file, promised in _files(folder).items():
        tensors = _read_header(file)
        if promised is not None:
            _check_against_index(file, promised, {tensor.stored_as for tensor in tensors})
        for tensor in tensors:
            if is_leftover(tensor.name):
                continue
            if tensor.name in found:
                twin = found[tensor.name]
                raise ValueError(
                    f"{folder} holds {tensor.name} twice: as {twin.stored_as} in {twin.file.name} and as {tensor.stored_as} "
                    f"in {tensor.file.name}. Remove one of them."
                )
            found[tensor.name] = tensor
    return found


def compare(folder: Path, found: Mapping[str, StoredTensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check a folder's tensors against the names and shapes its config asks for; a ValueError names the odd ones."""
    missing, surplus = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    problems = []
    if missing:
        problems.append(f"lacks {len(missing)} tensor(s) of the model: {some(missing)}")
    if surplus:
        problems.append(f"holds {len(surplus)} tensor(s) the model has not: {some(surplus)}")
    wrong = [
        f"{name} is {list(found[name].shape)}, the config asks for {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if wrong:
        problems.append(f"has {len(wrong)} tensor(s) of another shape: {some(wrong)}")
    if problems:
        raise ValueError(f"{folder} {'; it '.join(problems)}. Do config.json and the weights belong together?")


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files, each with the tensor names that the index promises (None without an index)."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is out of date.")
    if single.is_file():
        return {single: None}
    if index.is_file():
        return _indexed_files(index)
    if any(folder.glob(SHARD_PATTERN)):
        raise ValueError(f"{folder} holds shards but no {INDEX_FILE}: an upload or a save was not completed.")
    pickles = [path.name for pattern in PICKLES for path in folder.glob(pattern)]
    if pickles:
        raise ValueError(
            f"{folder} holds weights only as pickles ({some(pickles)}), which can run code when opened and are never read "
            "here. Convert them to safetensors where you trust their source."
        )
    raise ValueError(f"{folder} is not a checkpoint folder: it has neither {WEIGHTS_FILE} nor {INDEX_FILE}.")


def _indexed_files(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map (tensor name → shard).")
    files: dict[Path, set[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: weight_map[{name!r}]={shard!r} must be the name of a safetensors file beside it.")
        promised = files.setdefault(index.parent / shard, set())
        assert promised is not None
        promised.add(name)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{index} names {len(absent)} shard(s) that are not there: {some(absent)}.")
    return files


def _read_header(file: Path) -> list[StoredTensor]:
    tensors = []
    try:
        with safe_open(file, framework="pt") as opened:
            for stored_as in opened.keys():  # noqa: SIM118 (not a dict: it has no other way to be listed)
                part = opened.get_slice(stored_as)
                tensors.append((stored_as, tuple(part.get_shape()), part.get_dtype()))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    foreign = {f"{name} ({dtype})" for name, _, dtype in tensors if dtype not in DTYPES and not is_leftover(name)}
    if foreign:
        raise ValueError(f"{file} holds tensors that are not float32, bfloat16 or float16: {some(foreign)}.")
    return [
        StoredTensor(canonical_name(name), name, file, shape, DTYPES.get(dtype, torch.uint8))
        for name, shape, dtype in tensors
    ]


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def _check_against_index(file: Path, promised: set[str], there: set[str]) -> None:
    if promised - there:
        raise ValueError(f"{INDEX_FILE} says that {file.name} holds {some(promised - there)}, but it does not.")
    if there - promised:
        raise ValueError(f"{file.name} holds {some(there - promised)}, which {INDEX_FILE} does not say.")
