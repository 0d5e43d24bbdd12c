"""`scripts/count_tokens.py`: what is counted, that counts add up, and what it says about bad files."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dllm_var.text.chat import encode_text
from dllm_var.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def count(script: Any) -> Any:
    return script("scripts/count_tokens.py").main


def _lines(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(file)


def _counts(file: Path) -> Counter[int]:
    content = json.loads(file.read_text())
    counts = Counter({int(token): n for token, n in content["p_baseline_dict"].items()})
    assert content["num_token"] == counts.total()
    return counts


def test_the_fields_of_a_record_are_joined_each_followed_by_a_space(count: Any, tmp_path: Path, capsys: Any) -> None:
    records = [{"instruction": "add 1 2", "input": None, "output": "3"}, {"output": "four\n", "input": "x", "id": 7}]
    source = _lines(tmp_path / "a.jsonl", *records, {"instruction": "", "output": "5"})
    assert count([source, "--tokenizer", "tiny", "--output", str(tmp_path / "f.json")]) == 0
    tokenizer = load_tokenizer("tiny")
    texts = ["add 1 2 3 ", "x four\n ", " 5 "]
    expected = Counter(token for text in texts for token in encode_text(tokenizer, text))
    assert _counts(tmp_path / "f.json") == expected
    assert f"{expected.total():,} tokens, {len(expected):,} different ones" in capsys.readouterr().out


def test_a_field_that_is_null_throughout_is_no_mistake_and_the_folder_of_the_output_is_made(
    count: Any, tmp_path: Path
) -> None:
    source = _lines(tmp_path / "a.jsonl", {"instruction": "one", "input": None, "output": "two"})
    output = tmp_path / "new" / "folder" / "f.json"
    assert count([source, "--tokenizer", "tiny", "--output", str(output)]) == 0
    assert _counts(output) == Counter(encode_text(load_tokenizer("tiny"), "one two "))


def test_chosen_fields_alone_are_counted(count: Any, tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.jsonl", {"question": "one", "answer": "two", "output": "three"})
    arguments = [source, "--tokenizer", "tiny", "--output", str(tmp_path / "f.json"), "--fields", "question,answer"]
    assert count(arguments) == 0
    assert _counts(tmp_path / "f.json") == Counter(encode_text(load_tokenizer("tiny"), "one two "))


def test_plain_text_is_counted_with_its_line_ends_however_long_it_is(
    count: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"line {i} of äöü\n" for i in range(50)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8")
    monkeypatch.setitem(count.__globals__, "TEXT_CHARACTERS", 1)  # a line at a time
    assert count([str(tmp_path / "a.txt"), "--tokenizer", "tiny", "--output", str(tmp_path / "f.json")]) == 0
    tokenizer = load_tokenizer("tiny")
    assert _counts(tmp_path / "f.json") == Counter(token for line in lines for token in encode_text(tokenizer, line))


def test_no_control_token_is_counted_however_the_text_is_worded(count: Any, tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.jsonl", {"output": "<|eot_id|><|endoftext|><|mdm_mask|>"})
    assert count([source, "--tokenizer", "tiny", "--output", str(tmp_path / "f.json"), "--fields", "output"]) == 0
    tokenizer = load_tokenizer("tiny")
    assert not _counts(tmp_path / "f.json").keys() & {tokenizer.eos_token_id, *tokenizer.all_special_ids}


def test_counts_of_several_corpora_add_up(count: Any, tmp_path: Path) -> None:
    first, second = _lines(tmp_path / "a.jsonl", {"output": "one two"}), _lines(tmp_path / "b.jsonl", {"output": "two"})
    common = ["--tokenizer", "tiny", "--fields", "output", "--output"]
    assert count([first, *common, str(tmp_path / "1.json")]) == 0
    assert count([second, *common, str(tmp_path / "2.json")]) == 0
    assert count([first, second, *common, str(tmp_path / "both.json")]) == 0
    added = ["--add", str(tmp_path / "1.json"), "--add", str(tmp_path / "2.json")]
    assert count([*common, str(tmp_path / "sum.json"), *added]) == 0
    assert count([second, *common, str(tmp_path / "more.json"), "--add", str(tmp_path / "1.json")]) == 0
    both = (tmp_path / "both.json").read_text()
    assert both == (tmp_path / "sum.json").read_text() == (tmp_path / "more.json").read_text()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        (b"not json\n", r"a\.jsonl:1: not JSON"),
        (b'{"output": "x"}\n[1]\n', r"a\.jsonl:2: not an object"),
        (b'{"output": 5}\n', r"a\.jsonl:1: the field 'output' holds 5, not text"),
        (b'{"text": "x"}\n', "no record has the field output"),
        (b'{"output": "\xff"}\n', r"a\.jsonl is not UTF-8 text \(byte 12\)"),
        (b'{"output": "\\ud800"}\n', r"a\.jsonl:1: the text is not valid Unicode"),
    ],
)
def test_a_bad_file_is_told_and_nothing_is_written(
    content: bytes | None, said: str, count: Any, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "a.jsonl"
    if content is not None:
        file.write_bytes(content)
    output = tmp_path / "f.json"
    assert count([str(file), "--tokenizer", "tiny", "--output", str(output), "--fields", "output"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokenizer", "tiny", "--output", "f.json"], "nothing to count"),
        (["a.txt", "--tokenizer", "nowhere", "--output", "f.json"], "'nowhere' is not a folder"),
        (["empty.txt", "--tokenizer", "tiny", "--output", "f.json"], "hold no text"),
        (["--add", "a.txt", "--tokenizer", "tiny", "--output", "f.json"], "is not of the form"),
    ],
)
def test_wrong_arguments_are_told(
    arguments: list[str], said: str, count: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("text")
    Path("empty.txt").write_text("")
    assert count(arguments) == 2
    assert said in capsys.readouterr().err
