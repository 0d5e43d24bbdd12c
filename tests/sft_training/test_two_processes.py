"""Two real processes: they start, share the rows, and train the same model as one process does."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from dllm_var.model.checkpoint import load_model
from sft_training import sft
from sft_training.config import SftConfig
from sft_training.records import read_metrics
from sft_training.sft import train

SCRIPT = Path(__file__).resolve().parents[2] / "sft_training" / "run_cpu.sh"
LENGTHS = [3 + (5 * i) % 19 for i in range(60)]


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def overrides(files: Path, start: Path, *more: str) -> list[str]:
    return [
        "model=scratch", f"model.config={start}", f"model.tokenizer={start}", f"dataset.files={files}",
        "packing.max_length=48", "training.local_batch_size=2", "training.warmup_steps=1", "training.learning_rate=3e-3",
        "training.max_steps=4", "precision=fp32", "training.trace_rows=true", *more,
    ]  # fmt: skip


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loss", ["plain_mean", "token_sum_global"])
def test_two_processes_train_the_same_model_as_one_on_disjoint_rows(
    settings: Callable[..., SftConfig], write_samples: Any, start_folder: Path, tmp_path: Path, loss: str
) -> None:
    files = write_samples(LENGTHS)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    pair = tmp_path / "pair"
    # two processes with one micro-batch of two rows, then of two: against four rows in one process
    accumulate = 1 if loss == "plain_mean" else 2
    options = [f"loss.name={loss}", f"training.grad_accum_steps={accumulate}"]
    figures = ["tokens/prompt", "tokens/response", "tokens/masked", "tokens/eos"]
    if loss == "token_sum_global":  # the same with two sources
        other = write_samples(LENGTHS[::-1], "other.jsonl")
        options += ["dataset.files=null", f"dataset.sources=[{{name: a, files: {files}, weight: 1}}, "
                    f"{{name: b, files: {other}, weight: 2}}]"]  # fmt: skip
        figures += ["tokens/source_a/masked", "tokens/source_b/prompt", "ce/source_a", "ce/source_b", "data/passes_b"]
    made = launch(elsewhere, *overrides(files, start_folder, *options, f"output_dir={pair}"))
    assert made.returncode == 0, made.stderr[-3000:]
    assert not list(elsewhere.iterdir())

    alone = settings(
        files, *options, f"training.grad_accum_steps={2 * accumulate}", "training.max_steps=4", "packing.open_rows=8",
        "training.trace_rows=true", output="alone",
    )  # fmt: skip
    train(alone)
    run = json.loads((pair / "run.json").read_text(encoding="utf-8"))
    assert run["world_size"] == 2
    assert run["distributed_type"] == "MULTI_CPU"
    assert run["optimizer"] == ["AdamW"]

    ours, theirs = (
        {line["step"]: line for line in read_metrics(folder) if "loss" in line} for folder in (pair, Path(alone.output_dir))
    )
    assert ours.keys() == theirs.keys() == {1, 2, 3, 4}
    for step in ours:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)
        for name in figures:
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=0 if name.startswith("tokens") else 1e-5)
    weights, wanted = (load_model(folder / "final").state_dict() for folder in (pair, Path(alone.output_dir)))
    assert max((weights[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5

    first, second = (
        [json.loads(line) for line in (pair / f"rows-rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)
    )
    rows = [sorted(row for line in lines for row in line["rows"]) for lines in (first, second)]
    assert set(rows[0]).isdisjoint(rows[1])
    assert sorted(rows[0] + rows[1]) == list(range(4 * 2 * 2 * accumulate))
    whole = [json.loads(line) for line in (Path(alone.output_dir) / "rows-rank0.jsonl").read_text().splitlines()]
    assert sorted(key for line in first + second for key in line["samples"]) == sorted(
        k for line in whole for k in line["samples"]
    )


def test_a_launcher_that_starts_one_process_only_is_found_out(
    settings: Callable[..., SftConfig], write_samples: Any
) -> None:
    with pytest.raises(ValueError, match=r"expect_processes=2, but the launcher started 1 process.*run_cpu\.sh"):
        train(settings(write_samples(LENGTHS), "training.expect_processes=2"))


def test_a_dry_run_prints_command_and_settings_and_starts_nothing(
    write_samples: Any, start_folder: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    made = launch(elsewhere, *overrides(write_samples(LENGTHS), start_folder), DRY_RUN="1", PROCESSES="3")
    assert made.returncode == 0, made.stderr[-3000:]
    command, *printed = made.stdout.splitlines()
    assert "accelerate.commands.launch --config_file" in command
    assert "--num_processes 3" in command
    assert "  expect_processes: 3" in printed
    assert "  max_length: 48" in printed
    assert not list(elsewhere.iterdir())


def test_a_finished_run_leaves_its_process_group_while_python_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At Python's exit a thread of the group can abort a process whose run is done and saved."""
    left = []
    accelerator = SimpleNamespace(end_training=lambda: left.append(True))
    monkeypatch.setattr(sft, "typed", lambda composed: composed)
    monkeypatch.setattr(sft, "train", lambda config: SimpleNamespace(accelerator=accelerator))
    monkeypatch.delenv("DRY_RUN", raising=False)
    inspect.unwrap(sft._main)(OmegaConf.create())
    assert left == [True]
