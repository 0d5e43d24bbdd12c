"""Why: what the study found, over its recipes, ways of decoding and seeds: tables, plots, and how sure it is.

How: ``python scripts/study_report.py --input RUN/study/250 --output RUN/study/250/report`` writes report.json, .md and
.png. Reads the files of ``study_measure.py``, named RECIPE-SEED.json. An interval is the 95 % bootstrap over seeds and,
within a seed, over problems.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataset.tiny_corpus import TASKS
from evaluation.arguments import new_file
from evaluation.length_calibration import Outcome

DRAWS = 1000
# Column → (what it is of an outcome, how it is printed). All are means over answers, the last one a mean of ratios, in which
# short answers weigh as much as long ones: it is not the mean length over the mean number of forwards.
FIGURES: dict[str, tuple[Callable[[Outcome], float], str]] = {
    "exact match": (lambda o: o.exact, ".3f"),
    "stops by EOS": (lambda o: o.ended, ".3f"),
    "right length": (lambda o: o.ended and o.given == o.right, ".3f"),
    "length error": (lambda o: abs(o.given - o.right), ".1f"),
    "forwards": (lambda o: o.forwards, ".1f"),
    "positions": (lambda o: o.positions, ".0f"),
    "tokens/forward of an answer": (lambda o: o.given / o.forwards, ".2f"),
}
Key = tuple[str, str]  # recipe, way


def read(folder: Path) -> dict[Key, dict[int, list[dict[str, Any]]]]:
    """(recipe, way) → seed → its records.

    Raises:
        ValueError: there is no result, or one that cannot be read.
    """
    found: dict[Key, dict[int, list[dict[str, Any]]]] = {}
    files = [path for path in sorted(folder.glob("*.json")) if re.fullmatch(r".+-\d+", path.stem)]
    files.sort(key=lambda path: not path.stem.startswith("dllm_var-"))  # ours is what the others are compared with
    for file in files:
        recipe, _, seed = file.stem.rpartition("-")
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            fields = result["fields"]
            for record in result["records"]:
                outcomes = [Outcome(**dict(zip(fields, row, strict=True))) for row in record["outcomes"]]
                found.setdefault((recipe, record["way"]), {}).setdefault(int(seed), []).append(
                    record | {"outcomes": outcomes}
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is no result of study_measure.py: delete it and run scripts/study.sh again."
            ) from error
    if not found:
        raise ValueError(f"{folder} holds no RECIPE-SEED.json: run scripts/study.sh first.")
    return found


def interval(seeds: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """Mean over seeds and problems with its bootstrap interval; seeds: one array of values per problem each."""
    draw = np.random.default_rng(0)
    means = [
        np.mean([draw.choice(seeds[i], len(seeds[i])).mean() for i in draw.integers(len(seeds), size=len(seeds))])
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(np.mean([values.mean() for values in seeds])), "low": float(low), "high": float(high)}


def figures(by_seed: Mapping[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Every figure of one recipe and way, over all tasks and of each task."""
    made: dict[str, Any] = {"seeds": sorted(by_seed)}
    for name, (of, _) in FIGURES.items():
        made[name] = interval(
            [np.array([of(o) for r in records for o in r["outcomes"]], float) for records in by_seed.values()]
        )
    tasks = {record["task"] for records in by_seed.values() for record in records}
    made["tasks"] = {
        task: float(
            np.mean([o.exact for records in by_seed.values() for r in records if r["task"] == task for o in r["outcomes"]])
        )
        for task in sorted(tasks)
    }
    made["seconds"] = float(  # of an answer, on a machine that may do other work: to plan a study, not to compare
        np.median([sum(r["seconds"] for r in own) / sum(len(r["outcomes"]) for r in own) for own in by_seed.values()])
    )
    made["answers"] = sum(len(record["outcomes"]) for records in by_seed.values() for record in records)
    return made


def by_task(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: exact match of each task, a line for each recipe and way."""
    lines = [f"| recipe | decoded by | answers | {' | '.join(TASKS)} |", "|---" * (3 + len(TASKS)) + "|"]
    for recipe, own in report.items():
        for way, values in own.items():
            cells = [f"{values['tasks'][task]:.2f}" if task in values["tasks"] else "" for task in TASKS]
            lines.append(f"| {recipe} | {way} | {values['answers']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: the figures over all tasks, a line for each recipe and way."""
    lines = [f"| recipe | decoded by | seeds | {' | '.join(FIGURES)} |", "|---" * (3 + len(FIGURES)) + "|"]
    for recipe, own in report.items():
        for way, values in own.items():
            cells = []
            for name, (_, form) in FIGURES.items():
                value = values[name]
                spread = f" [{value['low']:{form}}, {value['high']:{form}}]" if name == "exact match" else ""
                cells.append(f"{value['mean']:{form}}{spread}")
            lines.append(f"| {recipe} | {way} | {len(values['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(
    report: Mapping[str, Mapping[str, Any]], found: Mapping[Key, Mapping[int, list[dict[str, Any]]]], file: Path
) -> None:
    """Accuracy against compute, given against right length, and what every change of the recipe costs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (compute, lengths, recipes) = plt.subplots(1, 3, figsize=(17, 5.5), layout="constrained")
    compute.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    first = {recipe: next(iter(own)) for recipe, own in report.items()}
    for recipe, own in report.items():
        at = [(v["positions"]["mean"], v["exact match"]["mean"]) for v in own.values()]
        compute.plot(*zip(*at, strict=True), "o", alpha=0.8, label=recipe)
    for recipe in list(report)[:1] + [r for r in report if r.startswith("llada")]:
        outcomes = [o for records in found[recipe, first[recipe]].values() for r in records for o in r["outcomes"]]
        lengths.plot(
            [o.right for o in outcomes], [o.given for o in outcomes], ".", alpha=0.3, label=f"{recipe}, {first[recipe]}"
        )
    lengths.axline((1, 1), slope=1, color="grey", lw=0.8)
    values = [report[recipe][way]["exact match"] for recipe, way in first.items()]
    means = [v["mean"] for v in values]
    spread = [
        [m - v["low"] for m, v in zip(means, values, strict=True)],
        [v["high"] - m for m, v in zip(means, values, strict=True)],
    ]
    recipes.barh(list(first), means, xerr=spread, color="tab:blue", alpha=0.7)
    recipes.invert_yaxis()
    compute.set(xscale="log", xlabel="positions computed per answer", ylabel="exact match", title="accuracy against compute")
    lengths.set(xlabel="right length (tokens)", ylabel="length given", title="does it know how long its answer is?")
    recipes.set(xlabel="exact match", title="in EOS-led blocks (autoregressive: left to right)")
    for axes in (compute, lengths):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="folder with RECIPE-SEED.json")
    parser.add_argument("--output", type=new_file, required=True, help="without ending; .json, .md and .png are written")
    args = parser.parse_args()
    try:
        found = read(args.input)
    except ValueError as error:
        parser.error(str(error))
    report: dict[str, dict[str, Any]] = {}
    for (recipe, way), by_seed in found.items():
        report.setdefault(recipe, {})[way] = figures(by_seed)
    args.output.with_suffix(".json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(f"{table(report)}\n\n{by_task(report)}\n", encoding="utf-8")
    draw(report, found, args.output.with_suffix(".png"))
    print(table(report))


if __name__ == "__main__":
    main()
