"""Why: every decoding method and cache on the same prompts of the same model: what each gets right, and what it costs.

How: ``python scripts/compare_decoding.py`` (bundled model, ten minutes). Prints one table; ``--output FILE.json`` keeps
what every system did with every prompt, and a picture of accuracy against compute beside it. ``--model FOLDER`` compares on
another model. Accuracy, forwards, positions and stop reasons come from float64 runs, so that rounding decides nothing; a
test derives those of the committed file again. Seconds are a ratio to `vanilla`, each system run once per round in float32.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import dllm_var
from dataset.tiny_corpus import TASKS, Problem, fresh_prompts
from dllm_var import Generation, GenerationConfig, Pretrained
from evaluation.arguments import new_file, whole

SEED = 30_000  # of the held-out prompts; those of scripts/eval_tiny.py are others
CANVAS, BLOCK = 64, 32
FIXED = {"gen_length": CANVAS, "block_length": BLOCK}
DUAL = {"cache": "prefix", "use_dual": True}

# Name in the table → options. Every method with its defaults, then with what it is usually combined with.
SYSTEMS: dict[str, dict[str, Any]] = {
    "vanilla": {"method": "vanilla", **FIXED},
    "vanilla, one block": {"method": "vanilla", "gen_length": CANVAS},
    "vanilla, early stop": {"method": "vanilla", **FIXED, "early_stop": True},
    "ar order": {"method": "ar", **FIXED},
    "threshold": {"method": "vanilla", **FIXED, "threshold": 0.9},
    "threshold + prefix": {"method": "vanilla", **FIXED, "threshold": 0.9, "cache": "prefix"},
    "threshold + dual": {"method": "vanilla", **FIXED, "threshold": 0.9, **DUAL},
    "factor": {"method": "vanilla", **FIXED, "factor": 1.0},
    "factor + dual": {"method": "vanilla", **FIXED, "factor": 1.0, **DUAL},
    "pc_sampler": {"method": "pc_sampler", **FIXED},
    "pc_sampler + prefix": {"method": "pc_sampler", **FIXED, "cache": "prefix"},
    "certainty prior": {"method": "vanilla", "gen_length": CANVAS, "sigma": 10.0},
    "certainty prior + d2cache": {"method": "vanilla", "gen_length": CANVAS, "sigma": 10.0, "cache": "d2cache"},
    "threshold + d2cache": {"method": "vanilla", **FIXED, "threshold": 0.9, "cache": "d2cache", "inflate_w": 4},
    "vanilla + dllm": {"method": "vanilla", **FIXED, "cache": "dllm"},
    "threshold + dllm": {"method": "vanilla", **FIXED, "threshold": 0.9, "cache": "dllm"},
    "klass": {"method": "klass", **FIXED},
    "klass + prefix": {"method": "klass", **FIXED, "cache": "prefix"},
    "eb_sampler": {"method": "eb_sampler", **FIXED},
    "eb_sampler, gamma 0.1": {"method": "eb_sampler", **FIXED, "gamma": 0.1},
    "eb_sampler + prefix": {"method": "eb_sampler", **FIXED, "cache": "prefix"},
    "wino": {"method": "wino", **FIXED},
    "wino + prefix": {"method": "wino", **FIXED, "cache": "prefix"},
    "wino + dual": {"method": "wino", **FIXED, **DUAL},
    "daedal": {"method": "daedal", "initial_gen_length": BLOCK, "max_gen_length": CANVAS},
    "daedal + prefix": {"method": "daedal", "initial_gen_length": BLOCK, "max_gen_length": CANVAS, "cache": "prefix"},
    "dllm_var": {"max_gen_length": CANVAS},
    "dllm_var, no cache": {"max_gen_length": CANVAS, "cache": "none"},
    "dllm_var, factor": {"max_gen_length": CANVAS, "factor": 1.0},
    "dllm_var, entropy bound": {"max_gen_length": CANVAS, "gamma": 0.1, "remasking": "entropy"},
    "dllm_var, klass": {"max_gen_length": CANVAS, "kl_threshold": 0.01},
    "dllm_var, wino": {"max_gen_length": CANVAS, "wide_in_thres": 0.6},
    "dllm_var, editing": {"max_gen_length": CANVAS, "enable_editing": True},
}


@dataclass(frozen=True)
class Outcome:
    """What one system did with one prompt.

    Attributes:
        exact: whether the answer is right to the letter and ended by a stop token. by_eos: whether one ended it.
        forwards, positions: of this prompt alone. decided: tokens of the answer, the stop token included.
    """

    exact: bool
    by_eos: bool
    forwards: int
    positions: int
    decided: int

    @classmethod
    def of(cls, problem: Problem, answer: Generation) -> "Outcome":
        """Score an answer."""
        by_eos = answer.stop_reason == "eos"
        return cls(
            exact=by_eos and answer.text == problem.output,
            by_eos=by_eos,
            forwards=answer.forwards,
            positions=answer.positions,
            decided=answer.decided,
        )


def mean(outcomes: list[Outcome], name: str) -> float:
    """Of one figure over the prompts."""
    return statistics.fmean(getattr(outcome, name) for outcome in outcomes)


def chosen_problems(model: Pretrained, per_task: int) -> list[Problem]:
    """The same number of held-out problems of every task, those whose answer and stop token fit the canvas."""
    assert model.tokenizer is not None
    problems = []
    for task in TASKS:
        fitting = (
            p
            for p in fresh_prompts(task, SEED, 20 * per_task)
            if len(model.tokenizer.encode(p.output, add_special_tokens=False)) < CANVAS
        )
        problems += [next(fitting) for _ in range(per_task)]
    return problems


def decode(model: Pretrained, problems: list[Problem], options: dict[str, Any]) -> list[Generation]:
    """The answers of one system, in one batch."""
    return dllm_var.generate(model, [p.instruction for p in problems], GenerationConfig(**options))


def exact_outcomes(model: Pretrained, problems: list[Problem]) -> dict[str, list[Outcome]]:
    """What every system does with every problem; rows are independent, so their batch does not matter."""
    systems = track(SYSTEMS.items(), "exact columns", transient=True, disable=not sys.stderr.isatty())
    return {
        name: [Outcome.of(*pair) for pair in zip(problems, decode(model, problems, options), strict=True)]
        for name, options in systems
    }


def time_ratios(model: Pretrained, problems: list[Problem], rounds: int) -> dict[str, float]:
    """Median over rounds of each system's seconds over those of `vanilla` in the same round, all prompts in one batch."""
    ratios: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for _ in track(range(rounds), "timing", transient=True, disable=not sys.stderr.isatty()):
        seconds = {}
        for name, options in SYSTEMS.items():
            started = time.perf_counter()
            decode(model, problems, options)
            seconds[name] = time.perf_counter() - started
        for name, value in seconds.items():
            ratios[name].append(value / seconds["vanilla"])
    return {name: statistics.median(values) for name, values in ratios.items()}


def show(outcomes: dict[str, list[Outcome]], ratios: dict[str, float]) -> None:
    """The table."""
    prompts = len(next(iter(outcomes.values())))
    title = f"{prompts} held-out prompts, canvas {CANVAS}, block {BLOCK}; forwards and positions per prompt"
    table = Table("system", *["exact match", "stops by EOS", "forwards", "positions", "tokens/forward", "time"], title=title)
    for name, each in outcomes.items():
        table.add_row(
            name, f"{mean(each, 'exact'):.3f}", f"{mean(each, 'by_eos'):.3f}", f"{mean(each, 'forwards'):.1f}",
            f"{mean(each, 'positions'):.0f}", f"{mean(each, 'decided') / mean(each, 'forwards'):.2f}",
            f"{ratios[name]:.2f}" if name in ratios else "-",
        )  # fmt: skip
    Console(width=110).print(table)


def draw(outcomes: dict[str, list[Outcome]], file: Path) -> None:
    """Accuracy against positions computed per prompt."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    for name, each in outcomes.items():
        at, own = (mean(each, "positions"), mean(each, "exact")), name.startswith("dllm_var")
        axes.plot(*at, "o" if own else "s", color="tab:red" if own else "tab:blue")
        axes.annotate(name, at, xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="positions computed per prompt", ylabel="exact match", title="accuracy against compute")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--prompts", type=whole(1), default=4, help="held-out problems per task")
    parser.add_argument("--rounds", type=whole(0), default=3, help="rounds of timing; 0: none")
    parser.add_argument("--output", type=new_file, help="JSON file; the picture goes beside it, as .png")
    args = parser.parse_args()
    try:
        model = dllm_var.load_pretrained(args.model, dtype=torch.float64)
        problems = chosen_problems(model, args.prompts)
        outcomes = exact_outcomes(model, problems)
    except ValueError as error:
        parser.error(str(error))
    ratios = time_ratios(dllm_var.load_pretrained(args.model), problems, args.rounds) if args.rounds else {}
    show(outcomes, ratios)
    if args.output is not None:
        kept = {name: [list(asdict(outcome).values()) for outcome in each] for name, each in outcomes.items()}
        result = {"prompts_per_task": args.prompts, "fields": list(Outcome.__dataclass_fields__), "outcomes": kept}
        args.output.write_text(json.dumps(result | {"time_ratio": ratios}) + "\n", encoding="utf-8")
        draw(outcomes, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
