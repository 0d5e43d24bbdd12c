#!/usr/bin/env bash
# Why: fine-tune LLaDA-8B on machines with Hopper GPUs (8 each by default): FP8 matrix products, ZeRO-2, rows of 8192 tokens
#      and the published hyper-parameters. Three passes over the data; the published run never ended by itself
#      (training.max_steps=2000000).
# How: bash sft_training/run_gpus_fp8.sh dataset.files=TOKENS.jsonl output_dir=runs/llada
#      DRY_RUN=1 bash sft_training/run_gpus_fp8.sh     shows what would run, on any machine
#      model.path=FOLDER model.tokenizer=FOLDER        where the weights lie, if not in ./LLaDA-8B-Base
# Number of GPUs, several machines, Slurm and other ways to share the model: see launch.sh. Arguments: see configs/sft.yaml.
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/launch.sh"
train_on_gpus precision=fp8 "$@"
