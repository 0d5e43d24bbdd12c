"""Supervised fine-tuning: ``python sft_training/sft.py dataset.files=FILE.jsonl training.max_steps=1000``.

The settings are explained in ``configs/sft.yaml``. Everything a run leaves lies in ``output_dir``: checkpoints, the final
model in LLaDA's format (``final``), run.json, metrics.jsonl, loss.png, TensorBoard events. The same command with the same
output_dir goes on from the newest checkpoint, with the same losses as if it had not stopped.
"""

import dllm_var.quiet  # noqa: F401  # isort: skip (before transformers)
import logging
import os
import shutil
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

from dllm_var.model.checkpoint import load_config
from dllm_var.model.config import warn_beyond_context
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.speed import compile_network
from dllm_var.pretrained import Pretrained
from dllm_var.text.special_tokens import SpecialTokens
from sft_training.adapters import adapter_facts, attach, plan_adapter, save_network
from sft_training.build import (
    build_collate,
    build_model,
    build_stream,
    check_processes,
    open_files,
    open_tokenizer,
    sample_rules,
    shape_folder,
    training_steps,
    world_size,
)
from sft_training.checkpoints import PARTIAL, RunStopped, checkpoint_to_resume, full_disk_told, resume_stream, step_of
from sft_training.config import SftConfig
from sft_training.overrides import check_overrides, compose_settings, typed
from sft_training.precision import apply_fp8, check_fp8
from sft_training.records import Recorder, RunFile, write_config, write_run
from sft_training.run_folder import FINAL, check_origin, check_place, finished, make_ready, same_folder, take
from sft_training.sharding import (
    SameWay,
    acting,
    check_sharding,
    inside,
    masters,
    shards_weights,
    spare_the_compiler,
    suit_fsdp,
    weights_dtype,
)
from sft_training.trainer import SftTrainer
from sft_training.universal import load_universal, ready_for
from sft_training.validation import Validator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULE_NAMES = {"linear": "linear", "constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}

log = logging.getLogger(__name__)


def on_cpu(config: SftConfig) -> bool:
    """Whether the run stays on the CPU.

    Raises:
        ValueError: it must not, and there is no GPU that torch can use.
    """
    if config.training.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"training.device='cuda', but torch {torch.__version__} (CUDA {torch.version.cuda}) can use no GPU here: "
            "install a CUDA build of torch, or a newer driver (nvidia-smi)."
        )
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
        ddp_backend="gloo" if cpu and "LOCAL_RANK" in os.environ else None,
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


def facts(trainer: SftTrainer, special: SpecialTokens) -> dict[str, Any]:
    """The settings as they act, read from the built parts and not from the configuration."""
    assert trainer.optimizer is not None
    assert trainer.lr_scheduler is not None
    optimizer, args, scheduler = inside(trainer.optimizer), trainer.args, trainer.lr_scheduler
    peak, schedule = scheduler.base_lrs[0], scheduler.lr_lambdas[0]
    return {
        "optimizer": [type(part).__name__ for part in getattr(optimizer, "parts", [optimizer])],
        "lr_at_steps": {str(step): peak * schedule(step) for step in (0, 50, 100)},
        "max_steps": args.max_steps,
        "world_size": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "sharding": acting(trainer),
        "device": str(args.device),
        "tokens_per_step": trainer.rows_per_step * trainer.config.packing.max_length,
        "weights": str(next(trainer.network.parameters()).dtype).removeprefix("torch."),
        "master_weights": str(masters(trainer.optimizer).dtype).removeprefix("torch."),
        "autocast": trainer.accelerator.mixed_precision,
        "fp8": getattr(trainer.network, "fp8_report", None),
        "parameters": trainer.parameters,
        **adapter_facts(trainer.network),
        "threads": torch.get_num_threads(),
        "samples": len(trainer.stream.mixture),
        "sources": trainer.stream.sources(trainer.stream.first_row),
        "special_tokens": {"mask": special.mask, "stop": list(special.stop), "pad": special.pad},
    }


def prepare(config: SftConfig) -> tuple[SftTrainer, Path | None]:
    """Everything up to the first step: the trainer, and the checkpoint from which it goes on.

    Raises:
        ValueError: settings, data or checkpoint are not usable; weights are read last.
    """
    check_processes(config.training.expect_processes)
    way = check_sharding(config, world_size())
    if config.training.threads is not None:
        torch.set_num_threads(config.training.threads)
    tokenizer, special = open_tokenizer(config)
    shape, fp8 = load_config(shape_folder(config)), config.precision.fp8
    vocabulary = shape.embedding_rows
    check_fp8(fp8, shape, on_cpu(config))
    held_out = None
    if config.validation.files is not None:
        rules = sample_rules(config, vocabulary, special, tokenizer)
        held_out = open_files("validation.files", config.validation.files, rules)
    if config.packing.attention == "full":
        warn_beyond_context(shape, config.packing.max_length, "rows of packing.max_length tokens reach")
    max_steps = training_steps(config, vocabulary, special, tokenizer)
    stream = build_stream(config, vocabulary, special, tokenizer)
    if on_cpu(config) and way.startswith("zero"):
        spare_the_compiler()
    args = arguments(config, max_steps)
    config.output_dir = args.output_dir = same_folder(config.output_dir)
    take(Path(config.output_dir))
    checkpoint = checkpoint_to_resume(Path(config.output_dir), config.resume)
    plan = plan_adapter(config, checkpoint, way)
    universal = False
    if checkpoint is not None:
        if step_of(checkpoint) > max_steps:
            raise ValueError(
                f"{checkpoint} is past the {max_steps} steps of this run: raise training.max_steps, or name an earlier "
                "checkpoint (resume=FOLDER), or start anew with resume=never."
            )
        if plan is None:  # an adapter looks at its base's weights instead
            check_origin(checkpoint, config.model)
        resume_stream(stream, checkpoint)
        universal = ready_for(checkpoint, way, args)
    stored = plan is not None and args.bf16  # a base that is not trained needs no more digits than it has on disk
    network = model = build_model(config, None if stored else weights_dtype(way, args.bf16))
    if fp8.backend is not None:
        apply_fp8(model, fp8.backend, fp8.recipe, fp8.emulate)
    if config.training.gradient_checkpointing:
        # the library is renaming it: releases know one name, the other, or both
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": way == "zero3"})  # ZeRO-3 hands out its shards while the other kind compares shapes
    if config.training.compile:
        compile_network(model, dynamic=False)
    if plan is not None:
        model = attach(network, plan, config.training.seed, args.device)
    folder = Path(config.output_dir)
    trainer = SftTrainer(model, args, config, stream, build_collate(config, special), tokenizer, [Recorder(folder)])
    if universal:
        load_universal(trainer)
    if way.startswith("fsdp"):
        suit_fsdp(trainer, network)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if held_out is not None:
        pretrained = Pretrained(network, tokenizer, special)
        trainer.add_callback(Validator(config.validation, held_out, pretrained, trainer.log, together=shards_weights(way)))
    trainer.add_callback(SameWay(trainer, way))
    trainer.add_callback(RunFile(folder, lambda: facts(trainer, special)))
    return trainer, checkpoint


def train(config: SftConfig) -> SftTrainer:
    """A whole run, from the settings to ``<output_dir>/final``; one that is complete already is left as it is.

    Raises:
        ValueError: as `prepare`.
        RunStopped: the run ended early, by a signal, a loss that is not finite, or a full disk.
    """
    trainer, checkpoint = prepare(config)
    folder = Path(config.output_dir)
    last = trainer.args.max_steps
    if checkpoint is not None and step_of(checkpoint) == last and finished(folder, last):
        log.warning(
            "%s is complete, all %d steps: nothing to do. Delete its %s to have it written again.", folder, last, FINAL
        )
        return trainer
    with full_disk_told(folder):
        if trainer.is_world_process_zero():
            make_ready(folder, checkpoint)
            write_config(folder, asdict(config))
        with trainer.guard.listening():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        step = trainer.state.global_step
        if trainer.guard.stopped_by is not None and step < last:
            raise RunStopped(
                f"{trainer.guard.stopped_by}: the run stopped after step {step} of {last} and is saved as "
                f"checkpoint-{step}; start it again with output_dir={folder} to go on."
            )
        whole = trainer.whole_network()
        if trainer.is_world_process_zero():
            finish(trainer, whole)
    return trainer


def finish(trainer: SftTrainer, whole: LLaDAModelLM) -> None:
    """Write ``final``, under another name until it is complete, and how the run ended."""
    folder, stream = Path(trainer.config.output_dir), trainer.stream
    written = folder / f"{PARTIAL}{FINAL}"
    save_network(whole, written, dtype=DTYPES[trainer.config.model.final_dtype])
    trainer.tokenizer.save_pretrained(written)
    shutil.rmtree(folder / FINAL, ignore_errors=True)  # of the same run, which ended before
    written.rename(folder / FINAL)
    sources = stream.sources(trainer.state.global_step * trainer.rows_per_step)
    dropped = sum(source["dropped"] for source in sources.values())
    ended = {"steps": trainer.state.global_step, "dropped_samples": dropped, "rows_left_over": stream.left_over}
    write_run(folder, {**ended, "sources": sources, "skipped_steps": trainer.guard.skipped})


def per_step(config: SftConfig) -> str:
    """What an optimizer step comes to, for people who look before they start."""
    t, processes = config.training, config.training.expect_processes or world_size()
    rows = t.local_batch_size * t.grad_accum_steps * processes
    return (
        f"# an optimizer step: {t.local_batch_size} rows x {t.grad_accum_steps} micro-batches x {processes} process(es) = "
        f"{rows} rows of {config.packing.max_length} = {rows * config.packing.max_length} tokens"
    )


def dry_run() -> bool:
    """Whether the settings are only to be shown.

    Raises:
        ValueError: DRY_RUN is neither 0 nor 1.
    """
    asked = os.environ.get("DRY_RUN") or "0"
    if asked not in ("0", "1"):
        raise ValueError(f"DRY_RUN={asked}: give 1 (only show the settings) or 0.")
    return asked == "1"


@hydra.main(version_base="1.3", config_path="../configs", config_name="sft")
def _main(composed: DictConfig) -> None:
    try:
        config = typed(composed)
        if dry_run():
            print(yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
            print(per_step(config))
            return
        # The process group ends while Python still runs: at its exit a thread of the group can abort a finished run.
        train(config).accelerator.end_training()
    except (ValueError, RunStopped) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        raise SystemExit(f"sft.py: {error}") from error
    except KeyboardInterrupt:
        sys.exit("sft.py: interrupted; what was saved is whole, and the same command goes on from there.")


def main() -> None:
    """Command-line entry."""
    try:
        if not any(argument.startswith("-") for argument in sys.argv[1:]):  # a flag for Hydra itself, such as --cfg job
            config = compose_settings(sys.argv[1:])  # so that a mistake leaves no run folder behind
            check_place(Path(config.output_dir))
        sys.argv[1:] = check_overrides(sys.argv[1:])
        dry = dry_run()
    except ValueError as error:
        raise SystemExit(f"sft.py: {error}") from error
    if int(os.environ.get("RANK", "0")) > 0:  # one run folder and one log, written by the first process
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.run.dir=."]
    if dry:
        sys.argv += ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra.run.dir=."]
    _main()


if __name__ == "__main__":
    main()
