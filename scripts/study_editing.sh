#!/usr/bin/env bash
# Why: does training on visible wrong tokens (forward_process.edit_share, an experiment of ours) make editing while decoding
# (enable_editing) useful, and what does it cost?
# How: bash scripts/study_editing.sh [RUN_FOLDER], after scripts/train_tiny.sh has finished that run. Goes on training its model
# for STEPS steps (default 800) twice, with a tenth of the visible tokens checked and with none, and measures both with and
# without editing on 100 held-out problems a task. Results: one JSON line each.
# Found on an earlier bundled model (evaluation/results/editing.jsonl): trained for it, editing lifts exact match from .70 to .80 for 1.7
# times the forwards; not trained for it, it lowers .67 to .65. Counting suffers from editing either way.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
steps="${STEPS:-800}"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -e "$run/sft/final/config.json" ]] ||
  { echo "$run has no sft/final: run bash scripts/train_tiny.sh $run first" >&2; exit 1; }

for share in 0 0.1; do
  out="$run/editing/share_$share"
  ONE_STAGE=1 bash "$root/scripts/train_tiny.sh" "$run" model.path="$run/sft/final" forward_process.edit_share="$share" \
    training.learning_rate=2e-3 training.max_steps="$steps" training.decay_steps="$steps" training.warmup_steps=0 \
    training.seed=2 output_dir="$out"
  "$python" "$root/scripts/eval_tiny.py" --model "$out/final" --prompts 100 --settings "block 32" editing --output "$out.json"
done
tail -n 1 "$run"/editing/*.json
