"""The study: what is trained, how it is measured, and what is made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dllm_var import load_pretrained
from sft_training.overrides import compose_settings

ROOT = Path(__file__).parents[2]

# In place of Python: notes the call, and leaves the file that the call is made for.
STAND_IN = """#!{python}
import json, pathlib, sys
given = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(given) + "\\n")
folders = [one.split("=", 1)[1] for one in given if one.startswith("output_dir=")]
if folders:  # the last one counts
    final = pathlib.Path(folders[-1]) / "final"
    final.mkdir(parents=True)
    (final / "config.json").write_text("{{}}")
if "--output" in given:
    pathlib.Path(given[given.index("--output") + 1]).write_text("{{}}\\n")
"""


@pytest.fixture(scope="module")
def measure(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/study_measure.py")
    return module


@pytest.fixture(scope="module")
def report(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/study_report.py")
    return module


def study(
    tmp_path: Path, *arguments: str, script: str = "study.sh", **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run a script with a stand-in for Python; what it said, and every call."""
    run, log, stand_in = tmp_path / "run", tmp_path / "calls", tmp_path / "python"
    for done in (
        "text/made.json",
        "more/made.json",
        "last/made.json",
        "start/config.json",
        "warm_up/final/config.json",
        "sft/final/config.json",
    ):
        (run / done).parent.mkdir(parents=True, exist_ok=True)
        (run / done).touch()
    stand_in.write_text(STAND_IN.format(python=sys.executable, log=str(log)), encoding="utf-8")
    stand_in.chmod(0o755)
    log.unlink(missing_ok=True)
    ran = subprocess.run(
        ["bash", ROOT / "scripts" / script, run, *arguments],
        env=os.environ | {"PYTHON": str(stand_in), "STEPS": "30", "SEEDS": "1 2"} | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return ran, [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


def test_every_recipe_is_trained_with_every_seed_by_settings_that_exist_and_measured_once(tmp_path: Path) -> None:
    ran, calls = study(tmp_path)
    assert ran.returncode == 0, ran.stderr
    trained = [call[1:] for call in calls if call[0].endswith("sft.py")]
    folders = [[o for o in call if o.startswith("output_dir=")][-1].removeprefix("output_dir=") for call in trained]
    assert len(folders) == len(set(folders)) == 22
    for overrides, folder in zip(trained, folders, strict=True):
        config = compose_settings(overrides)
        assert config.training.max_steps == (60 if "_anew-" in folder else 30)
        assert config.training.local_batch_size * config.packing.max_length == 2880  # the same positions for all
        base = "warm_up" if "_anew-" in folder or "autoregressive-" in folder else "sft"
        assert config.model.path == str(tmp_path / "run" / base / "final")
    assert {compose_settings(overrides).training.seed for overrides in trained} == {1, 2}
    measured = [call for call in calls if call[0].endswith("study_measure.py")]
    assert [call[call.index("--model") + 1] for call in measured] == [f"{folder}/final" for folder in folders]
    assert ["--autoregressive" in call for call in measured] == ["autoregressive" in folder for folder in folders]
    assert calls[-1][0].endswith("study_report.py")


def test_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    study(tmp_path)
    _, calls = study(tmp_path)
    assert not [call for call in calls if call[0].endswith("sft.py")]


@pytest.mark.parametrize(
    ("script", "base"), [("study.sh", "warm_up"), ("study.sh", "sft"), ("study_surroundings.sh", "warm_up")]
)
def test_without_its_base_the_study_says_what_to_run_first(tmp_path: Path, script: str, base: str) -> None:
    ran, _ = study(tmp_path, script=script)
    (tmp_path / "run" / base / "final" / "config.json").unlink()
    ran = subprocess.run(
        ["bash", ROOT / "scripts" / script, tmp_path / "run"], env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 1
    assert f"no {base}/final: run bash scripts/train_tiny.sh" in ran.stderr


def test_without_a_finished_run_the_editing_study_says_what_to_run_first_and_makes_nothing(tmp_path: Path) -> None:
    ran = subprocess.run(
        ["bash", ROOT / "scripts/study_editing.sh", tmp_path / "run"], env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "run bash scripts/train_tiny.sh" in ran.stderr
    assert not (tmp_path / "run").exists()


def test_the_warm_up_is_compared_with_as_many_steps_from_random_weights_and_without_masks(tmp_path: Path) -> None:
    ran, calls = study(tmp_path, script="study_warm_up.sh")
    assert ran.returncode == 0, ran.stderr
    trained = [compose_settings(call[1:]) for call in calls if call[0].endswith("sft.py")]
    arms: dict[str, list[Any]] = {}
    for config in trained:
        arms.setdefault(Path(config.output_dir).parent.name, []).append(config)
    steps = {arm: [config.training.max_steps for config in configs] for arm, configs in arms.items()}
    assert steps == {"recipe": [350, 500, 1700, 950], "masked_only": [750, 1070, 3640, 2040], "left_to_right": [2550, 950]}
    assert {arm: sum(stages) for arm, stages in steps.items()} == {
        "recipe": 3500,
        "masked_only": 7500,
        "left_to_right": 3500,
    }
    assert all(config.training.local_batch_size * config.packing.max_length == 3072 for config in trained)
    study_folder = tmp_path / "run" / "warm_up_study"
    first = {arm: configs[0].model for arm, configs in arms.items()}
    assert first["masked_only"].from_scratch
    assert first["recipe"].path == str(study_folder / "recipe" / "warm_up" / "final")
    assert first["left_to_right"].path == str(study_folder / "left_to_right" / "warm_up" / "final")
    objectives = {arm: {config.loss.name for config in configs} for arm, configs in arms.items()}
    assert objectives == {"recipe": {"plain_mean"}, "masked_only": {"plain_mean"}, "left_to_right": {"next_token"}}
    measured = [call for call in calls if Path(call[0]).name.startswith("eval_")]
    assert [Path(call[0]).name for call in measured] == ["eval_tiny.py", "eval_tiny.py", "eval_ar_twin.py"]
    assert [call[call.index("--model") + 1] for call in measured] == [f"{study_folder / arm}/sft/final" for arm in arms]
    assert ran.stdout.endswith("{}\n" * 3)


def test_strict_packing_and_tails_differ_in_nothing_but_the_masks_behind_a_sample(tmp_path: Path) -> None:
    ran, calls = study(tmp_path, script="study_surroundings.sh")
    assert ran.returncode == 0, ran.stderr
    trained = {c.output_dir: c for c in (compose_settings(call[1:]) for call in calls if call[0].endswith("sft.py"))}
    folder = tmp_path / "run" / "surroundings" / "30"
    strict, tails, views = (trained[str(folder / name)] for name in ("strict", "tails", "block_views"))
    assert (strict.view.tail_share, tails.view.tail_share, tails.view.tail_max) == (0.0, 0.8, 32)
    tails.view, tails.output_dir = strict.view, strict.output_dir
    assert strict == tails
    assert (strict.view.block_share, strict.packing.attention) == (0.0, "full")
    assert (views.view.block_share, views.packing.attention) == (0.85, "sample")
    assert {c.model.path for c in trained.values()} == {str(tmp_path / "run" / "warm_up" / "final")}
    assert {c.training.max_steps for c in trained.values()} == {30}
    measured = [call[call.index("--model") + 1] for call in calls if call[0].endswith("eval_tiny.py")]
    assert measured == [f"{name}/final" for name in trained]
    assert ran.stdout.endswith("{}\n" * 3)
    _, again = study(tmp_path, script="study_surroundings.sh")
    assert not [call for call in again if call[0].endswith(("sft.py", "eval_tiny.py"))]
    _, longer = study(tmp_path, script="study_surroundings.sh", STEPS="40")
    assert {compose_settings(call[1:]).training.max_steps for call in longer if call[0].endswith("sft.py")} == {40}


def test_an_unknown_arm_of_the_warm_up_study_is_named_and_nothing_is_trained(tmp_path: Path) -> None:
    ran, calls = study(tmp_path, "masked", script="study_warm_up.sh")
    assert ran.returncode == 1
    assert ran.stderr == "there is no arm masked: recipe, masked_only or left_to_right\n"
    assert not calls


@pytest.mark.parametrize("steps", ["100", "1 2 3 4 0", "1 2 3 4 5 6", "1 2 3 4 x", "1 2 3 -4 5"])
def test_stage_steps_that_are_no_five_numbers_are_refused_before_anything_is_made(tmp_path: Path, steps: str) -> None:
    ran, calls = study(tmp_path, script="train_tiny.sh", STAGE_STEPS=steps)
    assert ran.returncode == 1
    assert f"STAGE_STEPS is '{steps}'" in ran.stderr
    assert not calls


def test_a_stage_of_no_steps_is_left_out_and_the_next_goes_on_from_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "run" / "sft").mkdir(parents=True)
    ran, calls = study(tmp_path, script="train_tiny.sh", STAGE_STEPS="40 0 20 0 10", TRAIN_ONLY="1")
    assert ran.returncode == 0, ran.stderr
    (trained,) = [compose_settings(call[1:]) for call in calls if call[0].endswith("sft.py")]
    assert trained.model.path == str(tmp_path / "run" / "warm_up" / "final")
    assert (trained.training.max_steps, trained.training.decay_steps) == (20, 0)


@pytest.mark.parametrize(("given", "seed"), [({}, 1), ({"SEED": "2"}, 2)])
def test_the_seed_is_that_of_every_stage_and_a_stage_may_have_a_single_step(
    tmp_path: Path, given: dict[str, str], seed: int
) -> None:
    ran, calls = study(tmp_path, script="train_tiny.sh", STAGE_STEPS="1 1 1 1 1", TRAIN_ONLY="1", **given)
    assert ran.returncode == 0, ran.stderr
    assert [compose_settings(call[1:]).training.seed for call in calls if call[0].endswith("sft.py")] == [seed] * 3


def test_every_way_of_decoding_answers_every_task(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in measure.WAYS.values():
        for name in ("gen_length", "max_gen_length"):
            if name in options:
                monkeypatch.setitem(options, name, 32)
    model = load_pretrained("tiny")
    records = measure.measure(model, False, 1)
    assert {(r["way"], r["task"]) for r in records} == {(way, task) for way in measure.WAYS for task in measure.TASKS}
    assert all(len(r["outcomes"]) == 1 and r["seconds"] > 0 for r in records)


def test_a_quarter_of_the_problems_is_answered_on_canvases(measure: ModuleType) -> None:
    model = load_pretrained("tiny")
    records = measure.measure(model, False, 5, ["EOS-led blocks", "pure diffusion 64"])
    assert {(r["way"], len(r["outcomes"])) for r in records} == {("EOS-led blocks", 5), ("pure diffusion 64", 2)}


def test_only_a_file_of_the_same_problems_and_ways_is_left_as_it_is(measure: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for text in ("", "[]", '{"records": []}'):
        file.write_text(text, encoding="utf-8")
        assert not measure.holds(file, 3, ["DAEDAL"])
    file.write_text(json.dumps({"prompts_per_task": 3, "records": [{"way": "DAEDAL"}, {"way": "DAEDAL"}]}), encoding="utf-8")
    assert measure.holds(file, 3, ["DAEDAL"])
    assert not measure.holds(file, 4, ["DAEDAL"])
    assert not measure.holds(file, 3, ["DAEDAL", "EOS-led blocks"])


def test_an_autoregressive_answer_takes_a_forward_for_each_token(measure: ModuleType) -> None:
    model = load_pretrained("tiny")
    records = measure.measure(model, True, 1)
    assert {r["way"] for r in records} == {measure.LEFT_TO_RIGHT}
    for record in records:
        outcome = measure.Outcome(*record["outcomes"][0])
        assert outcome.forwards == outcome.raw == outcome.given
        assert outcome.positions > outcome.raw


def outcomes(report: ModuleType, exact: list[bool], forwards: int = 4) -> list[list[Any]]:
    return [[6, 6 if right else 9, 32, True, right, forwards, 100] for right in exact]


@pytest.fixture
def folder(report: ModuleType, tmp_path: Path) -> Path:
    fields = list(report.Outcome.__dataclass_fields__)
    for recipe, share in (("autoregressive", 0.5), ("dllm_var", 0.9), ("llada_sft", 0.2)):
        for seed in (1, 2, 3):
            exact = [i < share * 10 for i in range(10)]
            record = {"way": "EOS-led blocks", "task": "add", "seconds": 2.0, "outcomes": outcomes(report, exact)}
            result = {"fields": fields, "prompts_per_task": 10, "records": [record]}
            (tmp_path / f"{recipe}-{seed}.json").write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")  # of an earlier call
    return tmp_path


def test_figures_are_means_with_intervals_and_ours_comes_first(
    report: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["study_report.py", "--input", str(folder), "--output", str(folder / "report")])
    report.main()
    made = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(made) == ["dllm_var", "autoregressive", "llada_sft"]
    ours = made["dllm_var"]["EOS-led blocks"]
    assert ours["seeds"] == [1, 2, 3]
    assert ours["exact match"]["mean"] == pytest.approx(0.9)
    assert 0.7 < ours["exact match"]["low"] < 0.9 < ours["exact match"]["high"] <= 1.0
    assert ours["length error"]["mean"] == pytest.approx(0.3)
    assert ours["tokens/forward of an answer"]["mean"] == pytest.approx((0.9 * 6 + 0.1 * 9) / 4)
    assert ours["tasks"] == {"add": pytest.approx(0.9)}
    assert (ours["answers"], ours["seconds"]) == (30, pytest.approx(0.2))
    written = (folder / "report.md").read_text(encoding="utf-8")
    assert "| dllm_var | EOS-led blocks | 3 | 0.900 [" in written
    assert "| dllm_var | EOS-led blocks | 30 |  | 0.90 |  |  |  |  |" in written  # each task: only add was asked
    assert "| dllm_var |" in capsys.readouterr().out
    assert (folder / "report.png").read_bytes()[1:4] == b"PNG"


def test_the_readme_shows_the_committed_study_whole(report: ModuleType) -> None:
    made = json.loads((ROOT / "evaluation/results/study.json").read_text(encoding="utf-8"))
    text = (ROOT / "evaluation/results/study.md").read_text(encoding="utf-8")
    assert text == f"{report.table(made)}\n\n{report.by_task(made)}\n"
    assert report.table(made) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(made["dllm_var"][way]["seeds"] == [1, 2, 3] for way in made["dllm_var"])


def test_an_interval_is_wider_when_seeds_differ(report: ModuleType) -> None:
    alike = report.interval([np.array([0.0, 1.0] * 50)] * 3)
    apart = report.interval([np.zeros(100), np.array([0.0, 1.0] * 50), np.ones(100)])
    assert alike["mean"] == apart["mean"] == 0.5
    assert apart["high"] - apart["low"] > 3 * (alike["high"] - alike["low"]) > 0


@pytest.mark.parametrize("text", ["{", "[]", '{"fields": ["right"], "records": [{"way": "x", "outcomes": [[1, 2]]}]}'])
def test_a_damaged_result_is_named(report: ModuleType, folder: Path, text: str) -> None:
    (folder / "dllm_var-2.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"dllm_var-2\.json is no result"):
        report.read(folder)


def test_an_empty_folder_is_named(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no RECIPE-SEED\.json: run scripts/study\.sh first"):
        report.read(tmp_path)
