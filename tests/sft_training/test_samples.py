"""Tokenised files: both formats are read, and a bad line is named with its file and number."""

import json
from pathlib import Path

import numpy as np
import pytest

from sft_training import samples
from sft_training.samples import SampleFiles, find_files

MASK = 270


def opened(*files: Path, vocabulary: int = 288) -> SampleFiles:
    return SampleFiles(files, vocabulary=vocabulary, mask_id=MASK)


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


GOOD = {"id": "a:1", "input_ids": [1, 2, 3, 4], "prompt_length": 2}


def test_samples_come_in_file_order_with_their_prompt_and_response(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", GOOD, {**GOOD, "id": "a:2"}), write(tmp_path / "b.jsonl", {**GOOD, "id": "b:1"})]
    found = opened(*files)
    assert [found[i].key for i in range(len(found))] == ["a:1", "a:2", "b:1"]
    assert found[0].response.tolist() == [False, False, True, True]
    assert found[0].prompt.tolist() == [1, 2]


def test_the_published_format_without_ids_gets_a_key_from_file_and_line(tmp_path: Path) -> None:
    found = opened(
        write(tmp_path / "ref.jsonl", {"input_ids": [5, 6], "prompt_length": 0}, {"input_ids": [7], "prompt_length": 1})
    )
    assert [found[i].key for i in range(2)] == ["ref:1", "ref:2"]
    assert found[0].response.all()
    assert not found[1].response.any()


def test_loss_runs_say_which_turns_are_trained(tmp_path: Path) -> None:
    found = opened(write(tmp_path / "m.jsonl", {**GOOD, "input_ids": list(range(8)), "loss_runs": [[2, 1], [5, 2]]}))
    assert np.flatnonzero(found[0].response).tolist() == [2, 5, 6]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_lines_are_found_whatever_the_size_of_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(samples, "SCAN", chunk)
    records = [{**GOOD, "id": f"x:{i}", "input_ids": list(range(1, i + 2)), "prompt_length": 1} for i in range(9)]
    for ending in ("", "\n"):
        path = write(tmp_path / "x.jsonl", *records)
        path.write_text(path.read_text(encoding="utf-8") + ending, encoding="utf-8")
        found = opened(path)
        assert [found[i].key for i in range(len(found))] == [f"x:{i}" for i in range(9)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line 2 is not a tokenised sample"),
        ("", "line 2 is not a tokenised sample"),
        ("[1, 2]", "a JSON object is needed, this is a list"),
        ('{"prompt_length": 1}', "it lacks 'input_ids'"),
        ('{"input_ids": [1, 2]}', "it lacks 'prompt_length'"),
        ('{"input_ids": [], "prompt_length": 0}', "at least one whole number"),
        ('{"input_ids": [1.5], "prompt_length": 0}', "at least one whole number"),
        ('{"input_ids": ["a"], "prompt_length": 0}', "at least one whole number"),
        ('{"input_ids": [[1], [2]], "prompt_length": 0}', "at least one whole number"),
        ('{"input_ids": [[1], [2, 3]], "prompt_length": 0}', "line 2"),
        ('{"input_ids": [1, 288], "prompt_length": 0}', "reach from 1 to 288, the model knows 0 to 287"),
        ('{"input_ids": [-1, 3], "prompt_length": 0}', "reach from -1 to 3"),
        ('{"input_ids": [1, 270], "prompt_length": 0}', "hold the mask token 270"),
        ('{"input_ids": [1, 2], "prompt_length": 3}', "a response of -1 tokens from 3 on does not fit 2 tokens"),
        (
            '{"input_ids": [1, 2], "prompt_length": 0, "loss_runs": [[1, 2]]}',
            "a response of 2 tokens from 1 on does not fit",
        ),
        ('{"input_ids": [1, 2], "prompt_length": null}', "line 2"),
    ],
)
def test_a_malformed_line_is_named_with_file_line_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    found = opened(path)
    assert len(found) == 3
    assert found[2].key == "a:1"
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 is not") as caught:
        found[1]
    assert reason in str(caught.value)


def test_files_are_found_by_path_glob_or_list_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    names = [path.name for path in find_files("dataset.files", [str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")])]
    assert names == ["a.jsonl", "b.jsonl"]
    assert find_files("dataset.files", str(tmp_path / "c.txt")) == [tmp_path / "c.txt"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere/*.jsonl", r"dataset\.files: no file matches 'nowhere/\*\.jsonl' \(seen from "),
        ([], r"dataset\.files=\[\]: give one path"),
        (7, r"dataset\.files=7: give one path"),
        ([7], r"dataset\.files=\[7\]: give one path"),
    ],
)
def test_files_that_are_not_there_are_named(given: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_files("dataset.files", given)


def test_a_folder_is_answered_with_the_glob_for_its_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder; write .*/\*\.jsonl for the files in it"):
        find_files("dataset.files", str(tmp_path))


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ValueError, match=r"none\.jsonl is empty: it holds no sample"):
        opened(tmp_path / "none.jsonl")
