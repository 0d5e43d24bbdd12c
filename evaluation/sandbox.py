"""Run one generated program against its tests so that it can neither harm the machine nor pass without solving them.

`evaluation.programs` calls `run`, once per program. Each call starts two processes that end with it: the program in one,
the tests in the other (`evaluation.judge` says why the program can then not forge a verdict), both without the right to do
more than compute (`evaluation.confinement`). Held off: network, new processes, signals to others, files outside a temporary
folder (reading too, but for Python and its packages), environment variables, more than `memory_mb` of memory per process,
more than `timeout` seconds of processor time, endless output. Everything ends with the caller; one
that is killed leaves a temporary folder behind.

Linux on x86_64 or aarch64, root or not, in a container or not; elsewhere and where the kernel has no seccomp nothing is run.
Before Linux 6.2 (no Landlock) a warning says that programs can write no file at all, but can read what the user can read.

Not protected against:

* a fault of the kernel: this is one kernel shared with a program, no virtual machine. Programs that somebody wrote in order
  to break out belong on a machine that holds nothing of value.
* use of the machine within the limits: `timeout` seconds of processor time, five times that of waiting, `memory_mb` twice,
  and some tens of MB of disk until it is stopped; a burst of files may exceed that for a tenth of a second.
* what may be read: Python, its packages, system libraries, and whether a path exists; with no Landlock every file of the
  user, and the memory of the user's processes where the system lets one process look into another.
* wrong tests: they run as they are, in the judge. A program that answers all their calls rightly passes, whatever else it
  does. The judge's arguments are copies, so a test that looks at what a program changed in its argument sees no change.
"""

import contextlib
import functools
import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.confinement import MACHINES, landlock_available
from evaluation.judge import PATIENCE

STARTUP_SECONDS = 60.0  # beyond the program's own time, on a machine that is very busy
LEAST_MEMORY_MB = 64  # Python itself
ERROR_BYTES = 1 << 20  # error output after which a program is stopped
FOLDER_FILES, FOLDER_BYTES = 256, 64 << 20  # the same for the temporary folder
TAIL = 2000

SOURCE = str(Path(__file__).resolve().parents[1])
START = "import sys; sys.path.insert(0, {!r}); from evaluation.judge import main; main()"
SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/dev/urandom", "/dev/zero"]


@dataclass(frozen=True)
class Outcome:
    """What became of one program.

    Attributes:
        passed: every test ran to its end and held.
        reason: `passed`; `failed`: a test or the program raised an error, or the program ended before its tests; `timeout`;
            `memory`: it asked for more than allowed; `killed`: it died of a signal; `output`: it wrote too much.
        seconds: wall-clock time, start of the processes included.
        stderr_tail: the last part of its error output, then the failed test or the error.
    """

    passed: bool
    reason: str
    seconds: float
    stderr_tail: str


def run(
    program: str,
    *,
    tests: str,
    names: Sequence[str],
    prelude: str = "",
    timeout: float = 10.0,
    memory_mb: int = 1024,
) -> Outcome:
    """Whether a program passes tests.

    Args:
        program: untrusted Python source. It runs as a module, not as `__main__`.
        tests: trusted Python source that fails by raising, as `assert` does.
        names: what the tests take from the program; a name that it does not define is a failure. All other names in the
            tests are their own, those of `prelude`, or Python's: a program cannot redefine them.
        prelude: trusted Python source that runs before the tests, in their namespace.
        timeout: seconds of processor time of the program, rounded up, so that other programs on
            the machine seldom decide; in wall-clock time it has five times as much. The tests have as much again.
        memory_mb: address space of each of the two processes, in MiB.

    Raises:
        ValueError: not Linux, a processor whose system calls are not known here, or limits in which Python cannot start.
        RuntimeError: the kernel refuses a mechanism, so nothing was run.
    """
    _known_machine()
    if timeout <= 0 or memory_mb < LEAST_MEMORY_MB:
        raise ValueError(
            f"timeout={timeout} s and memory_mb={memory_mb}: a program needs some time and at least {LEAST_MEMORY_MB} MiB"
        )
    job = json.dumps({"program": program, "tests": tests, "names": list(names), "prelude": prelude})
    with (
        tempfile.TemporaryDirectory(prefix="dllm_var_sandbox_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as handed,
    ):
        handed.write(job.encode())
        handed.seek(0)
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", START.format(SOURCE), _settings(folder, timeout, memory_mb)],
            stdin=handed,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=_environment(folder),
            start_new_session=True,
        )
        try:
            verdict, errors = _watch(process, folder, PATIENCE * timeout + STARTUP_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # not yet waited for, so the number is still theirs
            process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
    answer = {"reason": "timeout", "detail": "the tests did not come to an end"}  # if the judge had to be killed as well
    if verdict.endswith(b"\n"):
        answer = json.loads(verdict)
    if answer["reason"] == "refused":
        raise RuntimeError(f"the sandbox cannot be closed here, so no program is run: {answer['detail']}")
    tail = (errors.decode(errors="replace") + answer["detail"])[-TAIL:]
    return Outcome(answer["reason"] == "passed", answer["reason"], time.perf_counter() - began, tail)


def check() -> None:
    """Try the sandbox with a harmless program (some tens of milliseconds); ValueError says why it cannot work here."""
    try:
        outcome = run("def one():\n    return 1\n", tests="assert one() == 1", names=["one"])
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    if not outcome.passed:
        raise ValueError(f"the sandbox does not work here ({outcome.reason}): {outcome.stderr_tail}")


@functools.cache
def _known_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise ValueError(
            f"generated programs are run only on Linux with {' or '.join(MACHINES)}, and this is {sys.platform} on "
            f"{platform.machine()}; score them there, or leave humaneval and mbpp out"
        )


@functools.cache
def _landlock() -> bool:
    available = landlock_available()
    if not available:
        warnings.warn(
            "this kernel has no Landlock (Linux 6.2 or newer): generated programs can write no file, not even in their "
            "temporary folder, but they can read every file that this user can read",
            stacklevel=2,
        )
    return available


def _settings(folder: str, timeout: float, memory_mb: int) -> str:
    """What both processes may know, as JSON."""
    paths = sysconfig.get_paths()
    packages = sorted({paths["purelib"], paths["platlib"]})
    python = [paths["stdlib"], paths["platstdlib"], str(Path(paths["stdlib"]).parent)]
    limits = {
        "folder": folder,
        "readable": [*SYSTEM, *python, *packages],
        "landlock": _landlock(),
        "seconds": timeout,
        "memory_mb": memory_mb,
    }
    return json.dumps({"parent": os.getpid(), "source": SOURCE, "packages": packages, "limits": limits})


def _environment(folder: str) -> dict[str, str]:
    own = {"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return own | {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}


def _watch(process: subprocess.Popen[bytes], folder: str, patience: float) -> tuple[bytes, bytes]:
    """The verdict and the tail of the error output, once the judge has ended or `patience` seconds have passed."""
    assert process.stdout is not None
    assert process.stderr is not None
    verdict, errors, written = b"", b"", 0
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as pipes:
        pipes.register(process.stdout, selectors.EVENT_READ)
        pipes.register(process.stderr, selectors.EVENT_READ)
        while pipes.get_map() and time.monotonic() < deadline:
            for key, _ in pipes.select(timeout=0.1):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    pipes.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    verdict += piece
                else:
                    written += len(piece)
                    errors = (errors + piece)[-TAIL:]
            if written > ERROR_BYTES or _overfull(folder):
                process.terminate()  # the judge answers with the verdict `output`
    return verdict, errors


def _overfull(folder: str) -> bool:
    total = 0
    with os.scandir(folder) as files:
        for count, file in enumerate(files, 1):
            with contextlib.suppress(FileNotFoundError):
                total += file.stat(follow_symlinks=False).st_size
            if count > FOLDER_FILES or total > FOLDER_BYTES:
                return True
    return False
