"""JSON Lines files: all formats are read, and a bad line or file is named with the place of its fault."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_training import samples
from sft_training.samples import SampleFiles, SampleRules, find_files

MASK = 270


def opened(*files: Path, tokenizer: Any = None, template: str = "chat") -> SampleFiles:
    return SampleFiles(files, SampleRules(288, MASK, tokenizer, template))


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


GOOD = {"id": "a:1", "input_ids": [1, 2, 3, 4], "prompt_length": 2}


def test_samples_come_in_file_order_with_their_prompt_and_response(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", GOOD, {**GOOD, "id": "a:2"}), write(tmp_path / "b.jsonl", {**GOOD, "id": "b:1"})]
    found = opened(*files)
    assert [found[i].key for i in range(len(found))] == ["0/a:1", "0/a:2", "1/b:1"]
    assert found[0].response.tolist() == [False, False, True, True]
    assert found[0].prompt.tolist() == [1, 2]


def test_the_published_format_without_ids_gets_a_key_from_file_and_line(tmp_path: Path) -> None:
    found = opened(
        write(tmp_path / "ref.jsonl", {"input_ids": [5, 6], "prompt_length": 0}, {"input_ids": [7], "prompt_length": 1})
    )
    assert [found[i].key for i in range(2)] == ["ref:1", "ref:2"]
    assert found[0].response.all()
    assert not found[1].response.any()


def test_an_empty_id_is_none_and_one_that_is_no_text_is_named(tmp_path: Path) -> None:
    found = opened(write(tmp_path / "x.jsonl", {**GOOD, "id": ""}, {**GOOD, "id": "\ud800"}))
    assert found[0].key == "x:1"
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2 is not a tokenised sample: .*surrogates not allowed"):
        found[1]


def test_a_file_is_taken_by_its_name_before_a_pattern_and_only_once(tmp_path: Path) -> None:
    files = [write(tmp_path / name, GOOD) for name in ("a[1].jsonl", "a1.jsonl")]
    (tmp_path / "link.jsonl").symlink_to(files[1])
    assert find_files("dataset.files", str(files[0])) == [files[0]]
    assert find_files("dataset.files", str(tmp_path / "a?.jsonl")) == [files[1]]
    twice = find_files("dataset.files", [str(files[1]), str(tmp_path / "link.jsonl"), f"{tmp_path}/./a1.jsonl"])
    assert [path.resolve() for path in twice] == [files[1]]


def test_files_with_commas_between_them_get_the_way_to_write_a_list() -> None:
    with pytest.raises(ValueError, match=r"Several are a list: dataset\.files=\[a\.jsonl,b\.jsonl\]"):
        find_files("dataset.files", "a.jsonl,b.jsonl")


def test_a_file_whose_lines_were_put_in_another_order_is_another_one(tmp_path: Path) -> None:
    records = [{**GOOD, "id": f"x:{i}"} for i in range(3)]
    ours, other = (opened(write(tmp_path / "x.jsonl", *each)).fingerprint() for each in (records, records[::-1]))
    assert ours != other
    assert ours[0][:3] == other[0][:3]


def test_fields_of_text_that_nothing_reads_are_told(tmp_path: Path, tokenizer: Any) -> None:
    found = opened(write(tmp_path / "x.jsonl", {"prompt": "Two?", "id": 7, "output": "2"}), tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="samples of text have fields that nothing reads: prompt. Those that count"):
        assert found[0].key == "7"


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
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2 is not .* \(the line starts at byte 61\)\.$") as caught:
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


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_blank_lines_are_no_samples_and_the_lines_behind_them_keep_their_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(samples, "SCAN", chunk)
    path = tmp_path / "gaps.jsonl"
    path.write_bytes(f"\n{json.dumps(GOOD)}\r\n\r\n  \n{json.dumps({**GOOD, 'id': 'a:2'})}\n{{broken\n\n\n".encode())
    found = opened(path)
    assert [found[i].key for i in range(2)] == ["a:1", "a:2"]
    with pytest.raises(ValueError, match=r"gaps\.jsonl, line 6 is not a tokenised sample: .* starts at byte"):
        found[2]
    assert len(found) == 3


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ValueError, match=r"none\.jsonl is empty: it holds no sample"):
        opened(tmp_path / "none.jsonl")


def test_more_files_than_may_be_open_are_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "OPEN_FILES", 2)
    found = opened(*(write(tmp_path / f"{i}.jsonl", {**GOOD, "id": f"f:{i}"}) for i in range(7)))
    for i in (0, 6, 3, 0, 1, 6):
        assert found[i].key == f"{i}/f:{i}"
    assert len(found._open) == 2


@pytest.mark.parametrize("closed", [False, True])
def test_a_file_that_vanishes_is_named_and_not_skipped(tmp_path: Path, closed: bool) -> None:
    path = write(tmp_path / "gone.jsonl", GOOD, GOOD)
    found = opened(path)
    path.unlink()
    if closed:
        found._open.popitem()[1].close()
    with pytest.raises(ValueError, match=r"gone\.jsonl (was deleted or replaced|cannot be read any more, at byte 61: No)"):
        found[1]


def test_a_file_that_becomes_shorter_is_named_and_does_not_kill_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.jsonl", *[GOOD] * 4000)  # many pages: a mapped file would end in SIGBUS
    found = opened(path)
    with path.open("r+b") as file:
        file.truncate(90)
    with pytest.raises(ValueError, match=r"cut\.jsonl became shorter .* \(243999 bytes .* 90 now; .* byte 243939 is"):
        found[3999]
    with pytest.raises(ValueError, match="became shorter"):
        found[0]  # what is still there may be something else


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: No such file"):
        opened(tmp_path / "none.jsonl")


TEXTS = [
    {"instruction": "Say <|mdm_mask|> ", "input": "twice", "output": "no."},
    {"instruction": None, "output": " \u00e9t\u00e9 "},
    {"output": "<|eot_id|>", "input": "i", "more": 3},
]


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_text_is_tokenised_as_the_tokeniser_of_files_does_it(
    tmp_path: Path, tokenizer: Any, script: Any, template: str
) -> None:
    tool = script("dataset/transfer_text2token.py")
    lines = [json.dumps(record).encode() for record in TEXTS]
    made, _, problem = tool.tokenise(tokenizer, tool.Recipe(template, 999, "stop"), tool.Chunk(0, "x.jsonl", 1, lines, 0))
    assert problem is None
    tokens, texts = tmp_path / "tokens.jsonl", write(tmp_path / "x.jsonl", *TEXTS)
    tokens.write_bytes(made)
    ours, theirs = opened(texts, tokenizer=tokenizer, template=template), opened(tokens)
    for i in range(3):
        assert ours[i].key == theirs[i].key == f"x:{i + 1}"
        assert np.array_equal(ours[i].ids, theirs[i].ids)
        assert np.array_equal(ours[i].response, theirs[i].response)
    other = opened(texts, tokenizer=tokenizer, template="plain" if template == "chat" else "chat")
    assert ours.fingerprint() != other.fingerprint()  # the text alone does not decide the tokens


def test_a_bad_line_of_text_is_named_like_any_other(tmp_path: Path, tokenizer: Any) -> None:
    found = opened(write(tmp_path / "t.jsonl", TEXTS[0], {"output": " "}, GOOD), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"t\.jsonl, line 2 is not an instruction record: the field 'output' is empty"):
        found[1]
    with pytest.raises(ValueError, match=r"line 3 is not an instruction record: the field 'output' is missing"):
        found[2]


def test_text_without_a_tokenizer_and_text_among_tokens_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    text, tokens = write(tmp_path / "t.jsonl", TEXTS[0]), write(tmp_path / "u.jsonl", GOOD)
    with pytest.raises(ValueError, match=r"t\.jsonl holds text .* no tokenizer is given"):
        opened(text)
    with pytest.raises(ValueError, match=r"t\.jsonl holds text and .*u\.jsonl token ids: make two sources"):
        opened(text, tokens, tokenizer=tokenizer)


def test_loss_runs_need_no_prompt_length(tmp_path: Path) -> None:
    found = opened(write(tmp_path / "m.jsonl", {"input_ids": [1, 2, 3], "loss_runs": [[1, 1]]}))
    assert found[0].response.tolist() == [False, True, False]
