"""Finding a task's documents: what is wrong with a file is said in one sentence, and nothing is left out without a word."""

import csv
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from evaluation import task_files
from evaluation.task_files import TASK_NAMES, check, load_tasks
from evaluation.tasks import build

DATA = Path(__file__).parents[1] / "golden" / "prompts" / "data"
LOCAL = [name for name in TASK_NAMES if name != "tiny"]

pytestmark = pytest.mark.filterwarnings("ignore:.*subtasks have no documents")


@pytest.fixture
def folder(tmp_path):
    """A copy of the test documents that may be spoilt."""
    return Path(shutil.copytree(DATA, tmp_path / "data"))


def load(name, path, **options):
    given = {"num_fewshot": None, "seed": 1, "confirm_run_unsafe_code": True} | options
    return load_tasks(name, path=path, **given)


def told(call, *arguments, **options):
    """The sentence that a mistake ends in."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller looks at the sentence)
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", LOCAL)
def test_the_folder_itself_and_the_folder_around_it_are_the_same(name):
    assert task_files.read(name, DATA) == task_files.read(name, DATA / TASK_NAMES[name].folder)


def test_an_unknown_task_names_the_nearest():
    assert "did you mean gsm8k?" in told(check, "gms8k", None)


@pytest.mark.parametrize(("name", "number"), [("mbpp", 4), ("humaneval", 1), ("tiny", 1), ("gsm8k", -1)])
def test_examples_that_a_task_does_not_have_are_refused(name, number):
    assert f"dataset.num_fewshot={number}" in told(check, name, None, number)


def test_more_examples_than_the_file_has_are_refused():
    assert "has 8 examples to show" in told(load, "gsm8k", DATA, num_fewshot=9)


@pytest.mark.parametrize("name", LOCAL)
def test_a_missing_file_says_what_to_put_where(name, tmp_path):
    sentence = told(check, name, tmp_path)
    assert f"dataset.path={tmp_path}" in sentence
    assert f"Put {TASK_NAMES[name].folder}/" in sentence


def test_a_folder_that_is_none_is_refused(tmp_path):
    assert "is no folder" in told(check, "gsm8k", tmp_path / "nowhere")


def test_the_bundled_suite_takes_no_folder():
    assert "leave dataset.path out" in told(check, "tiny", DATA)


@pytest.mark.parametrize("name", LOCAL)
def test_a_missing_column_is_named_with_file_and_line(name, folder):
    facts = TASK_NAMES[name]
    column = list(facts.columns)[-1]
    if name == "gpqa":
        file = folder / "gpqa" / "gpqa_main.csv"
        rows = list(csv.DictReader(file.read_text().splitlines(keepends=True)))
        with open(file, "w", newline="") as out:
            writer = csv.DictWriter(out, [key for key in rows[0] if key != column], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        place = "line 2"
    elif name == "bbh":
        file, place = folder / "bbh" / "word_sorting.json", "example 2"
        value = json.loads(file.read_text())
        del value["examples"][1][column]
        file.write_text(json.dumps(value))
    else:
        file, place = folder / facts.folder / facts.files["test"], "line 2"
        lines = file.read_text().splitlines()
        row = json.loads(lines[1])
        del row[column]
        file.write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]))
    assert told(check, name, folder).startswith(f"{file}, {place}, column {column!r} is missing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no rows"),
        ('{"question": "?", "answer": "1"}\n\n{"question": }', "line 3: is no JSON"),
        ('{"question": "?", "answer": 5}', "line 1, column 'answer' holds 5 where text belongs"),
        ("[1, 2]", "line 1, column 'question' is missing"),
    ],
)
def test_a_file_of_something_else_is_refused(text, expected, folder):
    file = folder / "gsm8k" / "test.jsonl"
    file.write_text(text)
    sentence = told(check, "gsm8k", folder)
    assert sentence.startswith(str(file))
    assert expected in sentence


def test_bytes_that_are_no_text_are_refused(folder):
    (folder / "gsm8k" / "test.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "is no UTF-8 text" in told(check, "gsm8k", folder)


def test_a_bbh_file_of_another_shape_is_refused(folder):
    (folder / "bbh" / "navigate.json").write_text('{"input": "?"}')
    assert "column 'examples' is missing" in told(check, "bbh", folder)


@pytest.mark.parametrize("answer", [-1, 4])
def test_an_answer_that_is_none_of_the_choices_is_refused(folder, answer):
    file = folder / "mmlu" / "test.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(row | {"answer": answer}))
    assert f"{file}, line 1, column 'answer' holds {answer}" in told(check, "mmlu", folder)


def test_a_list_that_is_too_short_is_refused(folder):
    file = folder / "mbpp" / "mbpp.jsonl"
    row = json.loads(file.read_text().splitlines()[1])
    file.write_text(json.dumps(row | {"test_list": row["test_list"][:2]}))
    assert "column 'test_list' has 2 entries, 3 are needed" in told(check, "mbpp", folder)


@pytest.mark.parametrize(("name", "found"), [("bbh", 3), ("mmlu", 2), ("mmlu_pro", 2), ("minerva_math", 3)])
def test_subtasks_without_documents_are_named_and_the_others_run(name, found):
    with pytest.warns(UserWarning, match="have no documents here") as told_once:
        loaded = load(name, DATA)
    everything = {"bbh": 27, "mmlu": 57, "mmlu_pro": 14, "minerva_math": 7}[name]
    assert len(loaded["tasks"]) == found
    assert len(loaded["missing"]) == everything - found
    assert all(missing in str(told_once[0].message) for missing in loaded["missing"])
    assert loaded["groups"][TASK_NAMES[name].harness_name].child_names == list(loaded["tasks"])


def test_a_subject_without_its_own_documents_is_not_asked_those_of_another():
    loaded = load("mmlu", DATA)
    assert {task.config.dataset_name: [doc["subject"] for doc in task.eval_docs] for task in loaded["tasks"].values()} == {
        "anatomy": ["anatomy"],
        "high_school_physics": ["high_school_physics"],
    }


def test_files_with_no_document_of_the_task_are_refused(folder):
    file = folder / "mbpp" / "mbpp.jsonl"
    file.write_text(file.read_text().splitlines()[0])  # of another split
    assert "there are no documents" in told(load, "mbpp", folder)


@pytest.mark.parametrize("name", [name for name in TASK_NAMES if TASK_NAMES[name].runs_programs])
def test_programs_need_consent_and_no_consent_lets_them_out_of_the_sandbox(name):
    assert "confirm_run_unsafe_code" in told(load, name, DATA, confirm_run_unsafe_code=False)
    assert f"the programs of {name} outside a sandbox" in told(load, name, None, builtin=True)


def test_a_task_that_only_the_harness_has_and_that_runs_programs_is_refused(monkeypatch):
    (task,) = load("gsm8k", DATA)["tasks"].values()
    monkeypatch.setattr(task, "UNSAFE_CODE", True, raising=False)
    monkeypatch.setattr(build.TaskManager, "load", lambda *given: {"tasks": {"gsm8k": task}})
    assert "to score gsm8k the harness runs what the model writes" in told(build.builtin, "gsm8k_cot", ["gsm8k"], None, 1)


def test_local_files_need_no_network(monkeypatch):
    def hub(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    for name in TASK_NAMES:
        assert load(name, None if name == "tiny" else DATA)["tasks"]


def test_without_a_folder_the_hub_is_asked_and_its_absence_is_one_sentence(monkeypatch):
    asked = []

    def hub(path, name, **kwargs):
        asked.append((path, name))
        raise ConnectionError("no way\nthere")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    sentence = told(load, "gsm8k", None)
    assert asked == [("openai/gsm8k", "main")]
    assert "openai/gsm8k could not be had from the hub (no way)" in sentence
    assert sentence.endswith(
        "Put gsm8k/train.jsonl and gsm8k/test.jsonl into a folder and give that folder as dataset.path."
    )


def test_what_the_hub_gives_is_read_like_the_local_files(monkeypatch):
    rows = task_files.read("gsm8k", DATA)
    given = DatasetDict({split: Dataset.from_list(its) for split, its in rows.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **kwargs: given)
    (ours,), (local,) = load("gsm8k", None)["tasks"].values(), load("gsm8k", DATA)["tasks"].values()
    (theirs,) = load("gsm8k", None, builtin=True)["tasks"].values()
    for task in (ours, local, theirs):
        task.build_all_requests()
    texts = [[instance.arguments for instance in task.instances] for task in (ours, local, theirs)]
    assert texts[0] == texts[1] == texts[2]


def test_the_protocol_s_examples_go_with_the_harness_s_own_task_as_well(monkeypatch):
    rows = task_files.read("gsm8k", DATA)
    given = DatasetDict({split: Dataset.from_list(its) for split, its in rows.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **kwargs: given)
    for asked, shown in ((None, 4), (2, 2)):
        (task,) = load("gsm8k", None, builtin=True, num_fewshot=asked)["tasks"].values()
        assert type(task).__name__ == "ConfigurableTask"
        assert task.config.num_fewshot == shown


def test_a_builtin_task_that_cannot_be_loaded_is_one_sentence():
    assert "minerva_math cannot be loaded here" in told(load, "minerva_math", None, builtin=True)


def test_a_builtin_task_that_does_not_exist_names_the_nearest():
    assert "did you mean gsm8k_cot?" in told(build.builtin, "gsm8k_cott", ["gsm8k"], None, 1)


@pytest.mark.parametrize(("name", "path"), [("gsm8k", DATA), ("tiny", None)])
def test_a_builtin_task_takes_no_data_of_ours(name, path):
    assert "leave dataset.builtin out" in told(load, name, path, builtin=True)


def test_a_complete_task_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("gsm8k", DATA)["missing"] == []


def test_checking_does_not_wait_for_the_harness():
    program = "import sys; from evaluation.task_files import check; check('bbh', None); print('lm_eval' in sys.modules)"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert answer.stdout.strip() == "False"
