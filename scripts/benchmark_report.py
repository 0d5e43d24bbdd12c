"""What ``benchmark.py`` measured, against the bars, and as the tables of the README."""

import statistics
from typing import Any

PARTS = ("environment", "holding", "single", "engine", "large", "formats", "accuracy", "at_best")  # of a result
OURS, BARE, LEFT_TO_RIGHT = "dLLM-Var", "bare forwards", "autoregressive"


def spread(found: dict[str, float]) -> str:
    """A ratio with its interval, or that it is unclear."""
    if found["low"] <= 1.0 <= found["high"]:
        return "unclear"
    digits = 2 if found["median"] < 10.0 else 1 if found["median"] < 100.0 else 0
    median, low, high = (f"{found[name]:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def failures(result: dict[str, Any]) -> list[str]:
    """One line for each bar that the result does not meet."""
    ratios, engine, large = result["single"]["ratio"], result["engine"], result["large"]
    dual = ratios[f"Fast-dLLM dual {result['holding']}"]
    faster = [("LLaDA 1024", ratios["LLaDA 1024"], 30.1), ("Fast-dLLM, dual cache", dual, 2.0)]
    missed = []
    if LEFT_TO_RIGHT in ratios:
        faster.append(("the autoregressive model", ratios[LEFT_TO_RIGHT], 2.4))
        mean = result["accuracy"]["mean"]
        if mean[OURS] < mean[LEFT_TO_RIGHT] - 0.03:
            missed.append(
                f"exact match {mean[OURS]:.3f} is over .03 below the autoregressive model's {mean[LEFT_TO_RIGHT]:.3f}"
            )
    else:
        missed.append("no autoregressive model was measured: give --twin")
    faster.append(("itself one request at a time, with 16 at a time", engine["ratio"]["16"], 1.5))
    for name, found, bar in faster:
        if found["median"] < bar or found["low"] <= 1.0:
            missed.append(f"{spread(found)} times as fast as {name}, the bar is {bar}")
    for name, value, bar in (
        ("loop over bare forwards, bundled model", result["single"]["overhead"]["median"], 1.25),
        ("loop over bare forwards, 100 M", large["overhead"]["median"], 1.05),
        ("peak memory over store and weights, 100 M", large["memory"], 1.10),
        ("wasted columns of 16 requests at a time", engine["wasted"]["16"], 0.05),
    ):
        if value > bar:
            missed.append(f"{name}: {value:.3f}, the bar is {bar}")
    if not engine["same_tokens"]:
        missed.append("the engine's answers depend on how many requests run at a time")
    return missed


def tables(result: dict[str, Any]) -> str:
    """Everything as Markdown."""
    single, engine, large, where = (result[name] for name in ("single", "engine", "large", "environment"))
    problems = len(single["tokens"][OURS])
    columns = "forwards | positions | MFLOP per token | MB per token | time ÷ dLLM-Var | LLaDA-8B on an H100, by formula"
    lines = [f"| one request at a time | {columns} |", "|---" * 7 + "|"]
    for name, each in single["costs"].items():
        forwards, positions, flops, moved, h100 = (statistics.fmean(column) for column in zip(*each, strict=True))
        tokens = statistics.fmean(single["tokens"][name])
        time = "1" if name == OURS else spread(single["ratio"][name])
        per_token = f"{flops / tokens / 1e6:.1f} | {moved / tokens / 1e6:.1f}"
        lines.append(f"| {name} | {forwards:.1f} | {positions:.0f} | {per_token} | {time} | {1000 * h100:.0f} ms |")
    share = result["at_best"] / single["seconds"][OURS]
    answer = statistics.fmean(single["tokens"][OURS])
    plain = {"method", "gen_length", "block_length"}  # LLaDA's own sampler, no option switched on
    canvases = {name: options["gen_length"] for name, options in single["ways"].items() if options.keys() == plain}
    longer = ", ".join(f"{length / answer:.1f} ({name})" for name, length in canvases.items())
    lines += [
        "",
        f"Means over {problems} problems; time is the median of the ratios on the same problem, with its 95 % interval, "
        f"unclear where that holds 1. The canvas alone is longer than our answers by a factor of {longer}. Time of the loop "
        f"÷ its bare forwards: {spread(single['overhead'])}; with {large['parameters'] / 1e6:.0f} M weights: "
        f"{spread(large['overhead'])}; peak memory there is {large['memory']:.2f} times weights and store. The loop reaches "
        f"{share:.0%} of what {where['matmul_rate'] / 1e9:.0f} GFLOP/s and {where['copy_rate'] / 1e9:.0f} GB/s allow "
        f"({where['cpu']}, {where['threads']} thread, torch {where['torch']}, {where['date']}"
        f"{''.join(f', {name}={value}' for name, value in where['malloc'].items())}).",
        "",
        "| requests at a time | forwards | wasted columns | times as fast as one |",
        "|---|---|---|---|",
    ]
    for together, forwards in engine["forwards"].items():
        speed = "1" if together == "1" else spread(engine["ratio"][together])
        lines.append(f"| {together} | {forwards} | {engine['wasted'][together]:.1%} | {speed} |")
    lines += [
        "",
        "| weights and kernels | time ÷ float32, 100 M weights | same answers of the bundled model |",
        "|---|---|---|",
    ]
    for name, found in result["formats"].items():
        lines.append(f"| {name} | {spread(found['seconds ÷ float32'])} | {found['same answers']:.0%} |")
    return "\n".join(lines)
