#!/usr/bin/env bash
# Everything a change must pass: sets the environment up, then lint, formatting, types and tests, one thread each.
#
#   bash scripts/test.sh                   all of it
#   bash scripts/test.sh -k packing -x     what follows is passed on to pytest
#
# Called by people and by .ci/run. All four steps run even when an early one fails; the last lines name those that did.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
export VENV
bash "$root/install.sh"
export PATH="$VENV/bin:$PATH" # DeepSpeed looks for ninja there
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 # no test may need the network
cd "$root"

failed=()
step() { # NAME HOW-TO-MEND COMMAND...: runs one step and remembers whether it failed
    local name="$1" mend="$2" start=$SECONDS
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    if "$@"; then
        printf '== %s: passed in %s s\n' "$name" $((SECONDS - start))
    else
        printf '== %s: FAILED. %s\n' "$name" "$mend"
        failed+=("$name")
    fi
}

step lint "Many findings mend themselves: ruff check --fix" ruff check
step formatting "Mend with: ruff format" ruff format --check
step types "Each line above names a file, a line and what mypy found." mypy
# Two processes, each file in one of them: about half the time on two cores, since most tests use one thread.
step tests "The failures are above; one alone: bash scripts/test.sh -k NAME" python -m pytest -n 2 --dist loadfile "$@"

if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\nAll four steps passed.\n'
