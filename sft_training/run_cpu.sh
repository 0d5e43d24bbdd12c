#!/usr/bin/env bash
# Why: data-parallel training without a GPU, to see a configuration run on several processes before a cluster does.
# How: bash sft_training/run_cpu.sh dataset.files=TOKENS.jsonl training.max_steps=100   (arguments go to sft.py, see configs/sft.yaml)
#      PROCESSES=2             how many processes; training stops if the launcher starts another number
#      DRY_RUN=1               print the command and the resolved configuration, and stop
#      PYTHON=.venv/bin/python which Python; DLLM_RUN_DIR: the run folder; OMP_NUM_THREADS: threads of each process
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
fi
processes=${PROCESSES:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} CUDA_VISIBLE_DEVICES=
export DLLM_RUN_DIR=${DLLM_RUN_DIR:-outputs/sft/$(date +%Y-%m-%d_%H-%M-%S)} # one folder for all processes

settings=(training.device=cpu "training.expect_processes=$processes" "$@")
launch=("$PYTHON" -m accelerate.commands.launch --config_file "$root/configs/accelerate/cpu.yaml"
  --num_processes "$processes" "$here/sft.py" "${settings[@]}")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%q ' "${launch[@]}"
  printf '\n\n'
  exec "$PYTHON" "$here/sft.py" "${settings[@]}"
fi
exec "${launch[@]}"
