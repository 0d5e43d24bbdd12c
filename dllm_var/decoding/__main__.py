"""What decoding offers: methods with their options, caches, and which of them go together.

    python -m dllm_var.decoding

Everything printed is the data of `dllm_var.decoding.methods`.
"""

import argparse
import signal
import textwrap
from collections.abc import Mapping
from typing import Any

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.methods import CACHES, COLUMNS, FIXED, MATRIX, METHODS, ORDER, SAMPLING

WIDTH = 100
INDENT = 16  # of everything that stands beside a name
SHARED = {"canvas": FIXED, "order": ORDER}  # options that several methods read, printed once


def main() -> None:
    """Print the three tables."""
    print("METHODS, with their options and defaults (None: off, or derived from other options)\n")
    for name, method in METHODS.items():
        shared = [group for group, values in SHARED.items() if values.keys() <= method.options.keys()]
        common = {option: value for group in shared for option, value in SHARED[group].items()}
        own = {o: value for o, value in method.options.items() if o not in common or common[o] != value}
        references = ["…" + group for group in [*shared, "sampling"]]
        beside(
            name,
            f"{method.summary} ({source(method.paper)})",
            "  ".join([written(own), *references]),
            f"caches: {', '.join(fitting(name))}",
        )
    for group, values in {**SHARED, "sampling": SAMPLING}.items():
        beside("…" + group, written(values))
    print("\nCACHES\n")
    for name, cache in CACHES.items():
        beside(name, cache.summary + (f" ({source(cache.paper)})" if cache.paper else ""), written(cache.options))
    print("\nWHICH GO TOGETHER (yes; a number: under that rule; no: refused, the number says why)\n")
    matrix()


def fitting(method: str) -> list[str]:
    """The caches that a method goes with."""
    config = GenerationConfig(method=method)
    canvas = [name for name, cache in CACHES.items() if config.canvas in cache.canvases]
    return [name for name in canvas if all(MATRIX[policy][name].verdict != "refused" for policy in config.policies)]


def source(paper: str) -> str:
    """The name of a paper, in one word."""
    return f"arXiv\N{NO-BREAK SPACE}{paper}"


def written(options: Mapping[str, Any]) -> str:
    """Options with their defaults."""
    return "  ".join(f"{name}={value}" for name, value in options.items())


def beside(name: str, *parts: str) -> None:
    """Print a name with paragraphs beside it."""
    lines = [line for part in parts for line in textwrap.wrap(part, WIDTH - INDENT, break_long_words=False)]
    for first, line in zip([name, *[""] * len(lines)], lines, strict=False):
        print(f"{first:<{INDENT}}{line}")


def matrix() -> None:
    """Print policies against caches, and the notes that its numbers stand for."""
    notes: dict[str, int] = {}
    print(f"{'':<{INDENT}}" + "".join(f"{column:>13}" for column in COLUMNS))
    for policy, row in MATRIX.items():
        cells = []
        for column in COLUMNS:
            pair = row[column]
            number = notes.setdefault(pair.note, len(notes) + 1) if pair.note else 0
            cells.append({"sound": "yes", "rule": f"{number}", "refused": f"no {number}"}[pair.verdict])
        print(f"{policy:<{INDENT}}" + "".join(f"{cell:>13}" for cell in cells))
    print()
    for note, number in notes.items():
        beside(f"{number:>{INDENT - 2}}", note)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m dllm_var.decoding", description=__doc__).parse_args()  # it takes none
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # piped into head, it ends quietly
    main()
