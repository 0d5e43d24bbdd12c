"""Turns a folder of instruction files (JSON Lines) into one file of token ids, the input of SFT.

    python dataset/transfer_text2token.py --input_dir FOLDER --output_file TOKENS.jsonl --tokenizer_model tiny

Every ``*.jsonl`` and ``*.json`` below the folder is read in sorted order; a line is an object with ``instruction``,
``input`` and ``output`` (the first two may be null). A line of the output is
``{"id", "input_ids", "prompt_length", "source", "num_tokens"}``; the tokens from prompt_length on are the response.
Samples longer than --max_length are left out and counted, never cut.

The work can be stopped in any way, at any moment: the same command goes on where it was, and the finished file is the
same to the byte as without the stop, for any --num_workers. While unfinished, the output's name plus ``.part`` and
``.progress.json`` stand beside it, afterwards ``.summary.json``.

Exit code: 0 done, 1 bad data (or a disk that fails), 2 bad arguments, 130 interrupted.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from dllm_var.model.shards import some
from dllm_var.text.chat import TEMPLATES, render_sample
from dllm_var.text.instructions import BadLine, parse_line, to_messages
from dllm_var.text.part_file import PartFile
from dllm_var.text.tally import Tally
from dllm_var.text.tokenizer import load_tokenizer

FORMAT = 1  # raise it when the same settings begin to give another output: work left by old code is then not continued
CHUNK_LINES = 256  # lines between two safe points
CHUNK_BYTES = 4 << 20


class BadData(Exception):
    """Files that give no output; the message is for the user."""


@dataclass(frozen=True)
class Recipe:
    """What decides the output apart from the files and the tokenizer."""

    template: str
    max_length: int
    on_error: str


@dataclass(frozen=True)
class Source:
    """One input file; `name` is its path below the input folder."""

    path: Path
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Chunk:
    """Some consecutive lines of one source, and the byte at which reading goes on after them."""

    source: int
    name: str
    first_line: int
    lines: list[bytes]
    next_offset: int


@dataclass
class SafePoint:
    """Where reading goes on, and the counts up to there: the state that the part file keeps."""

    source: int = 0
    offset: int = 0
    line: int = 1
    tally: Tally = field(default_factory=Tally)

    def saved(self) -> dict[str, Any]:
        """As JSON takes it."""
        return vars(self) | {"tally": vars(self.tally)}

    @staticmethod
    def restored(saved: dict[str, Any] | None) -> "SafePoint":
        """From `saved`; the beginning, if nothing was."""
        return SafePoint() if saved is None else SafePoint(**(saved | {"tally": Tally.restored(saved["tally"])}))


Outcome = tuple[bytes, Tally, str | None]


# Lines to samples, in this process or in several.


def tokenise(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, chunk: Chunk) -> Outcome:
    """Output lines of a chunk, their tally, and under ``on_error=stop`` the complaint about the first bad line."""
    out: list[str] = []
    tally = Tally()
    for number, raw in enumerate(chunk.lines, start=chunk.first_line):
        tally.lines += 1
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line.strip():
            tally.blank_lines += 1
            continue
        place = f"{chunk.name}:{number}"
        try:
            record = parse_line(line)
            prompt, response = render_sample(tokenizer, to_messages(record, recipe.template), record.output, recipe.template)
        except ValueError as error:
            if recipe.on_error == "stop":
                return b"", tally, f"{place}: {error}"
            tally.drop(error.reason if isinstance(error, BadLine) else "not encodable", place)
            continue
        tally.unused_fields.update(record.unused)
        if len(prompt) + len(response) > recipe.max_length:
            tally.drop("longer than max_length", place)
            continue
        tally.count(prompt, response, tokenizer.eos_token_id)
        tally.without_prompt += not (record.instruction.strip() or record.input.strip())
        sample: dict[str, Any] = {"id": f"{chunk.name.rpartition('.')[0]}:{number}", "input_ids": prompt + response}
        sample |= {"prompt_length": len(prompt), "source": chunk.name, "num_tokens": len(prompt) + len(response)}
        out.append(json.dumps(sample, separators=(",", ":")) + "\n")
    return "".join(out).encode(), tally, None


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_model: str, recipe: Recipe) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that is killed says nothing, and its workers would wait for ever.
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    _worker.update(tokenizer=load_tokenizer(tokenizer_model), recipe=recipe)


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> Outcome:
    return tokenise(_worker["tokenizer"], _worker["recipe"], chunk)


def outcomes(
    chunks: Iterator[Chunk], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Generator[tuple[Chunk, Outcome], None, None]:
    """Every chunk with its outcome, in the order of the chunks; at most a few chunks per worker are in memory."""
    if args.num_workers == 1:
        yield from ((chunk, tokenise(tokenizer, args.recipe, chunk)) for chunk in chunks)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    waiting: deque[tuple[Chunk, Future[Outcome]]] = deque()
    pool = ProcessPoolExecutor(
        args.num_workers, multiprocessing.get_context("spawn"), _start_worker, (args.tokenizer_model, args.recipe)
    )
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(_work, chunk)))
            if len(waiting) > 3 * args.num_workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# Reading.


def data_files(folder: Path) -> Iterator[Path]:
    """The JSON files at any depth, those in linked folders too.

    Raises:
        ValueError: a folder that cannot be read, a link that leads nowhere, or to a folder that it lies in.
    """

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename!r} cannot be read: {error.strerror}.") from error

    for place, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        paths = [Path(place) / name for name in names if name.endswith((".jsonl", ".json"))]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{str(path)!r} is a link to nothing: mend or remove it.")
            if any("\ud800" <= letter <= "\udfff" for letter in str(path)):  # bytes, as Python shows them
                raise ValueError(f"the name {str(path)!r} is not UTF-8: rename it.")
        yield from (path for path in paths if path.is_file())
        for inner in (Path(place) / name for name in folders):
            if inner.is_symlink() and inner.resolve() in map(Path.resolve, inner.parents):
                raise ValueError(f"{str(inner)!r} is a link to a folder that it lies in: remove it.")


def find_sources(folder: Path) -> list[Source]:
    """The input files, sorted by name.

    Raises:
        ValueError: as `data_files`; there is none, or two would give their samples the same ids.
    """
    found = sorted(data_files(folder))
    if not found:
        raise ValueError(f"--input_dir {str(folder)!r} holds no *.jsonl or *.json file, at any depth.")
    stems: dict[Path, Path] = {}
    for path in found:
        twin = stems.setdefault(path.with_suffix(""), path)
        if twin != path:
            raise ValueError(f"{str(twin)!r} and {str(path)!r} would give their samples the same ids: rename or remove one.")
    stats = [path.stat() for path in found]
    return [
        Source(path, path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns)
        for path, stat in zip(found, stats, strict=True)
    ]


def not_read(folder: Path) -> list[str]:
    """The files below a folder that are no JSON files by their names; hidden ones do not count."""
    inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in inside if path.suffix not in (".jsonl", ".json") and path.name[0] != ".")


def check_output(output: Path, folder: Path, sources: list[Source]) -> None:
    """Whether the output would be read as input by a later run, through links too.

    Raises:
        ValueError: it would.
    """
    places = {place.resolve() for source in sources for place in source.path.parents if place.is_relative_to(folder)}
    if output.parent.resolve() in places:
        raise ValueError(
            f"--output_file {str(output)!r} lies where --input_dir leads, and a later run would read it as input: put it "
            "elsewhere."
        )


def read_chunks(sources: list[Source], start: SafePoint) -> Iterator[Chunk]:
    """The lines from a safe point on; a chunk never crosses from one file to the next."""
    offset, line = start.offset, start.line
    for index in range(start.source, len(sources)):
        with open(sources[index].path, "rb") as file:
            file.seek(offset)
            while True:
                lines: list[bytes] = []
                size = 0
                while len(lines) < CHUNK_LINES and size < CHUNK_BYTES and (raw := file.readline()):
                    lines.append(raw)
                    size += len(raw)
                if not lines:
                    break
                offset += size
                yield Chunk(index, sources[index].name, line, lines, offset)
                line += len(lines)
        offset, line = 0, 1


# The command.


def fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: list[Source]) -> str:
    """A hash of everything that decides the output: only work with the same hash is continued or taken for finished."""
    files = [(source.name, source.size, source.mtime_ns) for source in sources]
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    parts = json.dumps([FORMAT, vars(recipe), tokenizer.backend_tokenizer.to_str(), roles, files])
    return hashlib.sha256(parts.encode()).hexdigest()


def run(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, sources: list[Source]) -> str:
    """Does or finishes the work and returns what to tell of it.

    Raises:
        ValueError: the output is in use or not ours.
        BadData: a line is bad, no line gave a sample, or the files changed meanwhile.
    """
    output = PartFile(args.output_file, fingerprint(args.recipe, tokenizer, sources))
    if output.finished():
        return f"{args.output_file} is already complete for these files and settings; see {output.summary}."
    try:
        point = SafePoint.restored(output.open())
        convert(args, tokenizer, sources, output, point)
        if find_sources(args.input_dir) != sources:
            raise BadData(f"the files in {str(args.input_dir)!r} were changed while they were read: run again.")
        if not point.tally.samples:
            output.discard()
            raise BadData("no line gave a sample, so nothing was written.\n" + point.tally.text())
        described = vars(args.recipe) | {"sources": [source.name for source in sources]}
        size = output.finish(described | point.tally.report())
        return f"{point.tally.text()}\n{args.output_file} ({size:,} bytes); the summary is also in {output.summary}."
    finally:
        output.close()


def convert(
    args: argparse.Namespace,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    output: PartFile,
    point: SafePoint,
) -> None:
    """Appends everything after the safe point to the output, moving the safe point along.

    Raises:
        BadData: under ``on_error=stop``, the first bad line.
    """
    before = [sum(source.size for source in sources[:index]) for index in range(len(sources) + 1)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        contextlib.closing(outcomes(read_chunks(sources, point), tokenizer, args)) as done,
    ):
        bar = progress.add_task(sources[point.source].name, total=before[-1], completed=before[point.source] + point.offset)
        if point.offset:
            progress.console.print(f"Going on at {sources[point.source].name}:{point.line}.", highlight=False)
        for chunk, (text, tally, complaint) in done:
            if complaint is not None:
                raise BadData(f"{complaint} Mend the line, or leave such lines out with --on_error skip.")
            point.source, point.offset = chunk.source, chunk.next_offset
            point.line = chunk.first_line + len(chunk.lines)
            point.tally.add(tally)
            output.append(text, point.saved())
            progress.update(bar, completed=before[chunk.source] + chunk.next_offset, description=chunk.name)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked as far as they can be without opening anything; a fault ends the program with code 2."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", type=Path, required=True, help="folder with *.jsonl or *.json files, at any depth")
    parser.add_argument("--output_file", type=Path, required=True, help="the JSON Lines file to write")
    parser.add_argument("--tokenizer_model", required=True, help="folder with tokenizer.json, or 'tiny' for the bundled one")
    parser.add_argument(
        "--template", default="chat", choices=TEMPLATES, help="chat turns ending in eot + EOS, or bare text + EOS"
    )
    parser.add_argument("--max_length", type=int, default=8192, help="longest sample in tokens (default 8192)")
    parser.add_argument("--num_workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--on_error", default="stop", choices=("stop", "skip"), help="what to do at a malformed line")
    args = parser.parse_args(argv)
    for name in ("max_length", "num_workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} must be at least 1")
    if not args.input_dir.is_dir():
        parser.error(f"--input_dir {str(args.input_dir)!r} is not a folder")
    if args.output_file.is_dir():
        parser.error(f"--output_file {str(args.output_file)!r} is a folder: name a file in it")
    if args.output_file.resolve().is_relative_to(args.input_dir.resolve()):
        parser.error("--output_file lies inside --input_dir, where a later run would read it as input: put it elsewhere")
    args.recipe = Recipe(args.template, args.max_length, args.on_error)
    return args


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = parse_arguments(argv)
    try:
        tokenizer = load_tokenizer(args.tokenizer_model)
        render_sample(tokenizer, [{"role": "user", "content": "?"}], "!", args.template)  # are the template's tokens there?
        sources = find_sources(args.input_dir)
        check_output(args.output_file, args.input_dir, sources)
        if others := not_read(args.input_dir):
            print(f"not read, since they end neither in .jsonl nor in .json: {some(others)}", file=sys.stderr)
        print(run(args, tokenizer, sources))
    except (BadData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a worker process died, perhaps for lack of memory: try fewer --num_workers.", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
