"""The entry: the same result from any number of processes, and after a kill; mistakes end in one sentence."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

import dllm_var
from evaluation import eval as entry
from evaluation import report, task_files
from evaluation.settings import compose_settings
from evaluation.store import MERGED, Answer, read_records
from evaluation.team import Team, device, launcher_warning

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SUITE = ["limit=1", "generation.max_gen_length=32", "generation.block_length=16"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few local problems in the format of gsm8k."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("train", "test"):
        problems = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(5)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems), encoding="utf-8")
    return folder


def gsm8k(data: Path) -> list[str]:
    return ["dataset.name=gsm8k", f"dataset.path={data}", "dataset.num_fewshot=1", "generation=vanilla", "seed=1234"] + [
        f"generation.{option}" for option in ("gen_length=12", "block_length=4", "steps=6", "temperature=0.7")
    ]


def evaluate(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run it here and return the report."""
    entry.run(compose_settings([*arguments, f"output_dir={folder}"]))
    return report.read(folder)


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "DLLM_RUN_DIR")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def outcome(folder: Path) -> tuple[Any, str, dict[str, Any]]:
    """What may not depend on processes and batches: rows, scores, answers."""
    records = {key: {**vars(record), "seconds": None, "latency": None} for key, record in read_records(folder).items()}
    return report.read(folder)["rows"], (folder / entry.SAMPLES_FILE).read_text(encoding="utf-8"), records


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Both evaluations from a single process."""
    folder = tmp_path_factory.mktemp("alone")
    evaluate(folder / "suite", *SUITE)
    evaluate(folder / "gsm8k", *gsm8k(data), "batch_size=3")
    return folder


def test_a_report_holds_what_is_needed_to_believe_it(alone: Path) -> None:
    found = report.read(alone / "suite")
    facts = found["facts"]
    assert [row["n"] for row in found["rows"] if row["task"] != "tiny"] == [1] * 6
    assert [row["n"] for row in found["rows"] if row["task"] == "tiny"] == [6]
    assert {"tiny", "tiny_spell", "tiny_count"} <= {row["task"] for row in found["rows"]}
    assert (facts["model"], facts["chat_template"], facts["world_size"], facts["dtype"]) == ("tiny", True, 1, "float32")
    assert (facts["generation"]["method"], facts["generation"]["cache"]) == ("dllm_var", "block_commit")
    assert (facts["generation"]["block_length"], facts["limit"], facts["seed"]) == (16, 1, 0)
    assert facts["model_sha256"] == entry.weights_hash(ROOT / "dllm_var/bundled/tiny")
    assert set(facts["versions"]) == {"lm_eval", "torch", "transformers", "tokenizers"}
    assert len(facts["code_sha256"]) == 64
    assert facts["not_read_from_the_task"] == {"do_sample": False}
    assert sorted(path.name for path in (alone / "suite").glob("*.jsonl")) == [MERGED, entry.SAMPLES_FILE]
    records = read_records(alone / "suite").values()
    assert all(isinstance(record, Answer) and record.decided <= 32 for record in records)
    assert len(records) == 6
    assert {row["shots"] for row in report.read(alone / "gsm8k")["rows"]} == {1}


@pytest.mark.timeout(600)
@pytest.mark.dist
def test_two_processes_and_other_batches_give_the_same_result(alone: Path, data: Path, tmp_path: Path) -> None:
    lines = [
        [*SUITE, "batch_size=2", f"output_dir={tmp_path / 'suite'}"],
        [*gsm8k(data), f"output_dir={tmp_path / 'gsm8k'}"],
    ]
    (tmp_path / "lines.json").write_text(json.dumps([*lines, lines[0]]), encoding="utf-8")
    made = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(HERE / "several_evaluations.py"), str(tmp_path / "lines.json")],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=560, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[:4000]
    for name in ("suite", "gsm8k"):
        assert outcome(tmp_path / name) == outcome(alone / name)
        assert report.read(tmp_path / name)["facts"]["world_size"] == 2
    assert made.stderr.count("eval.py: 2 process(es)") == 3
    assert "suite is complete: nothing to do" in made.stderr


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_where_it_was_stopped(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    started = subprocess.Popen(
        [sys.executable, "eval.py", *SUITE, "batch_size=1", f"output_dir={folder}"],
        cwd=ROOT / "evaluation", env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    file, deadline = folder / "answers-rank0.jsonl", time.time() + 400
    while not file.is_file() or file.read_bytes().count(b"\n") < 2:
        assert time.time() < deadline, started.kill()
        assert started.poll() is None, started.stderr.read().decode()[-3000:]  # type: ignore[union-attr]
        time.sleep(0.02)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    before = read_records(folder)
    assert 2 <= len(before) < 6
    with file.open("ab") as opened:
        opened.write(b'{"key": "0123", "kind": "Answ')
    asked: list[Any] = []
    generate = dllm_var.generate

    def spy(model: Any, prompts: list[Any], config: Any, **named: Any) -> Any:
        asked.extend(prompts if "requests" in named else [])
        return generate(model, prompts, config, **named)

    monkeypatch.setattr(dllm_var, "generate", spy)
    facts = evaluate(folder, *SUITE, "batch_size=4")["facts"]
    assert (len(asked), facts["answers_reused"]) == (6 - len(before), len(before))
    assert outcome(folder) == outcome(alone / "suite")
    assert {key: read_records(folder)[key] for key in before} == before


def test_a_complete_folder_is_left_alone_and_other_settings_are_refused(
    alone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry, "load_pretrained", None)
    evaluate(alone / "suite", *SUITE, "batch_size=2")
    assert "suite is complete: nothing to do" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds results of other settings \(limit\): give another folder"):
        evaluate(alone / "suite", *SUITE, "limit=2")
    with pytest.raises(ValueError, match=r"other settings \(generation, seed\)"):
        evaluate(alone / "suite", *SUITE, "seed=1")
    for name, words in entry.INPUTS.items():  # as after training the model, or an adapter on it, once more
        inputs = entry.inputs
        with monkeypatch.context() as patch:
            patch.setattr(entry, "inputs", lambda *given, name=name, inputs=inputs: {**inputs(*given), name: "another"})
            with pytest.raises(ValueError, match=rf"other settings \({words}\)"):
                evaluate(alone / "suite", *SUITE)


def test_a_complete_folder_is_not_taken_for_the_result_of_other_problems(
    alone: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "load_pretrained", None)
    file = next(data.rglob("test.jsonl"))
    before = file.read_text(encoding="utf-8")
    try:
        evaluate(alone / "gsm8k", *gsm8k(data))
        file.write_text(before.replace("####", "It is ####"), encoding="utf-8")
        with pytest.raises(ValueError, match=r"other settings \(the problems\): give another folder"):
            evaluate(alone / "gsm8k", *gsm8k(data))
    finally:
        file.write_text(before, encoding="utf-8")


def test_answers_of_other_code_or_weights_are_not_used(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reused = {}
    for changed in ("nothing", "code_hash", "weights_hash"):
        folder = tmp_path / changed
        folder.mkdir()
        (folder / MERGED).write_bytes((alone / "suite" / MERGED).read_bytes())
        with monkeypatch.context() as patch:
            if changed != "nothing":
                patch.setattr(entry, changed, lambda *_: "another")
            reused[changed] = evaluate(folder, *SUITE)["facts"]["answers_reused"]
    assert reused == {"nothing": 6, "code_hash": 0, "weights_hash": 0}


def test_a_folder_without_weights_is_refused_before_a_task_is_loaded(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_files, "load_tasks", None)
    (tmp_path / "config.json").write_bytes((chat_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        evaluate(tmp_path / "run", f"model.path={tmp_path}")


def test_the_command_line_says_it_in_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "evaluation/eval.py"), "generation.block_length=0"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith("eval.py: block_length=0 is not a whole number of at least 1")
    assert made.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", "dataset.name=gsm9k"])
    for rank, said in (("1", ""), ("0", "eval.py: dataset.name='gsm9k' is unknown: did you mean gsm8k")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            entry.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(said)


def test_a_launcher_that_started_one_process_instead_of_several_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_warning() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert launcher_warning() is None  # one process was asked for
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "asked for several processes and started ONE" in str(launcher_warning())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_warning() is None


def test_every_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpus, at in ((0, torch.device("cpu")), (2, torch.device("cuda", 1))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert device() == at
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"process 2 of this machine has no GPU of its own, of 1: start 1 process\(es\)"):
        device()


def test_a_team_of_one_hands_everything_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = Team()
    assert (team.hand_out([["job"]]), team.bring_together(3)) == (["job"], [3])
    team.dismiss()


@pytest.mark.parametrize("refused", [False, True])
def test_the_processes_part_once_and_while_python_still_runs(monkeypatch: pytest.MonkeyPatch, refused: bool) -> None:
    """At Python's exit a thread of the group can abort a process whose work is done; a second group can wait for ever."""
    parted: list[bool] = []

    def run(config: Any) -> None:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        Team().dismiss()
        assert not parted  # another evaluation of the same processes can follow
        if refused:
            raise ValueError("this cannot be")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: parted.append(True))
    monkeypatch.setattr(entry, "typed", lambda composed: composed)
    monkeypatch.setattr(entry, "run", run)
    with pytest.raises(SystemExit) if refused else nullcontext():
        inspect.unwrap(entry._main)(OmegaConf.create())
    assert parted == [True]
