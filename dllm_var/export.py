"""Write a model as a folder that `transformers` opens by itself, offline, where this package is not installed.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=...) and AutoTokenizer.from_pretrained(folder)

The folder carries the weights, the tokenizer, the licence and the very source files of this package that the model needs,
laid flat (``dllm_var/model/kv_store.py`` becomes ``model_kv_store.py``) with their imports made relative. Which files those
are is read from the imports, beginning at `dllm_var.hub_model`, so an export cannot fall behind the code.
"""

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase

from dllm_var.model.checkpoint import MAX_SHARD_BYTES, CheckpointSummary, load_model, save_model
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.shards import file_hash
from dllm_var.pretrained import Pretrained
from dllm_var.text.special_tokens import resolve

PACKAGE = "dllm_var"
ENTRY = f"{PACKAGE}.hub_model"
# The names by which the released checkpoints are known to other software.
HASHES = "SHA256SUMS"
WRITTEN_BY = f"# Written by {PACKAGE}.export"  # opens every code file of an export
PROBE_TOKENS = 32
FILE_NAMES = {ENTRY: "modeling_llada", f"{PACKAGE}.model.config": "configuration_llada"}
AUTO_MAP = {
    "AutoConfig": "configuration_llada.LLaDAConfig",
    "AutoModel": "modeling_llada.LLaDAModelLM",
    "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
}


def export(
    model: LLaDAModelLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_card: str | None = None,
) -> CheckpointSummary:
    """Write model, tokenizer and code into a folder.

    Args:
        model: what to export. tokenizer: the one it was trained with.
        folder: made if need be; files of an earlier export are replaced.
        dtype: to store the weights in; their own when not given.
        max_shard_bytes: the largest weight file, see `save_model`.
        model_card: the text of README.md: data, recipe, measured quality, limits.

    Raises:
        ValueError: tokenizer and model disagree about a special token, or what `save_model` refuses.
    """
    special = resolve(tokenizer, model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = reachable_modules(ENTRY)
    modules[ENTRY] += _naming_all(modules)
    for module, source in modules.items():
        (folder / f"{flat_name(module)}.py").write_text(source, encoding="utf-8")
    _write_tokenizer(tokenizer, folder)
    shutil.copyfile(_licence(), folder / "LICENSE")
    if model_card is not None:
        (folder / "README.md").write_text(model_card, encoding="utf-8")
    ours = {"eot_token_id": special.eot, "known_tokens": special.known}
    more = {"auto_map": AUTO_MAP, **{name: value for name, value in ours.items() if value is not None}}
    return save_model(model, folder, max_shard_bytes, dtype, config_fields=more)


@dataclass(frozen=True)
class Release:
    """A finished export.

    Attributes:
        summary: of the weights. rounding: largest difference between logits before and after the weights were rounded to
            the stored dtype, and largest logit, both on the probe.
    """

    summary: CheckpointSummary
    rounding: float
    largest: float


def release(
    pretrained: Pretrained,
    folder: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    model_card: Callable[[LLaDAModelLM], str] | None = None,
) -> Release:
    """`export` with proof: hashes of all files, weights reopened and their logits compared bit for bit, then put in place.

    Everything is written beside the target and renamed at the end, so that a half export never has the target's name.

    Args:
        pretrained: what to export; its weights are rounded to ``dtype`` in place.
        folder: new, empty, or an earlier export, which is then replaced.
        model_card: makes README.md from the rounded model.

    Raises:
        ValueError: see `check_target` and `export`; or what was reopened computes other logits.
    """
    folder = Path(folder).expanduser().resolve()  # through links, and with a name of its own also where it is "."
    check_target(folder)
    assert pretrained.tokenizer is not None
    model, mask = pretrained.model, pretrained.special.mask
    before = probe(model, mask)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    rounded = probe(model, mask)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
        made = Path(room) / folder.name
        card = None if model_card is None else model_card(model)
        summary = export(model, pretrained.tokenizer, made, dtype, max_shard_bytes, card)
        write_hashes(made)
        again = probe(load_model(made), mask)
        if not torch.equal(rounded, again):
            difference = (rounded.float() - again.float()).abs().max().item()
            raise ValueError(f"the export was reopened and computes other logits (by {difference}), so it was not kept.")
        check_hashes(made)
        _put(made, folder, aside=Path(room) / "earlier")
    rounding = (before.float() - rounded.float()).abs().max().item()
    return Release(summary, rounding, rounded.float().abs().max().item())


def _put(made: Path, folder: Path, aside: Path) -> None:
    """Give a finished export its name; what had it before goes aside first, and comes back if that fails."""
    try:
        if folder.exists():
            os.replace(folder, aside)
        os.replace(made, folder)
    except OSError as error:
        if aside.exists() and not folder.exists():
            os.replace(aside, folder)
        raise ValueError(f"output {folder} cannot be replaced ({error.strerror}): choose a new folder.") from error


@torch.no_grad()
def probe(model: LLaDAModelLM, mask: int) -> torch.Tensor:
    """Logits of a fixed canvas, every other position a mask, in the model's dtype."""
    ids = torch.randint(model.config.vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, ::2] = mask
    logits = model(ids.to(model.device)).logits
    assert logits is not None
    return cast(torch.Tensor, logits.cpu())


def check_target(folder: Path) -> None:
    """Refuse a target that holds anything but an earlier export.

    Raises:
        ValueError: naming the folder.
    """
    if folder.is_dir() and any(folder.iterdir()) and not _is_export(folder):
        raise ValueError(f"output {folder} holds files that no export of ours wrote: choose a new or empty folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file: choose a folder.")


def write_hashes(folder: Path) -> None:
    """SHA256SUMS for all files of a folder, in the form that ``sha256sum -c`` reads."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = sorted(name for name in files if name != HASHES)
    (folder / HASHES).write_text("".join(f"{file_hash(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def check_hashes(folder: Path) -> None:
    """Compare a folder's files with its SHA256SUMS.

    Raises:
        ValueError: naming the files that are missing or differ.
    """
    bad = [n for n, digest in _listed(folder).items() if not (folder / n).is_file() or file_hash(folder / n) != digest]
    if bad:
        raise ValueError(f"{folder}: {', '.join(bad)} not as {HASHES} says.")


def _listed(folder: Path) -> dict[str, str]:
    lines = (folder / HASHES).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _is_export(folder: Path) -> bool:
    code = folder / f"{FILE_NAMES[ENTRY]}.py"
    if not (folder / HASHES).is_file() or not code.is_file():
        return False
    there = {path.name for path in folder.iterdir()} - {HASHES}
    return code.read_text(encoding="utf-8").startswith(WRITTEN_BY) and there == set(_listed(folder))


def flat_name(module: str) -> str:
    """The name of a module's file in an exported folder, without ``.py``."""
    return FILE_NAMES.get(module, module.removeprefix(f"{PACKAGE}.").replace(".", "_"))


def reachable_modules(entry: str) -> dict[str, str]:
    """Source of a module and of all modules of this package that it imports, directly or not, ready for the flat folder.

    Raises:
        ValueError: an import that is not of the form ``from dllm_var.x.y import A``, with file and line.
    """
    found: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module], needed = _flatten(module)
            waiting.extend(needed)
    return dict(sorted(found.items()))


def _naming_all(modules: Iterable[str]) -> str:
    """Lines for the end of the entry file that mention every other file."""
    lines = ["", "", "if False:  # never run: some releases of transformers copy only the files that this one names"]
    lines += [f"    from .{flat_name(module)} import __name__" for module in modules if module != ENTRY]
    return "\n".join(lines) + "\n"


def _flatten(module: str) -> tuple[str, list[str]]:
    """A module's source with relative imports, and the modules of the package that it imports."""
    path = _source_file(module)
    text = path.read_text(encoding="utf-8")
    lines, needed = text.splitlines(), []
    tree = ast.parse(text)
    never_run = {id(node) for guard in ast.walk(tree) if _only_for_type_checkers(guard) for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            ours, usable = any(_is_ours(alias.name) for alias in node.names), False
        elif isinstance(node, ast.ImportFrom):
            ours = node.level > 0 or _is_ours(node.module or "")
            usable = ours and not node.level and _source_file(node.module or "").name != "__init__.py"
        else:
            continue
        if not ours:
            continue
        if not usable:
            raise ValueError(f"{path}:{node.lineno}: imports inside the package must read `from {PACKAGE}.x.y import A`.")
        assert isinstance(node, ast.ImportFrom)
        assert node.module is not None
        at = node.lineno - 1
        if id(node) in never_run:  # such an import may be circular, which the tool that copies remote code cannot follow
            end = node.end_lineno or node.lineno
            lines[at:end] = [f"{' ' * node.col_offset}pass"] + [""] * (end - node.lineno)
            continue
        lines[at] = lines[at].replace(f"from {node.module} import", f"from .{flat_name(node.module)} import", 1)
        needed.append(node.module)
    origin = f"{module.replace('.', '/')}.py"
    return "\n".join([f"{WRITTEN_BY} from {origin}: change it there.", *lines]) + "\n", needed


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == PACKAGE


def _source_file(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"the source of {module} was not found: an export needs the package as files.")
    return Path(spec.origin)


def _only_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    # Releases of transformers differ in where they look for these; the folder answers all of them.
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["model_input_names"] = ["input_ids", "attention_mask"]  # some would add token_type_ids, which no LLaDA takes
    if isinstance(fields.get("extra_special_tokens"), list):  # its name since release 5; before, that one held a mapping
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    if isinstance(tokenizer.chat_template, str):
        fields["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _licence() -> Path:
    """This package's licence: of the installed distribution, else of the source tree that is being run."""
    try:
        for file in distribution(PACKAGE).files or ():
            path = Path(str(file.locate()))
            if file.name == "LICENSE" and path.is_file():
                return path
    except PackageNotFoundError:
        pass
    root = _source_file(ENTRY).parents[1]
    if (root / "pyproject.toml").is_file() and (root / "LICENSE").is_file():
        return root / "LICENSE"
    raise ValueError(f"the LICENSE of {PACKAGE} was not found: install the package (pip install -e .) before exporting.")
