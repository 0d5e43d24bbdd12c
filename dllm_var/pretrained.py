"""A model with its tokenizer and control tokens, opened by name or folder.

Called by users, the demo and `evaluation/` through `dllm_var.load_pretrained`.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from operator import index
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dllm_var.model.adapter import Adapter, apply_adapter, check_base, is_adapter, read_adapter
from dllm_var.model.checkpoint import load_config, load_model
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.speed import FASTEST, compile_network, quantize_int8
from dllm_var.text.chat import Message, render_prompt
from dllm_var.text.special_tokens import SpecialTokens, resolve
from dllm_var.text.tokenizer import load_tokenizer

BUNDLED = "tiny"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# What is fetched from the hub: data only, so no remote code ever reaches this machine.
HUB_FILES = ["*.json", "*.jinja", "*.safetensors"]

KINDS = "a prompt is either text, or a list of messages, or a list of token ids"
Prompt = str | Sequence[Message] | Sequence[int]


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, a GPU's or the CPU's, which has no class of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@dataclass(frozen=True)
class Pretrained:
    """What is needed to answer: the network, its tokenizer (None: ids only) and its control tokens."""

    model: LLaDAModelLM
    tokenizer: PreTrainedTokenizerBase | None
    special: SpecialTokens

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: a question, a list of messages (both rendered as a chat), or ids as they are.

        Raises:
            ValueError: text without a tokenizer, or messages that cannot be rendered.
        """
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
            hint = ": of a conversation give the list of its messages, of a tokenizer's output its input_ids[0]"
            raise ValueError(f"{KINDS}, not a {type(prompt).__name__}{hint if isinstance(prompt, Mapping) else ''}.")
        parts: list[Any] = list(prompt)
        messages = [part for part in parts if isinstance(part, dict)]
        if not messages:
            try:
                return [index(part) for part in parts]
            except TypeError as error:
                raise ValueError(f"{KINDS}: these are no token ids ({error}).") from error
        if len(messages) < len(parts):
            raise ValueError(f"{KINDS}, not a mixture.")
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give prompts as token ids.")
        return render_prompt(self.tokenizer, messages)


def load_pretrained(
    name_or_folder: str | Path = BUNDLED,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    base: str | Path | None = None,
    merge: bool = True,
    int8: bool = False,
    compile: bool = False,
) -> Pretrained:
    """Open a LLaDA-format model, or a LoRA adapter with the model that it belongs to, for inference.

    Args:
        name_or_folder: "tiny" for the bundled model, a folder, or the name of a model on the Hugging Face hub
            (``owner/name``). Only a hub name uses the network, and only if no such path exists here.
        dtype: of the weights; default float32 on the CPU, else as stored (`dllm_var.model.speed.FASTEST`).
        device: default the GPU if there is one, else the CPU.
        base: only for an adapter: its base model, if it is not where the adapter says.
        merge: only for an adapter: add it to the base's weights (faster) instead of keeping it beside them.
        int8: keep the weights of the blocks as int8 (needs torchao): less memory, and answers may differ a little.
        compile: compile the network: slow to start, and answers may differ in the last bits.

    Raises:
        ValueError: no such folder or hub model, a folder that is no checkpoint, a tokenizer that does not fit, too
            little memory, or an adapter without its base.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: give a torch.dtype, such as torch.bfloat16, or None.")
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} cannot be used here ({reason}): leave it out, or give 'cpu'.") from error
    dtype = FASTEST.get(device.type) if dtype is None else dtype
    opened = open_pretrained(name_or_folder, dtype, device, base=base, merge=merge)
    if int8:
        quantize_int8(opened.model)
    if compile:
        compile_network(opened.model, dynamic=True)
    return opened


def open_pretrained(
    name_or_folder: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    *,
    base: str | Path | None = None,
    merge: bool = True,
) -> Pretrained:
    """`load_pretrained` without its choices: dtype None always means the stored one. Called by the exporter."""
    folder = resolve_folder(name_or_folder)
    adapter = read_adapter(folder) if is_adapter(folder) else None
    if adapter is None and base is not None:
        raise ValueError(f"base={str(base)!r} only goes with an adapter, and {folder} is a whole model.")
    whole = folder if adapter is None else base_folder(adapter, base)
    load_config(whole)  # says first whether the folder is a checkpoint at all
    tokenizer = load_tokenizer(folder if (folder / "tokenizer.json").is_file() else whole)
    model = load_model(whole, dtype=dtype, device=device)
    if adapter is not None:
        model = apply_adapter(model, adapter, merge)
    return Pretrained(model, tokenizer, resolve(tokenizer, model.config))


def base_folder(adapter: Adapter, base: str | Path | None = None) -> Path:
    """The folder of the model that an adapter belongs to: the one given here, else the one it names.

    Raises:
        ValueError: it is not to be found, or its weights are not those that the adapter was trained on.
    """
    name = base or adapter.base
    if name is None:
        raise ValueError(f"{adapter.folder} does not say which model it belongs to: give that with base= (--base).")
    try:
        folder = resolve_folder(name)
    except ValueError as error:
        raise ValueError(f"{adapter.folder} is an adapter of {name}, give that with base= (--base): {error}") from error
    check_base(adapter, folder)
    if adapter.base_hash is None:
        warnings.warn(
            f"{adapter.folder} carries no hash of its base: whether {name} is the right one cannot be checked.", stacklevel=3
        )
    return folder


def resolve_folder(name_or_folder: str | Path) -> Path:
    """The local folder that a name stands for; fetches a hub model.

    Raises:
        ValueError: nothing of that name here, or on the hub.
    """
    name = str(name_or_folder)
    if name == BUNDLED:
        return Path(str(files("dllm_var") / "bundled" / BUNDLED))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    # A first part that exists here makes it a mistyped path rather than somebody's name on the hub.
    if not HUB_NAME.fullmatch(name) or folder.parent.exists():
        raise ValueError(f"model {name!r} is no folder: give {BUNDLED!r}, a checkpoint folder, or a hub name (owner/name).")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # network, access rights, no such model: the library raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model {name!r} is no folder here and could not be had from the hub: {reason}") from error
