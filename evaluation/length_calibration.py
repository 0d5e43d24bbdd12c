"""Why: nobody publishes how well a diffusion language model judges the length of its answer, and what a wrong budget costs.

How: ``python evaluation/length_calibration.py`` (bundled model and suite, some minutes). Every system answers the same
held-out problems under several budgets; ``--output FILE.json`` keeps the figures and draws them beside it, as .png.

The systems: EOS-led blocks (`dllm_var`), fixed canvases decoded by threshold, DAEDAL, and one token at a time from the left
(`ar`). The *budget* is the longest answer that a system may give: ``max_gen_length``, or the ``gen_length`` of a canvas.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dllm_var
from dataset.tiny_corpus import TASKS, Problem, fresh_prompts
from dllm_var import Generation, GenerationConfig, Pretrained
from evaluation.arguments import new_file, whole

SEED = 40_000  # of the held-out problems; other scripts draw others
BUDGETS = (32, 64, 128, 256)
BLOCK = 32


def options(system: str, budget: int) -> dict[str, Any]:
    """What makes a system of a budget; fixed canvases end a row once everything before its first stop token is decided."""
    canvas = {"gen_length": budget, "block_length": min(BLOCK, budget), "early_stop": True}
    return {
        "EOS-led": {"max_gen_length": budget, "block_length": BLOCK},
        "fixed": {"method": "vanilla", "threshold": 0.9, **canvas},
        "DAEDAL": {"method": "daedal", "initial_gen_length": BLOCK, "max_gen_length": budget},
        "AR order": {"method": "ar", **canvas},
    }[system]


SYSTEMS = ("EOS-led", "fixed", "DAEDAL", "AR order")


@dataclass(frozen=True)
class Outcome:
    """One answer against the one right answer; lengths in tokens, the stop token included.

    Attributes:
        right: the length that the problem asks for. given: that of the answer; without a stop token the whole budget.
        raw: positions of the canvas' response. ended: whether a stop token ended the answer. exact: right to the letter
            and ended. forwards, positions: what it took.
    """

    right: int
    given: int
    raw: int
    ended: bool
    exact: bool
    forwards: int
    positions: int

    @classmethod
    def of(cls, right: int, problem: Problem, answer: Generation) -> "Outcome":
        """Compare an answer with its problem, whose answer takes `right` tokens."""
        ended = answer.stop_reason == "eos"
        return cls(
            right=right,
            given=answer.decided,
            raw=len(answer.raw),
            ended=ended,
            exact=ended and answer.text == problem.output,
            forwards=answer.forwards,
            positions=answer.positions,
        )


def calibration(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Shares of the answers, and tokens per answer.

    ``over_run``, ``under_run``: tokens too many and too few, over all answers; ``too_long``, ``too_short``: the shares of
    answers they come from. ``truncated``: no stop token within the budget. ``wasted``: positions behind the stop token
    over all response positions of the canvas.
    """
    n = len(outcomes)
    return {
        "exact": sum(o.exact for o in outcomes) / n,
        "right_length": sum(o.ended and o.given == o.right for o in outcomes) / n,
        "too_long": sum(o.given > o.right for o in outcomes) / n,
        "too_short": sum(o.ended and o.given < o.right for o in outcomes) / n,
        "over_run": sum(max(0, o.given - o.right) for o in outcomes) / n,
        "under_run": sum(max(0, o.right - o.given) for o in outcomes) / n,
        "truncated": sum(not o.ended for o in outcomes) / n,
        "wasted": sum(o.raw - o.given for o in outcomes) / sum(o.raw for o in outcomes),
        "forwards": statistics.fmean(o.forwards for o in outcomes),
        "positions": statistics.fmean(o.positions for o in outcomes),
    }


def measure(model: Pretrained, prompts: int, systems: Sequence[str], budgets: Sequence[int]) -> list[dict[str, Any]]:
    """One record per system, budget and task: its outcomes."""
    assert model.tokenizer is not None
    problems = {task: fresh_prompts(task, SEED, prompts) for task in TASKS}
    right = {
        task: [len(model.tokenizer.encode(p.output, add_special_tokens=False)) + 1 for p in own]
        for task, own in problems.items()
    }
    made = []
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        line = progress.add_task("length calibration", total=len(systems) * len(budgets) * len(TASKS))
        for system in systems:
            for budget in budgets:
                config = GenerationConfig(**options(system, budget))
                for task, own in problems.items():
                    answers = dllm_var.generate(model, [p.instruction for p in own], config, batch_size=16)
                    outcomes = [Outcome.of(*each) for each in zip(right[task], own, answers, strict=True)]
                    made.append({"system": system, "budget": budget, "task": task, "outcomes": outcomes})
                    progress.advance(line)
    return made


def figures(records: Sequence[dict[str, Any]], system: str, budget: int, task: str | None = None) -> dict[str, float]:
    """`calibration` of one system and budget, over one task or over all."""
    chosen = [r for r in records if r["system"] == system and r["budget"] == budget and task in (None, r["task"])]
    return calibration([outcome for r in chosen for outcome in r["outcomes"]])


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Two tables: every system and budget over all tasks; every task at each system's largest budget."""
    keys = ["exact", "right_length", "too_long", "too_short", "over_run", "under_run", "truncated", "wasted", "forwards"]

    def add(table: Table, names: list[str], values: dict[str, float]) -> None:
        table.add_row(*names, *(f"{values[key]:.1f}" if key in WHOLE else f"{values[key]:.3f}" for key in keys))

    pairs = list(dict.fromkeys((r["system"], r["budget"]) for r in records))
    tasks = list(dict.fromkeys(r["task"] for r in records))
    overall = Table("system", "budget", *keys, title="all tasks")
    for system, budget in pairs:
        add(overall, [system, str(budget)], figures(records, system, budget))
    largest = Table("system", "task", *keys, title=f"budget {max(budget for _, budget in pairs)}")
    for system in dict.fromkeys(system for system, _ in pairs):
        for task in tasks:
            add(largest, [system, task], figures(records, system, max(b for s, b in pairs if s == system), task))
    console.print(overall, largest)


WHOLE = {"over_run", "under_run", "forwards", "positions"}  # tokens, forwards; the others are shares


def draw(records: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy and positions against the budget, and the given against the right length at the largest budget."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = list(dict.fromkeys(r["system"] for r in records))
    budgets = sorted({r["budget"] for r in records})
    drawn, (accuracy, cost, lengths) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for system in systems:
        curve = [figures(records, system, budget) for budget in budgets]
        accuracy.plot(budgets, [c["exact"] for c in curve], "o-", label=system)
        cost.plot(budgets, [c["positions"] for c in curve], "o-", label=system)
        points = [o for r in records if (r["system"], r["budget"]) == (system, budgets[-1]) for o in r["outcomes"]]
        lengths.plot([o.right for o in points], [o.given for o in points], ".", alpha=0.4, label=system)
    lengths.axline((1, 1), slope=1, color="grey", lw=0.8)
    accuracy.set(title="exact match", xlabel="budget (tokens)", ylim=(-0.03, 1.03), xscale="log")
    cost.set(title="positions computed per answer", xlabel="budget (tokens)", xscale="log", yscale="log")
    lengths.set(title=f"length at budget {budgets[-1]}", xlabel="right length (tokens)", ylabel="length given")
    for axes in (accuracy, cost, lengths):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    drawn.savefig(file, dpi=110)
    plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--prompts", type=whole(1), default=8, help="held-out problems per task")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--budgets", nargs="+", type=int, default=list(BUDGETS), help=f"multiples of {BLOCK}")
    parser.add_argument("--output", type=new_file, help="JSON file; the picture goes beside it, as .png")
    args = parser.parse_args()
    odd = [budget for budget in args.budgets if budget < BLOCK or budget % BLOCK]
    if odd:
        parser.error(f"--budgets {odd[0]} is no multiple of {BLOCK}, the length of a block")
    try:
        records = measure(dllm_var.load_pretrained(args.model), args.prompts, args.systems, args.budgets)
    except ValueError as error:
        parser.error(str(error))
    show(records, Console(width=130))
    if args.output is not None:
        kept = [{**r, "outcomes": [list(asdict(o).values()) for o in r["outcomes"]]} for r in records]
        result = {"prompts_per_task": args.prompts, "fields": list(Outcome.__dataclass_fields__), "records": kept}
        args.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
        draw(records, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
