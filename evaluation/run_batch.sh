#!/usr/bin/env bash
# Why: the published protocol as a whole, eight tasks one after the other, with its shots and its choice of template.
# How: CONFIRM_RUN_UNSAFE_CODE=true PRETRAINED_PATH=maomaocun/dLLM-Var bash evaluation/run_batch.sh   (arguments go to eval.py)
#      --dry-run               first argument: print the commands, and stop
#      PRETRAINED_PATH=tiny    a folder, a name on the hub, or the bundled model
#      BLOCK_LENGTH=64 MAX_GEN_LENGTH=1024 THRESHOLD=0.9 BATCH_SIZE=1   how to decode (mmlu: one token, as published)
#      LOG_PATH=outputs/protocol    a folder for each task, and summary.md. The same command again goes on where this one was
#                              stopped: a task that is complete is not run again, and other settings are refused
#      TASKS="gsm8k bbh"       which of the eight
#      DATASET_PATH=FOLDER     local files in place of the hub; LIMIT=20: problems of each (sub)task
#      PROCESSES=4             default: one for each GPU, or one
#      CONFIRM_RUN_UNSAFE_CODE=true   humaneval_instruct and mbpp run the programs that the model writes, in a sandbox
#      PYTHON=.venv/bin/python
set -euo pipefail
folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$folder/../sft_training/launch.sh"

dry_run=0
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
TASKS=${TASKS:-gsm8k gpqa mmlu humaneval_instruct mbpp bbh minerva_math mmlu_pro}
LOG_PATH=${LOG_PATH:-outputs/protocol}
BLOCK_LENGTH=${BLOCK_LENGTH:-64} MAX_GEN_LENGTH=${MAX_GEN_LENGTH:-1024} BATCH_SIZE=${BATCH_SIZE:-1}
gpus=$(visible_gpus)
PROCESSES=${PROCESSES:-$((gpus > 0 ? gpus : 1))}
for name in BLOCK_LENGTH MAX_GEN_LENGTH BATCH_SIZE PROCESSES; do
  need_number "$name" 1
done
CONFIRM_RUN_UNSAFE_CODE=${CONFIRM_RUN_UNSAFE_CODE:-false}
programs=' (humaneval|humaneval_instruct|mbpp) '
if [[ " $TASKS " =~ $programs && $CONFIRM_RUN_UNSAFE_CODE != true ]] && ((dry_run == 0)); then
  fail "${BASH_REMATCH[1]} runs the programs that the model writes: set CONFIRM_RUN_UNSAFE_CODE=true, or leave it out of TASKS."
fi
find_python
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

launcher=("$PYTHON")
if ((PROCESSES > 1)); then # --multi_gpu: without it the launcher starts a single process where there are no GPUs
  launcher+=(-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$PROCESSES" --main_process_port 0)
fi
decoding=(generation=dllm_var "generation.threshold=${THRESHOLD:-0.9}" seed=1234)
given=("model.path=${PRETRAINED_PATH:-tiny}" "batch_size=$BATCH_SIZE")
[[ -z ${DATASET_PATH:-} ]] || given+=("dataset.path=$DATASET_PATH")
[[ -z ${LIMIT:-} ]] || given+=("limit=$LIMIT")

trap 'exit 130' INT # Ctrl-C ends the whole protocol, not one task of it
failed=() complete=()
for task in $TASKS; do
  lengths=("generation.block_length=$BLOCK_LENGTH" "generation.max_gen_length=$MAX_GEN_LENGTH")
  [[ $task != mmlu ]] || lengths=(generation.block_length=1 generation.max_gen_length=1)
  code=()
  [[ ! " $task " =~ $programs ]] || code=("confirm_run_unsafe_code=$CONFIRM_RUN_UNSAFE_CODE")
  command=("${launcher[@]}" "$folder/eval.py" "dataset.name=$task" "${decoding[@]}" "${lengths[@]}" "${given[@]}"
    ${code[@]+"${code[@]}"} "output_dir=$LOG_PATH/$task" "$@")
  printf '%q ' "${command[@]}"
  echo
  ((dry_run == 0)) || continue
  if "${command[@]}"; then
    complete+=("$LOG_PATH/$task")
  else
    failed+=("$task")
  fi
done
((dry_run == 0)) || exit 0

if ((${#complete[@]})); then
  mkdir -p "$LOG_PATH"
  "$PYTHON" "$folder/report.py" "${complete[@]}" | tee "$LOG_PATH/summary.md"
fi
((${#failed[@]} == 0)) || fail "not complete: ${failed[*]}. What went wrong is told above; the same command goes on from there."
