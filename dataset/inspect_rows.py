"""Shows what the model trains on: packed rows after corruption, in colour.

    python dataset/inspect_rows.py dataset.files=TOKENS.jsonl --rows 3

Takes the settings of ``sft_training/sft.py`` (see ``configs/sft.yaml``) and prints the very rows that a training with them
would start with. Colours: prompts blue, visible response plain, masked response red on its clean text, masked EOS white on
red, visible tokens of the loss underlined (right ones green, wrong ones in their place magenta), mask-only tails dim dots,
padding dim dashes; a bar opens each sample.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dllm_var.diffusion.packing import Row
from dllm_var.model.checkpoint import load_config
from dllm_var.text.special_tokens import SpecialTokens
from sft_training.build import build_collate, build_stream, open_tokenizer, shape_folder
from sft_training.config import SftConfig
from sft_training.overrides import compose_settings

STYLES = {
    "prompt": "blue",
    "visible": "default",
    "masked": "red",
    "masked EOS": "bold white on red",
    "checked": "underline green",
    "replaced": "underline magenta",
    "tail": "dim yellow",
    "padding": "dim",
}
SIGNS = {"tail": "·", "padding": "-"}
BORDER = "▌"


def kinds(row: Row, noisy: np.ndarray, asked: np.ndarray, special: SpecialTokens) -> list[str]:
    """What each position of a corrupted row is, one of the names of `STYLES`; ``asked`` are those of the loss."""
    found = []
    for position, (token, seen) in enumerate(zip(row.ids.tolist(), noisy.tolist(), strict=True)):
        if not row.real[position]:
            found.append("padding")
        elif asked[position] and seen == special.mask:
            found.append("masked EOS" if token in special.stop else "masked")
        elif asked[position]:
            found.append("checked" if seen == token else "replaced")
        elif row.response[position]:
            found.append("visible")
        else:
            found.append("tail" if token == special.mask else "prompt")
    return found


def picture(row: Row, noisy: np.ndarray, names: list[str], tokenizer: PreTrainedTokenizerBase) -> Text:
    """A row as coloured text: runs of one kind are decoded together, a bar opens each sample."""
    starts = {start: inside for _, start, _, inside in row.pieces}
    text = Text(overflow="fold")
    begin = 0
    for end in range(1, len(names) + 1):
        if end < len(names) and names[end] == names[begin] and end not in starts:
            continue
        if begin in starts:
            text.append(("" if begin == 0 else "\n") + BORDER + ("…" if starts[begin] else ""), style="bold green")
        name = names[begin]
        ids = noisy if name == "replaced" else row.ids
        shown = SIGNS[name] * (end - begin) if name in SIGNS else tokenizer.decode(ids[begin:end].tolist())
        text.append(shown, style=STYLES[name])
        begin = end
    return text


def pictures(config: SftConfig, number: int) -> Iterator[Text]:
    """The first rows of a training with these settings, each with a line of figures."""
    tokenizer, special = open_tokenizer(config)
    stream = build_stream(config, load_config(shape_folder(config)).embedding_rows, special, tokenizer)
    collate = build_collate(config, special)
    for row in islice(stream, number):
        batch = collate([row])
        noisy = batch["noisy"][0].numpy()
        names = kinds(row, noisy, batch["masked"][0].numpy(), special)
        counts = ", ".join(f"{names.count(name)} {name}" for name in STYLES if name in names)
        levels = batch["t"][0][batch["masked"][0]].unique().tolist()
        head = f"row {row.index}: {len(row.pieces)} samples, t {', '.join(f'{t:.2f}' for t in levels)}; {counts}\n"
        yield Text(head, style="bold") + picture(row, noisy, names, tokenizer) + Text("\n")


def legend() -> Text:
    """Every kind in its own colour."""
    return Text("  ").join([Text(f"{BORDER}sample", "bold green"), *(Text(name, style) for name, style in STYLES.items())])


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description="Print packed, corrupted training rows in colour.")
    parser.add_argument("--rows", type=int, default=2, help="how many rows (default 2)")
    parser.add_argument("overrides", nargs="*", help="settings as for sft_training/sft.py, such as dataset.files=FILE")
    given = parser.parse_intermixed_args()
    console = Console()
    try:
        if given.rows < 1:
            raise ValueError(f"--rows {given.rows}: give at least 1.")
        config = compose_settings(given.overrides)
        config.training.local_batch_size = config.training.grad_accum_steps = 1  # rows as they come, not whole steps
        console.print(legend(), "\n")
        for text in pictures(config, given.rows):
            console.print(text)
    except ValueError as error:
        sys.exit(f"inspect_rows.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
