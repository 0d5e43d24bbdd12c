"""Why: what the bundled model can do, on problems that it has never seen, under every setting that should not matter.

How: ``python scripts/eval_tiny.py`` (bundled model, 500 problems per task and setting), ``--model FOLDER``, ``--prompts N``.
Prints a table per setting and one JSON line last; ``--output FILE`` keeps that line. An answer counts only when it is the
right one character for character *and* was ended by the model itself.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import dllm_var
from dataset.tiny_corpus import HELD_OUT_SEED, TASKS, Problem, fresh_prompts
from dllm_var import Generation, GenerationConfig, Pretrained
from evaluation.arguments import new_file, share, whole

SETTINGS: dict[str, dict[str, Any]] = {
    "block 32": {"block_length": 32, "max_gen_length": 1024, "cache": "block_commit"},
    "block 16": {"block_length": 16, "max_gen_length": 1024, "cache": "block_commit"},
    "max_gen_length 256": {"block_length": 32, "max_gen_length": 256, "cache": "block_commit"},
    "no cache": {"block_length": 32, "max_gen_length": 1024, "cache": "none"},
}
STUDIES = {"editing": {"block_length": 32, "max_gen_length": 1024, "enable_editing": True}}  # measured only when asked for


@dataclass(frozen=True)
class Score:
    """What one task gave under one setting; shares are of the prompts."""

    exact: float
    by_eos: float
    right_length: float
    tokens_per_forward: float
    longest: int

    @classmethod
    def of(cls, problems: list[Problem], answers: list[Generation]) -> "Score":
        """Score answers against their problems."""
        pairs = list(zip(problems, answers, strict=True))
        return cls(
            exact=statistics.fmean(a.stop_reason == "eos" and a.text == p.output for p, a in pairs),
            by_eos=statistics.fmean(a.stop_reason == "eos" for _, a in pairs),
            right_length=statistics.fmean(len(a.text or "") == len(p.output) for p, a in pairs),
            tokens_per_forward=sum(a.decided for a in answers) / sum(a.forwards for a in answers),
            longest=max(a.decided for a in answers),
        )


def measure(
    model: Pretrained, config: GenerationConfig, asked: dict[str, list[Problem]], batch_size: int, progress: Progress
) -> dict[str, Score]:
    """Scores of every task under one setting."""
    scores = {}
    for task, problems in asked.items():
        line = progress.add_task(f"  {task}", total=len(problems))
        answers: list[Generation] = []
        for i in range(0, len(problems), batch_size):
            batch = [p.instruction for p in problems[i : i + batch_size]]
            answers += dllm_var.generate(model, batch, config)
            progress.update(line, completed=len(answers))
        progress.remove_task(line)
        scores[task] = Score.of(problems, answers)
    return scores


def macro(scores: dict[str, Score], field: str) -> float:
    """Unweighted mean of one figure over the tasks."""
    return statistics.fmean(getattr(score, field) for score in scores.values())


def show(console: Console, name: str, scores: dict[str, Score]) -> None:
    """One table: a line per task and the mean."""
    table = Table(
        "task", "exact match", "stops by EOS", "right length", "tokens/forward", "longest", title=name, title_justify="left"
    )
    for task, s in scores.items():
        table.add_row(
            task, f"{s.exact:.3f}", f"{s.by_eos:.3f}", f"{s.right_length:.3f}", f"{s.tokens_per_forward:.1f}", str(s.longest)
        )
    means = [macro(scores, field) for field in ("exact", "by_eos", "right_length", "tokens_per_forward")]
    table.add_section()
    table.add_row("mean", *(f"{m:.3f}" for m in means[:3]), f"{means[3]:.1f}", "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="folder of a checkpoint; default the bundled model")
    parser.add_argument("--prompts", type=whole(1), default=500, help="held-out problems per task")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--threshold", type=share, default=0.9)
    parser.add_argument("--batch_size", type=whole(1), default=16)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, *STUDIES], default=list(SETTINGS))
    parser.add_argument("--output", type=new_file, help="also write the JSON line to this file")
    args = parser.parse_args()
    try:
        asked = {task: fresh_prompts(task, HELD_OUT_SEED + args.seed, args.prompts) for task in args.tasks}
        model = dllm_var.load_pretrained(args.model)
    except ValueError as error:
        parser.error(str(error))
    console, started, results = Console(), time.time(), {}
    for name in args.settings:
        config = GenerationConfig(threshold=args.threshold, **(SETTINGS | STUDIES)[name])
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            results[name] = measure(model, config, asked, args.batch_size, progress)
        show(console, name, results[name])
    line = json.dumps(
        {
            "model": str(args.model), "prompts_per_task": args.prompts, "seed": args.seed, "threshold": args.threshold,
            "seconds": round(time.time() - started, 1),
            "settings": {
                name: {
                    "macro_exact": round(macro(scores, "exact"), 4), "by_eos": round(macro(scores, "by_eos"), 4),
                    "tokens_per_forward": round(macro(scores, "tokens_per_forward"), 2),
                    "tasks": {task: {k: round(v, 4) for k, v in vars(s).items()} for task, s in scores.items()},
                }
                for name, scores in results.items()
            },
        }
    )  # fmt: skip
    print(line)
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
