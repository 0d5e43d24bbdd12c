"""From the task files to the tasks that the harness runs. Called by `evaluation.task_files.load_tasks`."""

import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets import DatasetDict
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from evaluation.tasks.protocol import ProtocolTask

OURS = Path(__file__).parent
HARNESS = Path(lm_eval.tasks.__file__).parent

Config = dict[str, Any]
Tasks = dict[str, Any]  # what `lm_eval.evaluate` takes as task_dict, and "missing": names of subtasks without documents


def configs(name: str) -> tuple[Config, list[Config]]:
    """A task file: the group's settings (empty for a single task), and the settings of each of its tasks.

    A group's file says under ``each`` what its tasks share, and under ``members`` what differs: either as it stands, or as
    the folder of the harness whose files say so.
    """
    config = load_yaml(OURS / f"{name}.yaml")
    if "group" not in config:
        return {}, [config]
    each, members = config.pop("each"), config.pop("members")
    if isinstance(members, str):
        files = sorted(file for file in (HARNESS / members).glob("*.yaml") if not file.name.startswith("_"))
        members = [load_yaml(file, recursive=False) for file in files]
    own = [{key: value for key, value in member.items() if key not in ("include", "tag")} for member in members]
    return config, [deepcopy(each) | member for member in own]


def build(name: str, documents: Callable[[Config], DatasetDict | None] | None, shots: int, seed: int, instead: str) -> Tasks:
    """One of our tasks.

    Args:
        documents: the splits of a task with these settings, None if it has none; None: all from the hub.
        shots: examples before each document. seed: of their choice.
        instead: for error messages, what a user without the hub can do.

    Raises:
        ValueError: no documents, or fewer examples than are to be shown.
    """
    group_config, members = configs(name)
    tasks, missing = [], []
    for config in members:
        given = documents(config) if documents else None
        if documents and given is None:
            missing.append(config.get("dataset_name") or config["task_alias"])
            continue
        task = ProtocolTask(config | {"num_fewshot": shots}, given, seed, instead)
        if shots > len(task.sampler.df):
            raise ValueError(
                f"dataset.num_fewshot={shots}: {task.task_name} has {len(task.sampler.df)} examples to show, ask for fewer."
            )
        tasks.append(task)
    if not tasks:
        raise ValueError(f"there are no documents for any subtask of {name}. {instead}")
    found: Tasks = {"tasks": {task.task_name: task for task in tasks}, "groups": {}, "group_map": {}, "missing": missing}
    if group_config:
        group = Group.from_config(group_config)
        for task in tasks:
            group.add(task)
        found |= {"groups": {group.name: group}, "group_map": {group.name: group.child_names}}
    if missing:
        warnings.warn(
            f"{name}: {len(missing)} of {len(members)} subtasks have no documents here and are left out of the mean: "
            f"{', '.join(missing)}.",
            stacklevel=3,
        )
    return found


def builtin(name: str, folders: list[str] | None, shots: int | None, seed: int) -> Tasks:
    """A task as the harness has it.

    Args:
        name: of a task, group or tag of the harness.
        folders: where its files lie among the harness's; None: look through all of them (ten seconds and more).
        shots: None for the harness's own number. seed: of their choice, and of whatever the task draws while it loads.

    Raises:
        ValueError: the harness has no such task, cannot load it here, or would run what the model writes.
    """
    paths = None if folders is None else [str(HARNESS / folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=paths is None)
    if name not in manager.all_tasks:
        near = get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
        raise ValueError(f"dataset.name={name!r} is no task of the harness: did you mean {near[0]}?")
    random.seed(seed)
    try:
        found: Tasks = dict(manager.load([name]))
    except Exception as error:  # network, packages that are not there: the tasks raise what they like
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"the harness's own task {name} cannot be loaded here: {reason}") from error
    for task in found["tasks"].values():
        assert isinstance(task, Task)
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(
                f"dataset.name={name}: to score {task.task_name} the harness runs what the model writes, outside a sandbox; "
                "that is not done here. humaneval, humaneval_instruct and mbpp have one, without dataset.builtin."
            )
        own = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=own if shots is None else shots)
        task.set_fewshot_seed(seed)
    return found | {"missing": []}
