"""Why: one folder to hand on: weights in bf16, tokenizer, chat template, code for transformers, model card, hashes.

How: ``python scripts/export.py --model runs/my_run/final`` writes ``runs/my_run/final-export``. Whole models, a run's
``checkpoint-N`` and adapters (merged with their base; ``--base FOLDER`` if it has moved) are taken, by folder or name. What
was written is reopened and its logits are compared bit for bit before it gets its name. The card is filled from the run's
own records (run.json, config.yaml, metrics.jsonl) if they lie beside the model, and says what is not known.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from dllm_var.export import HASHES, check_target, release
from dllm_var.model.adapter import is_adapter, read_adapter
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.pretrained import HUB_NAME, open_pretrained, resolve_folder
from sft_training.records import read_metrics, read_run, read_settings

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RECIPE = ("model", "packing", "view", "forward_process", "loss", "precision", "adapter", "training")
FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
LAST_LINES = 20  # log lines over which the training loss is averaged

CARD = """---
library_name: transformers
{base_line}tags: [masked-diffusion, variable-length]
---

# {name}

A masked diffusion language model of LLaDA's architecture that ends its answers itself (dLLM-Var, arXiv 2510.24605):
{parameters:,} parameters, {layers} layers, a context of {context:,} tokens, weights in {dtype}.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
question = [{{"role": "user", "content": "…"}}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**prompt)[0]))
```

Or, with dLLM-Var: `python demo_dLLM-var.py --model {name}`. `sha256sum -c {hashes}` checks the files.

## Where it comes from

{origin}

{recipe}"""
NOT_KNOWN = """## Not known

{unknown}
"""


@dataclass
class Source:
    """What is known of the model that is exported: its records, if any, and the base if it was an adapter."""

    folder: Path
    base: str | None = None
    base_hash: str | None = None
    run: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> int | None:
        """Optimizer steps that were made; None when nothing says so."""
        number = re.fullmatch(r"checkpoint-(\d+)", self.folder.name)
        return int(number[1]) if number else self.run.get("steps")


def look_at(name: str) -> Source:
    """What lies in and beside a model's folder."""
    folder = resolve_folder(name)
    source = Source(folder)
    if is_adapter(folder):
        adapter = read_adapter(folder)
        source.base, source.base_hash = adapter.base, adapter.base_hash
    for place in (folder, folder.parent):
        if (place / "run.json").is_file() and (place / "config.yaml").is_file():
            source.run, source.settings = read_run(place), read_settings(place)
            source.metrics = read_metrics(place)
            break
    return source


def card(name: str, source: Source, model: LLaDAModelLM) -> str:
    """The model card as Markdown."""
    base = source.base or (source.settings.get("model") or {}).get("path")
    own = source.folder / "README.md"
    if own.is_file():
        last = f"## Its own card\n\n{FRONT_MATTER.sub('', own.read_text(encoding='utf-8'), count=1).lstrip()}"
    else:
        last = NOT_KNOWN.format(unknown=bullets(unknown(source, base)))
    hub = base if base is not None and HUB_NAME.fullmatch(base) else None
    recipe = {key: without_folders(source.settings[key]) for key in RECIPE if key in source.settings}
    shown = f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```\n\n" if recipe else ""
    return CARD.format(
        base_line=f"base_model: {hub}\n" if hub else "", name=name, hashes=HASHES,
        parameters=sum(value.numel() for value in model.parameters()), layers=model.config.n_layers,
        context=model.config.max_sequence_length, dtype=str(model.dtype).removeprefix("torch."),
        origin=bullets(origin(source, base)), recipe=shown,
    ) + last  # fmt: skip


def origin(source: Source, base: str | None) -> list[str]:
    """What the records say of data, steps and losses."""
    said = [f"Exported from `{source.folder.name}`."]
    if source.base is not None:
        known = f" (SHA-256 of its weights: `{source.base_hash}`)" if source.base_hash else ""
        said.append(f"A LoRA adapter, merged with its base `{short(source.base)}`{known}.")
    elif base is not None:
        said.append(f"All weights were trained, starting from `{short(base)}`.")
    elif source.settings:
        said.append("All weights were trained, starting from random ones.")
    if source.run:
        data = without_folders(source.settings.get("dataset") or {})
        said.append(f"Data: {source.run.get('samples', 'an unknown number of')} samples; settings `{json.dumps(data)}`.")
    per_step = source.run.get("tokens_per_step")
    if source.steps is not None:
        seen = f" of {per_step:,} positions, prompts and padding included" if per_step else ""
        said.append(f"{source.steps:,} of {source.run.get('max_steps', '?')} optimizer steps{seen}.")
    done = [line for line in source.metrics if source.steps is None or line["step"] <= source.steps]
    losses = [line["loss"] for line in done if "loss" in line][-LAST_LINES:]
    if losses:
        said.append(f"Training loss: {sum(losses) / len(losses):.4f} (mean of the last {len(losses)} log lines).")
    held_out = [line for line in done if "eval_loss" in line]
    if held_out:
        last = held_out[-1]
        said.append(f"Loss on held-out samples under fixed noise: {last['eval_loss']:.4f} (step {last['step']}).")
    return said


def unknown(source: Source, base: str | None) -> list[str]:
    """What a reader would like to know and nothing here says."""
    missing = ["How good the answers are: the export measures nothing."]
    if not source.run:
        missing.insert(0, "Data, recipe and number of steps: no run.json and config.yaml lay beside the exported model.")
    elif source.steps is None:
        missing.insert(0, "The number of steps: run.json does not say that the run ended.")
    if base is not None:
        missing.append(f"What `{short(base)}` was trained on.")
    missing.append("Under which licence the weights and the data stand: LICENSE in this folder is that of the code.")
    return missing


def without_folders(value: Any) -> Any:
    """The same settings with paths cut down to their last part: where files lay is nobody else's business."""
    if isinstance(value, dict):
        return {key: without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_folders(part) for part in value]
    return short(value) if isinstance(value, str) else value


def short(name: str) -> str:
    """A path's last part; a hub name as it is."""
    return name if HUB_NAME.fullmatch(name) and not Path(name).exists() else Path(name).name


def bullets(lines: list[str]) -> str:
    """Lines as a Markdown list."""
    return "\n".join(f"* {line}" for line in lines)


def target_of(model: str) -> Path:
    """Where an export goes by default: beside a folder, and here for a name."""
    folder = Path(model).expanduser()
    beside = folder.resolve() if folder.is_dir() else Path(folder.name)
    return beside.with_name(f"{beside.name}-export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="final/ or checkpoint-N of a run, or a name")
    parser.add_argument("--base", metavar="FOLDER", help="of an adapter, if its base is not where it says")
    parser.add_argument("--output", type=Path, help="new folder, or an earlier export; default FOLDER-export")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the stored weights")
    parser.add_argument("--max_shard_gb", type=float, default=5.0, metavar="GB", help="largest weight file (10^9 bytes)")
    options = parser.parse_args()
    if not 0 < options.max_shard_gb < float("inf"):
        parser.error(f"--max_shard_gb {options.max_shard_gb} must be above 0, and finite")
    target = options.output or target_of(options.model)
    try:
        check_target(target)
        source = look_at(options.model)
        if options.base is not None:
            source.base = options.base
        pretrained = open_pretrained(options.model, None, "cpu", base=options.base)
        stored = pretrained.model.dtype
        made = release(
            pretrained, target, DTYPES[options.dtype], int(options.max_shard_gb * 1e9),
            lambda model: card(target.name, source, model),
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"export.py: {error}")
    except OSError as error:
        sys.exit(f"export.py: {error.filename or target} cannot be written ({error.strerror}): give another --output.")
    summary = made.summary
    print(f"{target}: {summary.parameters:,} parameters, {summary.nbytes / 1e9:.3f} GB, {len(summary.files)} weight file(s)")
    print("reopened: every logit is the same, bit for bit (largest difference 0)")
    if stored != DTYPES[options.dtype]:
        print(f"rounding to {options.dtype} moved logits by at most {made.rounding:.3g} (the largest is {made.largest:.3g})")
    print(f"hashes of all files: {target / HASHES}")


if __name__ == "__main__":
    main()
