"""What a training run can be told: typed sections, checked as a whole before any model is loaded.

Read by everything in this folder, through ``overrides.py``. The values and what they mean stand in ``configs/sft.yaml``;
here are their types, and the rules between them that types cannot say.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from dllm_var.diffusion.corruption import ForwardProcess
from dllm_var.diffusion.decoding_view import DecodingView
from dllm_var.diffusion.objective import LOSSES
from dllm_var.diffusion.packing import Packer
from dllm_var.text.chat import TEMPLATES
from sft_training.precision import check_fp8_settings

SCHEDULES = ("linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "muon")
ATTENTIONS = ("full", "sample")
PRECISIONS = ("auto", "fp32", "bf16")
ADAPTERS = ("none", "lora", "qlora")
MOST_THREADS = 1024  # torch dies without a word of many more
MOST_SEED = 2**32 - 1  # of numpy
USUAL_PASSES = 3  # of LLaDA's SFT (2502.09992)


@dataclass
class ModelSection:
    path: Optional[str] = "tiny"  # noqa: UP045 (OmegaConf on Python 3.10 wants this spelling)
    from_scratch: bool = False
    config: Optional[str] = None  # noqa: UP045
    tokenizer: Optional[str] = None  # noqa: UP045
    final_dtype: str = "fp32"


@dataclass
class SourceSection:
    name: str = "data"
    weight: Optional[float] = None  # noqa: UP045
    files: Any = None
    hub: Optional[str] = None  # noqa: UP045
    split: str = "train"


@dataclass
class DatasetSection:
    files: Any = None
    hub: Optional[str] = None  # noqa: UP045
    split: str = "train"
    sources: list[SourceSection] = field(default_factory=list)
    template: str = "chat"
    epochs: Optional[int] = None  # noqa: UP045
    shuffle: bool = True
    shuffle_seed: int = 42
    prefetch_steps: int = 2


@dataclass
class PackingSection:
    max_length: int = 1024
    mode: str = "whole"
    open_rows: int = 8
    attention: str = "full"


@dataclass
class ViewSection:
    tail_share: float = 0.0
    tail_max: int = 0
    block_share: float = 0.0
    block_lengths: list[int] = field(default_factory=lambda: [8, 16, 32, 64])
    every_block: bool = False
    first_look_share: float = 0.0
    tail_eos: bool = False
    fill: bool = False


@dataclass
class ForwardSection:
    t_min: float = 0.1
    t_max: float = 0.9
    t_per: str = "row"
    always_mask_eos: bool = True
    edit_share: float = 0.0


@dataclass
class LossSection:
    name: str = "plain_mean"
    chunk: int = 1024


@dataclass
class Fp8Section:
    backend: Optional[str] = None  # noqa: UP045
    recipe: str = "tensorwise"
    emulate: bool = False


@dataclass
class PrecisionSection:
    dtype: str = "auto"
    fp8: Fp8Section = field(default_factory=Fp8Section)


@dataclass
class AdapterSection:
    kind: str = "none"
    r: int = 32
    alpha: int = 256
    dropout: float = 0.05
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])


@dataclass
class TrainingSection:
    max_steps: Optional[int] = None  # noqa: UP045
    local_batch_size: int = 2
    grad_accum_steps: int = 4
    optimizer: str = "adamw"
    learning_rate: float = 2.5e-5
    schedule: str = "linear"
    warmup_steps: int = 50
    decay_steps: int = 0
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    seed: int = 42
    logging_steps: int = 1
    save_steps: int = 4000
    save_total_limit: Optional[int] = 10  # noqa: UP045
    on_nan: str = "stop"
    gradient_checkpointing: bool = False
    compile: bool = False
    device: str = "auto"
    threads: Optional[int] = None  # noqa: UP045
    expect_processes: Optional[int] = None  # noqa: UP045
    trace_rows: bool = False


@dataclass
class ValidationSection:
    files: Any = None
    every: int = 500
    samples: int = 64
    decodes: int = 16
    block_length: int = 32
    threshold: float = 0.9
    max_gen_length: int = 256
    seed: int = 0


@dataclass
class SftConfig:
    """The whole of ``configs/sft.yaml``, section by section."""

    model: ModelSection = field(default_factory=ModelSection)
    dataset: DatasetSection = field(default_factory=DatasetSection)
    packing: PackingSection = field(default_factory=PackingSection)
    view: ViewSection = field(default_factory=ViewSection)
    forward_process: ForwardSection = field(default_factory=ForwardSection)
    loss: LossSection = field(default_factory=LossSection)
    precision: PrecisionSection = field(default_factory=PrecisionSection)
    adapter: AdapterSection = field(default_factory=AdapterSection)
    training: TrainingSection = field(default_factory=TrainingSection)
    validation: ValidationSection = field(default_factory=ValidationSection)
    output_dir: str = "outputs/sft"
    resume: str = "auto"

    def passes(self) -> int | None:
        """Passes over the data: dataset.epochs, else as many as training.max_steps needs (None), else `USUAL_PASSES`."""
        if self.dataset.epochs is None and self.training.max_steps is None:
            return USUAL_PASSES
        return self.dataset.epochs

    def view_settings(self) -> DecodingView:
        """The settings of the decoding view, checked."""
        return DecodingView(**{**vars(self.view), "block_lengths": tuple(self.view.block_lengths)})

    def process_settings(self) -> ForwardProcess:
        """The settings of the forward process, checked."""
        return ForwardProcess(**vars(self.forward_process))


def check(config: SftConfig) -> None:
    """The rules between settings.

    Raises:
        ValueError: naming option, value and fix.
    """
    config.view_settings()
    config.process_settings()
    Packer(**_packing(config))
    _choice("packing.attention", config.packing.attention, ATTENTIONS)
    if config.view.every_block and (config.packing.attention, config.packing.mode) != ("sample", "whole"):
        raise ValueError(
            f"view.every_block=true with packing.attention={config.packing.attention!r} and packing.mode="
            f"{config.packing.mode!r}: its blocks must not see each other, which takes attention=sample and mode=whole."
        )
    if config.view.fill and config.packing.mode != "whole":
        raise ValueError(f"view.fill=true with packing.mode={config.packing.mode!r}: a sample per row takes mode=whole.")
    _choice("loss.name", config.loss.name, LOSSES)
    _choice("precision.dtype", config.precision.dtype, PRECISIONS)
    check_fp8_settings(config)
    if config.forward_process.edit_share > 0 and config.loss.name in ("elbo", "next_token"):
        raise ValueError(
            f"forward_process.edit_share={config.forward_process.edit_share} with loss.name={config.loss.name!r}: visible "
            "tokens can only be trained with plain_mean or token_sum_global."
        )
    if config.view.block_share > 0 and config.loss.name == "next_token":
        raise ValueError(
            f"view.block_share={config.view.block_share} with loss.name='next_token': blocks are for filling in masks. Set "
            "view.block_share=0."
        )
    _choice("model.final_dtype", config.model.final_dtype, ("fp32", "bf16"))
    training = config.training
    _choice("training.optimizer", training.optimizer, OPTIMIZERS)
    _choice("training.schedule", training.schedule, SCHEDULES)
    _choice("training.device", training.device, ("auto", "cpu", "cuda"))
    _at_least("loss.chunk", config.loss.chunk, 1)
    _choice("training.on_nan", training.on_nan, ("stop", "skip"))
    for name in ("local_batch_size", "grad_accum_steps", "logging_steps", "save_steps"):
        _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("max_steps", "expect_processes", "save_total_limit"):
        if getattr(training, name) is not None:
            _at_least(f"training.{name}", getattr(training, name), 1)
    for name in ("learning_rate", "warmup_steps", "decay_steps", "weight_decay", "max_grad_norm"):
        _at_least(f"training.{name}", getattr(training, name), 0)
    if training.threads is not None:
        _at_least("training.threads", training.threads, 1, MOST_THREADS)
    validation = config.validation
    for name, seed in (("training", training.seed), ("validation", validation.seed)):
        _at_least(f"{name}.seed", seed, 0, MOST_SEED)
    for name in ("every", "samples", "block_length", "max_gen_length"):
        _at_least(f"validation.{name}", getattr(validation, name), 1)
    _at_least("validation.decodes", validation.decodes, 0)
    if not 0 <= validation.threshold <= 1:
        raise ValueError(f"validation.threshold={validation.threshold}: a confidence to reach is at least 0 and at most 1.")
    if config.dataset.epochs is not None:
        _at_least("dataset.epochs", config.dataset.epochs, 1)
    if (training.schedule == "wsd") != (training.decay_steps > 0):
        raise ValueError(
            f"training.schedule={training.schedule!r} with training.decay_steps={training.decay_steps}: wsd needs "
            "decay_steps >= 1, the other schedules decay_steps=0."
        )
    if training.max_steps is not None:
        check_schedule(training, training.max_steps)
    if len(training.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in training.betas):
        raise ValueError(f"training.betas={training.betas}: give two numbers in [0, 1).")
    check_sources(config.dataset)
    _choice("dataset.template", config.dataset.template, TEMPLATES)
    _at_least("dataset.prefetch_steps", config.dataset.prefetch_steps, 0)
    _check_adapter(config)
    _check_model(config)


def check_schedule(training: TrainingSection, steps: int) -> None:
    """Whether wsd's warm-up and decay have room in a run of so many optimizer steps.

    Raises:
        ValueError: naming option, value and fix.
    """
    needed = training.warmup_steps + training.decay_steps
    if training.schedule == "wsd" and needed > steps:
        raise ValueError(
            f"training.warmup_steps={training.warmup_steps} and training.decay_steps={training.decay_steps} take {needed} "
            f"steps, but the run has {steps}: lower them, or let it run longer."
        )


def _check_adapter(config: SftConfig) -> None:
    adapter = config.adapter
    _choice("adapter.kind", adapter.kind, ADAPTERS)
    _at_least("adapter.r", adapter.r, 1)
    _at_least("adapter.alpha", adapter.alpha, 1)
    if not 0.0 <= adapter.dropout < 1.0:
        raise ValueError(f"adapter.dropout={adapter.dropout}: must be at least 0 and below 1.")
    if adapter.kind == "none":
        for name, value in vars(adapter).items():
            if value != getattr(AdapterSection(), name):
                raise ValueError(
                    f"adapter.{name}={value} has no effect without an adapter: add adapter=lora, or leave it out."
                )
        return
    if not adapter.targets:
        raise ValueError(f"adapter.kind={adapter.kind!r} with adapter.targets=[]: name at least one layer.")
    if config.training.optimizer == "muon":
        raise ValueError(
            "training.optimizer='muon' with an adapter: Muon is made for whole matrices, not for the two factors of a "
            "product. Set training.optimizer=adamw."
        )
    if config.model.from_scratch:
        raise ValueError("model.from_scratch=true with an adapter: its base would be lost, so give model.path instead.")


def check_sources(section: DatasetSection) -> None:
    """The rules of ``dataset``: one kind of place for the samples, and sources that can be told apart.

    Raises:
        ValueError: naming option, value and fix.
    """
    given = [name for name in ("files", "hub", "sources") if getattr(section, name) not in (None, [])]
    if not given:
        raise ValueError(
            "dataset.files is not set: give one tokenised JSON Lines file, a glob or a list of them "
            "(dataset/transfer_text2token.py writes such files); or set dataset.hub or dataset.sources."
        )
    if len(given) > 1:
        both = f"dataset.{given[0]} and dataset.{given[1]} are both set"
        raise ValueError(f"{both}: give one of them (dataset.sources may list files and hub datasets).")
    names = [source.name for source in section.sources]
    for number, source in enumerate(section.sources):
        place = f"dataset.sources[{number}]"
        if not source.name or "/" in source.name or names.count(source.name) > 1:
            raise ValueError(f"{place}.name={source.name!r}: every source needs a name of its own, without '/'.")
        if (source.files is None) == (source.hub is None):
            raise ValueError(f"{place} ({source.name}): give either files or hub.")
        if source.weight is None or not 0 < source.weight < float("inf"):
            raise ValueError(f"{place}.weight={source.weight}: give a number above 0, its share of the samples drawn.")
    for place, source in [("dataset", section), *((f"dataset.sources[{i}]", s) for i, s in enumerate(section.sources))]:
        if source.hub is None and source.split != "train":
            raise ValueError(f"{place}.split={source.split!r}: only a hub dataset has splits, and {place}.hub is not set.")


def _check_model(config: SftConfig) -> None:
    model = config.model
    if model.from_scratch:
        if model.config is None:
            raise ValueError("model.from_scratch=true needs model.config=FOLDER with the config.json of the new model.")
        if model.path is not None:
            raise ValueError(f"model.from_scratch=true starts from random weights: set model.path=null (is {model.path!r}).")
        if model.tokenizer is None:
            raise ValueError("model.from_scratch=true needs model.tokenizer=FOLDER with the tokenizer of the data.")
    elif model.path is None:
        raise ValueError("model.path is null: give a checkpoint folder or 'tiny', or set model.from_scratch=true.")
    elif model.config is not None:
        raise ValueError(f"model.config={model.config!r} only goes with model.from_scratch=true: a checkpoint has its own.")


def packer_of(config: SftConfig, pad_id: int) -> Packer:
    """An empty packer with the configured settings."""
    return Packer(**_packing(config), pad_id=pad_id)


def _packing(config: SftConfig) -> dict[str, Any]:
    section = config.packing
    return {
        "length": section.max_length,
        "mode": section.mode,
        "open_rows": section.open_rows,
    }


def _choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(valid)}.")


def _at_least(name: str, value: float, low: float, most: float = math.inf) -> None:
    if not low <= value <= most:
        raise ValueError(f"{name}={value}: must be at least {low}{f' and at most {most}' if most < math.inf else ''}.")
    if value == math.inf:
        raise ValueError(f"{name}={value}: must be finite.")
