# What run_gpus_fp8.sh, run_gpus_bf16.sh and run_cpu.sh share: from the environment to one `accelerate launch`. Sourced, not run.
#
#   SHARD=zero2        how the processes share the model: a file of configs/accelerate (ddp, zero2, zero3; fsdp2 on GPUs)
#   DRY_RUN=1          print the command, the launcher's files and the resolved configuration, and stop; needs no GPU, no weights
#   GPUS_PER_NODE=8    processes of each machine; default: the GPUs that are visible here (run_cpu.sh: PROCESSES, default 2)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several machines: start the same line on each. Under Slurm (srun, one task
#                      for each machine) they are taken from its variables.
#   DLLM_RUN_DIR       the run folder (output_dir=… says the same); several machines need one on a disk that they share
#   PYTHON=.venv/bin/python   which Python
#   OMP_NUM_THREADS=1  threads of each process
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600   seconds for the checkpoint that a SIGTERM (preemption) asks for; whoever sends it must
#                      wait as long (Slurm: sbatch --signal=TERM@SECONDS)
# All other arguments go to sft.py: any setting of configs/sft.yaml.
[[ ${DRY_RUN:-0} == [01] ]] || {
  echo "$(basename "$0"): DRY_RUN=$DRY_RUN: give 1 (only show what would run) or 0." >&2
  exit 2
}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 2
}

# need_number NAME LOWEST: the variable NAME holds a whole number
need_number() {
  [[ ${!1} =~ ^(0|[1-9][0-9]*)$ ]] && ((${!1} >= $2)) || fail "$1=${!1}: give a whole number from $2 on."
}

visible_gpus() {
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    awk -F, '{ n = 0; while (n < NF && $(n + 1) !~ /^ *-/) n++; print n }' <<<"$CUDA_VISIBLE_DEVICES" # -1 ends the list
  elif command -v nvidia-smi >/dev/null; then
    nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true # of a broken driver it tells nothing here
  else
    echo 0
  fi
}

find_python() {
  if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x $root/.venv/bin/python ]] && PYTHON=$root/.venv/bin/python
  fi
  [[ $PYTHON != */* ]] || export PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH # DeepSpeed looks for ninja there
}

# Machines, this one's number, and the address at which they meet
find_machines() {
  NNODES=${NNODES:-${SLURM_NNODES:-1}}
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
  need_number NNODES 1
  need_number NODE_RANK 0
  ((NODE_RANK < NNODES)) || fail "NODE_RANK=$NODE_RANK with NNODES=$NNODES: machines are numbered from 0 to $((NNODES - 1))."
  if ((NNODES > 1)); then
    if [[ -z ${MASTER_ADDR:-} && -n ${SLURM_JOB_NODELIST:-} ]] && command -v scontrol >/dev/null; then
      MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # sed reads to the end: no broken pipe
    fi
    [[ -n ${MASTER_ADDR:-} ]] || fail "NNODES=$NNODES needs MASTER_ADDR=HOST, the address of machine 0, the same on every machine."
    MASTER_PORT=${MASTER_PORT:-29500}
    DLLM_RUN_DIR=${DLLM_RUN_DIR:-${SLURM_JOB_ID:+outputs/sft/job-$SLURM_JOB_ID}}
  fi
  MASTER_PORT=${MASTER_PORT:-0}
  need_number MASTER_PORT 0
}

# launch PROCESSES SETTING…: PROCESSES on each machine, sft.py with these settings
launch() {
  local total=$((NNODES * $1)) setting
  local settings=("training.expect_processes=$total" "${@:2}")
  ((NNODES == 1)) || [[ -n $DLLM_RUN_DIR || " ${settings[*]}" == *" output_dir="* ]] ||
    fail "NNODES=$NNODES needs DLLM_RUN_DIR=FOLDER (or output_dir=FOLDER), on a disk that all machines share."
  [[ -f $root/configs/accelerate/$SHARD.yaml ]] ||
    fail "SHARD=$SHARD: choose one of $(cd "$root/configs/accelerate" && echo *.yaml | sed 's/\.yaml//g')."
  local files=("$root/configs/accelerate/$SHARD.yaml")
  local command=("$PYTHON" "$here/sft.py" "${settings[@]}")
  if [[ $SHARD != ddp ]] || ((total > 1)); then # the launcher starts no single process under ddp, and none is needed
    local flags=(--config_file "${files[0]}" --num_machines "$NNODES" --machine_rank "$NODE_RANK" --num_processes "$total"
      --main_process_port "$MASTER_PORT")
    ((NNODES == 1)) || flags+=(--main_process_ip "$MASTER_ADDR")
    if [[ $SHARD == zero* ]]; then
      files+=("$root/configs/deepspeed/$SHARD.json")
      flags+=(--deepspeed_config_file "${files[1]}")
    fi
    command=("$PYTHON" -m accelerate.commands.launch "${flags[@]}" "$here/sft.py" "${settings[@]}")
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  export DLLM_RUN_DIR=${DLLM_RUN_DIR:-outputs/sft/$(date +%Y-%m-%d_%H-%M-%S)} # one folder for all processes
  # The launcher passes a SIGTERM on and kills after this many seconds what has not ended: a checkpoint may take minutes.
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-3600}
  [[ ${DRY_RUN:-0} == 1 ]] || exec "${command[@]}"

  printf '%q ' "${command[@]}"
  printf '\n\n'
  for file in "${files[@]}"; do
    echo "# ${file#"$root"/}"
    grep -v '^#' "$file"
    echo
  done
  for setting in "${settings[@]}"; do
    [[ $setting != dataset* && $setting != -* ]] || exec "$PYTHON" "$here/sft.py" "${settings[@]}"
  done
  echo "# no dataset.files=… given, which a run needs; FILE.jsonl stands in for it below"
  exec "$PYTHON" "$here/sft.py" "${settings[@]}" dataset.files=FILE.jsonl
}

# train_on_gpus SETTING…: LLaDA-8B with the published hyper-parameters, before the user's settings, which win
train_on_gpus() {
  local gpus
  gpus=$(visible_gpus)
  find_python
  find_machines
  if [[ -n ${GPUS_PER_NODE:-} ]]; then
    need_number GPUS_PER_NODE 1
  elif ((gpus > 0)); then
    GPUS_PER_NODE=$gpus
  else
    GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-8}
  fi
  if [[ ${DRY_RUN:-0} != 1 ]]; then
    ((gpus > 0)) || fail "no GPU is visible here (nvidia-smi, CUDA_VISIBLE_DEVICES). DRY_RUN=1 shows what would run; run_cpu.sh trains without."
    ((GPUS_PER_NODE <= gpus)) || fail "GPUS_PER_NODE=$GPUS_PER_NODE, but $gpus GPU(s) are visible here: ask for at most $gpus."
  fi
  SHARD=${SHARD:-zero2}
  launch "$GPUS_PER_NODE" model=llada_8b_base packing.max_length=8192 training.local_batch_size=2 training.grad_accum_steps=4 \
    training.gradient_checkpointing=true training.device=cuda "$@"
}

# train_on_cpus SETTING…
train_on_cpus() {
  PROCESSES=${PROCESSES:-2}
  need_number PROCESSES 1
  find_python
  find_machines
  SHARD=${SHARD:-ddp}
  [[ $SHARD != fsdp2 ]] || fail "SHARD=fsdp2 needs GPUs: accelerate does not shard over CPU processes. Choose ddp, zero2 or zero3."
  export CUDA_VISIBLE_DEVICES=
  launch "$PROCESSES" training.device=cpu "$@"
}
