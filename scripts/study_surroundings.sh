#!/usr/bin/env bash
# Why: does a model learn to stop when packed rows show it the next prompt? What `view` in configs/sft.yaml is there for.
# How: bash scripts/study_surroundings.sh [RUN_FOLDER], after scripts/train_tiny.sh has made that folder's data and warm-up. From
# the warm-up, which has never seen a mask, trains STEPS steps (default 800) on the same samples three times: strict packing
# (published), mask-only tails, and tails with block views, each sample seeing itself alone; measures stopping and exact match
# on 100 held-out problems a task. It goes on after any stop. Results: one JSON line each in RUN_FOLDER/surroundings/STEPS
# (evaluation/results/surroundings.jsonl has those of one run).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
steps="${STEPS:-800}"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || { echo "there is no $python: run bash install.sh first, or give PYTHON=…" >&2; exit 1; }
[[ -e "$run/warm_up/final/config.json" ]] ||
  { echo "$run has no warm_up/final: run bash scripts/train_tiny.sh $run first" >&2; exit 1; }

study() { # NAME OVERRIDES...: train one variant, then measure it
  local out="$run/surroundings/$steps/$1"
  shift
  [[ -e "$out/final/config.json" ]] ||
    bash "$root/scripts/train_tiny.sh" "$run" training.max_steps="$steps" training.warmup_steps=$((steps / 8)) \
      training.decay_steps=$((steps / 4)) training.save_total_limit=1 output_dir="$out" "$@"
  [[ -e "$out.json" ]] ||
    "$python" "$root/scripts/eval_tiny.py" --model "$out/final" --prompts 100 --settings "block 32" --output "$out.json"
}

export ONE_STAGE=1
study strict view.tail_share=0 view.tail_max=0 view.block_share=0 view.every_block=false packing.attention=full
study tails view.tail_share=0.8 view.tail_max=32 view.block_share=0 view.every_block=false packing.attention=full
study block_views
tail -qn 1 "$run/surroundings/$steps"/*.json
