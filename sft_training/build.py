"""From settings to parts: tokenizer, model, stream of rows, and how many processes share the work.

Called by ``sft.py`` and ``dataset/inspect_rows.py``.
"""

import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dllm_var.model.checkpoint import load_config, load_model
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.pretrained import resolve_folder
from dllm_var.text.special_tokens import SpecialTokens, resolve
from dllm_var.text.tokenizer import load_tokenizer
from sft_training.config import SftConfig, SourceSection, check_schedule, packer_of
from sft_training.data import Collate, RowStream
from sft_training.mixture import Mixture, Source
from sft_training.samples import SampleFiles, SampleRules, Samples, find_files

FIRST_LOOK = 100  # samples

log = logging.getLogger(__name__)


def shape_folder(config: SftConfig) -> Path:
    """The folder whose config.json says the model's shape.

    Raises:
        ValueError: no such folder.
    """
    section = config.model
    return Path(str(section.config)) if section.from_scratch else resolve_folder(str(section.path))


def open_tokenizer(config: SftConfig) -> tuple[PreTrainedTokenizerBase, SpecialTokens]:
    """Tokenizer and control tokens of the run, checked against the model's config before any weight is read."""
    folder = shape_folder(config)
    tokenizer = load_tokenizer(config.model.tokenizer or folder)
    return tokenizer, resolve(tokenizer, load_config(folder))


def build_model(config: SftConfig, dtype: torch.dtype | None = torch.float32) -> LLaDAModelLM:
    """The model to train: loaded (dtype None: as stored), or new with weights drawn from training.seed."""
    if config.model.from_scratch:
        torch.manual_seed(config.training.seed)
        return LLaDAModelLM(load_config(shape_folder(config))).to(dtype)
    return load_model(shape_folder(config), dtype)


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_processes(expected: int | None) -> None:
    """Compare the number of processes with the one that was asked for: launchers start a single one without a word.

    Raises:
        ValueError: they differ.
    """
    if expected is not None and world_size() != expected:
        raise ValueError(
            f"training.expect_processes={expected}, but the launcher started {world_size()} process(es). On a machine "
            "without GPUs use sft_training/run_cpu.sh or torchrun --nproc_per_node."
        )


def rows_per_step(config: SftConfig) -> int:
    """Rows of an optimizer step over all processes."""
    return config.training.local_batch_size * config.training.grad_accum_steps * world_size()


def sample_rules(
    config: SftConfig, vocabulary: int, special: SpecialTokens, tokenizer: PreTrainedTokenizerBase | None
) -> SampleRules:
    """What makes a sample of a record; without a tokenizer only records of token ids are samples."""
    return SampleRules(vocabulary, special.mask, tokenizer, config.dataset.template)


def open_files(option: str, given: Any, rules: SampleRules) -> Samples:
    """The samples in the files that a setting names.

    Raises:
        ValueError: no file, files of two kinds, or one that cannot be used.
    """
    files = find_files(option, given)
    tables = [path for path in files if path.suffix == ".parquet"]
    if not tables:
        return SampleFiles(files, rules)
    if len(tables) < len(files):
        raise ValueError(f"{option} names Parquet files ({tables[0]}) and others: make two of dataset.sources of them.")
    from sft_training.tables import open_parquet

    return open_parquet(files, rules)


def build_mixture(config: SftConfig, rules: SampleRules) -> Mixture:
    """All sources of the run, opened."""
    section = config.dataset
    single = SourceSection("data", 1.0, section.files, section.hub, section.split)
    sources = []
    for number, source in enumerate(section.sources or [single]):
        place = f"dataset.sources[{number}]" if section.sources else "dataset"
        if source.hub is None:
            samples = open_files(f"{place}.files", source.files, rules)
        else:
            from sft_training.tables import open_hub

            samples = open_hub(f"{place}.hub", source.hub, source.split, rules)
        sources.append(Source(source.name, samples, source.weight))
    shuffle_seed = section.shuffle_seed if section.shuffle else None
    return Mixture(sources, seed=config.training.seed, shuffle_seed=shuffle_seed)


def build_stream(
    config: SftConfig, vocabulary: int, special: SpecialTokens, tokenizer: PreTrainedTokenizerBase | None = None
) -> RowStream:
    """The global stream of packed rows; sources of text need a tokenizer.

    Raises:
        ValueError: a source that cannot be used, or whose answers never end.
    """
    mixture = build_mixture(config, sample_rules(config, vocabulary, special, tokenizer))
    for source in mixture.sources:
        check_ends(source, special.stop)
    return RowStream(
        mixture,
        config.view_settings(),
        packer_of(config, special.pad),
        seed=config.training.seed,
        mask_id=special.mask,
        eos_id=special.eos,
        epochs=config.passes(),
        rows_per_step=rows_per_step(config),
        ahead=config.dataset.prefetch_steps,
    )


def check_ends(source: Source, stop: tuple[int, ...]) -> None:
    """Look for stop tokens in the first answers of a source: without any, a model would never learn where answers end.

    Raises:
        ValueError: there is none, as where the ids are those of another tokenizer; or there are no answers.
    """
    first = [source.samples[i] for i in range(min(FIRST_LOOK, len(source.samples)))]
    answers = [sample.ids[sample.response] for sample in first if sample.response.any()]
    if first and not answers:
        raise ValueError(
            f"{source.name}: none of the first {len(first)} samples has a response to learn from: prompt_length is their "
            "whole length, or loss_runs is empty."
        )
    if answers and not any(np.isin(answer, stop).any() for answer in answers):
        raise ValueError(
            f"{source.name}: none of the first {len(answers)} responses holds a stop token ({', '.join(map(str, stop))}). "
            "Were they made for another model? dataset/transfer_text2token.py --tokenizer_model makes them for this one."
        )


def training_steps(
    config: SftConfig, vocabulary: int, special: SpecialTokens, tokenizer: PreTrainedTokenizerBase | None = None
) -> int:
    """training.max_steps, or as many as the passes over the data give (found by packing them once).

    Raises:
        ValueError: the passes give fewer steps than asked for, not even one, or too few for the schedule.
    """
    wanted = config.training.max_steps
    if config.passes() is None:
        assert wanted is not None
        return wanted
    log.info("packing %d pass(es) once to count the steps; training.max_steps spares that", config.passes())
    size = rows_per_step(config)
    stream = build_stream(config, vocabulary, special, tokenizer)
    steps = sum(1 for _ in islice(stream, wanted and wanted * size)) // size
    if steps == 0:
        raise ValueError(
            f"dataset.epochs={config.passes()} gives {stream.left_over} rows, fewer than the {size} of one optimizer step: "
            "lower training.local_batch_size or training.grad_accum_steps, or raise dataset.epochs."
        )
    if wanted is not None and steps < wanted:
        raise ValueError(
            f"training.max_steps={wanted}, but dataset.epochs={config.passes()} gives {steps} steps: lower max_steps, raise "
            "epochs, or set one of them to null."
        )
    check_schedule(config.training, steps)
    return steps


def build_collate(config: SftConfig, special: SpecialTokens) -> Collate:
    """What turns rows into corrupted micro-batches."""
    return Collate(
        config.process_settings(),
        seed=config.training.seed,
        mask_id=special.mask,
        stop=special.stop,
        next_token=config.loss.name == "next_token",
        always_real=config.packing.mode == "whole",
        within_sample=config.packing.attention == "sample",
        staged=config.view.every_block,
        sources=tuple(source.name for source in config.dataset.sources),
    )
