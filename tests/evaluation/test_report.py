"""The report of an evaluation: rows with their errors, counts as sums over sums, tables and plots."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evaluation import report
from evaluation.report import computation, main, markdown, read, rows, write

RESULTS = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.25,
            "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": "N/A",
        }
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 4}}, "n-shot": {"gsm8k": 4}, "versions": {"gsm8k": 3.0},
}  # fmt: skip
FACTS = {"model": "tiny", "generation": {"method": "dllm_var", "cache": "block_commit"}}


def _answer(**changes: Any) -> Any:
    usual = {"task": "gsm8k", "prompt_length": 40, "raw_length": 32, "stop_reason": "eos", "forwards": 4, "positions": 168}
    return SimpleNamespace(**{**usual, "decided": 10, "seconds": 0.5, "latency": 1.0, **changes})


def test_there_is_a_row_for_every_filter_with_its_error_shots_and_version() -> None:
    strict, flexible = rows(RESULTS)
    assert strict == {
        "task": "gsm8k", "metric": "exact_match", "filter": "strict-match", "value": 0.5, "standard_error": 0.25, "n": 4,
        "shots": 4, "version": 3.0,
    }  # fmt: skip
    assert (flexible["filter"], flexible["value"], flexible["standard_error"]) == ("flexible-extract", 0.75, None)


def test_a_group_has_as_many_problems_as_its_members_and_theirs() -> None:
    found = {
        "results": {name: {"acc,none": 0.5} for name in ("all", "one", "two", "empty")},
        "n-samples": {name: {"original": 100, "effective": n} for name, n in (("one", 2), ("three", 3), ("four", 4))},
        "group_subtasks": {"all": ["one", "two"], "two": ["three", "four"], "empty": []},
    }
    assert {row["task"]: row["n"] for row in rows(found)} == {"all": 9, "one": 2, "two": 7, "empty": None}


def test_ratios_are_a_sum_over_a_sum() -> None:
    figures = computation([_answer(), _answer(decided=2, forwards=1, seconds=0.1)])
    assert figures["tokens_per_forward"] == 12 / 5  # the mean of ratios would be 2.25
    assert figures["tokens_per_second"] == pytest.approx(12 / 0.6)
    assert figures["forwards_without_prefill"] == 1.5


def test_latencies_are_told_by_percentile() -> None:
    figures = computation([_answer(latency=float(seconds)) for seconds in range(100, -1, -1)])
    assert figures["latency_percentiles"] == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_tokens_end_with_the_first_stop_token_and_the_rest_of_the_block_is_waste() -> None:
    figures = computation([_answer(decided=24), _answer(decided=32, stop_reason="length")])
    assert (figures["tokens"], figures["raw_tokens"]) == (28, 32)
    assert figures["wasted_share"] == 1 - 56 / 64
    assert (figures["by_eos"], figures["truncated"], figures["stop_reasons"]) == (0.5, 0.5, {"eos": 1, "length": 1})


def test_prompts_are_not_counted_as_output() -> None:
    short, long = (computation([_answer(prompt_length=n)]) for n in (1, 1000))
    assert (short["prompt_tokens"], long["prompt_tokens"]) == (1, 1000)
    assert {**short, "prompt_tokens": 0} == {**long, "prompt_tokens": 0}


def test_a_run_leaves_json_a_table_and_two_plots(tmp_path: Path) -> None:
    write(tmp_path, RESULTS, [_answer(), _answer(task="mbpp")], FACTS)
    assert {file.name for file in tmp_path.iterdir()} == {
        "results.json", "results.md", "lengths.png", "accuracy_compute.png"
    }  # fmt: skip
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept == read(tmp_path)
    assert kept["facts"] == FACTS
    assert set(kept["computation"]) == {"gsm8k", "mbpp"}
    assert (tmp_path / "lengths.png").read_bytes()[1:4] == b"PNG"


def test_a_run_that_only_ranked_has_no_plots_of_answers(tmp_path: Path) -> None:
    write(tmp_path, RESULTS, [], FACTS)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.md"}


def test_the_results_file_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(report, "draw_compute", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, RESULTS, [_answer()], FACTS)
    assert not (tmp_path / "results.json").exists()


def test_runs_lie_side_by_side_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    for name, model in (("a", "tiny"), ("b", "llada-inst")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, RESULTS, [_answer()], {**FACTS, "model": model})
    picture = tmp_path / "both.png"
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(picture)])
    main()
    printed = capsys.readouterr().out
    assert "| tiny, dllm_var, block_commit | gsm8k | exact_match | strict-match | 0.5000 | 0.2500 | 4 | 4 | 3.0 |" in printed
    assert "| llada-inst, dllm_var, block_commit | gsm8k | 1 | 1.000 | 10.0 | 4.0 | 3.0 | 168 | 2.50 |" in printed
    assert picture.read_bytes()[1:4] == b"PNG"
    assert "–" in markdown([read(tmp_path / "a")])  # an error that is not known is no zero


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "holds no results.json: give the output folder"),
        ("{", "is not JSON"),
        ("[]", "was not written by"),
        ('{"facts": [], "rows": [], "computation": {}}', "was not written by"),
        ('{"facts": {}, "rows": [{"task": "gsm8k"}], "computation": {}}', "was not written by"),
    ],
)
def test_a_folder_that_is_no_finished_run_is_told(
    text: str | None, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert told in capsys.readouterr().err


def test_a_picture_that_is_no_png_is_refused_before_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["report.py", "nowhere", "--plot", "runs/x.foo"])
    with pytest.raises(SystemExit):
        report.main()
    assert "the picture is a .png file" in capsys.readouterr().err


def test_an_unfinished_run_among_others_is_told_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("done", "refused"):
        (tmp_path / name).mkdir()
    write(tmp_path / "done", RESULTS, [_answer()], FACTS)
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path / "done"), str(tmp_path / "refused")])
    main()
    printed = capsys.readouterr()
    assert printed.out == markdown([read(tmp_path / "done")])
    assert f"report.py: left out: {tmp_path / 'refused'} holds no results.json" in printed.err
