"""What an evaluation can be told: typed settings, checked as a whole before any model or data is loaded.

Used by ``eval.py``. The values and what they mean stand in ``configs/eval.yaml``, in ``configs/eval_model`` (whose files are
chosen with ``model=NAME``) and in the groups ``generation`` and ``cache``, whose options are those of `GenerationConfig`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from omegaconf import DictConfig

from dllm_var import GenerationConfig
from dllm_var.diffusion.likelihood import UNIT
from dllm_var.model.adapter import is_adapter, read_adapter
from dllm_var.model.checkpoint import load_config
from dllm_var.model.shards import survey
from dllm_var.pretrained import base_folder, resolve_folder
from dllm_var.text.chat import TEMPLATES
from evaluation import task_files
from evaluation.programs import require_consent
from sft_training.overrides import CONFIGS, check_overrides, compose_file, fill

DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}
GROUPS = ("model", "generation", "cache")
SAMPLING = "stratified"  # of the likelihood's masks


@dataclass(frozen=True)
class How:
    """How to decode and rate, for ``harness.py``. samples, sampling, seed: of the likelihood."""

    decoding: GenerationConfig
    batch_size: int
    samples: int
    sampling: str
    seed: int


@dataclass
class ModelSection:
    path: str = "tiny"
    adapter: Optional[str] = None  # noqa: UP045 (OmegaConf on Python 3.10 wants this spelling)
    dtype: str = "auto"
    template: str = "auto"


@dataclass
class DatasetSection:
    name: str = "tiny"
    path: Optional[str] = None  # noqa: UP045
    num_fewshot: Optional[int] = None  # noqa: UP045
    builtin: bool = False


@dataclass
class EvalConfig:
    """The whole of ``configs/eval.yaml``."""

    model: ModelSection = field(default_factory=ModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    generation: dict[str, Any] = field(default_factory=dict)
    cache: Optional[dict[str, Any]] = None  # noqa: UP045
    batch_size: int = 8
    seed: int = 0
    limit: Optional[int] = None  # noqa: UP045
    likelihood_samples: int = 128
    confirm_run_unsafe_code: bool = False
    output_dir: str = "outputs/eval"

    def decoding(self) -> GenerationConfig:
        """How to decode, checked."""
        return GenerationConfig.from_groups(self.generation, self.cache)

    def how(self) -> How:
        """What a worker has to know of the settings."""
        return How(self.decoding(), self.batch_size, self.likelihood_samples, SAMPLING, self.seed)

    @property
    def chat_template(self) -> bool:
        """Whether prompts are rendered as a chat: model.template, or what the task's protocol says."""
        if self.model.template != "auto":
            return self.model.template == "chat"
        protocol = task_files.TASK_NAMES.get(self.dataset.name)
        return protocol is None or protocol.chat_template

    @property
    def data_folder(self) -> Path | None:
        """dataset.path as a path."""
        return None if self.dataset.path is None else Path(self.dataset.path).expanduser()


def compose_settings(arguments: Sequence[str]) -> EvalConfig:
    """The settings of ``configs/eval.yaml`` with a command line's overrides.

    Raises:
        ValueError: as `for_hydra` and `typed` say.
    """
    return typed(compose_file("eval", for_hydra(arguments)))


def for_hydra(arguments: Sequence[str]) -> list[str]:
    """A command line as Hydra wants it, its keys checked.

    ``model=NAME`` chooses from the group ``eval_model``, because ``configs/model`` holds the models to train. Options of
    generation and cache are passed on even where the chosen file does not have them: `GenerationConfig` says why not.

    Raises:
        ValueError: a value that cannot be read, a key that does not exist, with the valid ones, or an unknown model.
    """
    made = []
    for word in check_overrides(arguments, EvalConfig, GROUPS):
        key, sign, value = word.partition("=")
        if key == "model" and sign:
            names = sorted(file.stem for file in (CONFIGS / "eval_model").glob("*.yaml"))
            unknown = [name for name in value.split(",") if name not in names]
            if unknown:
                raise ValueError(f"model={unknown[0]!r} is unknown: choose one of {', '.join(names)}, or model.path=FOLDER.")
            word = f"eval_model@{word}"
        elif key == "dataset":
            raise ValueError(f"{word}: a task is chosen with dataset.name={value}.")
        elif key.startswith(("generation.", "cache.")):
            word = f"++{word}"
        made.append(word)
    return made


def typed(config: DictConfig) -> EvalConfig:
    """The composed configuration as typed settings, every rule checked that needs no model.

    Raises:
        ValueError: an unknown key, a value out of range, options that contradict, an unknown task, files that are missing.
    """
    built = fill(config, EvalConfig)
    for name in ("batch_size", "limit", "likelihood_samples"):
        value = getattr(built, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    if not 0 <= built.seed < 2**32:
        raise ValueError(f"seed={built.seed}: give at least 0 and below 2^32, what the harness's generators take.")
    if built.likelihood_samples % UNIT[SAMPLING]:
        raise ValueError(f"likelihood_samples={built.likelihood_samples}: give a multiple of {UNIT[SAMPLING]}.")
    if built.model.dtype not in DTYPES:
        raise ValueError(f"model.dtype={built.model.dtype!r}: choose one of {', '.join(DTYPES)}.")
    if built.model.template not in ("auto", *TEMPLATES):
        raise ValueError(f"model.template={built.model.template!r}: choose one of auto, {', '.join(TEMPLATES)}.")
    decoding = built.decoding()
    if decoding.threshold is not None and decoding.threshold > 1:
        raise ValueError(
            f"generation.threshold={decoding.threshold} is above 1, which no confidence reaches: give at most 1 (one token "
            "per forward)."
        )
    _check_task(built)
    return built


def _check_task(config: EvalConfig) -> None:
    section = config.dataset
    if section.num_fewshot is not None and section.num_fewshot < 0:
        raise ValueError(f"dataset.num_fewshot={section.num_fewshot}: give at least 0, or null for the protocol's number.")
    if section.builtin:
        task_files.check_builtin(section.name, section.path)
    if section.builtin and section.name not in task_files.TASK_NAMES:
        return  # known to the harness or not: that takes a long look at all its tasks
    task_files.check(section.name, config.data_folder, section.num_fewshot)
    if task_files.TASK_NAMES[section.name].runs_programs:
        require_consent(config.confirm_run_unsafe_code)


def check_model(section: ModelSection) -> Path:
    """The folder of the model's weights, fetched if it is on the hub, looked at without reading a weight.

    Raises:
        ValueError: no such folder, no weights in it, or an adapter that does not belong to it.
    """
    folder = resolve_folder(section.path)
    if section.adapter is not None:
        adapter = read_adapter(resolve_folder(section.adapter))
        folder = base_folder(adapter, section.path)
    elif is_adapter(folder):
        folder = base_folder(read_adapter(folder))
    load_config(folder)
    survey(folder)
    return folder
