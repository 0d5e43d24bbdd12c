"""Parquet files and hub datasets give the very samples that JSON Lines files give, and every fault is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dllm_var.text.special_tokens import SpecialTokens
from sft_training.build import build_stream, open_files
from sft_training.config import SftConfig
from sft_training.samples import SampleFiles, SampleRules, Samples
from sft_training.tables import open_hub, open_parquet

MASK = 270
RULES = SampleRules(288, MASK)
SPECIAL = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)

TOKENS: dict[str, list[Any]] = {
    "id": [f"k:{i}" for i in range(7)],
    "input_ids": [list(range(1, i + 3)) for i in range(7)],
    "prompt_length": [1] * 7,
    "num_tokens": [0] * 7,
}
TEXTS: dict[str, list[Any]] = {
    "instruction": ["a ", None, "Say <|eot_id|>"],
    "input": [None, "b", " c"],
    "output": ["one", "two ", "<|endoftext|>"],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def lines(path: Path, columns: dict[str, list[Any]]) -> Path:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def assert_same(ours: Samples, theirs: Samples) -> None:
    assert len(ours) == len(theirs)
    for i in reversed(range(len(ours))):
        assert ours[i].key == theirs[i].key
        assert np.array_equal(ours[i].ids, theirs[i].ids)
        assert np.array_equal(ours[i].response, theirs[i].response)


def test_parquet_files_give_the_samples_of_json_lines_files(tmp_path: Path) -> None:
    first, second = {k: v[:4] for k, v in TOKENS.items()}, {k: v[4:] for k, v in TOKENS.items()}
    tables = [parquet(tmp_path / "a.parquet", first, row_group_size=2), parquet(tmp_path / "b.parquet", second)]
    files = [lines(tmp_path / "a.jsonl", first), lines(tmp_path / "b.jsonl", second)]
    found = open_files("dataset.files", str(tmp_path / "*.parquet"), RULES)
    assert_same(found, SampleFiles(files, RULES))
    sizes = [path.stat().st_size for path in tables]
    assert found.fingerprint() == [["a.parquet", sizes[0], 4], ["b.parquet", sizes[1], 3]]


def test_a_parquet_file_is_taken_by_its_name_and_not_as_a_pattern(tmp_path: Path) -> None:
    columns = {"input_ids": [[5, 6, 1]], "prompt_length": [1]}
    ours = parquet(tmp_path / "a[1].parquet", columns)
    parquet(tmp_path / "a1.parquet", {**columns, "input_ids": [[7, 7, 1]]})
    assert open_files("dataset.files", str(ours), RULES)[0].ids.tolist() == [5, 6, 1]


def test_without_ids_the_key_is_file_and_row_and_runs_may_stand_for_the_prompt(tmp_path: Path) -> None:
    columns = {"input_ids": TOKENS["input_ids"], "loss_runs": [[[0, 1]], None, *[[[1, 1], [2, 1]]] * 5],
               "prompt_length": [None, 2, *[None] * 5]}  # fmt: skip
    assert_same(
        open_parquet([parquet(tmp_path / "x.parquet", columns)], RULES),
        SampleFiles([lines(tmp_path / "x.jsonl", columns)], RULES),
    )


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_text_columns_give_the_tokens_of_text_files(tmp_path: Path, tokenizer: Any, template: str) -> None:
    rules = SampleRules(288, MASK, tokenizer, template)
    theirs = SampleFiles([lines(tmp_path / "t.jsonl", TEXTS)], rules)
    found = open_parquet([parquet(tmp_path / "t.parquet", TEXTS)], rules)
    assert_same(found, theirs)
    assert found.fingerprint()[-1] == theirs.fingerprint()[-1]
    with pytest.raises(ValueError, match=r"t\.parquet holds text .* no tokenizer"):
        open_parquet([tmp_path / "t.parquet"], RULES)


def test_a_dataset_that_was_saved_is_opened_with_and_without_splits(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_dict(TOKENS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "test": whole.select(range(2, 4))}).save_to_disk(tmp_path / "two")
    theirs = SampleFiles([lines(tmp_path / "a.jsonl", TOKENS)], RULES)
    one, two = (open_hub("dataset.hub", str(tmp_path / name), "train", RULES) for name in ("one", "two"))
    assert_same(one, theirs)
    assert_same(two, theirs)
    test = open_hub("dataset.hub", str(tmp_path / "two"), "test", RULES)
    assert [test[i].key for i in range(2)] == ["k:2", "k:3"]
    assert one.fingerprint() == [["one[train]", sum(map(len, TOKENS["input_ids"])), 7]]
    with pytest.raises(
        ValueError, match=r"dataset\.hub=.*two', split 'dev' cannot be loaded: it has the splits train, test\."
    ):
        open_hub("dataset.hub", str(tmp_path / "two"), "dev", RULES)
    with pytest.raises(ValueError, match=r"one', split 'test' cannot be loaded: it is the split train\."):
        open_hub("dataset.hub", str(tmp_path / "one"), "test", RULES)


def test_a_folder_of_parquet_files_is_a_dataset_too(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-00000.parquet", TOKENS)
    found = open_hub("dataset.hub", str(tmp_path / "data"), "train", RULES)
    assert_same(found, SampleFiles([lines(tmp_path / "a.jsonl", TOKENS)], RULES))
    assert len(open_hub("dataset.hub", str(tmp_path / "data"), "train[:2]", RULES)) == 2
    with pytest.raises(ValueError, match=r"split 'validation' cannot be loaded: .*validation"):
        open_hub("dataset.hub", str(tmp_path / "data"), "validation", RULES)


def test_a_dataset_that_is_not_there_offline_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"dataset\.hub='nobody/nothing', split 'train' cannot be loaded: .* Give a dataset"
    ):
        open_hub("dataset.hub", "nobody/nothing", "train", RULES)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"input_ids": [[1.5]], "prompt_length": [0]},
            "the column input_ids holds list<.*double>, it must hold lists of whole",
        ),
        ({"input_ids": ["ab"], "prompt_length": [0]}, "the column input_ids holds string"),
        ({"input_ids": [[1]], "prompt_length": ["1"]}, "the column prompt_length holds string, it must hold whole numbers"),
        (
            {"input_ids": [[1]], "loss_runs": [[1, 1]]},
            "the column loss_runs holds list<.*int64>, it must hold lists of pairs",
        ),
        ({"input_ids": [[1]], "prompt_length": [0], "id": [0.5]}, "the column id holds double, it must hold text or whole"),
        ({"input_ids": [[1]]}, r"lacks the column prompt_length \(or loss_runs\); it has input_ids\."),
        ({"output": [3]}, "the column output holds int64, it must hold text"),
        ({"question": ["a"]}, r"has the columns question: needed are input_ids and prompt_length .* or instruction"),
    ],
)
def test_columns_of_the_wrong_type_are_named_at_the_start(
    tmp_path: Path, tokenizer: Any, columns: dict[str, list[Any]], said: str
) -> None:
    rules = SampleRules(288, MASK, tokenizer)
    with pytest.raises(ValueError, match=rf"bad\.parquet.*{said}"):
        open_parquet([parquet(tmp_path / "bad.parquet", columns)], rules)
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"dataset\.hub='.*saved', split 'train'.*{said}"):
        open_hub("dataset.hub", str(tmp_path / "saved"), "train", rules)


def test_a_row_that_is_no_sample_is_named_with_file_and_row(tmp_path: Path) -> None:
    good, bad = {"input_ids": [[1], [2]], "prompt_length": [0, 0]}, {"input_ids": [[1], [288]], "prompt_length": [0, 0]}
    found = open_parquet([parquet(tmp_path / "a.parquet", good), parquet(tmp_path / "b.parquet", bad)], RULES)
    assert found[2].ids.tolist() == [1]
    with pytest.raises(ValueError, match=r"b\.parquet, row 2 is not a tokenised sample: input_ids reach from 288 to 288"):
        found[3]
    nulls = {"input_ids": [[1], None], "prompt_length": [0, 0]}
    with pytest.raises(ValueError, match=r"c\.parquet, row 2 is not a tokenised sample: input_ids must be a list"):
        open_parquet([parquet(tmp_path / "c.parquet", nulls)], RULES)[1]


def test_empty_unreadable_and_unlike_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = parquet(tmp_path / "good.parquet", TOKENS)
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.table(TOKENS).slice(0, 0), empty)
    with pytest.raises(ValueError, match=r"empty\.parquet is empty: it holds no sample"):
        open_parquet([good, empty], RULES)
    (tmp_path / "junk.parquet").write_bytes(good.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"junk\.parquet cannot be read as a Parquet file: "):
        open_parquet([tmp_path / "junk.parquet"], RULES)
    with pytest.raises(ValueError, match=r"gone\.parquet cannot be read as a Parquet file: "):
        open_parquet([tmp_path / "gone.parquet"], RULES)
    content = bytearray(good.read_bytes())
    content[4:60] = bytes(56)  # the head of the file is whole, its pages are not
    (tmp_path / "torn.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"torn\.parquet \(of 1 Parquet files\) cannot be read: "):
        open_parquet([tmp_path / "torn.parquet"], RULES)
    other = parquet(tmp_path / "other.parquet", {k: v for k, v in TOKENS.items() if k != "id"})
    with pytest.raises(ValueError, match=r"good\.parquet has the columns \['id', .*other\.parquet has .*: make two sources"):
        open_parquet([good, other], RULES)
    with pytest.raises(ValueError, match=r"dataset\.files names Parquet files .* and others: make two"):
        open_files("dataset.files", [str(good), str(lines(tmp_path / "a.jsonl", TOKENS))], RULES)
    datasets.Dataset.from_dict({"input_ids": [], "prompt_length": []}).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match=r"none', split 'train' cannot be loaded: it is empty\."):
        open_hub("dataset.hub", str(tmp_path / "none"), "train", RULES)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(TOKENS).select([]))
    with pytest.raises(ValueError, match=r"dataset\.hub='some/where', split 'train' is empty: it holds no sample"):
        open_hub("dataset.hub", "some/where", "train", RULES)


def test_a_parquet_file_that_vanishes_after_the_start_takes_nothing_away(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TOKENS)
    found = open_parquet([path], RULES)
    path.unlink()
    assert [found[i].key for i in range(7)] == TOKENS["id"]


def test_a_file_that_changed_is_read_anew_and_not_from_the_copy(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", TOKENS)
    assert open_parquet([path], RULES)[0].ids.tolist() == [1, 2]
    parquet(path, {**TOKENS, "input_ids": [[9, 9]] * 7})
    assert open_parquet([path], RULES)[0].ids.tolist() == [9, 9]


def test_the_same_rows_come_from_files_of_either_kind(
    settings: Callable[..., SftConfig], write_samples: Any, tmp_path: Path
) -> None:
    files = write_samples([3 + i % 9 for i in range(30)])
    records = [json.loads(line) for line in files.read_text(encoding="utf-8").splitlines()]
    table = parquet(tmp_path / "train.parquet", {name: [record[name] for record in records] for name in records[0]})
    streams = [build_stream(settings(path, "dataset.epochs=2"), 288, SPECIAL) for path in (files, table)]
    for ours, theirs in zip(*streams, strict=True):
        assert ours.pieces == theirs.pieces
        assert np.array_equal(ours.ids, theirs.ids)
