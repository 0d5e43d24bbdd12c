"""The protocol's script: eight commands with the published settings, one folder each, and a table at the end."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from evaluation.settings import EvalConfig, compose_settings

SCRIPT = Path(__file__).parents[2] / "evaluation" / "run_batch.sh"
EIGHT = "gsm8k gpqa mmlu humaneval_instruct mbpp bbh minerva_math mmlu_pro".split()
OURS = "TASKS LOG_PATH BLOCK_LENGTH MAX_GEN_LENGTH THRESHOLD BATCH_SIZE PRETRAINED_PATH DATASET_PATH LIMIT PROCESSES".split()


def batch(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in (*OURS, "CONFIRM_RUN_UNSAFE_CODE", "DRY_RUN")}
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env={**kept, "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def settings(command: str) -> EvalConfig:
    """What the command line of a dry run comes to."""
    return compose_settings(command.split("eval.py ")[1].split())


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python that keeps how it was called; it makes no result for bbh."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n[[ "$*" != *dataset.name=bbh* ]]\n', encoding="utf-8")
    file.chmod(0o755)
    return str(file)


def test_a_dry_run_prints_the_published_protocol_and_nothing_else_happens(tmp_path: Path) -> None:
    made = batch("--dry-run", folder=tmp_path, CONFIRM_RUN_UNSAFE_CODE="true", PRETRAINED_PATH="some/folder")
    assert (made.returncode, made.stderr) == (0, "")
    lines = made.stdout.splitlines()
    assert [line.split("dataset.name=")[1].split()[0] for line in lines] == EIGHT
    assert all(f"output_dir=outputs/protocol/{task}" in line for task, line in zip(EIGHT, lines, strict=True))
    assert not list(tmp_path.iterdir())
    for task in ("gsm8k", "mmlu"):
        config = settings(lines[EIGHT.index(task)])
        decoding = config.decoding()
        assert (decoding.method, decoding.threshold, decoding.cache) == ("dllm_var", 0.9, "block_commit")
        assert (decoding.block_length, decoding.max_gen_length) == ((1, 1) if task == "mmlu" else (64, 1024))
        assert (config.batch_size, config.seed, config.model.path) == (1, 1234, "some/folder")
    assert [("confirm_run_unsafe_code=true" in line) for line in lines] == [task in EIGHT[3:5] for task in EIGHT]


def test_the_environment_and_the_arguments_reach_every_command(tmp_path: Path) -> None:
    given = {"BLOCK_LENGTH": "32", "MAX_GEN_LENGTH": "96", "THRESHOLD": "0.8", "BATCH_SIZE": "4", "LIMIT": "2"}
    made = batch("--dry-run", "cache=none", folder=tmp_path, TASKS="bbh gsm8k", LOG_PATH="logs", PROCESSES="3", **given)
    assert made.stdout.count("--num_processes 3") == made.stdout.count("--multi_gpu") == 2
    config = settings(made.stdout.splitlines()[1])
    decoding = config.decoding()
    assert (decoding.block_length, decoding.max_gen_length, decoding.threshold, decoding.cache) == (32, 96, 0.8, "none")
    assert (config.batch_size, config.limit, config.output_dir, config.dataset.name) == (4, 2, "logs/gsm8k", "gsm8k")
    assert "dataset.path=some/data" in batch("--dry-run", folder=tmp_path, DATASET_PATH="some/data").stdout


def test_a_task_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path: Path, python: str) -> None:
    (tmp_path / "logs").mkdir()
    made = batch(folder=tmp_path, TASKS="gsm8k bbh mmlu", LOG_PATH="logs", PYTHON=python)
    calls = (tmp_path / "calls").read_text(encoding="utf-8").splitlines()
    assert [call.split("dataset.name=")[1].split()[0] for call in calls[:3]] == ["gsm8k", "bbh", "mmlu"]
    assert calls[3].endswith("evaluation/report.py logs/gsm8k logs/mmlu")
    assert (tmp_path / "logs" / "summary.md").is_file()
    assert made.returncode == 2
    assert "run_batch.sh: not complete: bbh. What went wrong is told above" in made.stderr


def test_ctrl_c_ends_the_whole_protocol_and_not_one_task_of_it(tmp_path: Path) -> None:
    python = tmp_path / "python"  # ends as eval.py does, which has its own way with Ctrl-C
    python.write_text(f'#!/bin/bash\ntrap "exit 1" INT\necho "$@" >>{tmp_path}/calls\nsleep 60 & wait\n', encoding="utf-8")
    python.chmod(0o755)
    environment = os.environ | {"TASKS": "gsm8k bbh", "LOG_PATH": "logs", "PYTHON": str(python)}
    with subprocess.Popen(
        ["bash", str(SCRIPT)], cwd=tmp_path, env=environment, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what started the tests may ignore it
    ) as running:  # fmt: skip
        while running.poll() is None and not (tmp_path / "calls").is_file():
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(20) == 130
        os.killpg(running.pid, signal.SIGKILL)  # the sleep
    assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "humaneval_instruct runs the programs that the model writes: set CONFIRM_RUN_UNSAFE_CODE=true"),
        ({"TASKS": "gsm8k mbpp"}, "mbpp runs the programs"),
        ({"TASKS": "gsm8k", "BATCH_SIZE": "0"}, "BATCH_SIZE=0: give a whole number from 1 on"),
        ({"TASKS": "gsm8k", "PROCESSES": "two"}, "PROCESSES=two: give a whole number from 1 on"),
    ],
)
def test_what_was_typed_wrongly_ends_in_a_sentence(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    made = batch(folder=tmp_path, **environment)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith(f"run_batch.sh: {said}")
    assert made.stderr.count("\n") == 1
