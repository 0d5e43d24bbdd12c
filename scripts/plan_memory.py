"""How much memory a training run takes on each GPU, and whether it fits: before anything is rented, loaded or started.

    python scripts/plan_memory.py model=llada-8b precision=fp8 gpus=8 max_length=8192

Settings (name=value, defaults in brackets):

    model                    llada-8b, tiny, or a folder with config.json [llada-8b]
    precision                fp32, bf16 or fp8 [bf16]
    gpus                     processes that share the work, one GPU each [8]
    max_length               tokens of a row [8192]
    local_batch_size         rows of a micro-batch [2]
    zero                     DeepSpeed stage 2 or 3; 0: without DeepSpeed, float32 weights [2]
    gradient_checkpointing   true: blocks are recomputed in the backward [true]
    loss                     chunked: ours; full: the head on every position, for comparison [chunked]
    lora                     rank of adapters on q, k, v over a frozen model; none: all weights are trained [none]
    gpu_memory_gb            of one GPU, 1 GB = 10^9 bytes [80]

The formulas and what they rest on stand in sft_training/memory.py. The last line is one JSON object.

Exit code: 0 it fits, 1 it does not, 2 wrong arguments.
"""

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_var.model.checkpoint import load_config
from dllm_var.model.config import LLaDAConfig
from dllm_var.pretrained import resolve_folder
from sft_training.memory import GB, RESERVE, Run, estimate, first_too_large, fits, peak, suggest
from sft_training.precision import MULTIPLE

LLADA_8B = {
    "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288, "vocab_size": 126464,
    "embedding_size": 126464, "max_sequence_length": 4096, "rope": True, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "weight_tying": False, "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu",
    "mask_token_id": 0, "eos_token_id": 1,  # every config has them; memory does not depend on which they are
}  # fmt: skip
CHOICES = {"precision": ("fp32", "bf16", "fp8"), "loss": ("chunked", "full"), "zero": (0, 2, 3)}
KINDS: dict[str, type] = {
    "precision": str, "gpus": int, "max_length": int, "local_batch_size": int, "zero": int, "gradient_checkpointing": bool,
    "loss": str, "lora": int, "gpu_memory_gb": float,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Plan and print; see the module docstring for the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        return 0
    try:
        model, run = read(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    console.print(table(model, run))
    report: dict[str, Any] = {"model": model, **named(run), "fits": fits(run)}
    if fits(run):
        console.print(f"It fits: {run.gpu_memory_gb:g} GB, of which {RESERVE:.0%} are left to CUDA and fragmentation.")
    else:
        part, setting = first_too_large(run)
        report |= {"first_too_large": part, "setting": setting}
        console.print(f"It does not fit. Too large first: {part}, by {setting}={shown(named(run)[setting])}.")
        better = suggest(run)
        found = None if better is None else {k: v for k, v in named(better).items() if v != named(run)[k]}
        report["suggestion"] = found
        if better is None or found is None:
            console.print("Nothing that this planner knows makes it fit: take a smaller model, or lora=32.")
        else:
            words = " ".join(f"{name}={shown(value)}" for name, value in found.items())
            console.print(f"This fits, with {peak(estimate(better))[1] / GB:.1f} GB: {words}")
    moments = estimate(run)
    name, total = peak(moments)
    in_gb = {moment: {part: round(size / GB, 3) for part, size in parts.items()} for moment, parts in moments.items()}
    print(json.dumps({**report, "peak": name, "total_gb": round(total / GB, 3), "gb": in_gb}))
    return 0 if fits(run) else 1


def read(arguments: list[str]) -> tuple[str, Run]:
    """The model's name and the run that the words describe.

    Raises:
        ValueError: an unknown name or an impossible value, with the valid ones.
    """
    valid = ["model", *KINDS]
    given: dict[str, Any] = {}
    for word in arguments:
        name, sign, text = word.partition("=")
        if not sign or name not in valid:
            raise ValueError(f"{word!r} is not a setting: give name=value with one of {', '.join(valid)}.")
        given[name] = text if name == "model" else value(name, text)
    model = given.pop("model", "llada-8b")
    run = Run(shape(model), **given)
    if run.precision == "fp8" and run.tokens % MULTIPLE:
        raise ValueError(f"max_length={run.max_length}: FP8 needs a micro-batch of a multiple of {MULTIPLE} tokens.")
    if run.lora is not None and run.zero == 3:
        raise ValueError("lora with zero=3: adapters need a whole base, take zero=2 or zero=0.")
    return model, run


def value(name: str, text: str) -> Any:
    """A setting's value.

    Raises:
        ValueError: it cannot be one.
    """
    kind = KINDS[name]
    if name == "lora" and text == "none":
        return None
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name}={text!r}: give true or false.")
        return text == "true"
    try:
        found = kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: give a {'whole ' if kind is int else ''}number.") from None
    if name in CHOICES and found not in CHOICES[name]:
        raise ValueError(f"{name}={text!r}: choose one of {', '.join(map(str, CHOICES[name]))}.")
    if name not in CHOICES and not found > 0:
        raise ValueError(f"{name}={text}: must be above 0.")
    return found


def shape(model: str) -> LLaDAConfig:
    """The shape of a named model, or of the one in a folder.

    Raises:
        ValueError: neither a known name nor a folder with a usable config.json.
    """
    if model == "llada-8b":
        return LLaDAConfig(**LLADA_8B)
    if model != "tiny" and not Path(model).is_dir():
        raise ValueError(f"model={model!r}: choose llada-8b, tiny, or a folder with config.json.")
    return load_config(resolve_folder(model))


def named(run: Run) -> dict[str, Any]:
    """The settings by their names."""
    return {name: getattr(run, name) for name in KINDS}


def shown(setting: Any) -> str:
    """A value as one writes it on the command line."""
    return str(setting).lower() if isinstance(setting, bool) or setting is None else f"{setting}"


def table(model: str, run: Run) -> Table:
    """Parts by moments, in GB."""
    moments = estimate(run)
    largest = peak(moments)[0]
    words = " ".join(f"{name}={shown(setting)}" for name, setting in named(run).items())
    made = Table(title=f"GB on each GPU: model={model} {words}")
    made.add_column("")
    for moment in moments:
        made.add_column(f"{moment} (largest)" if moment == largest else moment, justify="right")
    for part in moments["loss"]:
        made.add_row(part, *(f"{parts[part] / GB:.2f}" for parts in moments.values()))
    made.add_section()
    made.add_row("total", *(f"{sum(parts.values()) / GB:.2f}" for parts in moments.values()))
    return made


if __name__ == "__main__":
    sys.exit(main())
