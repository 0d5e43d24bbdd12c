"""The response store: what was written is there, whatever was written when the run was killed."""

import json
from pathlib import Path

import pytest

from evaluation.store import MERGED, Answer, Rating, ResponseStore, key_of, merge, read_records


def answer(doc_id: int, task: str = "sums") -> Answer:
    return Answer(
        task=task, doc_id=doc_id, request=7, prompt_length=3, text="4 é\n", tokens=[5, 6], raw_length=8, stop_reason="eos",
        forwards=4, positions=30, decided=3, seconds=0.5, latency=2.0,
    )  # fmt: skip


RATING = Rating("choices", 2, 9, 1, 12, 3, -4.5, 0.25, 128, False, 0.1)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add("a", answer(1))
        store.add("b", RATING)
        assert read_records(tmp_path) == {"a": answer(1), "b": RATING}  # while the file is still being written to


def test_a_line_that_was_cut_off_is_left_out_and_what_follows_stands_on_its_own_line(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add("a", answer(1))
        store.add("b", answer(2))
    path = tmp_path / "answers-rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert read_records(tmp_path).keys() == {"a"}
    with ResponseStore(tmp_path) as store:
        store.add("c", answer(3))
    assert read_records(tmp_path) == {"a": answer(1), "c": answer(3)}


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    with ResponseStore(tmp_path) as store:
        store.add("a", answer(1))
    path = tmp_path / "answers-rank0.jsonl"
    for line in ("{}", "[1]", '{"key": "b", "kind": "Other"}', '{"key": "b", "kind": "Answer", "task": "sums"}', "{"):
        path.write_text(f"{path.read_text().splitlines()[0]}\n{line}\n", encoding="utf-8")
        with pytest.raises(ValueError, match=r"answers-rank0\.jsonl, line 2 is not a stored answer: delete that line"):
            read_records(tmp_path)


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with ResponseStore(tmp_path, 1), pytest.raises(ValueError, match=r"another run writes to .*answers-rank1\.jsonl"):
        ResponseStore(tmp_path, 1)
    ResponseStore(tmp_path, 1).__exit__(None, None, None)


def test_the_files_of_all_processes_become_one_in_order(tmp_path: Path) -> None:
    for rank, (key, record) in enumerate([("a", answer(11)), ("b", answer(2)), ("c", RATING)]):
        with ResponseStore(tmp_path, rank) as store:
            store.add(key, record)
    merge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MERGED]
    assert [json.loads(line)["key"] for line in (tmp_path / MERGED).read_text().splitlines()] == ["c", "b", "a"]
    with ResponseStore(tmp_path) as store:
        store.add("d", answer(1))
    merge(tmp_path)
    assert len(read_records(tmp_path)) == 4


def test_a_key_tells_any_two_things_apart() -> None:
    different = [key_of({"a": 1}, [1, 23]), key_of({"a": 1}, [12, 3]), key_of({"a": 2}, [1, 23]), key_of({"b": 1}, [1, 23])]
    assert len(set(different)) == 4
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
