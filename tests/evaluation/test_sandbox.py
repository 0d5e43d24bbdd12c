"""The sandbox: honest programs are scored rightly, hostile ones neither pass nor reach the machine.

`hostile/` holds one program per trick. All are to define `add`, and most answer rightly only if their trick has worked, so
that a hole shows as a program that passes. Nothing but this file reads them, and none is ever imported. What they aim at is
made here: a file, a port, a signal that this process catches.
"""

import json
import math
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, namedtuple
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path

import pytest

from evaluation import judge, sandbox

HOSTILE = Path(__file__).parent / "hostile"
ADD = "assert add(2, 3) == 5\nassert add(20, 22) == 42\n"
WRONG = "assert add(2, 3) == 5\nAssertionError"  # the program came to its answer, which is wrong: its trick has failed

FATES = {  # program: (reasons, what the end of the outcome's text must hold)
    "crash": ("killed", "signal 11"),
    "deep_recursion": ("memory killed failed timeout", ""),
    "disguised_class": ("failed", "TypeError"),
    "disguised_number": ("failed", WRONG),
    "endless_answer": ("output", "an answer of more than 16 MiB"),
    "endless_loop": ("timeout", ""),
    "endless_output": ("output", "too much error output"),
    "endless_printing": ("timeout", ""),
    "equal_to_everything": ("failed", WRONG),
    "escaping_the_session": ("failed", WRONG),
    "exit_at_once": ("failed", "ended itself (status 0)"),
    "exit_in_the_call": ("failed", "ended itself (status 0)"),
    "exit_of_all_kinds": ("failed", "SystemExit: 0"),
    "file_deletion": ("failed", WRONG),
    "filling_the_disk": ("output", "too large files"),
    "forged_answers": ("failed", ""),
    "forged_verdict": ("failed", WRONG),
    "fork_bomb": ("failed", WRONG),
    "limit_signal": ("timeout", "processor time"),
    "links_out_of_the_folder": ("failed", WRONG),
    "memory_bomb": ("memory", "MemoryError"),
    "memory_of_the_judge": ("failed", WRONG),
    "memory_outside_the_limit": ("failed", WRONG),
    "new_processes": ("failed", WRONG),
    "other_system_calls": ("failed", WRONG),
    "patched_builtins": ("failed", WRONG),
    "patched_comparison": ("failed killed", ""),
    "polite_exit": ("failed", "SystemExit: 0"),
    "raised_limits": ("failed", WRONG),
    "reading_secrets": ("failed", WRONG),
    "reading_the_tests": ("failed", WRONG),
    "real_time_signal": ("killed", "signal 40"),
    "signals_to_others": ("failed", WRONG),
    "slow_answer": ("timeout", ""),
    "sockets": ("failed", WRONG),
    "stopped": ("timeout", ""),
    "surviving_thread": ("failed", WRONG),
    "thread_bomb": ("failed memory", ""),
}


class Surroundings:
    """What hostile programs aim at: a file, a port, this process; `unharmed` says that all are as they were."""

    def __init__(self, folder: Path, port: socket.socket, signals: list[int]) -> None:
        self.folder, self.port, self.signals = folder, port, signals
        self.canary = folder / "canary.txt"
        self.canary.write_text("alive")
        self.before = self.canary.stat()

    def program(self, name: str, number: int = 0) -> str:
        text = (HOSTILE / f"{name}.py").read_text()
        facts = {"CANARY": self.canary, "PORT": self.port.getsockname()[1], "CALLER": os.getpid(), "NUMBER": number}
        for word, value in facts.items():
            text = text.replace(f"@{word}@", str(value))
        return text

    def unharmed(self) -> None:
        after = self.canary.stat()
        assert [path.name for path in self.folder.iterdir()] == ["canary.txt"]  # the temporary folder is gone as well
        assert self.canary.read_text() == "alive"
        assert (after.st_mode, after.st_mtime, after.st_nlink) == (self.before.st_mode, self.before.st_mtime, 1)
        assert self.signals == []
        with pytest.raises(BlockingIOError):
            self.port.accept()
        assert living_in(self.folder) == []


def living_in(folder: Path) -> list[str]:
    """Processes whose working directory is in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").startswith(str(folder)):
                found.append((process / "cmdline").read_text())
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    signals: list[int] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SECRET_TOKEN", "not for programs")
    before = signal.signal(signal.SIGUSR1, lambda number, frame: signals.append(number))
    with socket.create_server(("127.0.0.1", 0)) as port:
        port.setblocking(False)
        yield Surroundings(tmp_path, port, signals)
    signal.signal(signal.SIGUSR1, before)


def add_run(program: str, **limits: float) -> sandbox.Outcome:
    return sandbox.run(program, tests=ADD, names=["add"], **limits)


def test_every_hostile_program_has_its_fate_and_none_looks_like_a_test():
    files = {path.stem: path.read_text() for path in HOSTILE.iterdir() if path.suffix == ".py"}
    assert files.keys() == FATES.keys()
    assert all(text.startswith("# ") for text in files.values())
    assert not any(name.startswith(("test", "conftest", "__init__")) for name in files)


@pytest.mark.parametrize("name", FATES)
def test_a_hostile_program_neither_passes_nor_harms(name: str, around: Surroundings):
    reasons, text = FATES[name]
    outcome = add_run(around.program(name), timeout=1.0 if "timeout" in reasons else 30.0, memory_mb=512)
    assert not outcome.passed
    assert outcome.reason in reasons.split()
    assert text in outcome.stderr_tail
    around.unharmed()


@pytest.mark.parametrize("number", range(1, 8))
def test_an_answer_out_of_the_ordinary_is_a_wrong_answer(number: int, around: Surroundings):
    assert add_run(around.program("forged_answers", number)).reason == "failed"


def test_a_right_program_passes_and_a_wrong_one_fails_with_the_test_that_it_failed():
    assert add_run("def add(a, b):\n    return a + b\n").passed
    wrong = add_run("def add(a, b):\n    return 5\n")
    assert (wrong.passed, wrong.reason) == (False, "failed")
    assert "assert add(20, 22) == 42" in wrong.stderr_tail


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("def add(a, b)\n", "SyntaxError"),
        ("def plus(a, b):\n    return a + b\n", "defines no 'add'"),
        ("def add(a, b):\n    return a / 0\n", "ZeroDivisionError"),
        ("add = 5\n", "not callable"),
        ("def add(a, b):\n    return '\\ud800'\n", "AssertionError"),
        ("add = '\0'\n", "null bytes"),
        ("# \ud800", "surrogates"),
    ],
)
def test_a_broken_program_fails_with_its_error(program: str, text: str):
    outcome = add_run(program)
    assert outcome.reason == "failed"
    assert text in outcome.stderr_tail


def test_a_program_may_use_threads_packages_and_files_of_its_folder(around: Surroundings):
    program = """
import os, tempfile, threading
import numpy

def add(a, b):
    with tempfile.NamedTemporaryFile("w+", delete=False) as file:
        writer = threading.Thread(target=lambda: file.write(str(numpy.int64(a) + b)))
        writer.start()
        writer.join()
    os.rename(file.name, "sum.txt")
    text = open("sum.txt").read()
    os.remove("sum.txt")
    return numpy.array([int(text)])[0]
"""
    outcome = add_run(program)
    assert outcome.passed, outcome.stderr_tail
    around.unharmed()


def test_objects_stay_with_the_program_and_can_be_called_iterated_and_handed_back():
    program = """
class Node:
    def __init__(self, value):
        self.value = value
    def double(self, by=2):
        return Node(self.value * by)

def values(*nodes):
    return (node.value for node in nodes)
"""
    tests = """
one, two = Node(1), Node(value=2)
assert two.double(by=3).value == 6
assert list(values(one, *[two, two.double()])) == [1, 2, 4]
assert one != Node(1) and not hasattr(one, "nothing")
"""
    outcome = sandbox.run(program, tests=tests, names=["Node", "values"])
    assert outcome.passed, outcome.stderr_tail


def test_waiting_costs_no_processor_time_but_patience_ends():
    waits = "import time\ndef add(a, b):\n    time.sleep({})\n    return a + b\n"
    assert add_run(waits.format(1), timeout=0.9).passed
    late = add_run(waits.format(60), timeout=0.2)
    assert (late.reason, late.stderr_tail) == ("timeout", "no verdict after 1 s")


def test_a_program_cannot_redefine_what_it_is_not_asked_for():
    program = "def helper(x):\n    return 0\nabs = helper\ndef add(a, b):\n    return 7\n"
    prelude = "def helper(x):\n    return x\n"
    for tests in ("assert helper(3) == 0", "assert abs(add(1, 1) - 2) < 1e-6"):
        assert sandbox.run(program, tests=tests, names=["add"], prelude=prelude).reason == "failed"
    assert sandbox.run(program, tests="assert helper(3) == 3", names=["add"], prelude=prelude).passed


def test_plain_data_arrive_as_they_were_and_subclasses_as_their_base():
    point = namedtuple("point", "x y")
    same = [None, True, 0, -5, 10**5000, 1.5, math.inf, "ä\ud800\n", b"\0\xff", 1 + 2j, range(1, 9, 2), int, ValueError]
    same += [[], (1, [2]), {1, "a"}, frozenset({(1, 2)}), {"a": 1, (1, 2): {3: None}}, Decimal("0.1"), Fraction(1, 3)]
    based = [(point(1, 2), (1, 2)), (Counter("aab"), {"a": 2, "b": 1}), (bytearray(b"x"), b"x"), (IntEnum("E", "a").a, 1)]
    for value, expected in [*((value, value) for value in same), *based]:
        sent = json.loads(json.dumps(judge.encode(value, lambda thing: pytest.fail(f"{thing!r} is plain"))))
        received = judge.decode(sent, lambda number: pytest.fail("there are no objects"))
        assert received == expected
        assert type(received) is type(expected)
    assert math.isnan(judge.decode(judge.encode(math.nan, pytest.fail), pytest.fail))


def test_when_the_caller_is_killed_the_program_ends_too(tmp_path: Path):
    program = "open('running', 'w').close()\nwhile True:\n    pass\n"
    call = f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}; from evaluation import sandbox; "
    call += f"sandbox.run({program!r}, tests='', names=[], timeout=60)"
    caller = subprocess.Popen([sys.executable, "-c", call], cwd=HOSTILE.parents[2])
    wait_until(lambda: list(tmp_path.glob("*/running")))
    assert len(living_in(tmp_path)) == 2
    caller.kill()
    caller.wait()
    wait_until(lambda: not living_in(tmp_path))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["file_deletion", "links_out_of_the_folder", "memory_of_the_judge", "filling_the_disk"])
def test_without_landlock_no_file_can_be_changed_at_all(name, around: Surroundings, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "_landlock", lambda: False)
    outcome = add_run(around.program(name))
    assert outcome.reason == "failed"
    assert (WRONG if name != "filling_the_disk" else "PermissionError") in outcome.stderr_tail
    around.unharmed()


def test_without_landlock_the_user_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    sandbox._landlock.cache_clear()
    monkeypatch.setattr(sandbox, "landlock_available", lambda: False)
    with pytest.warns(UserWarning, match="no Landlock.*can read every file"):
        assert sandbox._landlock() is False
    sandbox._landlock.cache_clear()


def test_nothing_runs_when_the_kernel_refuses_to_confine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sandbox, "SYSTEM", [*sandbox.SYSTEM, "/" + "x" * 5000])  # the kernel refuses this rule
    with pytest.raises(RuntimeError, match=r"no program is run: .*File name too long"):
        add_run("def add(a, b):\n    return a + b\n")
    with pytest.raises(ValueError, match="no program is run"):
        sandbox.check()


def test_another_system_or_processor_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    for place, name, value in ((sys, "platform", "darwin"), (platform, "machine", lambda: "riscv64")):
        sandbox._known_machine.cache_clear()
        with monkeypatch.context() as other:
            other.setattr(place, name, value)
            with pytest.raises(ValueError, match=r"only on Linux with x86_64 or aarch64.*leave humaneval and mbpp out"):
                add_run("")
    sandbox._known_machine.cache_clear()
    sandbox.check()


@pytest.mark.parametrize("limits", [{"timeout": 0}, {"memory_mb": 8}])
def test_limits_in_which_nothing_can_run_are_refused(limits: dict[str, int]):
    with pytest.raises(ValueError, match="needs some time and at least 64 MiB"):
        add_run("", **limits)


def test_the_sandbox_adds_less_than_150_ms_of_processor_time():
    def cost(call, tries: int = 4) -> float:
        before = processor_seconds()
        for _ in range(tries):
            call()
        return (processor_seconds() - before) / tries

    add_run("def add(a, b):\n    return a + b\n")  # the compiled modules are written once
    bare = cost(lambda: subprocess.run([sys.executable, "-I", "-S", "-c", "pass"], check=True))
    assert cost(lambda: add_run("def add(a, b):\n    return a + b\n")) - bare < 0.15


def processor_seconds() -> float:
    """Of this process and all its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
