#!/usr/bin/env bash
# Why: does a model learn to stop when packed rows show it the next prompt? Settles the defaults of `view` in configs/sft.yaml.
# How: bash scripts/study_surroundings.sh [RUN_FOLDER], after scripts/train_tiny.sh has made that folder's data. Trains the
# bundled shape STEPS steps (default 800) on the same samples three times: strict packing (published), mask-only tails, and
# tails with block views; measures stopping and exact match on 100 held-out problems a task. Results: one JSON line each.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
steps="${STEPS:-800}"
python="${PYTHON:-$root/.venv/bin/python}"

study() { # NAME OVERRIDES...: train one variant, then measure it
  local name="$1"
  shift
  bash "$root/scripts/train_tiny.sh" "$run" training.max_steps="$steps" training.decay_steps=$((steps / 4)) \
    training.save_total_limit=1 output_dir="$run/study/$name" "$@"
  "$python" "$root/scripts/eval_tiny.py" --model "$run/study/$name/final" --prompts 100 --settings "block 32" \
    --output "$run/study/$name.json"
}

export ONE_STAGE=1
study strict view.tail_share=0 view.tail_max=0 view.block_share=0 view.every_block=false packing.attention=full
study tails view.tail_share=0.8 view.tail_max=32 view.block_share=0 view.every_block=false packing.attention=full
study block_views
tail -n 1 "$run"/study/*.json
