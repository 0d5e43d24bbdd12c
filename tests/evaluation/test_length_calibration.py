"""Length calibration: what counts as too long, too short, cut off and wasted, and the study on the bundled suite."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from dataset.tiny_corpus import Problem
from dllm_var import Generation, GenerationConfig, load_pretrained

PROBLEM = Problem("count", "1:3:1", "Count from 1 to 3.", "1 2 3")


@pytest.fixture(scope="module")
def study(script: Any) -> ModuleType:
    module: ModuleType = script("evaluation/length_calibration.py")
    return module


def _outcome(study: ModuleType, tokens: int, reason: str, raw: int = 32, text: str = "1 2 3") -> Any:
    ids = list(range(tokens)), list(range(raw))
    answer = Generation(*ids, reason, 4, 100, [0] * raw, [1.0] * raw, [0] * raw, text)
    return study.Outcome.of(6, PROBLEM, answer)  # five tokens and the stop token


def test_an_answer_is_too_long_too_short_or_right_in_tokens_with_its_stop_token(study: ModuleType) -> None:
    figures = study.calibration([_outcome(study, 5, "eos"), _outcome(study, 8, "eos", text="?"), _outcome(study, 1, "eos")])
    assert (figures["right_length"], figures["too_long"], figures["too_short"]) == (1 / 3, 1 / 3, 1 / 3)
    assert (figures["over_run"], figures["under_run"]) == (3 / 3, 4 / 3)
    assert figures["wasted"] == 1 - (6 + 9 + 2) / 96


def test_an_answer_without_a_stop_token_is_truncated_and_never_right(study: ModuleType) -> None:
    outcome = _outcome(study, 4, "length", raw=4)
    figures = study.calibration([outcome])
    assert (figures["truncated"], figures["exact"], figures["right_length"]) == (1, 0, 0)
    assert (figures["too_short"], figures["under_run"], figures["wasted"]) == (0, 2, 0)  # cut off is not stopped early


def test_every_system_fits_every_budget(study: ModuleType) -> None:
    for system in study.SYSTEMS:
        for budget in study.BUDGETS:
            assert GenerationConfig(**study.options(system, budget)).response_limit == budget


def test_the_study_measures_the_bundled_suite_and_draws_it(study: ModuleType, tmp_path: Path) -> None:
    records = study.measure(load_pretrained("tiny"), 1, ["EOS-led", "fixed"], [32])
    assert [(r["system"], r["budget"]) for r in records] == [("EOS-led", 32)] * 6 + [("fixed", 32)] * 6
    assert all(outcome.given <= 32 and outcome.raw <= 32 for r in records for outcome in r["outcomes"])
    console = Console(width=130, record=True)
    study.show(records, console)
    assert "EOS-led" in console.export_text()
    study.draw(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"


def test_a_budget_that_is_no_multiple_of_the_block_is_refused(
    study: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["length_calibration.py", "--budgets", "48"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--budgets 48 is no multiple of 32" in capsys.readouterr().err
