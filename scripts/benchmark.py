"""Why: how fast variable-length decoding is, against what, and which part of it comes from where.

How: ``python scripts/benchmark.py --output evaluation/results/benchmark.json`` (bundled model, one thread, an hour;
``--twin FOLDER`` adds an autoregressive model of the same shape, see ``eval_ar_twin.py``). Every round takes one held-out
problem through all ways of decoding, forwards and backwards in turn, so what is compared are ratios on the same prompt
(``paired_timing.py``). Forwards, positions, operations and bytes are exact (``forward_counts.py``). The last line is one
JSON object. ``--check FILE`` holds a result against the bars, ``--table FILE`` prints it (``benchmark_report.py``).
"""

import dllm_var.quiet  # isort: skip (before transformers)
import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_report import BARE, LEFT_TO_RIGHT, OURS, PARTS, failures, tables
from eval_ar_twin import answer, as_llama, continuations
from forward_counts import (
    H100_BANDWIDTH,
    H100_RATE,
    Replay,
    Shape,
    fixed_canvas,
    flops,
    left_to_right,
    nbytes,
    recorded,
    seconds_at_best,
)  # fmt: skip
from paired_timing import copy_rate, interleave, interleave_over, matmul_rate, ratio
from peak_memory import peak_bytes
from plan_memory import LLADA_8B
from rich.console import Console
from rich.progress import track

import dllm_var
from dataset.tiny_corpus import TASKS, Problem, fresh_prompts
from dllm_var import GenerationConfig, Pretrained
from dllm_var.engine import Engine
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.model.speed import compile_network, quantize_int8
from dllm_var.text.chat import decode_text
from dllm_var.text.special_tokens import SpecialTokens
from evaluation.arguments import new_file, whole
from sft_training.config import MOST_THREADS

SEED = 40_000  # of the held-out problems; those of the other measurements are others
BLOCK, MAX_GEN_LENGTH, THRESHOLD = 32, 1024, 0.9
LENGTHS = (1024, 512, 256)  # of LLaDA's canvas
TOGETHER = (1, 4, 16, 64)  # concurrent requests of the engine
GROWING = {"max_gen_length": MAX_GEN_LENGTH, "block_length": BLOCK}


def fixed(gen_length: int, **more: Any) -> dict[str, Any]:
    """LLaDA's canvas; without further options one token per forward."""
    return {"method": "vanilla", "gen_length": gen_length, "block_length": BLOCK, **more}


def arms(holding: int) -> dict[str, dict[str, Any]]:
    """Name → options of every way of decoding one prompt; `holding`: the canvas that holds nearly all answers."""
    peer, least = {"threshold": THRESHOLD, "early_stop": True}, LENGTHS[-1]
    return {
        **{f"LLaDA {length}": fixed(length) for length in LENGTHS},
        f"LLaDA {least}, early stop": fixed(least, early_stop=True),
        f"LLaDA {least}, parallel": fixed(least, threshold=THRESHOLD),
        f"LLaDA {least}, cache": fixed(least, cache="prefix"),
        f"Fast-dLLM prefix {holding}": fixed(holding, cache="prefix", **peer),
        f"Fast-dLLM dual {holding}": fixed(holding, cache="prefix", use_dual=True, **peer),
        OURS: {**GROWING, "threshold": THRESHOLD},
        "dLLM-Var, no cache": {**GROWING, "threshold": THRESHOLD, "cache": "none"},
        "dLLM-Var, one token": {**GROWING, "threshold": 1.1},
    }


@dataclass(frozen=True)
class Cost:
    """What one answer takes, exactly. h100: seconds of the same forwards at LLaDA-8B's shape on an ideal H100."""

    forwards: int
    positions: int
    flops: int
    bytes: int
    h100: float

    @classmethod
    def of(cls, config: LLaDAConfig, shapes: Sequence[Shape]) -> "Cost":
        """Sum over forwards, float32 here, bfloat16 there."""
        return cls(
            forwards=len(shapes),
            positions=sum(shape.rows * shape.columns for shape in shapes),
            flops=sum(flops(config, shape) for shape in shapes),
            bytes=sum(nbytes(config, shape, 4) for shape in shapes),
            h100=seconds_at_best(LLaDAConfig(**LLADA_8B), shapes, 2, H100_RATE, H100_BANDWIDTH),
        )


def chosen(number: int) -> list[Problem]:
    """Held-out problems, the tasks in turn."""
    each = [fresh_prompts(task, SEED, -(-number // len(TASKS))) for task in TASKS]
    return [problem for together in zip(*each, strict=True) for problem in together][:number]


def holding_length(model: Pretrained, problems: Sequence[Problem], share: float = 0.99) -> int:
    """The shortest canvas of whole blocks that holds that share of the answers with their EOS."""
    assert model.tokenizer is not None
    lengths = sorted(len(model.tokenizer.encode(p.output, add_special_tokens=False)) + 1 for p in problems)
    return -(-lengths[int(share * (len(lengths) - 1))] // BLOCK) * BLOCK


def cost(model: Pretrained, problem: Problem, options: dict[str, Any]) -> Cost:
    """Of one way of decoding; where nothing depends on the logits it is known without running."""
    config = model.model.config
    if options == fixed(options.get("gen_length", 0)):
        return Cost.of(
            config, fixed_canvas(len(model.prompt_ids(problem.instruction)), options["gen_length"], options["block_length"])
        )
    with recorded(model.model) as record:
        dllm_var.generate(model, [problem.instruction], GenerationConfig(**options))
    return Cost.of(config, record.shapes)


def replay(model: Pretrained, prompt: str | list[int], options: dict[str, Any]) -> Replay:
    """The forwards of our answer, to be run again."""
    with recorded(model.model, calls=True) as record:
        dllm_var.generate(model, [prompt], GenerationConfig(**options))
    return Replay(model.model, record)


def one_at_a_time(
    model: Pretrained, problems: Sequence[Problem], twin: Pretrained | None, holding: int, rounds: int
) -> dict[str, Any]:
    """Every way of decoding on every problem: exact costs, answers, and seconds as ratios to ours.

    The bare forwards differ from ours by less than single answers, of some 20 ms, scatter: they are timed over all problems.
    """
    ways = arms(holding)
    double = Pretrained(LLaDAModelLM(model.model.config).double().eval(), model.tokenizer, model.special)
    double.model.load_state_dict(model.model.state_dict())  # so that rounding decides nothing in the exact columns
    costs = {name: [cost(double, p, options) for p in problems] for name, options in ways.items()}
    floors = {p.instruction: replay(model, p.instruction, ways[OURS]) for p in problems}

    def decode(options: dict[str, Any]) -> Callable[[Problem], tuple[bool, int]]:
        def work(problem: Problem) -> tuple[bool, int]:
            (made,) = dllm_var.generate(model, [problem.instruction], GenerationConfig(**options))
            return made.text == problem.output, len(made.tokens) + 1

        return work

    timed: dict[str, Callable[[Problem], Any]] = {name: decode(options) for name, options in ways.items()}
    if twin is not None:
        llama, special = as_llama(twin.model, twin.special), twin.special
        made = {p.instruction: continuations(llama, special, [twin.prompt_ids(p.instruction)])[0] for p in problems}
        costs[LEFT_TO_RIGHT] = [
            Cost.of(twin.model.config, left_to_right(len(twin.prompt_ids(p.instruction)), len(made[p.instruction])))
            for p in problems
        ]

        def left_to_right_answer(problem: Problem) -> tuple[bool, int]:
            ids = continuations(llama, special, [twin.prompt_ids(problem.instruction)])[0]
            assert twin.tokenizer is not None
            return decode_text(twin.tokenizer, ids[:-1]) == problem.output, len(ids)

        timed[LEFT_TO_RIGHT] = left_to_right_answer
    for work in (timed[OURS], timed.get(LEFT_TO_RIGHT, timed[OURS])):
        work(problems[0])  # warm
    shown = track(problems, "one at a time", transient=True, disable=not sys.stderr.isatty())
    seconds, answers = interleave_over(timed, shown)
    whole = interleave(
        {OURS: lambda: [timed[OURS](p) for p in problems], BARE: lambda: [floors[p.instruction]() for p in problems]}, rounds
    )  # fmt: skip
    mean = {name: statistics.fmean(each) for name, each in seconds.items()}
    ratios = {name: asdict(ratio(each, seconds[OURS])) for name, each in seconds.items() if name != OURS}
    return {
        "ways": ways,
        "costs": {name: [list(asdict(c).values()) for c in each] for name, each in costs.items()},
        "exact": {name: sum(a[0] for a in each) for name, each in answers.items()},
        "tokens": {name: [a[1] for a in each] for name, each in answers.items()},
        "seconds": mean | {BARE: statistics.fmean(whole[BARE]) / len(problems)},
        "ratio": ratios | {BARE: asdict(ratio(whole[BARE], whole[OURS]))},
        "overhead": asdict(ratio(whole[OURS], whole[BARE])),
    }


def many_at_a_time(model: Pretrained, problems: Sequence[Problem], rounds: int) -> dict[str, Any]:
    """The engine on the same problems with 1, 4, 16, 64 of them at a time; answers must be the same.

    As a server does, it keeps one engine, whose store is allocated in the round that does not count.
    """
    config = GenerationConfig(**GROWING, threshold=THRESHOLD)
    longest = model.model.config.max_sequence_length
    engines = {n: Engine(model, max_rows=n, max_length=longest) for n in TOGETHER}
    spent: dict[int, tuple[int, int, int]] = {}
    answers: dict[int, list[list[int]]] = {}

    def serve(together: int) -> None:
        engine = engines[together]
        before = engine.forwards, engine.columns, engine.padding
        numbers = [engine.submit(problem.instruction, config) for problem in problems]
        made = engine.run()
        answers[together] = [made[number].tokens for number in numbers]
        spent[together] = engine.forwards - before[0], engine.columns - before[1], engine.padding - before[2]

    seconds = interleave({str(n): lambda n=n: serve(n) for n in TOGETHER}, rounds)  # type: ignore[misc]
    return {
        "requests": len(problems),
        "forwards": {n: spent[n][0] for n in TOGETHER},
        "columns": {n: spent[n][1] for n in TOGETHER},
        "wasted": {n: spent[n][2] / spent[n][1] for n in TOGETHER},
        "same_tokens": all(answers[n] == answers[1] for n in TOGETHER),
        "ratio": {n: asdict(ratio(seconds["1"], seconds[str(n)])) for n in TOGETHER if n > 1},
    }


def hundred_million() -> tuple[Pretrained, list[int]]:
    """A model of that size with random weights, and a prompt of 256 tokens."""
    torch.manual_seed(0)
    shape = {"d_model": 768, "n_heads": 12, "n_kv_heads": 12, "n_layers": 12, "mlp_hidden_size": 2048, "vocab_size": 8192}
    ends = {"mask_token_id": 8191, "eos_token_id": 8190}
    config = LLaDAConfig(**(LLADA_8B | shape | ends | {"embedding_size": 8192, "max_sequence_length": 1024}))
    special = SpecialTokens(mask=8191, eos=8190, pad=8190)
    return Pretrained(LLaDAModelLM(config).eval(), None, special), torch.randint(0, 8000, (256,)).tolist()


def large(rounds: int) -> dict[str, Any]:
    """What the loop adds to the bare forwards, and what memory it takes, at 100 M random weights."""
    model, prompt = hundred_million()
    options = {**GROWING, "max_gen_length": 64, "threshold": THRESHOLD}
    work = {
        OURS: lambda: dllm_var.generate(model, [prompt], GenerationConfig(**options)),
        BARE: replay(model, prompt, options),
    }
    seconds = interleave(work, rounds)  # type: ignore[arg-type]
    weights = sum(p.nbytes for p in model.model.parameters())
    shape = model.model.config
    store = 2 * shape.n_layers * shape.d_model * 4 * (len(prompt) + options["max_gen_length"] + 2 * BLOCK + 1)
    return {
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "overhead": asdict(ratio(seconds[OURS], seconds[BARE])),
        "memory": (weights + peak_bytes(work[OURS])) / (weights + store),
    }


def formats(bundled: Pretrained, rounds: int) -> dict[str, Any]:
    """Number formats and compiled kernels at 100 M random weights, and how many answers of the bundled model they change."""
    base, prompt = hundred_million()
    options = GenerationConfig(**GROWING | {"max_gen_length": BLOCK}, threshold=THRESHOLD)
    problems = chosen(24)
    timed: dict[str, Callable[[], object]] = {}
    same: dict[str, float] = {}
    exact = [a.tokens for a in dllm_var.generate(bundled, [p.instruction for p in problems], GenerationConfig())]
    compiled = partial(compile_network, dynamic=True)
    changes: dict[str, list[Callable[[LLaDAModelLM], object]]] = {
        "float32": [], "bfloat16": [LLaDAModelLM.bfloat16], "float32, int8": [quantize_int8],
        "bfloat16, int8": [LLaDAModelLM.bfloat16, quantize_int8], "float32, compiled": [compiled],
        "float32, int8, compiled": [quantize_int8, compiled],
    }  # fmt: skip
    for name, steps in changes.items():
        large, small = copy.deepcopy(base.model), copy.deepcopy(bundled.model)
        for step in steps:
            step(large)
            step(small)
        changed = Pretrained(small, bundled.tokenizer, bundled.special)
        made = dllm_var.generate(changed, [p.instruction for p in problems], GenerationConfig())
        same[name] = sum(a.tokens == b for a, b in zip(made, exact, strict=True)) / len(exact)
        timed[name] = partial(dllm_var.generate, Pretrained(large, None, base.special), [prompt], options)
    seconds = interleave(timed, rounds)
    return {
        name: {"seconds ÷ float32": asdict(ratio(seconds[name], seconds["float32"])), "same answers": same[name]}
        for name in changes
        if name != "float32"
    }


def accuracy(model: Pretrained, twin: Pretrained | None, every: dict[str, list[Problem]]) -> dict[str, Any]:
    """Exact match per task of ours and of the autoregressive model, on the same problems, as many of each task."""
    each = len(next(iter(every.values())))
    config = GenerationConfig(**GROWING, threshold=THRESHOLD)
    right: dict[str, dict[str, float]] = {OURS: {}}
    for task in track(every, "accuracy", transient=True, disable=not sys.stderr.isatty()):
        problems = every[task]
        asked, wanted = [p.instruction for p in problems], [p.output for p in problems]
        made = dllm_var.generate(model, asked, config, batch_size=16)
        right[OURS][task] = sum(a.stop_reason == "eos" and a.text == w for a, w in zip(made, wanted, strict=True)) / each
        if twin is not None:
            llama = as_llama(twin.model, twin.special)
            texts = [
                text for i in range(0, each, 50) for text in answer(llama, twin.tokenizer, twin.special, asked[i : i + 50])
            ]
            right.setdefault(LEFT_TO_RIGHT, {})[task] = sum(map(str.__eq__, map(str, texts), wanted)) / each
    return {"problems_per_task": each, "tasks": right, "mean": {n: statistics.fmean(r.values()) for n, r in right.items()}}


def environment(threads: int) -> dict[str, Any]:
    """What the seconds depend on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "cpu": cpu, "cores": os.cpu_count(),
        "threads": threads, "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "matmul_rate": matmul_rate(), "copy_rate": copy_rate(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--twin", help="folder of an autoregressive checkpoint of the same shape")
    parser.add_argument("--problems", type=whole(7), default=12, help="rounds of one problem each, one request at a time")
    parser.add_argument("--rounds", type=whole(7), default=7, help="rounds of the engine and of the large model")
    parser.add_argument("--accuracy", type=whole(1), default=50, help="problems per task for exact match")
    parser.add_argument("--threads", type=whole(1, MOST_THREADS), default=1)
    parser.add_argument("--output", type=new_file, help="also write the JSON line to this file")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", type=Path, metavar="FILE", help="only hold this result against the bars")
    only.add_argument("--table", type=Path, metavar="FILE", help="only print this result as Markdown")
    args = parser.parse_args()
    for file in filter(None, (args.check, args.table)):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            absent = [part for part in PARTS if part not in result]
            if absent:
                raise ValueError(f"it has no {', '.join(absent)}")
            shown, missed = tables(result), failures(result)
        except (OSError, ValueError, TypeError, KeyError) as error:
            parser.error(f"{file} cannot be read as a result of this script: {error!r}")
        if args.check is None:
            print(shown)
            return
        print("\n".join(missed) or "Every bar is met.")
        sys.exit(bool(missed))
    torch.set_num_threads(args.threads)
    try:  # what can be wrong is told before the first of many minutes
        every = {task: fresh_prompts(task, SEED, args.accuracy) for task in TASKS}
        few = chosen(args.problems)
        model = dllm_var.load_pretrained(args.model)
        twin = None if args.twin is None else dllm_var.load_pretrained(args.twin)
    except ValueError as error:
        parser.error(str(error))
    many = chosen(64)
    result = {"environment": environment(args.threads), "holding": holding_length(model, chosen(600))}
    result["single"] = one_at_a_time(model, few, twin, result["holding"], args.rounds)
    result["engine"] = many_at_a_time(model, many, args.rounds)
    result["large"] = large(args.rounds)
    result["formats"] = formats(model, args.rounds)
    result["accuracy"] = accuracy(model, twin, every)
    rates = result["environment"]["matmul_rate"], result["environment"]["copy_rate"]
    with recorded(model.model) as record:
        for problem in few:
            dllm_var.generate(model, [problem.instruction], GenerationConfig(**result["single"]["ways"][OURS]))
    result["at_best"] = seconds_at_best(model.model.config, record.shapes, 4, *rates) / args.problems
    line = json.dumps(result)
    Console(width=125).print(tables(json.loads(line)), markup=False)
    print(line)
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
