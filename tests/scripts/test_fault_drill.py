"""The fault drill loses nothing, and would tell if it did."""

import json
import sys
from pathlib import Path
from random import Random

import fault_drill
import pytest
from fault_drill import COMPARED, DRILLS, STEPS, Run, drill, lost_steps

from sft_training.records import append_metrics


@pytest.mark.dist
@pytest.mark.timeout(1200)
def test_a_quick_drill_injects_every_fault_once_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fault_drill.py", "--quick"])
    with pytest.raises(SystemExit) as ended:
        fault_drill.main()
    out, said = capsys.readouterr()
    assert ended.value.code == 0, said
    *table, last = out.splitlines()
    result = json.loads(last)
    assert (result["lost"], result["failed"]) == (0, [])
    assert [(fault["fault"], fault["injected"]) for fault in result["faults"]] == [(name, 1) for name in DRILLS]
    assert all(any(name in line for line in table) for name in DRILLS)


def recorded(folder: Path, losses: dict[int, float | None], ranks: int = 1) -> Run:
    """A run that has logged these losses."""
    run = Run(folder, folder, folder, ranks)
    for step, loss in losses.items():
        rest = {key: 0.5 for key in COMPARED if key != "loss"}
        append_metrics(folder, step, rest if loss is None else {"loss": loss, **rest})
    return run


def test_missing_and_other_steps_are_losses_and_those_after_a_step_left_out_only_when_missing(tmp_path: Path) -> None:
    alone = {step: [2.0, 0.5, 0.5, 0.5, 0.5] for step in range(1, STEPS + 1)}
    for number, (losses, ranks, lost) in enumerate(
        [
            (dict.fromkeys(alone, 2.0), 1, 0),
            (dict.fromkeys(range(1, STEPS), 2.0), 1, 1),
            ({**dict.fromkeys(alone, 2.0), 3: 2.0 + 1e-9}, 1, 1),
            ({**dict.fromkeys(alone, 2.0), 3: 2.0 + 1e-9}, 2, 0),
            ({**dict.fromkeys(alone, 2.0), 3: 2.0 + 1e-5}, 2, 1),
            ({**dict.fromkeys(alone, 2.0), 3: None, 4: 1.0}, 1, 0),
            ({1: 2.0, 2: 1.0, 3: None, 4: 1.0}, 1, 1 + STEPS - 4),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        assert lost_steps(recorded(tmp_path / str(number), losses, ranks), alone) == lost


def test_a_run_that_is_silent_about_its_fault_or_does_not_finish_fails_the_drill(tmp_path: Path) -> None:
    alone = {1: [2.0, 0.5, 0.5, 0.5, 0.5]}
    run = recorded(tmp_path, {1: 2.0})
    assert drill(lambda *_: "a sentence", _finished(run, False), alone, Random(0)) == (0, "did not finish")
    (tmp_path / "final").mkdir()
    assert drill(lambda *_: "a sentence", run, alone, Random(0)) == (0, "did not say 'a sentence'")
    (tmp_path / "said-0.log").write_text("…, and a sentence about it.", encoding="utf-8")
    assert drill(lambda *_: "a sentence", run, alone, Random(0)) == (0, "")
    assert drill(lambda *_: "a sentence", run, {**alone, 2: alone[1]}, Random(0)) == (1, "lost something")


def _finished(run: Run, finished: bool) -> Run:
    """The run, which does nothing more."""
    run.go = lambda nan_at=0: None  # type: ignore[method-assign]
    run.end = lambda: finished or (run.folder / "final").is_dir()  # type: ignore[method-assign]
    return run
