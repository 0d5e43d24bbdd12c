"""Supervised fine-tuning: ``python sft_training/sft.py dataset.files=FILE.jsonl training.max_steps=1000``.

The settings are explained in ``configs/sft.yaml``. Everything a run leaves lies in ``output_dir``: checkpoints, the final
model in LLaDA's format (``final``), run.json, metrics.jsonl, loss.png, TensorBoard events. The same command with the same
output_dir goes on from the newest checkpoint, with the same losses as if it had not stopped.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from omegaconf import DictConfig
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dllm_var.model.checkpoint import load_config, save_model
from dllm_var.pretrained import Pretrained
from dllm_var.text.special_tokens import SpecialTokens
from sft_training.build import (
    build_collate,
    build_model,
    build_samples,
    build_stream,
    check_processes,
    compile_network,
    open_tokenizer,
    shape_folder,
    training_steps,
    world_size,
)
from sft_training.config import SftConfig
from sft_training.overrides import check_overrides, compose_settings, typed
from sft_training.records import Recorder, RunFile, write_config, write_run
from sft_training.trainer import SftTrainer, is_checkpoint, newest_checkpoint, resume_stream
from sft_training.validation import Validator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULE_NAMES = {"linear": "linear", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def on_cpu(config: SftConfig) -> bool:
    """Whether the run stays on the CPU."""
    return config.training.device == "cpu" or not torch.cuda.is_available()


def use_bf16(config: SftConfig) -> bool:
    """Whether matrix products run in bfloat16; ``auto``: where the hardware computes in it."""
    if config.precision.dtype != "auto":
        return config.precision.dtype == "bf16"
    if on_cpu(config):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def arguments(config: SftConfig, max_steps: int) -> TrainingArguments:
    """Our settings in the library's words.

    Raises:
        ValueError: several GPUs for one process, which the library would share out in a way that changes the batch.
    """
    t = config.training
    cpu = on_cpu(config)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(config.output_dir) / "tensorboard")
    args = TrainingArguments(
        output_dir=config.output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=t.local_batch_size,
        gradient_accumulation_steps=t.grad_accum_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=SCHEDULE_NAMES[t.schedule],
        lr_scheduler_kwargs={"num_decay_steps": t.decay_steps, "decay_type": "linear"} if t.schedule == "wsd" else {},
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        adam_beta1=t.betas[0],
        adam_beta2=t.betas[1],
        logging_steps=t.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=t.save_steps,
        save_total_limit=t.save_total_limit,
        seed=t.seed,
        bf16=use_bf16(config),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and world_size() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        accelerator_config={"dispatch_batches": False, "split_batches": False},
        remove_unused_columns=False,
        ignore_data_skip=True,  # the stream is put where it stood instead of being wound forward
        report_to=["tensorboard"],
        disable_tqdm=True,
    )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process for each (accelerate launch), or hide the others "
            "(CUDA_VISIBLE_DEVICES=0)."
        )
    return args


def checkpoint_to_resume(config: SftConfig) -> Path | None:
    """The checkpoint from which to go on, None for a fresh start.

    Raises:
        ValueError: resume names a folder that is no checkpoint.
    """
    if config.resume == "never":
        return None
    if config.resume == "auto":
        return newest_checkpoint(Path(config.output_dir))
    folder = Path(config.resume)
    if not is_checkpoint(folder):
        raise ValueError(f"resume={config.resume!r}: choose auto, never, or the folder of a complete checkpoint.")
    return folder


def facts(trainer: SftTrainer, special: SpecialTokens) -> dict[str, Any]:
    """The settings as they act, read from the built parts and not from the configuration."""
    assert trainer.optimizer is not None
    assert trainer.lr_scheduler is not None
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # inside the library's wrapper
    args, schedule = trainer.args, trainer.lr_scheduler.lr_lambdas[0]
    return {
        "optimizer": [type(part).__name__ for part in getattr(optimizer, "parts", [optimizer])],
        "lr_at_steps": {str(step): args.learning_rate * schedule(step) for step in (0, 50, 100)},
        "max_steps": args.max_steps,
        "world_size": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "device": str(args.device),
        "tokens_per_step": trainer.rows_per_step * trainer.config.packing.max_length,
        "weights": str(next(trainer.network.parameters()).dtype).removeprefix("torch."),
        "autocast": trainer.accelerator.mixed_precision,
        "parameters": sum(value.numel() for value in trainer.network.parameters()),
        "threads": torch.get_num_threads(),
        "samples": len(trainer.stream.samples),
        "special_tokens": {"mask": special.mask, "stop": list(special.stop), "pad": special.pad},
    }


def prepare(config: SftConfig) -> tuple[SftTrainer, Path | None]:
    """Everything up to the first step: the trainer, and the checkpoint from which it goes on.

    Raises:
        ValueError: settings, data or checkpoint are not usable; weights are read last.
    """
    check_processes(config.training.expect_processes)
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    tokenizer, special = open_tokenizer(config)
    vocabulary = load_config(shape_folder(config)).embedding_rows
    held_out = None
    if config.validation.files is not None:
        held_out = build_samples("validation.files", config.validation.files, vocabulary, special)
    checkpoint = checkpoint_to_resume(config)
    max_steps = training_steps(config, vocabulary, special)
    stream = build_stream(config, vocabulary, special)
    if checkpoint is not None:
        resume_stream(stream, checkpoint)
    args = arguments(config, max_steps)
    model = build_model(config)
    if config.training.gradient_checkpointing:
        # the library is renaming it: releases know one name, the other, or both
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.training.compile:
        compile_network(model)
    folder = Path(config.output_dir)
    trainer = SftTrainer(model, args, config, stream, build_collate(config, special), tokenizer, [Recorder(folder)])
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if held_out is not None:
        trainer.add_callback(Validator(config.validation, held_out, Pretrained(model, tokenizer, special), trainer.log))
    trainer.add_callback(RunFile(folder, lambda: facts(trainer, special)))
    return trainer, checkpoint


def train(config: SftConfig) -> SftTrainer:
    """A whole run, from the settings to ``<output_dir>/final``; raises what `prepare` raises."""
    trainer, checkpoint = prepare(config)
    folder = Path(config.output_dir)
    if trainer.is_world_process_zero():
        write_config(folder, asdict(config))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_world_process_zero():
        save_model(trainer.network, folder / "final", dtype=DTYPES[config.model.final_dtype])
        trainer.tokenizer.save_pretrained(folder / "final")
        stream = trainer.stream
        ended = {"steps": trainer.state.global_step, "dropped_samples": stream.dropped, "rows_left_over": stream.left_over}
        write_run(folder, ended)
    return trainer


@hydra.main(version_base="1.3", config_path="../configs", config_name="sft")
def _main(composed: DictConfig) -> None:
    try:
        config = typed(composed)
        if os.environ.get("DRY_RUN") == "1":
            print(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
            return
        train(config)
    except ValueError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise SystemExit(f"sft.py: {error}") from error


def main() -> None:
    """Command-line entry."""
    try:
        if any(argument.startswith("-") for argument in sys.argv[1:]):  # a flag for Hydra itself, such as --cfg job
            check_overrides(sys.argv[1:])
        else:
            compose_settings(sys.argv[1:])  # so that a mistake leaves no run folder behind
    except ValueError as error:
        raise SystemExit(f"sft.py: {error}") from error
    if int(os.environ.get("RANK", "0")) > 0:  # one run folder and one log, written by the first process
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout"]
    if os.environ.get("DRY_RUN") == "1":
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra.run.dir=."]
    _main()


if __name__ == "__main__":
    main()
