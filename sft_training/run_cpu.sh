#!/usr/bin/env bash
# Why: training on several processes without a GPU, to see a configuration run before a cluster does.
# How: bash sft_training/run_cpu.sh dataset.files=TOKENS.jsonl training.max_steps=100   (arguments go to sft.py, see configs/sft.yaml)
#      PROCESSES=2             how many processes; training stops if the launcher starts another number
#      SHARD=zero2             share gradients and optimizer out with DeepSpeed (zero3: the weights too); default ddp: nothing
#      DRY_RUN=1               print the command and the resolved configuration, and stop
# All variables: see launch.sh.
set -euo pipefail
source "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/launch.sh"
train_on_cpus "$@"
