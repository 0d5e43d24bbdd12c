"""install.sh without the network: a stub `pip` and a stub interpreter show what it decides, prints and leaves behind.

The stub interpreter is the real one except for ``-m venv``, which makes a bare environment holding a stub pip; that pip
writes down each call, and "installs" a two-line torch, so everything else in install.sh runs for real.
"""

import importlib
import os
import pty
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
AGAIN = "run 'bash install.sh' again"

STUB_PIP = """
import os, pathlib, sys
import sysconfig
if sys.argv[1] == "--version":
    sys.exit()
with open(os.environ["CALLS"], "a") as calls:
    print(*sys.argv[1:], file=calls)
if "torch" in sys.argv:
    print(os.environ.get("PIP_SAYS", "Successfully installed torch"))
    if "PIP_SAYS" in os.environ:
        sys.exit(1)
    torch = pathlib.Path(sysconfig.get_path("purelib"), "torch")
    torch.mkdir(exist_ok=True)
    (torch / "__init__.py").write_text(
        "__version__ = '2.13.0'\\n"
        "class version: cuda = None\\n"
        "class cuda: is_available = staticmethod(lambda: False)\\n"
    )
"""

STUB_PYTHON = """#!/usr/bin/env bash
if [[ "$1 $2" == "-m venv" ]]; then
    "{real}" -m venv --without-pip "${{@:3}}"
    site="$("${{@: -1}}/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    cp -r "{pip}" "$site/pip"
else
    exec "{real}" "$@"
fi
"""

OLD_PYTHON = "#!/usr/bin/env bash\necho 3.8.18\n"
BARE_PYTHON = '#!/usr/bin/env bash\n[[ "$2" == *ensurepip* ]] && exit 1\necho 3.11.7\n'


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@dataclass
class Clone:
    """A copy of what install.sh reads, in a folder of its own, with stubs beside it."""

    folder: Path
    python: Path

    @property
    def venv(self) -> Path:
        return self.folder / ".venv"

    @property
    def site(self) -> Path:
        return next(self.venv.glob("lib/python*/site-packages"))

    @property
    def calls(self) -> list[str]:
        log = self.folder / "calls.txt"
        return log.read_text().splitlines() if log.exists() else []

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in {"VENV", "PYTHON", "PYTHONPATH"}}
        return kept | {"PYTHON": str(self.python), "CALLS": str(self.folder / "calls.txt")} | variables

    def install(self, cwd: str = "/", **variables: str) -> subprocess.CompletedProcess[str]:
        script = str(self.folder / "install.sh")
        return subprocess.run(
            ["bash", script], env=self.environment(**variables), cwd=cwd, text=True, capture_output=True, timeout=60
        )


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder = tmp_path / "a clone with spaces"
    folder.mkdir()
    for name in ("install.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").touch()
    (tmp_path / "pip" / "__main__.py").write_text(STUB_PIP)
    python = executable(tmp_path / "python", STUB_PYTHON.format(real=sys.executable, pip=tmp_path / "pip"))
    return Clone(folder, python)


def test_a_first_run_installs_torch_under_the_constraints_and_says_what_it_did(clone: Clone) -> None:
    done = clone.install()
    assert done.returncode == 0, done.stderr
    assert "Installed in " in done.stdout
    assert f"torch 2.13.0 in {clone.venv}" in done.stdout
    assert "CUDA: no (this is a CPU build of torch)" in done.stdout
    assert all("-c constraints.txt" in call for call in clone.calls)
    assert "torch -e .[train,eval,dev]" in clone.calls[-1]


def test_a_second_run_calls_nothing_and_says_so(clone: Clone) -> None:
    clone.install()
    calls = clone.calls
    again = clone.install()
    assert again.returncode == 0
    assert again.stdout.startswith("dLLM-Var is up to date: Python 3.")
    assert clone.calls == calls


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_installs_again_into_the_same_environment(clone: Clone, name: str) -> None:
    clone.install()
    (clone.venv / "kept").touch()
    calls = len(clone.calls)
    with (clone.folder / name).open("a") as file:
        file.write("# changed\n")
    again = clone.install()
    assert "Reusing" in again.stdout
    assert len(clone.calls) == 2 * calls
    assert (clone.venv / "kept").exists()


def test_after_an_interruption_the_half_written_package_is_written_again(clone: Clone) -> None:
    clone.install()
    (clone.venv / "dllm_var.unfinished").touch()
    whole, half, cut = (clone.site / f"{name}-1.0.dist-info" for name in ("whole", "half", "cut"))
    for info, record in ((whole, "whole-1.0.dist-info/RECORD,,\n"), (half, None), (cut, "cut/gone.py,,\n")):
        info.mkdir()
        if record:
            (info / "RECORD").write_text(record)
    calls = len(clone.calls)
    again = clone.install()
    assert again.returncode == 0, again.stderr
    assert whole.exists()
    assert not half.exists()
    assert not cut.exists()
    assert "left half done: half-1.0" in again.stdout
    assert len(clone.calls) == 2 * calls
    assert clone.install().stdout.startswith("dLLM-Var is up to date")


def test_a_failed_install_is_not_taken_for_a_finished_one(clone: Clone) -> None:
    clone.install()
    (clone.folder / "constraints.txt").write_text("torch==2.13.0\n")
    assert clone.install(PIP_SAYS="ERROR: something odd").returncode == 1
    calls = len(clone.calls)
    assert "Installed in " in clone.install().stdout
    assert len(clone.calls) > calls


def test_an_environment_whose_interpreter_is_gone_is_made_anew(clone: Clone) -> None:
    clone.install()
    for link in (clone.venv / "bin").glob("python*"):
        link.unlink()
    again = clone.install()
    assert again.returncode == 0, again.stderr
    assert f"Making {clone.venv}" in again.stdout


@pytest.mark.parametrize(
    ("pip_says", "sentence"),
    [
        ("Failed to establish a connection: Temporary failure in name resolution", "connect this machine to the network"),
        ("ERROR: Could not find a version of torch (from versions: none)", "connect this machine to the network"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: a wheel was refused", "pip failed; its last words are above"),
    ],
    ids=["offline", "nothing offered", "disk full", "other"],
)
def test_each_failure_of_pip_ends_with_a_sentence_that_helps(clone: Clone, pip_says: str, sentence: str) -> None:
    failed = clone.install(PIP_SAYS=pip_says)
    assert failed.returncode == 1
    last = failed.stderr.splitlines()[-1]
    assert sentence in last
    assert AGAIN in last


def test_a_failure_of_pip_is_seen_on_a_terminal_too(clone: Clone) -> None:
    """There pip's output runs through a pipe, which must not swallow its exit status."""
    ours, theirs = pty.openpty()
    failed = subprocess.run(
        ["bash", str(clone.folder / "install.sh")],
        env=clone.environment(PIP_SAYS="ERROR: a wheel was refused"),
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(theirs)
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert failed.returncode == 1
    assert "a wheel was refused" in shown
    assert "pip failed" in failed.stderr


@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        (OLD_PYTHON, "is Python 3.8.18; install a newer one or name it: PYTHON=/path/to/python3.11 bash install.sh"),
        (BARE_PYTHON, "has no working venv module; install it (Debian and Ubuntu: apt install python3-venv)"),
        ("#!/usr/bin/env bash\nexit 127\n", "no working Python was found as"),
    ],
    ids=["too old", "without venv", "not running"],
)
def test_an_interpreter_that_cannot_serve_is_refused_in_one_sentence(clone: Clone, python: str, sentence: str) -> None:
    refused = clone.install(PYTHON=str(executable(clone.folder / "wrong", python)))
    assert refused.returncode == 1
    assert sentence in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not clone.venv.exists()


def test_without_a_name_the_first_interpreter_that_serves_is_taken(clone: Clone, tmp_path: Path) -> None:
    found = tmp_path / "bin"
    found.mkdir()
    executable(found / "python3.11", OLD_PYTHON)
    executable(found / "python3.12", BARE_PYTHON)
    shutil.copy(clone.python, found / "python3.13")
    done = clone.install(PYTHON="", PATH=f"{found}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert "with python3.13" in done.stdout


def test_a_folder_that_is_no_environment_is_left_alone(clone: Clone, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").touch()
    refused = clone.install(VENV=str(precious))
    assert refused.returncode == 1
    assert "is not a virtual environment and not empty" in refused.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_a_relative_environment_is_made_where_the_user_stands(clone: Clone, tmp_path: Path) -> None:
    done = clone.install(cwd=str(tmp_path), VENV="mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "pyvenv.cfg").exists()
    assert not clone.venv.exists()


def test_every_requirement_of_the_project_has_an_exact_version_in_the_constraints() -> None:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append(pin)
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, wanted):
        for pin in pins[requirement.name.lower()]:
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            assert "+" not in specifier.version
            assert requirement.specifier.contains(specifier.version)
    assert [str(pin) for pin in pins["torch"]] == ["torch==2.13.0"]
