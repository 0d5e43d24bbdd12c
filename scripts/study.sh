#!/usr/bin/env bash
# Why: the paper's table at laptop scale: what each part of the recipe does, on the same network, data, steps and seeds.
# How: bash scripts/study.sh [RUN_FOLDER], after scripts/train_tiny.sh has made that folder's data, its autoregressive warm-up
# and its finished model. As in the paper, a recipe that fills in masks is a fine-tuning of a masked model, here of that one; the
# autoregressive recipe goes on from the warm-up. STEPS (default 250) steps for each of SEEDS (default "1 2 3"), PROMPTS (default
# 40) problems of each task: four to five hours on two cores, by estimate.
# That masked model knows already how to stop. The recipes *_anew therefore start at the warm-up, which has never seen a mask,
# and take twice the steps.
# Run it again after any stop, it goes on where it was. RUN_FOLDER/study/STEPS holds report.json, report.md and report.png.
# Two numbers of STEPS show which conclusions do not depend on the budget.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
steps="${STEPS:-250}"
seeds="${SEEDS:-1 2 3}"
prompts="${PROMPTS:-40}"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || { echo "there is no $python: run bash install.sh first, or give PYTHON=…" >&2; exit 1; }
for base in warm_up sft; do
  [[ -e "$run/$base/final/config.json" ]] ||
    { echo "$run has no $base/final: run bash scripts/train_tiny.sh $run first" >&2; exit 1; }
done

recipe() { # NAME OVERRIDES...: train it from `base` with this seed, then decode with it in the ways of `measured`
  local name="$1" out="$run/study/$steps/$1-$seed"
  shift
  if [[ ! -e "$out/final/config.json" ]]; then
    ONE_STAGE=1 bash "$root/scripts/train_tiny.sh" "$run" training.max_steps="$steps" training.decay_steps=$((steps * 4 / 5)) \
      training.warmup_steps=$((steps / 5)) training.learning_rate=1e-3 training.save_total_limit=1 training.seed="$seed" \
      dataset.shuffle_seed="$seed" model.path="$run/$base/final" output_dir="$out" "$@"
  fi
  "$python" "$root/scripts/study_measure.py" --model "$out/final" --output "$out.json" "${measured[@]}"
}

# A step has 2,880 positions in all recipes.
plain=(view.every_block=false view.block_share=0)
full=("${plain[@]}" packing.attention=full)
no_tails=(view.tail_share=0 view.tail_max=0)
llada=("${plain[@]}" "${no_tails[@]}" view.fill=true forward_process.always_mask_eos=false forward_process.t_min=0.001
  loss.name=elbo packing.max_length=288 training.local_batch_size=10)
longer=(training.max_steps=$((steps * 2)) training.decay_steps="$steps" training.learning_rate=2e-3)
for seed in $seeds; do # a whole table first, then the next seed makes it surer
  base=sft
  measured=(--prompts "$prompts")
  recipe dllm_var
  recipe published "${full[@]}" "${no_tails[@]}" forward_process.t_max=0.9 forward_process.t_per=row
  recipe llada_sft "${llada[@]}"
  measured=(--prompts "$prompts" --ways "EOS-led blocks" "EOS-led blocks, 1024") # what one change of the first recipe does
  recipe eos_maskable forward_process.always_mask_eos=false
  recipe no_block_views "${plain[@]}"
  recipe tails "${full[@]}"
  recipe t_0_1 forward_process.t_min=0.001
  base=warm_up
  measured=(--prompts "$prompts" --autoregressive)
  recipe autoregressive "${plain[@]}" "${no_tails[@]}" loss.name=next_token
  measured=(--prompts "$prompts" --ways "EOS-led blocks" "pure diffusion 64")
  recipe dllm_var_anew "${longer[@]}"
  recipe llada_sft_anew "${llada[@]}" "${longer[@]}"
  recipe eos_maskable_anew forward_process.always_mask_eos=false "${longer[@]}"
  "$python" "$root/scripts/study_report.py" --input "$run/study/$steps" --output "$run/study/$steps/report"
done
