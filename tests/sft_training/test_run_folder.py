"""Run folders: whose they are, what a start leaves of an earlier run, and that a finished run stays as it is."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dllm_var.model.checkpoint import load_model
from sft_training.checkpoints import STATE_FILE, checkpoints_in, complete, faults, newest_checkpoint, staging
from sft_training.config import SftConfig
from sft_training.run_folder import check_place, make_ready, take
from sft_training.sft import prepare, train

Settings = Callable[..., SftConfig]
LENGTHS = [3 + (5 * i) % 19 for i in range(40)]
HOLDS = """
import sys
from pathlib import Path
from sft_training.run_folder import take
take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def write(run: Path, step: int) -> Path:
    """A whole checkpoint, as far as its folder goes."""
    folder = staging(run, step) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / STATE_FILE).write_text("{}", encoding="utf-8")
    return complete(run, step, None)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_left_half_written_is_removed_and_later_checkpoints_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = (write(tmp_path, step) for step in (2, 4, 6))
    left = staging(tmp_path, 8) / "checkpoint-8"
    left.mkdir(parents=True)
    (left / STATE_FILE).touch()
    (tmp_path / "partial-thesis").mkdir()
    assert newest_checkpoint(tmp_path) == third
    make_ready(tmp_path, second)
    assert checkpoints_in(tmp_path) == [second, first]
    aside = [path for path in tmp_path.iterdir() if path.name.endswith("-checkpoint-6")]
    assert len(aside) == 1
    assert faults(aside[0]) == []
    assert not left.parent.exists()
    assert (tmp_path / "partial-thesis").is_dir()
    assert [message.split(" ")[0] for message in caplog.messages] == [str(left.parent), "The"]


def test_a_run_that_starts_anew_sets_everything_aside_that_an_earlier_one_left(
    settings: Settings, write_samples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_samples(LENGTHS)
    config = settings(files, "training.max_steps=2", "training.trace_rows=true")
    train(config)
    folder = Path(config.output_dir)
    before = contents(folder)
    train(settings(files, "training.max_steps=1", "training.seed=7", "resume=never"))
    (aside,) = folder.glob("aside-*")
    assert contents(aside) == {name: content for name, content in before.items() if name != ".lock"}
    assert f"what an earlier one left in {folder} is set aside in {aside.name}" in caplog.text
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-1"]
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["steps"] == 1


@pytest.mark.parametrize("theirs", ["final/thesis.txt", "metrics.jsonl", "config.yaml", "checkpoint-500/model.bin"])
def test_a_folder_that_no_run_of_ours_wrote_is_refused_untouched(
    settings: Settings, write_samples: Any, theirs: str
) -> None:
    config = settings(write_samples(LENGTHS))
    file = Path(config.output_dir) / theirs
    file.parent.mkdir(parents=True)
    file.write_text("mine", encoding="utf-8")
    for resume in ("auto", "never"):
        config.resume = resume
        with pytest.raises(ValueError, match=rf"output_dir=.*run holds {theirs.partition('/')[0]}, but no run\.json"):
            prepare(config)
    assert contents(Path(config.output_dir)) == {theirs: b"mine"}


def test_a_place_where_no_folder_can_be_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="output_dir is empty, or the folder that you are in"):
        check_place(Path(""))
    with pytest.raises(ValueError, match=r"output_dir=~/runs: .* write \$HOME/runs"):
        check_place(Path("~/runs"))
    with pytest.raises(ValueError, match=r"output_dir=.*file is a file: give a folder\."):
        take(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match=r"output_dir=.* cannot be a folder \(File name too long\)"):
        check_place(tmp_path / ("long" * 100))


def test_two_runs_cannot_work_in_one_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(ValueError, match=r"another run works there\. Wait for its end"):
            take(tmp_path)
        other.kill()
        other.wait()
    take(tmp_path)  # the lock of a process that was killed is gone with it


def test_a_finished_run_stays_as_it_is_and_its_model_can_be_written_again(
    settings: Settings, write_samples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_samples(LENGTHS)
    run = ("training.max_steps=3", "training.save_total_limit=1")
    config = settings(files, *run)
    train(config)
    folder = Path(config.output_dir)
    before = contents(folder)
    train(settings(files, *run))
    assert f"{folder} is complete, all 3 steps: nothing to do." in caplog.text
    assert contents(folder) == before

    weights = load_model(folder / "final").state_dict()
    (folder / "final").rename(folder.parent / "elsewhere")  # as after a kill between the last checkpoint and the model
    train(settings(files, *run, "model.final_dtype=bf16"))
    again = load_model(folder / "final").state_dict()
    assert all(torch.equal(value.bfloat16(), again[name].bfloat16()) for name, value in weights.items())
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-3"]
    assert contents(folder)["metrics.jsonl"] == before["metrics.jsonl"]

    with pytest.raises(ValueError, match=r"checkpoint-3 is past the 2 steps of this run: raise training\.max_steps"):
        prepare(settings(files, "training.max_steps=2"))


def test_a_run_goes_on_only_from_the_model_it_began_with(settings: Settings, write_samples: Any, chat_folder: Path) -> None:
    files = write_samples(LENGTHS)
    start = ("model=tiny", "model.config=null", "model.tokenizer=null")
    config = settings(files, *start, f"model.path={chat_folder}", "training.max_steps=1")
    train(config)
    moved = chat_folder.parent / "moved"
    moved.symlink_to(chat_folder)
    more = (*start, "training.max_steps=2")
    train(settings(files, *more, f"model.path={moved}"))  # the same folder, by another name
    copy = shutil.copytree(chat_folder, chat_folder.parent / "copy")
    other = settings(files, *more, f"model.path={copy}")
    with pytest.raises(ValueError, match=r"model\.path=.*copy, but .*checkpoint-2 goes on from model\.path=.*If the folder"):
        prepare(other)
    noted = Path(config.output_dir) / "config.yaml"
    assert yaml.safe_load(noted.read_text(encoding="utf-8"))["model"]["path"] == str(moved)
    for text, told in (("model: {path: [", "cannot be read as YAML"), ("[]", "holds no settings of a run")):
        noted.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=rf"config\.yaml {told}"):
            prepare(other)
