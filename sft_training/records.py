"""What a run leaves for people: progress bar, metrics.jsonl, the loss curve, run.json and the resolved configuration.

Called by ``sft.py``; only the first process writes.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dllm_var.model.shards import read_json
from sft_training.data import Counts

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"


class Recorder(TrainerCallback):
    """Progress bar, one JSON line per log line, and the loss curve at every checkpoint and at the end.

    A line's "seconds" count what the run has taken so far, over all its stops.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bar: tqdm[Any] | None = None
        self.started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.is_world_process_zero:
            forget_metrics_after(self.folder, state.global_step)
            self.started = time.monotonic() - max(
                (line.get("seconds", 0.0) for line in read_metrics(self.folder)), default=0.0
            )
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **others: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        append_metrics(self.folder, state.global_step, {**logs, "seconds": round(time.monotonic() - self.started, 1)})
        if self.bar is not None and "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs['learning_rate']:.2e}", "epoch": f"{logs['epoch']:.2f}"}
            self.bar.set_postfix(shown)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.is_world_process_zero:
            draw_curve(self.folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
            draw_curve(self.folder)


class RunFile(TrainerCallback):
    """Writes run.json when everything is built and nothing has been trained yet."""

    def __init__(self, folder: Path, facts: Callable[[], dict[str, Any]]) -> None:
        self.folder, self.facts = folder, facts

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.is_world_process_zero:
            write_run(self.folder, self.facts())


def trace_rows(folder: Path, rank: int, counts: Counts) -> None:
    """Note which rows and samples a rank trained on in one micro-batch (training.trace_rows)."""
    with (folder / f"rows-rank{rank}.jsonl").open("a", encoding="utf-8") as out:
        out.write(json.dumps({"rows": counts.rows, "samples": counts.samples}) + "\n")


def append_metrics(folder: Path, step: int, values: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl, the whole of it or, when the disk is full, nothing."""
    line = (json.dumps({"step": step, **values}) + "\n").encode()
    with (folder / METRICS_FILE).open("ab", buffering=0) as out:
        before = out.tell()
        try:
            while line:
                line = line[out.write(line) :]
        except OSError:
            out.truncate(before)
            raise


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl so far; a last line that a kill cut short does not count."""
    file = folder / METRICS_FILE
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{file} has a line that is no JSON: {error}") from error


def forget_metrics_after(folder: Path, step: int) -> None:
    """Drop what a run noted after the checkpoint from which it goes on, so that no step stands there twice."""
    kept = [line for line in read_metrics(folder) if line["step"] <= step]
    _replace(folder / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curve(folder: Path) -> None:
    """The training loss, and the fixed-noise validation loss where there is one, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(folder)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "validation, fixed noise")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.0)
    axes.set(xlabel="step", ylabel="cross-entropy per masked token", ylim=(0, None))
    if axes.lines:
        axes.legend()
    figure.savefig(folder / CURVE_FILE, dpi=120)
    pyplot.close(figure)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says so far."""
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """The resolved settings of a run, section by section; empty where none were noted.

    Raises:
        ValueError: the file is not as a run writes it.
    """
    file = folder / CONFIG_FILE
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model", {}), dict):
        raise ValueError(f"{file} holds no settings of a run.")
    return found


def write_run(folder: Path, facts: dict[str, Any]) -> None:
    """run.json: the settings as they act; what stands there from before stays unless it is said anew."""
    stamp = {"updated": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "torch": torch.__version__}
    _replace(folder / RUN_FILE, json.dumps({**read_run(folder), **facts, **stamp}, indent=2) + "\n")


def write_config(folder: Path, resolved: dict[str, Any]) -> None:
    """config.yaml: every setting, defaults included, as it was after all overrides."""
    _replace(folder / CONFIG_FILE, yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))


def _replace(file: Path, text: str) -> None:
    """Write a file anew; whatever happens, it holds the old text or the new one."""
    fresh = file.with_name(f"{file.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    finally:
        fresh.unlink(missing_ok=True)
