"""The tasks of the protocol: what is known of each, where its documents are found, and how it is loaded.

Called by ``evaluation/eval.py``: `check` before anything is loaded, then `load_tasks`. The texts, stop strings, filters and
metrics are in ``evaluation/tasks``. Documents come from a folder (``dataset.path``) or, without one, from the hub.
"""

import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dataset.tiny_corpus import HELD_OUT_SEED, fresh_prompts
from evaluation.programs import require_consent

Row = dict[str, Any]

TINY_PROBLEMS = 500  # of each kind
MBPP_TEST = range(11, 511)  # task ids of its test split

SUBTASK = "*.json"  # instead of a file's name: one file for each subtask
TYPES = {str: "text", int: "a whole number", list: "a list"}


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task without loading it.

    Attributes:
        harness_name: of the task or group in the harness's results.
        harness_folders: where its own files lie among the harness's.
        shots: examples that the protocol shows. most_shots: as many as there are at all, None where any number goes.
        chat_template: whether the protocol uses it.
        runs_programs: scoring executes what the model wrote.
        folder, files: a local copy: file of each split in FOLDER or FOLDER/folder.
        columns: of those files, with their types. entries: the least length of a list.
    """

    harness_name: str
    harness_folders: tuple[str, ...]
    shots: int
    most_shots: int | None
    chat_template: bool = True
    runs_programs: bool = False
    folder: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, type] = field(default_factory=dict)
    entries: Mapping[str, int] = field(default_factory=dict)


_HUMANEVAL: dict[str, Any] = {
    "harness_folders": ("humaneval",), "shots": 0, "most_shots": 0, "runs_programs": True,
    "folder": "humaneval", "files": {"test": "HumanEval.jsonl"},
    "columns": {"task_id": str, "prompt": str, "entry_point": str, "canonical_solution": str, "test": str},
}  # fmt: skip

TASK_NAMES: dict[str, TaskFacts] = {
    "gsm8k": TaskFacts(
        "gsm8k", ("gsm8k",), shots=4, most_shots=None,
        folder="gsm8k", files={"train": "train.jsonl", "test": "test.jsonl"}, columns={"question": str, "answer": str},
    ),
    "gpqa": TaskFacts(
        "gpqa_main_generative_n_shot", ("gpqa/generative",), shots=5, most_shots=None, chat_template=False,
        folder="gpqa", files={"train": "gpqa_main.csv"},
        columns={
            "Question": str, "Correct Answer": str,
            "Incorrect Answer 1": str, "Incorrect Answer 2": str, "Incorrect Answer 3": str,
        },
    ),
    "mmlu": TaskFacts(
        "mmlu_generative", ("mmlu/generative",), shots=5, most_shots=5,
        folder="mmlu", files={"dev": "dev.jsonl", "test": "test.jsonl"},
        columns={"subject": str, "question": str, "choices": list, "answer": int}, entries={"choices": 4},
    ),
    "humaneval_instruct": TaskFacts("humaneval_instruct", **_HUMANEVAL),
    "humaneval": TaskFacts("humaneval", **_HUMANEVAL),
    "mbpp": TaskFacts(
        "mbpp", ("mbpp",), shots=3, most_shots=3, runs_programs=True,
        folder="mbpp", files={"test": "mbpp.jsonl"},
        columns={"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
        entries={"test_list": 3},
    ),
    "bbh": TaskFacts(
        "bbh", ("bbh/cot_fewshot",), shots=3, most_shots=3,
        folder="bbh", files={"test": SUBTASK}, columns={"input": str, "target": str},
    ),
    "minerva_math": TaskFacts(
        "minerva_math", ("minerva_math", "benchmarks"), shots=4, most_shots=4,
        folder="math", files={"test": "test.jsonl"}, columns={"problem": str, "level": str, "type": str, "solution": str},
    ),
    "mmlu_pro": TaskFacts(
        "mmlu_pro", ("mmlu_pro",), shots=0, most_shots=5,
        folder="mmlu_pro", files={"validation": "validation.jsonl", "test": "test.jsonl"},
        columns={"category": str, "question": str, "options": list, "answer": str, "cot_content": str},
    ),
    "tiny": TaskFacts("tiny", (), shots=0, most_shots=0),
}  # fmt: skip


def check(name: str, path: Path | None, num_fewshot: int | None = None) -> None:
    """Look at everything that can be wrong with these settings before anything is loaded; reads the local files whole.

    Raises:
        ValueError: an unknown task, examples that it does not have, a missing file, or a file with a wrong line, which the
            message names with its column.
    """
    if name not in TASK_NAMES:
        nearest = difflib.get_close_matches(name, TASK_NAMES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"dataset.name={name!r} is unknown: did you mean {nearest}? Choose one of {', '.join(TASK_NAMES)}; other tasks "
            "of the harness go with dataset.builtin=true."
        )
    most = TASK_NAMES[name].most_shots
    if num_fewshot is not None and (num_fewshot < 0 or (most is not None and num_fewshot > most)):
        raise ValueError(
            f"dataset.num_fewshot={num_fewshot}: {name} has {'any number of' if most is None else most} examples to show; "
            "leave it out for the protocol's number."
        )
    if path is not None:
        read(name, path)


def check_builtin(name: str, path: object) -> None:
    """Whether a task may be the harness's own.

    Raises:
        ValueError: it is only ours, local files are given, or scoring it would run programs outside the sandbox.
    """
    if path is not None or name == "tiny":
        what = "dataset.name=tiny" if name == "tiny" else f"dataset.path={path}"
        raise ValueError(f"{what} goes with our own task files only: leave dataset.builtin out.")
    if name in TASK_NAMES and TASK_NAMES[name].runs_programs:
        raise ValueError(
            f"dataset.builtin=true: the harness would run the programs of {name} outside a sandbox. Leave dataset.builtin "
            "out: ours asks the same problems and runs them in one."
        )


def load_tasks(
    name: str,
    *,
    path: Path | None,
    num_fewshot: int | None,
    seed: int,
    confirm_run_unsafe_code: bool,
    builtin: bool = False,
) -> dict[str, Any]:
    """The task in the form that ``lm_eval.evaluate(task_dict=…)`` takes.

    Its further key ``missing`` names subtasks that were left out because there are no documents for them.

    Args:
        name: one of `TASK_NAMES`; with ``builtin`` also any other task of the harness.
        path: folder with the documents; None: the hub.
        num_fewshot: None for the protocol's number.
        seed: of the choice of examples.
        confirm_run_unsafe_code: consent to execute what the model writes, where scoring needs that.
        builtin: the task as the harness has it, with its data from the hub.

    Raises:
        ValueError: as `check` and `check_builtin`; no consent; data that are neither here nor on the hub; a task that the
            harness cannot load.
    """
    from evaluation.tasks import build  # the harness takes seconds to import; `check` must not wait for it

    if builtin:
        check_builtin(name, path)
        known = TASK_NAMES.get(name)
        if known is None:
            return build.builtin(name, None, num_fewshot, seed)
        shots = known.shots if num_fewshot is None else num_fewshot
        return build.builtin(known.harness_name, list(known.harness_folders), shots, seed)

    check(name, None, num_fewshot)
    facts = TASK_NAMES[name]
    if facts.runs_programs:
        require_consent(confirm_run_unsafe_code)
    documents = None
    if name == "tiny" or path is not None:
        rows = {} if path is None else read(name, path)
        documents = partial(_documents, name, rows)
    shots = facts.shots if num_fewshot is None else num_fewshot
    return build.build(name, documents, shots, seed, _instead(name))


def read(name: str, path: Path) -> dict[str, list[Row]]:
    """The checked rows of a task's local files: by split, or by subtask where each has a file of its own.

    Raises:
        ValueError: files that are missing or wrong, with file, line and column.
    """
    return {key: _rows(name, file) for key, file in files_of(name, path).items()}


def files_of(name: str, path: Path) -> dict[str, Path]:
    """A task's local files: by split, or by subtask where each has a file of its own.

    Raises:
        ValueError: there is no such folder, or it lacks a file.
    """
    facts = TASK_NAMES[name]
    if not facts.files:
        raise ValueError(f"dataset.path={path}: the problems of {name} are made here, leave dataset.path out.")
    if not path.is_dir():
        raise ValueError(f"dataset.path={path} is no folder. {_instead(name)}")
    folder = path / facts.folder if (path / facts.folder).is_dir() else path
    files = {split: folder / file for split, file in facts.files.items()}
    if SUBTASK in facts.files.values():
        files = {subtask: folder / f"{subtask}.json" for subtask in subtasks(name) if (folder / f"{subtask}.json").is_file()}
    absent = [str(file) for file in files.values() if not file.is_file()]
    if absent or not files:
        raise ValueError(f"dataset.path={path}: {' and '.join(absent) or 'any file'} of {name} is missing. {_instead(name)}")
    return files


def subtasks(name: str) -> list[str]:
    """Names of the subtasks for which the harness has a file each, without importing it."""
    spec = find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0], "tasks", TASK_NAMES[name].harness_folders[0])
    return sorted(file.stem for file in folder.glob("*.yaml") if not file.name.startswith("_"))


def _rows(name: str, file: Path) -> list[Row]:
    facts, rows = TASK_NAMES[name], []
    try:
        for place, row in _parsed(file):
            for column, kind in facts.columns.items():
                at = f"{file}, {place}, column {column!r}"
                if not isinstance(row, dict) or column not in row:
                    raise ValueError(f"{at} is missing: {name} needs {', '.join(facts.columns)}.")
                if not isinstance(row[column], kind):
                    raise ValueError(f"{at} holds {row[column]!r} where {TYPES[kind]} belongs.")
                if kind is list and len(row[column]) < facts.entries.get(column, 1):
                    raise ValueError(f"{at} has {len(row[column])} entries, {facts.entries.get(column, 1)} are needed.")
            if name == "mmlu" and not 0 <= row["answer"] < len(row["choices"]):
                raise ValueError(
                    f"{file}, {place}, column 'answer' holds {row['answer']}: the choices are numbered from 0 on."
                )
            rows.append({column: row[column] for column in facts.columns})
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error.reason}.") from error
    if not rows:
        raise ValueError(f"{file} has no rows: {name} needs {', '.join(facts.columns)} in each.")
    return rows


def _parsed(file: Path) -> Iterator[tuple[str, Any]]:
    """What a file holds, each with the words for its place."""
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix == ".csv":
            reader = csv.DictReader(lines)
            for row in reader:
                yield f"line {reader.line_num}", row
            return
        texts = enumerate(lines, start=1) if file.suffix == ".jsonl" else [(1, lines.read())]
        for number, text in texts:
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number + error.lineno - 1}: is no JSON ({error.msg}).") from error
            if file.suffix == ".jsonl":
                yield f"line {number}", value
                continue
            examples = value.get("examples") if isinstance(value, dict) else None
            if not isinstance(examples, list):
                raise ValueError(f"{file}, line 1, column 'examples' is missing: a list of examples belongs there.")
            yield from ((f"example {n}", example) for n, example in enumerate(examples, start=1))


def _documents(name: str, rows: dict[str, list[Row]], config: dict[str, Any]) -> Any:
    """The splits of one task or subtask as a DatasetDict, or None if there is nothing to ask."""
    from datasets import Dataset, DatasetDict

    if name == "tiny":
        problems = fresh_prompts(config["dataset_name"], HELD_OUT_SEED, TINY_PROBLEMS)
        splits = {"test": [{"instruction": problem.instruction, "output": problem.output} for problem in problems]}
    elif SUBTASK in TASK_NAMES[name].files.values():
        splits = {"test": rows.get(config["dataset_name"], [])}
    else:
        splits = {split: [row for row in its if _belongs(name, row, config)] for split, its in rows.items()}
    if not all(splits.values()):
        return None
    return DatasetDict({split: Dataset.from_list(its) for split, its in splits.items()})


def _belongs(name: str, row: Row, config: dict[str, Any]) -> bool:
    if name == "mmlu":
        return bool(row["subject"] == config["dataset_name"])
    if name == "mmlu_pro":
        return bool(row["category"].replace(" ", "_") == config["task_alias"])
    if name == "minerva_math":
        return bool(row["type"].lower().replace("&", "and").replace(" ", "_") == config["dataset_name"])
    return name != "mbpp" or row["task_id"] in MBPP_TEST


def _instead(name: str) -> str:
    facts = TASK_NAMES[name]
    files = [f"{facts.folder}/{'SUBTASK.json' if file == SUBTASK else file}" for file in facts.files.values()]
    return f"Put {' and '.join(files)} into a folder and give that folder as dataset.path."
