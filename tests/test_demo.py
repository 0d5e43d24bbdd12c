"""The terminal demo: what it prints, what it reads, and how it ends."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

from dllm_var import GenerationConfig, load_pretrained, stream

DEMO = Path(__file__).parents[1] / "demo_dLLM-var.py"
FAST = ["--max_gen_length", "12", "--block_length", "4"]
SUMMARY = re.compile(
    r"\[\d+ tokens, stopped by (eos|length), (?:1 forward|\d+ forwards), \d+\.\d tokens/forward, \d+ tokens/s\]"
)


@pytest.fixture(scope="module")
def demo(script: Any) -> Any:
    return script("demo_dLLM-var.py")


def test_one_prompt_gives_the_answer_and_its_figures(demo: Any, chat_folder: Path, capsys: Any) -> None:
    assert demo.main(["--model", str(chat_folder), "--prompt", "rep xy 3", *FAST]) == 0
    out = capsys.readouterr().out
    model = load_pretrained(chat_folder)
    config = GenerationConfig(max_gen_length=12, block_length=4)
    text = next(event.result.text for event in stream(model, ["rep xy 3"], config) if event.result)
    assert out.startswith(demo.printable(text))
    assert SUMMARY.search(out)


def test_every_line_of_a_pipe_is_a_prompt(demo: Any, chat_folder: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("rep xy 3\n\n  \ncount 9\n"))
    assert demo.main(["--model", str(chat_folder), *FAST]) == 0
    out = capsys.readouterr().out
    assert len(SUMMARY.findall(out)) == 2
    assert out.index("> rep xy 3") < out.index("> count 9")


def test_plain_output_is_the_final_text_piece_by_piece(demo: Any, chat_folder: Path) -> None:
    model, config = load_pretrained(chat_folder), GenerationConfig(max_gen_length=20, block_length=4)
    console = Console(file=io.StringIO(), width=20)
    result, seconds = demo.show_plain(console, stream(model, ["rep xy 3"], config))
    assert console.file.getvalue() == demo.printable(result.text) + "\n"  # not wrapped, nothing twice
    assert seconds > 0


def test_a_line_that_is_no_text_is_told_and_the_next_one_answered(
    demo: Any, chat_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"rep xy 3\ncaf\xe9\ncount 9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    assert demo.main(["--model", str(chat_folder), *FAST]) == 1
    told = capsys.readouterr()
    assert len(SUMMARY.findall(told.out)) == 2
    assert "error: the text is not valid Unicode: 'caf' is followed by" in told.err.replace("\n", " ")


def test_an_answer_longer_than_the_terminal_is_there_once_at_the_end(demo: Any, chat_folder: Path) -> None:
    model, config = load_pretrained(chat_folder), GenerationConfig(max_gen_length=60, block_length=4, threshold=2)
    console = Console(file=io.StringIO(), width=3, height=3, force_terminal=True, color_system=None)
    result, _ = demo.show_live(console, model, stream(model, ["rep xy 3"], config))
    lines = Text(demo.printable(result.text)).wrap(console, 3)
    assert len(lines) > 4
    assert "..." not in console.file.getvalue()  # the library's sign for lines at the end that it does not show
    last = console.file.getvalue().rsplit("\x1b[2K", 1)[-1]  # behind the last line that was wiped out
    ending = [line.plain.rstrip() for line in lines]
    assert [line.rstrip() for line in last.rstrip().splitlines()][-len(ending) :] == ending
    assert console.file.getvalue().count("\n" + lines[0].plain) <= 3  # while it fitted, and at the end


def test_the_live_view_shows_masks_and_colours_by_probability(demo: Any, chat_folder: Path) -> None:
    model, config = load_pretrained(chat_folder), GenerationConfig(max_gen_length=20, block_length=4)
    sure: dict[int, float] = {}
    views = []
    for event in stream(model, ["rep xy 3"], config):
        sure.update({commit.position: commit.confidence for commit in event.committed})
        views.append(demo.coloured(model, event, sure))
    assert demo.MASK_SIGN in views[0].plain
    assert demo.MASK_SIGN not in views[-1].plain
    assert event.result is not None
    assert views[-1].plain == demo.printable(event.result.text)
    colours = {colour for _, colour in demo.SHADES}
    assert len({span.style for view in views for span in view.spans} & colours) > 1


def test_the_banner_offers_the_examples_of_the_model(demo: Any, chat_folder: Path) -> None:
    model, config = load_pretrained(chat_folder), GenerationConfig()
    console = Console(file=io.StringIO(), width=120)
    examples = chat_folder / "examples.json"
    console.print(demo.banner(str(chat_folder), model, config))
    examples.write_text('["Write 1,024 in words.", "[bold]Sort: pear, fig"]')
    console.print(demo.banner(str(chat_folder), model, config))
    examples.unlink()
    before, after = console.file.getvalue().split("dLLM-Var")[1:]
    assert "Try:" not in before
    assert "Write 1,024 in words." in after
    assert "[bold]Sort: pear, fig" in after


def test_characters_that_steer_a_terminal_are_not_passed_on(demo: Any) -> None:
    assert demo.printable("a\x1b[31mb\nc\td\x9b1m\re") == "a\ufffd[31mb\nc\td\ufffd1m\ufffde"


def test_what_does_not_fit_into_the_memory_is_one_sentence(
    demo: Any, chat_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    def too_much(*_: Any, **__: Any) -> None:
        torch.empty(2**50)

    for name, code, said in (
        ("stream", 1, "the answer does not fit"),
        ("load_pretrained", 2, "does not fit into the memory"),
    ):
        monkeypatch.setattr(demo, name, too_much)
        assert demo.main(["--model", str(chat_folder), "--prompt", "ab", *FAST]) == code
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("chosen", "small", "threads"), [(None, None, 1), ("2", None, 2), (None, 1, 2)])
def test_a_small_network_stays_on_one_thread_unless_the_environment_says_more(
    demo: Any, chat_folder: Path, monkeypatch: Any, chosen: str | None, small: int | None, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    if small is not None:
        monkeypatch.setattr(demo, "SMALL", small)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert demo.main(["--model", str(chat_folder), "--prompt", "ab", *FAST]) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no such folder"], "model 'no such folder' is no folder"),
        (["--model", "tests"], "not a checkpoint folder"),
        (["--threshold", "-1"], "threshold=-1.0 is not a number of at least 0"),
        (["--block_length", "0"], "block_length=0"),
    ],
)
def test_a_bad_option_or_model_is_one_sentence(
    arguments: list[str], said: str, demo: Any, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(DEMO.parent)
    assert demo.main([*arguments, "--prompt", "hello"]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_a_prompt_beyond_the_context_is_answered_with_one_sentence_of_warning(
    demo: Any, chat_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 600 + "\nrep xy 3\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert demo.main(["--model", str(chat_folder), *FAST]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: a prompt and its longest answer reach beyond the 512 positions")
    assert captured.err.count("\n") == 1
    assert len(SUMMARY.findall(captured.out)) == 2


def test_a_prompt_that_cannot_be_answered_is_told_and_the_next_one_answered(
    demo: Any, chat_folder: Path, capsys: Any, monkeypatch: Any
) -> None:
    def failing(model: Any, prompts: Any, config: Any) -> Any:
        if prompts == ["first"]:
            raise ValueError("no such prompt")
        return stream(model, prompts, config)

    monkeypatch.setattr(demo, "stream", failing)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nrep xy 3\n"))
    assert demo.main(["--model", str(chat_folder), *FAST]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: no such prompt\n"
    assert len(SUMMARY.findall(captured.out)) == 1


class Terminal:
    """The demo in a pseudo-terminal of its own."""

    def __init__(self, folder: Path) -> None:
        self.master, slave = pty.openpty()
        self.seen = ""
        self.found = 0  # everything before was looked through: one piece of output may hold two signs
        self.process = subprocess.Popen(
            [sys.executable, str(DEMO), "--model", str(folder), "--max_gen_length", "400", "--block_length", "4"],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(slave)

    def read_until(self, sign: str) -> None:
        while sign not in self.seen[self.found :]:
            ready, _, _ = select.select([self.master], [], [], 120)
            assert ready, f"{sign!r} did not come after {self.seen!r}"
            self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.found = self.seen.index(sign, self.found) + len(sign)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        with contextlib.suppress(OSError):  # raised when the other end is closed
            while piece := os.read(self.master, 4096):
                self.seen += piece.decode(errors="replace")
        os.close(self.master)
        return self.process.wait(timeout=60)


def test_a_conversation_in_a_terminal_ends_with_ctrl_d(chat_folder: Path) -> None:
    terminal = Terminal(chat_folder)
    terminal.read_until("> ")
    assert "Ctrl-D ends" in terminal.seen
    terminal.type("count 9\n")
    terminal.read_until("tokens/s]")
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen


def test_ctrl_c_in_the_middle_of_an_answer_ends_without_a_traceback(chat_folder: Path) -> None:
    terminal = Terminal(chat_folder)
    terminal.read_until("> ")
    terminal.type("rep xy 3\n")
    terminal.read_until("░")
    os.kill(terminal.process.pid, signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.seen


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_input_has_no_questions_and_a_closed_output_no_reader(chat_folder: Path, closed: str) -> None:
    command = f'exec "{sys.executable}" "{DEMO}" --plain --model "{chat_folder}" {closed}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_ctrl_c_while_the_demo_is_still_importing_ends_without_a_traceback() -> None:
    command = [sys.executable, "-X", "importtime", str(DEMO), "--prompt", "rep xy 3", "--plain"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=DEMO.parent) as demo:
        assert demo.stderr is not None
        while "torch." not in (line := demo.stderr.readline()):
            assert line, "it ended before it imported torch"
        demo.send_signal(signal.SIGINT)
        rest = demo.stderr.read()
    assert demo.returncode == -signal.SIGINT  # a shell shows 130
    assert "Traceback" not in rest


SWALLOWING = """
import importlib.util, os, signal, sys

spec = importlib.util.spec_from_file_location("demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
stream = demo.stream

class Swallows:
    def __del__(self):  # what a destructor raises is only printed
        os.kill(os.getpid(), signal.SIGINT)

def interrupted(*given):
    for event in stream(*given):
        Swallows()
        yield event

demo.stream = interrupted
del sys.argv[1]
sys.exit(demo.run())
"""


def test_ctrl_c_that_a_library_swallows_ends_the_demo_all_the_same(chat_folder: Path) -> None:
    command = [sys.executable, "-c", SWALLOWING, str(DEMO), "--model", str(chat_folder), "--prompt", "rep xy 3", "--plain"]
    done = subprocess.run([*command, *FAST], capture_output=True, text=True, timeout=200, cwd=DEMO.parent)
    assert "Exception ignored in" in done.stderr
    assert done.returncode == 130, done.stderr
    assert "tokens/s]" not in done.stdout
