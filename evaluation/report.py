"""What an evaluation says: result rows with everything needed to trust them, counts of computation, tables and plots.

Called by ``eval.py`` at the end of a run (`write`), and by people and ``run_batch.sh`` to lay several runs side by side:

    python evaluation/report.py outputs/gsm8k outputs/mbpp

Ratios are a sum over a sum, never a mean of ratios. A tokens column counts an answer up to and including its first stop
token; what lies behind it in the last block is counted apart, as wasted positions.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evaluation.arguments import new_file
from evaluation.store import Answer

RESULTS_FILE, TABLE_FILE = "results.json", "results.md"
LENGTHS_FILE, COMPUTE_FILE = "lengths.png", "accuracy_compute.png"

# Column of the table → figure of `computation`, and how it is printed.
COLUMNS = {
    "n": ("answers", "d"), "stops by EOS": ("by_eos", ".3f"), "tokens": ("tokens", ".1f"), "forwards": ("forwards", ".1f"),
    "without prefill": ("forwards_without_prefill", ".1f"), "positions": ("positions", ".0f"),
    "tokens/forward": ("tokens_per_forward", ".2f"), "wasted": ("wasted_share", ".3f"),
    "tokens/s": ("tokens_per_second", ".1f"),
}  # fmt: skip


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task, metric and filter of the harness's result: value, standard error, n, shots, task version."""
    made = []
    for task, figures in results["results"].items():
        for key, value in figures.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{chosen}")
            made.append(
                {
                    "task": task, "metric": metric, "filter": chosen, "value": value,
                    "standard_error": error if isinstance(error, int | float) else None,
                    "n": asked(results, task),
                    "shots": results.get("n-shot", {}).get(task), "version": results.get("versions", {}).get(task),
                }
            )  # fmt: skip
    return made


def asked(results: dict[str, Any], task: str) -> int | None:
    """How many problems a task had, or those of a group all together."""
    if task in results.get("n-samples", {}):
        return int(results["n-samples"][task]["effective"])
    members = [asked(results, member) for member in results.get("group_subtasks", {}).get(task, [])]
    return sum(n for n in members if n is not None) or None


def computation(answers: Sequence[Answer]) -> dict[str, Any]:
    """What these answers (at least one) took: means per answer, and ratios of sums.

    ``seconds`` are those of decoding alone, shared out evenly among the answers of a batch. The first forward of an answer
    is its prefill. Latencies are those of the batch that an answer was in.
    """
    n = len(answers)
    total = {name: sum(getattr(a, name) for a in answers) for name in ("decided", "raw_length", "forwards", "positions")}
    seconds = sum(a.seconds for a in answers)
    lengths, latencies = sorted(a.decided for a in answers), sorted(a.latency for a in answers)
    return {
        "answers": n,
        "stop_reasons": dict(sorted(Counter(a.stop_reason for a in answers).items())),
        "by_eos": sum(a.stop_reason == "eos" for a in answers) / n,
        "truncated": sum(a.stop_reason == "length" for a in answers) / n,
        "prompt_tokens": sum(a.prompt_length for a in answers) / n,
        "tokens": total["decided"] / n,
        "tokens_quartiles": [lengths[int(share * (n - 1))] for share in (0.0, 0.25, 0.5, 0.75, 1.0)],
        "raw_tokens": total["raw_length"] / n,
        "wasted_share": 1 - total["decided"] / max(1, total["raw_length"]),
        "forwards": total["forwards"] / n,
        "forwards_without_prefill": total["forwards"] / n - 1,
        "positions": total["positions"] / n,
        "tokens_per_forward": total["decided"] / total["forwards"],
        "seconds": seconds,
        "latency_percentiles": {f"p{share}": latencies[round(share / 100 * (n - 1))] for share in (50, 90, 99)},
        "tokens_per_second": total["decided"] / seconds if seconds else None,
        "raw_tokens_per_second": total["raw_length"] / seconds if seconds else None,
    }


def by_task(answers: Iterable[Answer]) -> dict[str, list[Answer]]:
    """The answers of each task, the tasks by name."""
    found: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        found[answer.task].append(answer)
    return dict(sorted(found.items()))


def write(folder: Path, results: dict[str, Any], answers: Sequence[Answer], facts: dict[str, Any]) -> None:
    """Write results.json, results.md and the plots into a folder that exists.

    Args:
        results: what lm-evaluation-harness returned.
        answers: every generated answer once; empty for tasks that only rank.
        facts: how it was measured: model and its hash, template, generation and cache settings, dtype, versions, seed.
    """
    tasks = by_task(answers)
    report = {"facts": facts, "rows": rows(results), "computation": {task: computation(own) for task, own in tasks.items()}}
    (folder / TABLE_FILE).write_text(markdown([report]), encoding="utf-8")
    if tasks:
        draw_lengths(tasks, folder / LENGTHS_FILE)
        draw_compute([report], folder / COMPUTE_FILE)
    # Last, because whoever finds this file takes the run for complete.
    (folder / RESULTS_FILE).write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The report of a run.

    Raises:
        ValueError: there is none, or it is not one.
    """
    try:
        report: dict[str, Any] = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no {RESULTS_FILE}: give the output folder of a finished evaluation.") from error
    except ValueError as error:
        raise ValueError(f"{folder / RESULTS_FILE} is not JSON: run that evaluation again.") from error
    try:
        markdown([report])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / RESULTS_FILE} was not written by evaluation/eval.py.") from error
    return report


def label(report: dict[str, Any]) -> str:
    """Model, method and cache of a run, in short."""
    facts = report["facts"]
    generation = facts.get("generation", {})
    return f"{facts.get('model', '?')}, {generation.get('method', '?')}, {generation.get('cache', '?')}"


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """Two tables over all runs: what was right, and what it took."""
    right = ["| run | task | metric | filter | value | ± | n | shots | version |", "|" + "---|" * 9]
    took = [f"| run | task | {' | '.join(COLUMNS)} |", "|" + "---|" * (2 + len(COLUMNS))]
    for report in reports:
        name = label(report)
        for r in report["rows"]:
            error = "–" if r["standard_error"] is None else f"{r['standard_error']:.4f}"
            cells = [name, r["task"], r["metric"], r["filter"], f"{r['value']:.4f}", error, r["n"], r["shots"], r["version"]]
            right.append(f"| {' | '.join('–' if cell is None else str(cell) for cell in cells)} |")
        for task, figures in report["computation"].items():
            values = ["–" if figures[key] is None else format(figures[key], form) for key, form in COLUMNS.values()]
            took.append(f"| {name} | {task} | {' | '.join(values)} |")
    told = ["Per answer; tokens up to and including the first stop token, ratios sum over sum, seconds of decoding alone."]
    return "\n".join([*right, "", *took, "", *told]) + "\n"


def draw_lengths(tasks: dict[str, list[Answer]], file: Path) -> None:
    """How long the answers are, by how they ended; one panel per task."""
    plt = _pyplot()
    figure, panels = plt.subplots(len(tasks), figsize=(8, 1 + 1.8 * len(tasks)), squeeze=False, layout="constrained")
    for panel, (task, answers) in zip(panels[:, 0], tasks.items(), strict=True):
        ended = {
            reason: [a.decided for a in answers if a.stop_reason == reason]
            for reason in sorted({a.stop_reason for a in answers})
        }
        panel.hist(list(ended.values()), bins=40, stacked=True, label=list(ended))
        panel.set(title=task, ylabel="answers")
        panel.legend(title="ended by")
    panels[-1, 0].set_xlabel("tokens up to and including the first stop token")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_compute(reports: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy against forwards per answer: a point per run, task and filter of the task's first metric."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, report in enumerate(reports):
        for task, figures in report["computation"].items():
            own = [row for row in report["rows"] if row["task"] == task]
            for row in (row for row in own if row["metric"] == own[0]["metric"]):
                at = (figures["forwards"], row["value"])
                axes.errorbar(*at, yerr=row["standard_error"] or 0, fmt="o", color=f"C{number % 10}")
                axes.annotate(f"{task} {row['filter']}", at, xytext=(5, 3), textcoords="offset points", fontsize=7)
        axes.plot([], [], "o", color=f"C{number % 10}", label=label(report))
    axes.set(xlabel="forwards per answer", ylabel="accuracy", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="output folders of finished evaluations")
    parser.add_argument("--plot", type=new_file, metavar="FILE.png", help="also draw accuracy against forwards")
    args = parser.parse_args()
    if args.plot is not None and args.plot.suffix != ".png":
        parser.error(f"--plot {args.plot}: the picture is a .png file")
    reports = []
    for folder in args.folders:
        try:
            reports.append(read(folder))
        except ValueError as error:
            print(f"report.py: left out: {error}", file=sys.stderr)
    if not reports:
        sys.exit(2)
    print(markdown(reports), end="")
    if args.plot is not None:
        draw_compute(reports, args.plot)


if __name__ == "__main__":
    main()
