"""Why: does the engine lose or leak anything, over many requests that come, are cancelled and run out of time at random?

How: ``python scripts/soak.py`` (bundled model, 10,000 requests, some minutes); ``--output FILE`` keeps the JSON line printed
last. About one request in six is cancelled, one in ten has a deadline, one in ten a forward budget; two ways of decoding
share the engine. Every fiftieth answer that ran to its end is compared with the same request alone. Exit code 1 when a
request ended other than once, an answer differs, rows or queue are not empty at the end, or memory grew by more than 2 %.
"""

import dllm_var.quiet  # isort: skip (before transformers)
import argparse
import json
import random
import sys
from collections import Counter
from typing import Any

import psutil
import torch
from rich.progress import Progress

import dllm_var
from dllm_var import Generation, GenerationConfig, Pretrained
from dllm_var.engine import Engine
from evaluation.arguments import new_file, whole
from sft_training.config import MOST_THREADS

WAYS = (
    GenerationConfig(max_gen_length=64, block_length=16),
    GenerationConfig(method="vanilla", gen_length=32, block_length=16, threshold=0.9, cache="prefix", use_dual=True),
)
SETTLED = 0.2  # of the requests, after which memory must not grow any more
GROWTH = 0.02
COMPARED = 50


def soak(model: Pretrained, requests: int, rows: int, seed: int) -> dict[str, Any]:
    """Run them; what happened."""
    draw, process = random.Random(seed), psutil.Process()
    engine = Engine(model, max_rows=rows, max_length=256, memory=1 << 28, queue_size=4 * rows)
    asked: dict[int, tuple[str, GenerationConfig]] = {}
    ends: Counter[str] = Counter()
    submitted = ended = differing = compared = 0
    resident = None

    def finish(number: int, answer: Generation, whole: bool) -> None:
        nonlocal ended, differing, compared
        ended += 1
        ends[answer.stop_reason] += 1
        prompt, config = asked.pop(number)  # a second end of the same request is a KeyError
        if whole and number % COMPARED == 0:
            compared += 1
            differing += dllm_var.generate(model, [prompt], config)[0].tokens != answer.tokens

    with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
        line = progress.add_task("requests", total=requests)
        while submitted < requests or not engine.idle:
            while submitted < requests and len(engine.waiting) < engine.queue_size:
                kind, config = draw.random(), draw.choice(WAYS)
                prompt = f"Write {draw.randrange(10_000)} in words."
                limits = (
                    {"seconds": 10 ** draw.uniform(-3, 0)}
                    if kind < 0.1
                    else {"forwards": draw.randint(1, 3)}
                    if kind < 0.2
                    else {}
                )
                number = engine.submit(prompt, config, **limits)  # type: ignore[arg-type]
                asked[number] = (prompt, config)
                submitted += 1
            for event in engine.step():
                if event.result is not None:
                    finish(event.request, event.result, event.result.stop_reason in ("eos", "length"))
            if asked and draw.random() < 0.1 * rows / 4:
                number = draw.choice(list(asked))
                finish(number, engine.cancel(number), whole=False)
            progress.update(line, completed=ended)
            if resident is None and ended >= SETTLED * requests:
                resident = process.memory_info().rss
    assert resident is not None
    return {
        "requests": requests, "ended": ended, "stop_reasons": dict(sorted(ends.items())), "compared": compared,
        "differing": differing, "unanswered": len(asked), "live_rows": engine.live, "waiting": len(engine.waiting),
        "rows_in_stores": sum(lane.loop.state.rows for lane in engine.lanes.values()),
        "memory_growth": process.memory_info().rss / resident - 1, "forwards": engine.forwards,
        "wasted": engine.padding / engine.columns,
    }  # fmt: skip


def complaints(found: dict[str, Any]) -> list[str]:
    """What should not have happened."""
    wrong = [
        f"{name} is {found[name]}, not 0"
        for name in ("differing", "unanswered", "live_rows", "waiting", "rows_in_stores")
        if found[name]
    ]
    if found["ended"] != found["requests"]:
        wrong.append(f"{found['requests']} requests ended {found['ended']} times")
    if found["memory_growth"] > GROWTH:
        wrong.append(f"memory grew by {found['memory_growth']:.1%}, above {GROWTH:.0%}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--requests", type=whole(1), default=10_000)
    parser.add_argument("--rows", type=whole(1), default=16, help="requests decoded at a time")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--threads", type=whole(1, MOST_THREADS), default=1)
    parser.add_argument("--output", type=new_file, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        model = dllm_var.load_pretrained(args.model)
    except ValueError as error:
        parser.error(str(error))
    found = soak(model, args.requests, args.rows, args.seed)
    wrong = complaints(found)
    line = json.dumps(found | {"torch": torch.__version__, "seed": args.seed, "rows": args.rows})
    print(*wrong, *[] if wrong else ["Nothing was lost, nothing is left."], line, sep="\n")
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
