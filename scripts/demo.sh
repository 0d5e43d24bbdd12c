#!/usr/bin/env bash
# From nothing to a conversation: sets everything up, then lets you talk to a model (the bundled one, unless told otherwise).
#
#   bash scripts/demo.sh                   a chat when started in a terminal, three example questions otherwise
#   bash scripts/demo.sh < questions.txt   answers them, one a line; through a pipe the first may be 20 seconds late
#   bash scripts/demo.sh --threshold 0.7   what follows is passed on to demo_dLLM-var.py
#
# Called by people and by CI (without a terminal). Works from any folder; needs the network only the first time.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv}"
[[ "$VENV" == /* ]] || VENV="$PWD/$VENV"
export VENV
bash "$root/install.sh" < /dev/null
PATH="$VENV/bin:$PATH" # the ninja and accelerate of this environment
export PATH

demo=("$VENV/bin/python" "$root/demo_dLLM-var.py")
if [[ ! -t 1 ]]; then demo+=(--plain); fi
if [[ " $* " == *" --prompt"* ]]; then exec "${demo[@]}" "$@"; fi
patience=20 # seconds for the first question
if [[ -t 0 ]]; then
    echo "Starting the chat: type a question, leave with Ctrl-D."
    exec "${demo[@]}" "$@"
fi
first=""
if IFS= read -r -t "$patience" first 2> /dev/null || [[ -n "$first" ]]; then # a question comes through a pipe or from a file
    { printf '%s\n' "$first"; cat; } | "${demo[@]}" "$@"
    exit
fi
echo "No terminal, and no question to read: asking three questions, with a short, a longer and a long answer."
printf '%s\n' "Write 4072 in words." "Add 512 and 341. Show each column." "List 12 times each number from 11 to 14." | "${demo[@]}" "$@"
