"""Count how often each token occurs in a corpus: the file of background frequencies that debias and pc_sampler read.

Why: PC-Sampler (arXiv 2508.13021) decides informative tokens first, and a token is informative where it is rare in text like
that of the task. ``token_freq.json`` beside a model's weights is found by itself; any other file is named by frequency_file.

    python scripts/count_tokens.py --tokenizer FOLDER --output FOLDER/token_freq.json TEXT.jsonl [MORE.txt …]
    python scripts/count_tokens.py --tokenizer FOLDER --output ALL.json --add PART1.json --add PART2.json

A record of a ``*.jsonl`` file is the text of its --fields, each followed by a space; every other file is plain text.
Records are tokenised without control tokens. Counts of several corpora add up (--add), so that a large one can be counted
in parts.

Exit code: 0 written, 2 wrong arguments or data (nothing is written then).
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from dllm_var.decoding.frequencies import check_frequency_file, write_frequencies
from dllm_var.text.chat import encode_text
from dllm_var.text.tokenizer import load_tokenizer

FIELDS = "instruction,input,output"
TEXT_CHARACTERS = 1 << 16  # of a plain text file that are tokenised together, whole lines


def main(arguments: list[str] | None = None) -> int:
    """Count and write; see the module docstring for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="text, or JSON Lines (*.jsonl)")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, or 'tiny' for the bundled one")
    parser.add_argument("--output", required=True, type=Path, help="the JSON file to write")
    parser.add_argument("--fields", default=FIELDS, metavar="NAME,NAME", help=f"of a *.jsonl file; default {FIELDS}")
    parser.add_argument("--add", action="append", default=[], type=Path, metavar="FILE", help="counts to add (repeatable)")
    options = parser.parse_args(arguments)
    try:
        if not options.files and not options.add:
            raise ValueError("nothing to count: name text files, or counts with --add.")
        counts = count_files(load_tokenizer(options.tokenizer), options.files, options.fields.split(","))
        for file in options.add:
            counts.update(check_frequency_file(file)[1])
        if not counts:
            raise ValueError("the files hold no text, so there is nothing to write.")
        options.output.parent.mkdir(parents=True, exist_ok=True)
        total = write_frequencies(options.output, counts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {total:,} tokens, {len(counts):,} different ones.")
    return 0


def count_files(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], fields: Sequence[str]) -> Counter[int]:
    """How often each id occurs in some files, with a progress bar.

    Raises:
        ValueError: a file that is missing, not UTF-8 or not JSON Lines, a field that is not text, or one that no record of
            a file has.
    """
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"no such file: {', '.join(missing)}.")
    counts: Counter[int] = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=sum(file.stat().st_size for file in files))
        for file in files:
            progress.update(bar, description=file.name)
            for record in records(file, fields):
                try:
                    counts.update(encode_text(tokenizer, record.text))
                except ValueError as error:
                    raise ValueError(f"{record.place}: {error}") from error
                progress.advance(bar, record.size)
    return counts


class Record(NamedTuple):
    """A piece of text, where it stands, and how many bytes of the file it takes."""

    text: str
    place: str
    size: int


def records(file: Path, fields: Sequence[str]) -> Iterator[Record]:
    """The records of a file.

    Raises:
        ValueError: see `count_files`.
    """
    seen: set[str] = set()
    with open(file, encoding="utf-8", newline="") as lines:
        try:
            if file.suffix != ".jsonl":
                while text := "".join(lines.readlines(TEXT_CHARACTERS)):
                    yield Record(text, str(file), len(text.encode()))
                return
            for number, line in enumerate(lines, start=1):
                values = _fields(line, fields, f"{file}:{number}") if line.strip() else {}
                seen.update(values)
                text = "".join(f"{value} " for value in values.values() if value is not None)
                yield Record(text, f"{file}:{number}", len(line.encode()))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    never = [name for name in fields if name not in seen]
    if never:
        raise ValueError(f"{file}: no record has the field {' or '.join(never)}: name those to be counted with --fields.")


def _fields(line: str, fields: Sequence[str], place: str) -> dict[str, str | None]:
    """The chosen fields of a line, without those that it lacks; they may be null."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}): a *.jsonl file holds one object per line.") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: not an object with fields.")
    values = {name: record[name] for name in fields if name in record}
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{place}: the field {name!r} holds {value!r}, not text.")
    return values


if __name__ == "__main__":
    sys.exit(main())
