"""Why: the README's picture: one answer of the bundled model, a line per forward, from masks to text.

How: ``python scripts/draw_denoising.py --output scripts/denoising.svg [--prompt TEXT --block_length N]``.
"""

import argparse
import io

from rich.console import Console
from rich.text import Text

import dllm_var
from evaluation.arguments import new_file, share, whole

MASK = "▁"
COLOURS = ((0.9, "green"), (0.5, "yellow"), (0.0, "red"))  # of a token by its probability when it was fixed


def picture(model: dllm_var.Pretrained, prompt: str, config: dllm_var.GenerationConfig) -> Text:
    """A line per forward: what is decided so far, new tokens bold, masks where nothing is."""
    assert model.tokenizer is not None
    drawn, sure = Text(), dict[int, float]()
    for event in dllm_var.stream(model, [prompt], config):
        new = {commit.position: commit.confidence for commit in event.committed}
        sure |= new
        drawn.append(f"{event.step + 1:>3}  ", style="dim")
        for position, token in enumerate(event.response[: event.length]):
            if position not in sure:
                drawn.append(MASK, style="dim")
                continue
            colour = next(colour for bound, colour in COLOURS if sure[position] >= bound)
            text = model.tokenizer.decode([token]).replace("\n", "⏎")
            drawn.append(text, style=f"bold {colour}" if position in new else colour)
        drawn.append("\n")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=new_file, required=True, help="SVG file to write")
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--prompt", default="How do you say 90210 in English?")
    parser.add_argument("--block_length", type=whole(1), default=16)
    parser.add_argument("--threshold", type=share, default=0.9)
    args = parser.parse_args()
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    try:
        config = dllm_var.GenerationConfig(block_length=args.block_length, threshold=args.threshold)
        console.print(picture(dllm_var.load_pretrained(args.model), args.prompt, config))
    except ValueError as error:
        parser.error(str(error))
    args.output.write_text(console.export_svg(title=f"“{args.prompt}” one line per forward"), encoding="utf-8")
    print(f"{args.output}: written")


if __name__ == "__main__":
    main()
