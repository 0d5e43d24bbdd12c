"""Why: one trained recipe, decoded in every way that a model of its kind can be: what it gets right, and how long it thinks
answers are.

How: called by ``study.sh``; ``python scripts/study_measure.py --model FOLDER --output FILE.json``. A model trained with
``loss.name=next_token`` (``--autoregressive``) is answered with token by token. Outcomes are those of
``evaluation/length_calibration.py``. A file of the same problems and ways is left as it is.
"""

import dllm_var.quiet  # isort: skip (before transformers)
import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval_ar_twin import as_llama, continuations
from rich.progress import Progress

import dllm_var
from dataset.tiny_corpus import TASKS, Problem, fresh_prompts
from dllm_var import Generation, GenerationConfig, Pretrained
from dllm_var.text.chat import decode_text
from evaluation.arguments import new_file, whole
from evaluation.length_calibration import Outcome

SEED = 50_000  # of the held-out problems; those of the other measurements are others
BLOCK, LONGEST = 32, 256
CANVAS_SHARE = 4  # a fixed canvas costs tens of times as much: a quarter of the problems is answered on one
SURE = {"threshold": 0.9, "early_stop": True}
LEFT_TO_RIGHT = "left to right"

# The ways that the paper and LLaDA compare: blocks until EOS, the whole canvas at once, blocks on a canvas, a canvas that
# sizes itself, one token after the other.
WAYS: dict[str, dict[str, Any]] = {
    "EOS-led blocks": {"max_gen_length": LONGEST, "block_length": BLOCK},
    "EOS-led blocks, 1024": {"max_gen_length": 1024, "block_length": BLOCK},
    **{f"pure diffusion {n}": {"method": "vanilla", "gen_length": n, **SURE} for n in (64, 128, LONGEST)},
    "semi-autoregressive 256": {"method": "vanilla", "gen_length": LONGEST, "block_length": BLOCK, **SURE},
    "DAEDAL": {"method": "daedal", "initial_gen_length": BLOCK, "max_gen_length": LONGEST},
    "AR order 256": {"method": "ar", "gen_length": LONGEST, "block_length": BLOCK, "early_stop": True},
}

Answer = Callable[[list[str]], list[Generation]]


def ways(model: Pretrained, autoregressive: bool, names: Sequence[str]) -> dict[str, Answer]:
    """Name → what answers prompts in that way."""
    if not autoregressive:
        configs = {name: GenerationConfig(**WAYS[name]) for name in names}
        return {
            name: lambda prompts, c=c: dllm_var.generate(model, prompts, c, batch_size=16) for name, c in configs.items()
        }  # type: ignore[misc]
    llama, special, tokenizer = as_llama(model.model, model.special), model.special, model.tokenizer
    assert tokenizer is not None

    def answer(prompts: list[str]) -> list[Generation]:
        ids = [model.prompt_ids(prompt) for prompt in prompts]
        made = [row for i in range(0, len(ids), 50) for row in continuations(llama, special, ids[i : i + 50])]
        return [_as_generation(row, len(own), special.stop, tokenizer) for row, own in zip(made, ids, strict=True)]

    return {LEFT_TO_RIGHT: answer}


def _as_generation(row: list[int], prompt: int, stop: Sequence[int], tokenizer: Any) -> Generation:
    """An autoregressive answer: a forward for each token, and with a cache a position for each but the last."""
    ended = row[-1] in stop
    tokens = row[:-1] if ended else row
    none = [0] * len(row)
    text = decode_text(tokenizer, tokens)
    reason = "eos" if ended else "length"
    return Generation(tokens, row, reason, len(row), prompt + len(row) - 1, none, [1.0] * len(row), none, text)


def measure(
    model: Pretrained, autoregressive: bool, prompts: int, names: Sequence[str] = tuple(WAYS)
) -> list[dict[str, Any]]:
    """A record for each way and task: its outcomes, and the seconds that they took together."""
    assert model.tokenizer is not None
    problems: dict[str, list[Problem]] = {task: fresh_prompts(task, SEED, prompts) for task in TASKS}
    chosen, made = ways(model, autoregressive, names), []
    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        line = progress.add_task("measuring", total=len(chosen) * len(TASKS))
        for name, answer in chosen.items():
            share = CANVAS_SHARE if "method" in WAYS.get(name, {}) else 1  # without a method it is ours, which has no canvas
            for task, every in problems.items():
                own = every[: -(-prompts // share)]
                right = [len(model.tokenizer.encode(p.output, add_special_tokens=False)) + 1 for p in own]
                began = time.perf_counter()
                answers = answer([p.instruction for p in own])
                seconds = time.perf_counter() - began
                outcomes = [list(asdict(Outcome.of(*each)).values()) for each in zip(right, own, answers, strict=True)]
                made.append({"way": name, "task": task, "seconds": seconds, "outcomes": outcomes})
                progress.advance(line)
    return made


def holds(file: Path, prompts: int, names: Sequence[str]) -> bool:
    """Whether a file is a measurement of just so many problems in just these ways."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["prompts_per_task"] == prompts and {record["way"] for record in found["records"]} == set(names)
    except (ValueError, KeyError, TypeError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--autoregressive", action="store_true", help="it was trained to predict the next token")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), metavar="WAY",
                        help=f"ways of decoding: {', '.join(WAYS)}; default all")  # fmt: skip
    parser.add_argument("--prompts", type=whole(1), default=100, help="held-out problems per task, a quarter on canvases")
    parser.add_argument("--output", type=new_file, required=True, help="JSON file")
    args = parser.parse_args()
    if args.ways and args.autoregressive:
        parser.error(f"--autoregressive has one way of decoding, {LEFT_TO_RIGHT}: leave --ways out")
    names = [LEFT_TO_RIGHT] if args.autoregressive else args.ways or list(WAYS)
    if args.output.exists():
        if not holds(args.output, args.prompts, names):
            parser.error(f"--output {args.output} holds other problems or ways: delete it, or name another file")
        print(f"{args.output} is there already")
        return
    try:
        records = measure(dllm_var.load_pretrained(args.model), args.autoregressive, args.prompts, names)
    except ValueError as error:
        parser.error(str(error))
    result = {"fields": list(Outcome.__dataclass_fields__), "prompts_per_task": args.prompts, "records": records}
    fresh = args.output.with_suffix(".new")
    fresh.write_text(json.dumps(result) + "\n", encoding="utf-8")
    fresh.replace(args.output)


if __name__ == "__main__":
    main()
