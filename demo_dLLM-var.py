"""Chat in the terminal with a diffusion language model and watch it write: masks, guesses, and where it stops.

    python demo_dLLM-var.py                                    the bundled model, interactive
    python demo_dLLM-var.py --prompt "Write 1,024 in words."   one answer
    printf 'one\\ntwo\\n' | python demo_dLLM-var.py --plain      one answer for each line
    python demo_dLLM-var.py --model FOLDER_OR_HUB_NAME         another model of LLaDA's format, or a LoRA adapter

Every question stands alone: the model does not see the ones before it. This file only shows what `dllm_var.stream` tells.
"""

import argparse
import io
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run`: Ctrl-C ends the slow imports below without a word

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dllm_var import Event, Generation, GenerationConfig, Pretrained, load_pretrained, stream
from dllm_var.pretrained import lacks_memory, resolve_folder
from dllm_var.text.chat import StreamDecoder

MASK_SIGN = "░"
# Colour of a token by the model's probability for it when it was fixed.
SHADES = ((0.9, "green"), (0.7, "yellow"), (0.5, "dark_orange"), (0.0, "red"))
PAUSE = 0.04  # seconds after each forward in the live view, so that one can watch; not counted in tokens per second
INTERRUPTED = 130
SMALL = 20_000_000  # weights


class CtrlC:
    """KeyboardInterrupt on Ctrl-C, and once more at the next event where a destructor or callback swallowed the first."""

    pressed = False

    def __call__(self, *of_signal: object) -> None:
        self.pressed = True
        self.check()

    def check(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt


CTRL_C = CtrlC()


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 when a prompt could not be answered, 2 for a bad option or model, 130 after Ctrl-C."""
    options = parse(arguments)
    warnings.showwarning = caution
    plain = options.plain or not sys.stdout.isatty()
    console = Console(highlight=False, color_system=None if plain else "auto")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that bytes that are no text spoil their own line alone
    try:
        config = GenerationConfig(
            max_gen_length=options.max_gen_length,
            block_length=options.block_length,
            threshold=options.threshold,
            temperature=options.temperature,
            seed=options.seed,
        )
        with console.status(f"loading {options.model} …"):
            model = load_pretrained(options.model, base=options.base)
    except ValueError as error:
        return complain(error, 2)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        return complain(f"model {options.model!r} does not fit into the memory: use a smaller one, or a larger machine.", 2)
    one_thread_if_small(model)
    asked = options.prompt is None and sys.stdin.isatty()
    if asked:
        console.print(banner(options.model, model, config))
    failed = 0
    for prompt in [options.prompt] if options.prompt is not None else questions(console, asked):
        if not asked and options.prompt is None:
            console.print(Text(f"> {printable(prompt)}", style="bold"), soft_wrap=True)
        try:
            events = stream(model, [prompt], config)
            result, seconds = show_plain(console, events) if plain else show_live(console, model, events)
        except ValueError as error:
            failed = complain(error, 1)
            continue
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            failed = complain("the answer does not fit into the memory: lower --max_gen_length.", 1)
            continue
        console.print(summary(result, seconds), style="dim", soft_wrap=True)
    return 0 if asked else failed


def one_thread_if_small(model: Pretrained) -> None:
    """Leave a small network on one CPU thread, unless OMP_NUM_THREADS is set.

    The threads of a forward wait for each other at every step of it, and if something else has one of the cores, all of them
    wait for that one. With the bundled model two threads made 1.3 times the tokens per second of one while both cores
    were free, and a sixtieth of them beside a training that used both.
    """
    network = model.model
    if network.device.type == "cpu" and network.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; those that are not given stay None and mean the method's own default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", metavar="FOLDER_OR_HUB_NAME", help="default: the bundled model")
    parser.add_argument("--base", metavar="FOLDER_OR_HUB_NAME", help="of an adapter, if it is not where the adapter says")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument("--max_gen_length", type=int, metavar="N", help="the longest answer in tokens")
    parser.add_argument("--block_length", type=int, metavar="N", help="tokens decoded together")
    parser.add_argument("--threshold", type=float, metavar="P", help="commit what is more probable than this")
    parser.add_argument("--temperature", type=float, metavar="T", help="above 0: sample (default 0)")
    parser.add_argument("--seed", type=int, metavar="N", help="of sampling")
    parser.add_argument("--plain", action="store_true", help="no colours, no live view (the default into a pipe or a file)")
    return parser.parse_args(arguments)


def complain(what: object, code: int) -> int:
    """One sentence on stderr; returns the exit code."""
    print(f"error: {what}", file=sys.stderr)
    return code


def caution(what: object, *_where: object, **_more: object) -> None:
    """A warning as one sentence on stderr, in place of Python's lines with a piece of source code."""
    print(f"warning: {what}", file=sys.stderr)


def banner(name: str, model: Pretrained, config: GenerationConfig) -> Panel:
    """What is talking, what it can do, and how to read the colours."""
    parameters = sum(p.numel() for p in model.model.parameters())
    text = Text(f"{name}: {parameters / 1e6:,.1f} M parameters on {model.model.device}, {model.model.dtype}\n")
    text.append(f"block_length {config.block_length}, threshold {config.threshold}, up to {config.max_gen_length} tokens\n")
    examples = resolve_folder(name) / "examples.json"
    if examples.is_file():
        text.append("\nThis model was trained for a few kinds of task. Try:\n")
        for example in json.loads(examples.read_text(encoding="utf-8")):
            text.append(f"  {example}\n", style="italic")
    text.append("\nColours: probability ")
    for bound, colour in SHADES[:-1]:
        text.append(f"≥ {bound}  ", style=colour)
    text.append("lower", style=SHADES[-1][1])
    text.append(f"; {MASK_SIGN} is a mask. Every question stands alone. Ctrl-D ends.")
    return Panel(text, title="dLLM-Var", expand=False)


def questions(console: Console, asked: bool) -> Iterator[str]:
    """Lines that are not empty, from the keyboard or from a pipe, until there are no more."""
    while True:
        CTRL_C.check()
        try:
            line = (console.input("\n[bold]> [/bold]") if asked else input()).strip()
        except EOFError:
            if asked:
                console.print()
            return
        if line:
            yield line


def show_plain(console: Console, events: Iterable[Event]) -> tuple[Generation, float]:
    """Write text as soon as it is final; return the answer and the seconds it took."""
    start, shown = time.perf_counter(), 0
    for event in events:
        CTRL_C.check()
        text = event.text or ""
        console.out(printable(text[shown:]), end="", highlight=False)
        console.file.flush()
        shown = max(shown, len(text))
        if event.result is not None:
            seconds = time.perf_counter() - start
            console.out(printable((event.result.text or "")[shown:]), highlight=False)
            return event.result, seconds
    raise AssertionError("a stream ends with a result")


def show_live(console: Console, model: Pretrained, events: Iterable[Event]) -> tuple[Generation, float]:
    """Show the whole answer after every forward, masks included; return it and the seconds spent on it."""
    sure: dict[int, float] = {}
    seconds, start = 0.0, time.perf_counter()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for event in events:
            CTRL_C.check()
            seconds += time.perf_counter() - start
            sure.update({commit.position: commit.confidence for commit in event.committed})
            answer = coloured(model, event, sure)
            # What has scrolled out of the terminal could not be drawn over any more, so only the end is shown for now.
            shown = answer.wrap(console, console.width)[1 - console.height :]
            live.update(Text("\n").join(shown), refresh=True)
            if event.result is not None:
                break
            time.sleep(PAUSE)
            start = time.perf_counter()
    console.print(answer)
    assert event.result is not None, "a stream ends with a result"
    return event.result, seconds


def coloured(model: Pretrained, event: Event, sure: dict[int, float]) -> Text:
    """The answer as it stands, each piece in the colour of its probability."""
    assert model.tokenizer is not None
    decoder, text = StreamDecoder(model.tokenizer), Text()
    for position, token in enumerate(event.response[: event.length]):
        if token == model.special.mask:
            text.append(printable(decoder.finish())).append(MASK_SIGN, style="dim")
        else:
            shade = next(colour for bound, colour in SHADES if sure[position] >= bound)
            text.append(printable(decoder.push([token])), style=shade)
    return text.append(printable(decoder.finish()))


def printable(text: str) -> str:
    """Text without the characters that steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def summary(result: Generation, seconds: float) -> str:
    """Length, stop reason, forwards and speed of an answer."""
    plural = "s" * (result.forwards != 1)
    return (
        f"[{len(result.tokens)} tokens, stopped by {result.stop_reason}, {result.forwards} forward{plural}, "
        f"{result.tokens_per_forward:.1f} tokens/forward, {result.decided / max(seconds, 1e-9):.0f} tokens/s]"
    )


def run() -> int:
    """`main`, with the ways in which a terminal or a pipe ends it."""
    signal.signal(signal.SIGINT, CTRL_C)
    sys.stdin = sys.stdin or io.StringIO()  # None where whoever started this has closed it
    sys.stdout = sys.stdout or io.StringIO()
    try:
        return main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone; keep Python from trying to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(run())
