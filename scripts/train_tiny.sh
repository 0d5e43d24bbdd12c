#!/usr/bin/env bash
# Why: makes the bundled model from nothing: corpus, tokenizer, training through sft_training/sft.py.
# How: bash scripts/train_tiny.sh [RUN_FOLDER] [hydra overrides of the masked stages …]; run it again after any stop, it goes on
# where it was. The finished model, measured and with its card, is RUN_FOLDER/bundle. STAGE_STEPS="4000 1000 1500 10000 6000"
# says how many optimizer steps each of the five stages takes, 0 leaves one out; TRAIN_ONLY=1 ends when the last one is trained.
# SEED=2 is another run on the same samples: other first weights, other masks, other rows (default 1, that of the bundled model).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
run="${1:-$root/runs/tiny}"
shift $(($# > 0 ? 1 : 0))
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || { echo "there is no $python: run bash install.sh first, or give PYTHON=…" >&2; exit 1; }
threads="${THREADS:-$(nproc)}"
seed="${SEED:-1}"
read -r -a steps <<< "${STAGE_STEPS:-4000 1000 1500 10000 6000}"
[[ "${steps[*]}" =~ ^([0-9]+\ ){4}[1-9][0-9]*$ ]] ||
  { echo "STAGE_STEPS is '${STAGE_STEPS:-}': give five numbers of steps, the last above 0, such as '4000 1000 1500 10000 6000'" >&2; exit 1; }

corpus() { # FOLDER SEED [more options]: make the samples, once
  [[ -e "$1/made.json" ]] && return
  echo "corpus: $1"
  "$python" "$root/dataset/tiny_corpus.py" --output_dir "$1" --samples "${SAMPLES:-300000}" --seed "$2" "${@:3}"
}
tokens() { # INPUT_DIR OUTPUT_FILE
  "$python" "$root/dataset/transfer_text2token.py" --input_dir "$1" --output_file "$2" \
    --tokenizer_model "$run/start" --max_length 288 --num_workers "$threads" --template chat
}
corpus "$run/text" 1
if [[ ! -e "$run/start/config.json" ]]; then
  "$python" "$root/dataset/tiny_tokenizer.py" --text "$run/text/train/problems.jsonl" --output_dir "$run/start"
fi
tokens "$run/text/train" "$run/train.jsonl"

mkdir -p "$run"
commit="$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)" # the code of every start, for the model card
grep -qsx "$commit" "$run/commits" || echo "$commit" >> "$run/commits"

# Large freed buffers stay with the process: page faults would otherwise cost a tenth of the time.
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
export OMP_NUM_THREADS="$threads"
least() { echo $(($1 < $2 ? $1 : $2)); }
sft() { # STEPS DECAY_STEPS [more overrides]; all stages: the same optimizer and seed
  local steps="$1" decay="$2"
  shift 2
  "$python" "$root/sft_training/sft.py" dataset.files="$run/train.jsonl" model.tokenizer="$run/start" \
    packing.attention=sample training.grad_accum_steps=1 training.optimizer=muon \
    'training.betas=[0.9,0.98]' training.schedule=wsd training.warmup_steps="$(least 100 $((steps - decay)))" \
    training.max_steps="$steps" training.decay_steps="$decay" \
    training.compile=true training.threads="$threads" training.seed="$seed" \
    training.save_steps=250 training.save_total_limit=2 training.logging_steps=10 "$@"
}

# Stage 1: predict the next token under a causal mask. Finding an operand in the prompt, and copying it,
# is learnt several times sooner that way (scripts/study_warm_up.sh measures it).
origin=(model=scratch model.config="$run/start")
if ((steps[0] > 0)); then
  if [[ ! -e "$run/warm_up/final/config.json" ]]; then
    sft "${steps[0]}" $((steps[0] * 15 / 100 + (steps[0] < 7))) "${origin[@]}" \
      loss.name=next_token view.tail_share=0 view.tail_max=0 view.block_share=0 \
      packing.max_length=288 training.local_batch_size=11 \
      training.learning_rate=6e-3 output_dir="$run/warm_up"
  fi
  origin=(model=tiny model.path="$run/warm_up/final")
fi

fill() { # STEPS DECAY_STEPS …: fill in masks; most samples are shown with all their blocks at once, in the states of decoding
  local steps="$1" decay="$2"
  shift 2
  sft "$steps" "$decay" view.block_share=0.85 view.every_block=true view.tail_share=0.8 view.tail_max=32 \
    forward_process.t_per=sample forward_process.t_max=1.0 "$@"
}
if [[ -n "${ONE_STAGE:-}" ]]; then # the studies train a masked stage of their own and measure for themselves
  fill 10000 7000 "${origin[@]}" packing.max_length=576 training.local_batch_size=5 'view.block_lengths=[8,16,32]' \
    forward_process.t_min=0.1 training.learning_rate=2e-3 \
    output_dir="$run/masked" "$@"
  exit
fi

# For the stages below: more of what is hard, word problems first.
SAMPLES="${SAMPLES:-200000}" corpus "$run/more" 3 --turns spell word add word json count word spell json table word count
SAMPLES="${SAMPLES:-120000}" corpus "$run/last" 4 --turns word count word json count word spell json word count add table
tokens "$run/more/train" "$run/more.jsonl"
tokens "$run/last/train" "$run/last.jsonl"

# Stages 2 to 5: blocks that grow. To fill in a block of one mask is to predict the next token, so the warm-up's knowledge
# carries over at once; then every stage has to see a little further ahead. Nearly all tokens of an answer are decided by the
# first look at a block, when all of it is masked, so that is what is shown most.
grow() { # STAGE STEPS DECAY_STEPS BLOCK_LENGTHS FIRST_LOOK_SHARE LEARNING_RATE [more overrides]
  local stage="$1" steps="$2" decay="$3" blocks="$4" first="$5" rate="$6"
  shift 6
  ((steps > 0)) || return 0
  if [[ ! -e "$run/$stage/final/config.json" ]]; then
    fill "$steps" "$decay" "${origin[@]}" packing.max_length=384 training.local_batch_size=8 \
      dataset.files="$run/more.jsonl" \
      forward_process.t_min=0.2 view.block_lengths="$blocks" view.first_look_share="$first" \
      training.learning_rate="$rate" output_dir="$run/$stage" "$@"
  fi
  origin=(model=tiny model.path="$run/$stage/final")
}
grow blocks_4 "${steps[1]}" 0 '[1,2,4]' 1.0 4e-3 training.schedule=constant "$@"
grow blocks_16 "${steps[2]}" 0 '[4,8,16]' 0.8 3e-3 training.schedule=constant "$@"
grow blocks_32 "${steps[3]}" $((steps[3] - $(least 500 $((steps[3] / 2))))) '[16,32,32,32]' 0.6 3e-3 "$@"
grow sft "${steps[4]}" $((steps[4] - $(least 200 $((steps[4] / 2))))) '[16,32,32,32,32,32]' 0.6 1.5e-3 \
  dataset.files="$run/last.jsonl" model.final_dtype=bf16 "$@"
[[ -z "${TRAIN_ONLY:-}" ]] || exit 0

"$python" "$root/scripts/eval_tiny.py" --model "$run/sft/final" --output "$run/evaluation.json"
"$python" "$root/scripts/bundle_tiny.py" --run "$run" --output "$run/bundle"
echo "finished: $run/bundle (to ship it: copy its files to dllm_var/bundled/tiny)"
