"""The two processes in which a generated program meets its tests. `evaluation.sandbox` starts them; nothing else does.

The *judge* runs the tests, its child, the *player*, runs the program. They share no memory: when a test calls a function of
the program, the judge sends the arguments over a pipe and gets plain data back (numbers, strings, lists, dicts, …), rebuilt
from text. So the program never sees a test or an expected answer, an object of its own making never takes part in a
comparison, and the verdict goes through a pipe that only the judge has. All that a program can do is to answer.

An answer that is not plain data stays with the player; the tests hold a `Remote`, which can be called, iterated and asked
for attributes, and which equals nothing but itself.
"""

import builtins
import json
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any, NoReturn

from evaluation.confinement import confine, die_with, hide_memory

ANSWER_BYTES = 16 << 20  # the longest answer to one call
PATIENCE = 5  # wall-clock seconds for each second of processor time that a program has
DETAIL = 2000  # characters of an error text that are kept


def main() -> None:
    """`python -c "… main()" SETTINGS` with the job, {program, prelude, names, tests} in JSON, on standard input."""
    settings = json.loads(sys.argv[1])
    die_with(settings["parent"])
    limits = settings["limits"]
    sys.path[:] = [*(path for path in sys.path if path != settings["source"]), *settings["packages"]]
    judge = os.getpid()
    (questions, ask), (answers, answer) = os.pipe(), os.pipe()
    player = os.fork()  # before the job is read: the tests are never in the player's memory
    if player == 0:
        die_with(judge)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        for inherited in (ask, answers, nothing):
            os.close(inherited)
        play(questions, answer, limits)
    os.close(questions)
    os.close(answer)
    Judge(player, ask, answers, limits).run()


class Remote:
    """A function or object of the program, seen from the tests."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self._remote = (ask, number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ask, number = self._remote
        return ask("call", number, encode([args, kwargs], _number_of))

    def __iter__(self) -> Any:
        ask, number = self._remote
        return iter(ask("items", number))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        ask, number = self._remote
        try:
            return ask("attribute", number, name)
        except ProgramError as error:
            raise AttributeError(str(error)) from error


class Judge:
    """Runs the tests against the player and writes one verdict, {reason, detail}, to standard output."""

    def __init__(self, player: int, ask: int, answers: int, limits: dict[str, Any]) -> None:
        self.player, self.questions, self.answers, self.limits = player, ask, answers, limits

    def run(self) -> NoReturn:
        """Ends the process, with the verdict written and the player gone, whatever happens."""
        job = json.loads(sys.stdin.buffer.read())
        sys.stdin.close()
        hide_memory()
        patience = PATIENCE * self.limits["seconds"]
        signal.signal(signal.SIGALRM, lambda *_: self.finish("timeout", f"no verdict after {patience:g} s"))
        signal.signal(signal.SIGTERM, self.too_much)
        try:
            confine(**self.limits, may_kill=[os.getpid(), self.player])
            self.ask("confined")
        except Exception as error:  # whatever it is, nothing runs
            self.finish("refused", str(error))
        signal.setitimer(signal.ITIMER_REAL, patience)
        try:
            self.ask("load", job["program"])
            space: dict[str, Any] = {"__name__": "tests"}
            exec(compile(job["prelude"], "<prelude>", "exec"), space)
            space.update({name: self.ask("name", name) for name in job["names"]})
            exec(compile(job["tests"], "<tests>", "exec"), space)
        except BaseException as error:
            memory = isinstance(error, MemoryError) or (isinstance(error, ProgramError) and error.kind == "MemoryError")
            self.finish("memory" if memory else "failed", _place(error, job["tests"]) + f"{type(error).__name__}: {error}")
        self.finish("passed", "")

    def ask(self, *question: Any) -> Any:
        """The player's answer to one question; its exceptions come back as `ProgramError`."""
        try:
            _write(self.questions, question)
        except BrokenPipeError:
            self.player_ended()
        text = bytearray()
        while not text.endswith(b"\n"):
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                self.player_ended()
            text += piece
            if len(text) > ANSWER_BYTES:
                self.finish("output", f"an answer of more than {ANSWER_BYTES >> 20} MiB")
        kind, value = json.loads(text)
        if kind != "value":
            raise ProgramError(str(kind), str(value))
        return decode(value, lambda number: Remote(self.ask, number))

    def player_ended(self) -> NoReturn:
        _, status, used = os.wait4(self.player, 0)
        self.player = 0
        if os.WIFSIGNALED(status):
            # The kernel's own count for its limit and the one it hands out here differ by milliseconds: SIGXCPU decides.
            if os.WTERMSIG(status) == signal.SIGXCPU or used.ru_utime + used.ru_stime >= self.limits["seconds"]:
                self.finish("timeout", f"more than {self.limits['seconds']:g} s of processor time")
            self.finish("killed", f"the program was ended by signal {os.WTERMSIG(status)}")
        self.finish("failed", f"the program ended itself (status {os.WEXITSTATUS(status)}) before its tests were over")

    def too_much(self, signum: int, frame: FrameType | None) -> NoReturn:
        """SIGTERM is how the sandbox says that error output or files have outgrown their limit."""
        self.finish("output", "too much error output, or too many or too large files")

    def finish(self, reason: str, detail: str) -> NoReturn:
        for late in (signal.SIGALRM, signal.SIGTERM):
            signal.signal(late, signal.SIG_IGN)
        if self.player:
            os.kill(self.player, signal.SIGKILL)
            os.waitpid(self.player, 0)
        _write(1, {"reason": reason, "detail": detail[:DETAIL]})
        os._exit(0)


def play(questions: int, answer: int, limits: dict[str, Any]) -> NoReturn:
    """Answer the judge's questions with the program; what the program does here can only change its answers."""
    space = ModuleType("program")
    sys.modules["program"] = space
    objects: list[Any] = []

    def keep(thing: Any) -> list[Any]:
        objects.append(thing)
        return ["object", len(objects) - 1]

    def reply(kind: str, *rest: Any) -> Any:
        if kind == "confined":
            return confine(**limits, may_kill=[os.getpid()])
        if kind == "load":
            return exec(compile(rest[0], "<program>", "exec"), space.__dict__)
        if kind == "name":
            if rest[0] not in space.__dict__:
                raise NameError(f"the program defines no {rest[0]!r}")
            return space.__dict__[rest[0]]
        thing = objects[rest[0]]
        if kind == "items":
            return list(thing)
        if kind == "attribute":
            return getattr(thing, rest[1])
        args, kwargs = decode(rest[1], objects.__getitem__)
        return thing(*args, **kwargs)

    with os.fdopen(questions, "rb") as incoming:
        for question in incoming:
            try:
                message = ["value", encode(reply(*json.loads(question)), keep)]
            except BaseException as error:
                message = [type(error).__name__, str(error)[:DETAIL]]
            _write(answer, message)
    os._exit(0)


class ProgramError(Exception):
    """The program raised an exception: its kind and its text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


def encode(value: Any, reference: Callable[[Any], list[Any]]) -> Any:
    """Plain data as JSON, a subclass as its base; anything else is what `reference` makes of it."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return ["int", hex(value)]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, reference) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, reference), encode(item, reference)] for key, item in value.items()]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, type) and value in vars(builtins).values():
        return ["type", value.__name__]
    origin = type(value).__module__, type(value).__name__
    if origin in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return [origin[1], str(value)]
    if origin[0] == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item(), reference)
    return reference(value)


def decode(form: Any, thing: Callable[[int], Any]) -> Any:
    """What `encode` wrote, made of Python's own types only; objects are looked up with `thing`."""
    if not isinstance(form, list):
        return form
    kind, value = form
    if kind in ("list", "tuple", "set", "frozenset"):
        items = [decode(item, thing) for item in value]
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](items)
    if kind == "dict":
        return {decode(key, thing): decode(item, thing) for key, item in value}
    if kind == "Decimal":
        from decimal import Decimal

        return Decimal(value)
    if kind == "Fraction":
        from fractions import Fraction

        return Fraction(value)
    if kind == "type" and isinstance(named := vars(builtins)[value], type):
        return named
    makers: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "bytes": bytes.fromhex,
        "complex": lambda parts: complex(*parts),
        "range": lambda parts: range(*parts),
        "object": thing,
    }
    return makers[kind](value)


def _number_of(value: Any) -> list[Any]:
    if isinstance(value, Remote):
        return ["object", value._remote[1]]
    raise TypeError(f"a test passes a {type(value).__name__} to the program; only plain data can be passed")


def _place(error: BaseException, tests: str) -> str:
    """The line of the tests that failed."""
    trace, line = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return tests.splitlines()[line - 1].strip() + "\n" if line else ""


def _write(pipe: int, message: Any) -> None:
    rest = memoryview(json.dumps(message).encode() + b"\n")
    while rest:
        rest = rest[os.write(pipe, rest) :]
