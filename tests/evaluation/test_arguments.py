"""Command-line values that are checked before a long measurement begins."""

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from evaluation.arguments import new_file, share, whole

MEASURING = {
    "scripts.eval_tiny": [], "scripts.soak": [], "scripts.eval_ar_twin": ["--model", "tiny"], "scripts.benchmark": [],
    "scripts.benchmark_training": [], "scripts.compare_decoding": [], "scripts.study_measure": ["--model", "tiny"],
    "scripts.study_report": ["--input", "nowhere"], "scripts.draw_denoising": [], "evaluation.length_calibration": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "text", "told"),
    [
        (whole(1), "0", "0 must be 1 or more"),
        (whole(1), "1e3", "'1e3' is not a whole number"),
        (whole(1, 8), "9", "9 must be 1 or more, at most 8"),
        (share, "nan", "nan must be at least 0 and at most 1"),
        (share, "half", "'half' is not a number"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_range(read: Any, text: str, told: str) -> None:
    with pytest.raises(Exception, match=told):
        read(text)
    assert (whole(1, 8)("8"), share("0.5")) == (8, 0.5)


@pytest.mark.parametrize("script", MEASURING)
def test_a_result_that_could_not_be_written_is_told_before_anything_is_measured(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    main = importlib.import_module(script).main
    for output, told in ((tmp_path, "is a folder: name a file in it"), (tmp_path / "file" / "x.json", "cannot be written")):
        monkeypatch.setattr("sys.argv", [script, *MEASURING[script], "--output", str(output)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        assert f"argument --output: '{output}' {told}" in capsys.readouterr().err


def test_the_folder_of_a_result_is_made_and_a_file_there_stays_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    there = new_file(str(tmp_path / "new" / "result.json"))
    assert there.parent.is_dir()
    assert not there.exists()
    there.write_text("before", encoding="utf-8")
    assert new_file(str(there)).read_text(encoding="utf-8") == "before"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(Exception, match="permission denied"):
        new_file(str(there))
