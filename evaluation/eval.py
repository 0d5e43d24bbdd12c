"""Measure a model on a benchmark: ``python evaluation/eval.py dataset.name=gsm8k model=llada-inst generation=vanilla``.

The settings are explained in ``configs/eval.yaml``; without any, the bundled model answers its own suite. Several processes
(``accelerate launch --num_processes 4 evaluation/eval.py …``) share the requests and give the same result as one. The same
command with the same output_dir goes on where it was stopped.
"""

import dllm_var.quiet  # isort: skip (before transformers)
import hashlib
import json
import os
import platform
import random
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import hydra
import numpy as np
import torch
from omegaconf import DictConfig

from dllm_var import Pretrained, load_pretrained
from dllm_var.model.adapter import WEIGHTS_FILE
from dllm_var.model.checkpoint import weights_hash
from dllm_var.model.shards import file_hash
from dllm_var.pretrained import lacks_memory, resolve_folder
from evaluation import task_files
from evaluation.settings import DTYPES, EvalConfig, check_model, compose_settings, for_hydra, typed
from evaluation.team import Team, device, launcher_warning, part
from sft_training.overrides import check_folder

SAMPLES_FILE = "samples.jsonl"
# What decides over tokens beside the weights, where a model's folder holds it.
READ_WITH_WEIGHTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "token_freq.json", "adapter_config.json")
LIBRARIES = ("lm_eval", "torch", "transformers", "tokenizers")
DECIDES = ("model_sha256", "adapter_sha256", "model_files", "dtype", "device_type", "versions", "code_sha256")
INPUTS = {
    "model_sha256": "the weights", "adapter_sha256": "the adapter", "model_files": "tokenizer or config",
    "data_files": "the problems", "code_sha256": "the code of dllm_var", "versions": "the libraries",
}  # fmt: skip
ONLY_SPEED = ("batch_size", "output_dir")  # settings that do not decide over a result


def open_model(config: EvalConfig, at: torch.device) -> Pretrained:
    """The model, with its adapter if there is one."""
    section = config.model
    given = (section.path, None) if section.adapter is None else (section.adapter, section.path)
    return load_pretrained(given[0], DTYPES[section.dtype], at, base=given[1])


def inputs(config: EvalConfig, folder: Path) -> dict[str, Any]:
    """What a result depends on beside the settings, as hashes: model, problems and code; reads all weights once."""
    section = config.model
    adapter = None if section.adapter is None else resolve_folder(section.adapter)
    own = resolve_folder(section.path)
    if adapter is None and own != folder:
        adapter = own
    files = [place / name for place in (folder, adapter) if place is not None for name in READ_WITH_WEIGHTS]
    if "frequency_file" in config.generation and config.generation["frequency_file"] is not None:
        files.append(Path(config.generation["frequency_file"]))
    data = [] if config.data_folder is None else task_files.files_of(config.dataset.name, config.data_folder).values()
    return {
        "model": section.path,
        "model_sha256": weights_hash(folder),
        "adapter": section.adapter,
        "adapter_sha256": None if adapter is None else file_hash(adapter / WEIGHTS_FILE),
        "model_files": {f"{file.parent.name}/{file.name}": file_hash(file) for file in files if file.is_file()},
        "data_files": {file.name: file_hash(file) for file in data},
        "versions": {name: version(name) for name in LIBRARIES},
        "code_sha256": code_hash(),
    }


def environment(model: Pretrained, team: Team) -> dict[str, Any]:
    """Where it ran."""
    at = model.model.device
    return {
        "device": torch.cuda.get_device_name(at) if at.type == "cuda" else platform.processor() or platform.machine(),
        "device_type": at.type,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "world_size": team.size,
        "python": platform.python_version(),
    }


def code_hash() -> str:
    """SHA-256 of our own sources that an answer goes through: the package `dllm_var`."""
    root = Path(dllm_var.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def is_complete(folder: Path, config: EvalConfig, given: dict[str, Any]) -> bool:
    """Whether the results of just these settings and `inputs` are in this folder already.

    Raises:
        ValueError: the results of others are.
    """
    from evaluation import report

    if not (folder / report.RESULTS_FILE).is_file():
        return False
    facts, settings = report.read(folder)["facts"], asdict(config)
    before = facts.get("settings", {})
    other = [name for name, value in settings.items() if name not in ONLY_SPEED and before.get(name) != value]
    for name, words in INPUTS.items():
        if facts.get(name) != given[name]:
            other.append(words)
    if other:
        raise ValueError(f"output_dir={folder} holds results of other settings ({', '.join(other)}): give another folder.")
    return True


def write_samples(folder: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    """How each problem was scored, a line per problem and filter."""
    with (folder / SAMPLES_FILE).open("w", encoding="utf-8") as file:
        for task, own in samples.items():
            for sample in own:
                chosen = {
                    name: sample[name] for name in ("doc_id", "filter", "target", "filtered_resps", *sample["metrics"])
                }
                prompt = {name: sample[name] for name in ("doc_hash", "prompt_hash")}
                file.write(json.dumps({"task": task, **chosen, **prompt}, default=str) + "\n")


def lead(config: EvalConfig, team: Team) -> None:
    """The first process: everything but the others' share of the requests.

    Raises:
        ValueError: settings, data or model are not usable; the weights are read last.
    """
    started, folder = time.time(), Path(config.output_dir)
    weights = check_model(config.model)
    facts = inputs(config, weights)
    if is_complete(folder, config, facts):
        print(f"eval.py: {folder} is complete: nothing to do", file=sys.stderr)
        return
    at = device()
    random.seed(config.seed)
    np.random.seed(config.seed)  # noqa: NPY002 (the harness draws from the global generators)
    from lm_eval import evaluate  # seconds to import, and every mistake above was told by now

    from evaluation import report
    from evaluation.harness import DiffusionLM
    from evaluation.store import Answer, ResponseStore, merge

    tasks = task_files.load_tasks(
        config.dataset.name, path=config.data_folder, num_fewshot=config.dataset.num_fewshot, seed=config.seed,
        confirm_run_unsafe_code=config.confirm_run_unsafe_code, builtin=config.dataset.builtin,
    )  # fmt: skip
    with ResponseStore(folder) as store:
        team.hand_out([folder] * team.size)
        model = open_model(config, at)
        team.bring_together(None)
        facts |= environment(model, team)
        lm = DiffusionLM(model, config.how(), team, store, {name: facts[name] for name in DECIDES})
        results = evaluate(
            lm=lm, task_dict=tasks, limit=config.limit, bootstrap_iters=1000, apply_chat_template=config.chat_template,
            fewshot_as_multiturn=False, confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        )  # fmt: skip
        assert results is not None
    merge(folder)
    write_samples(folder, results["samples"])
    decoding = {name: value for name, value in asdict(config.decoding()).items() if value is not None}
    facts |= {
        "task": config.dataset.name,
        "builtin_task": config.dataset.builtin,
        "missing_subtasks": tasks.get("missing", []),
        "chat_template": config.chat_template,
        "generation": decoding,
        "seed": config.seed,
        "limit": config.limit,
        "batch_size": config.batch_size,
        "answers_reused": lm.reused,
        "not_read_from_the_task": lm.unread,
        "seconds_end_to_end": time.time() - started,
        "settings": asdict(config),
    }
    report.write(folder, results, [record for record in lm.records.values() if isinstance(record, Answer)], facts)
    print((folder / report.TABLE_FILE).read_text(encoding="utf-8"))
    print(f"{folder / report.RESULTS_FILE}: {lm.reused} of {len(lm.records)} answers were there before")


def help_out(config: EvalConfig, team: Team) -> None:
    """The other processes: their share of the requests, until there are no more."""
    at = device()
    folder = team.hand_out()
    if folder is None:  # something was not usable
        return
    from evaluation.harness import Worker
    from evaluation.store import ResponseStore

    with ResponseStore(folder, team.rank) as store:
        worker = Worker(open_model(config, at), config.how(), store)
        team.bring_together(None)
        while (batches := team.hand_out()) is not None:
            team.bring_together(worker.run(batches))


def run(config: EvalConfig) -> None:
    """A whole evaluation, in every process of it."""
    team = Team()
    try:
        if team.rank > 0:
            help_out(config, team)
            return
        if warning := launcher_warning():
            print(f"eval.py: WARNING: {warning}", file=sys.stderr)
        print(f"eval.py: {team.size} process(es), results in {config.output_dir}", file=sys.stderr)
        lead(config, team)
    finally:
        team.dismiss()


@hydra.main(version_base="1.3", config_path="../configs", config_name="eval")
def _main(composed: DictConfig) -> None:
    kept = f"the answers given so far are in {composed.get('output_dir')}: the same command goes on there."
    try:
        run(typed(composed))
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        refuse(error)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        refuse(
            ValueError("the memory is not enough: lower batch_size or the length of the answers, or take a smaller model.")
        )
    except OSError as error:  # a full disk, for one
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        refuse(ValueError(f"{error}; {kept}"))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print(f"eval.py: stopped; {kept}", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        part()


def refuse(error: ValueError) -> NoReturn:
    """One sentence, from the first process, and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"eval.py: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def main() -> None:
    """Command-line entry."""
    try:
        if not any(argument.startswith("-") for argument in sys.argv[1:]):  # a flag for Hydra itself, such as --cfg job
            config = compose_settings(sys.argv[1:])  # so that a mistake leaves no run folder behind
            check_folder("output_dir", Path(config.output_dir))
        sys.argv[1:] = for_hydra(sys.argv[1:])
    except ValueError as error:
        refuse(error)
    if int(os.environ.get("RANK", "0")) > 0:  # one run folder and one log, written by the first process
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.run.dir=."]
    _main()


if __name__ == "__main__":
    main()
