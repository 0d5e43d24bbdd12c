#!/usr/bin/env bash
# Why: what the left-to-right first stage of the bundled model's recipe is worth, and what the same network, data and number of
# steps give without any masks: three models of 7,500 steps, a third of the recipe's.
# How: bash scripts/study_warm_up.sh [RUN_FOLDER] [ARM], after scripts/train_tiny.sh has made that folder's data and warm-up. ARM is
# `recipe` (4,000 steps left to right, 3,500 with masks in growing blocks), `masked_only` (7,500 with masks in growing blocks, in the
# same proportions) or `left_to_right` (7,500 without masks; answered as an autoregressive model); default all of them. About an
# hour and three quarters on two cores with one arm on each (THREADS=1), and it goes on after any stop.
# Results: one JSON line each, of scripts/eval_tiny.py or, for the last, scripts/eval_ar_twin.py (evaluation/results/warm_up.jsonl
# has those of one run).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
arms="${2:-recipe masked_only left_to_right}"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || { echo "there is no $python: run bash install.sh first, or give PYTHON=…" >&2; exit 1; }
[[ -e "$run/warm_up/final/config.json" ]] ||
  { echo "$run has no warm_up/final: run bash scripts/train_tiny.sh $run first" >&2; exit 1; }
run="$(cd "$run" && pwd)"

for arm in $arms; do
  shared=(text more last start train.jsonl more.jsonl last.jsonl)
  overrides=()
  measure=(eval_tiny.py --settings "block 32" "block 16")
  case "$arm" in
    recipe) stage_steps="4000 350 500 1700 950" shared+=(warm_up) ;;
    masked_only) stage_steps="0 750 1070 3640 2040" ;;
    left_to_right)
      stage_steps="4000 0 0 2550 950" shared+=(warm_up) measure=(eval_ar_twin.py)
      overrides=(loss.name=next_token view.tail_share=0 view.tail_max=0 view.block_share=0 view.every_block=false
        view.first_look_share=0) ;;
    *) echo "there is no arm $arm: recipe, masked_only or left_to_right" >&2; exit 1 ;;
  esac
  out="$run/warm_up_study/$arm"
  mkdir -p "$out"
  for part in "${shared[@]}"; do
    ln -sfn "$run/$part" "$out/$part"
    [[ "$part" != *.jsonl ]] || ln -sfn "$run/$part.summary.json" "$out/$part.summary.json"
  done
  STAGE_STEPS="$stage_steps" TRAIN_ONLY=1 bash "$root/scripts/train_tiny.sh" "$out" "${overrides[@]}"
  [[ -e "$out/evaluation.json" ]] ||
    "$python" "$root/scripts/${measure[0]}" "${measure[@]:1}" --model "$out/sft/final" --output "$out/evaluation.json"
done
tail -qn 1 "$run"/warm_up_study/*/evaluation.json
