#!/usr/bin/env bash
# Installs dLLM-Var: makes the virtual environment .venv (or reuses it) and puts in the exact versions of constraints.txt.
#
#   bash install.sh                        the environment is .venv beside this file
#   VENV=/some/folder bash install.sh      another environment
#   PYTHON=python3.12 bash install.sh      another interpreter (3.10 or newer)
#
# Run it as often as you like: when neither pyproject.toml nor constraints.txt has changed it ends at once, and after an
# interruption it repairs what was left half done. CPU or CUDA is decided by the torch build that your package index
# offers for the pinned version; nothing here names an index.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
venv_python="$venv/bin/python"
stamp="$venv/dllm_var.stamp"           # line 1: what was installed (a hash); the rest: what was said about it
unfinished="$venv/dllm_var.unfinished" # there while packages are being written
log="$venv/install.log"
again="run 'bash install.sh' again"

die() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}

version_of() { # the three numbers of an interpreter, or nothing when it does not run
    "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null || true
}

new_enough() {
    [[ "$1" =~ ^([0-9]+)\.([0-9]+)\. ]] && ((BASH_REMATCH[1] == 3 && BASH_REMATCH[2] >= 10))
}

choose_python() { # sets $python; the tested version comes first
    local candidates=(python3.11 python3.12 python3.13 python3.10 python3 python) candidate version seen="" lame=""
    if [[ -n "${PYTHON:-}" ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version="$(version_of "$candidate")"
        if ! new_enough "$version"; then
            if [[ -n "$version" ]]; then seen="$candidate is Python $version"; fi
        elif ! "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            lame="$candidate"
        else
            python="$candidate"
            return
        fi
    done
    if [[ -n "$lame" ]]; then
        die "$lame has no working venv module; install it (Debian and Ubuntu: apt install python3-venv) and $again."
    fi
    die "dLLM-Var needs Python 3.10 or newer, but ${seen:-no working Python was found as ${candidates[*]}};" \
        "install a newer one or name it: PYTHON=/path/to/python3.11 bash install.sh"
}

fingerprint() { # what an up-to-date environment was made from; fails when its interpreter does not run
    "$venv_python" -c '
import hashlib, pathlib, sys
root, venv = sys.argv[1:]
parts = [root, venv, sys.version, *(pathlib.Path(root, name).read_text() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256("\n".join(parts).encode()).hexdigest())' "$root" "$venv" 2>/dev/null
}

make_venv() {
    local have
    have="$(version_of "$venv_python")"
    if [[ -n "${PYTHON:-}" && -n "$have" && "$have" != "$(version_of "$python")" ]]; then
        die "$venv was made with Python $have, not $(version_of "$python"); remove that folder or name another with VENV."
    fi
    if [[ -n "$have" ]]; then
        new_enough "$have" || die "$venv has Python $have, not 3.10 or newer; remove that folder or name another with VENV."
        if "$venv_python" -m pip --version >/dev/null 2>&1 || "$venv_python" -m ensurepip >/dev/null 2>&1; then
            echo "Reusing $venv (Python $have)."
            return
        fi
    fi
    if [[ -d "$venv" && -n "$(ls -A "$venv")" && ! -f "$venv/pyvenv.cfg" ]]; then
        die "$venv is not a virtual environment and not empty; name another folder with VENV."
    fi
    echo "Making $venv with $python (Python $(version_of "$python"))."
    "$python" -m venv --clear "$venv" || die "$python could not make a virtual environment in $venv (its message is above)."
}

repair() { # forgets packages of which an interrupted run wrote only a part, so that pip writes them again
    "$venv_python" - <<'PYTHON'
import csv
import pathlib
import shutil
import sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))
for left in site.glob("~*"):  # pip's own name for what it was about to remove
    shutil.rmtree(left) if left.is_dir() else left.unlink()
for info in site.glob("*.dist-info"):
    record = info / "RECORD"  # written last
    names = [row[0] for row in csv.reader(record.read_text(encoding="utf-8").splitlines())] if record.exists() else None
    if names is None or not all((site / name).exists() for name in names if not name.endswith(".pyc")):
        print("Installing again, as it was left half done:", info.name.removesuffix(".dist-info"))
        shutil.rmtree(info)
PYTHON
}

pip_install() { # all output goes to the log; on a terminal the start of its latest line is shown as well
    local command=("$venv_python" -m pip install --disable-pip-version-check --no-input --no-color -c constraints.txt "$@")
    if [[ ! -t 1 ]]; then
        "${command[@]}" >>"$log" 2>&1
        return
    fi
    local code=0 line
    "${command[@]}" 2>&1 | tee -a "$log" | while IFS= read -r line; do printf '\r\033[K%.78s' "$line"; done || code=$?
    printf '\r\033[K'
    return "$code"
}

explain_failure() {
    local no_network='name resolution|NewConnectionError|ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|unreachable'
    if grep -q 'No space left on device' "$log"; then
        die "the disk is full: make room (the CPU set-up takes 2 GB, the CUDA set-up about 8 GB) and $again."
    elif grep -qiE "$no_network|from versions: none" "$log"; then
        die "the packages could not be fetched: connect this machine to the network, or point pip at a package index that" \
            "it can reach (PIP_INDEX_URL, PIP_FIND_LINKS), and $again (details: $log)."
    fi
    tail -n 6 "$log" >&2
    die "pip failed; its last words are above, all of them in $log. When that is mended, $again."
}

describe() { # two lines: what is installed, and whether a GPU can be used
    "$venv_python" -c '
import sys, torch
print(f"Python {sys.version.split()[0]}, torch {torch.__version__} in {sys.prefix}")
if torch.cuda.is_available():
    print(f"CUDA: yes, {torch.cuda.get_device_name()}")
elif torch.version.cuda:
    print(f"CUDA: no (this torch is built for CUDA {torch.version.cuda}, but no usable GPU was found)")
else:
    print("CUDA: no (this is a CPU build of torch)")'
}

if [[ -f "$stamp" && ! -f "$unfinished" && "$(head -n 1 "$stamp")" == "$(fingerprint)" ]]; then
    echo "dLLM-Var is up to date: $(sed -n 2p "$stamp")"
    exit 0
fi

trap 'printf "\ninstall.sh: interrupted; %s, it goes on from here.\n" "$again" >&2; exit 130' INT TERM
SECONDS=0
choose_python
make_venv
cd "$root"
if [[ -f "$unfinished" ]]; then repair; fi
touch "$unfinished"
: >"$log"
echo "Installing dLLM-Var and what it needs (a few minutes the first time)."
pip_install pip setuptools || explain_failure
pip_install --build-constraint constraints.txt torch -e '.[train,eval,dev]' || explain_failure
said="$(describe)" || die "torch was installed but cannot be imported (its message is above); remove $venv and $again."
printf '%s\n%s\n' "$(fingerprint)" "$said" >"$stamp"
rm -f "$unfinished"
printf 'Installed in %s s: %s\n' "$SECONDS" "$said"
if [[ "$said" == *"CPU build"* ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo "This machine has an NVIDIA GPU, but pip's index gave a CPU build of torch: point pip at one with CUDA builds."
fi
