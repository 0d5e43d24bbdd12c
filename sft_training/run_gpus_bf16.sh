#!/usr/bin/env bash
# Why: the same fine-tuning as run_gpus_fp8.sh in bfloat16, for GPUs without FP8 (before Hopper) or as its yardstick.
# How: bash sft_training/run_gpus_bf16.sh dataset.files=TOKENS.jsonl output_dir=runs/llada     (see run_gpus_fp8.sh)
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/launch.sh"
train_on_gpus precision=bf16 "$@"
