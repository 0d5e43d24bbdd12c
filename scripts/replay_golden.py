"""Replay recorded decoding cases and compare tokens, forward counts and the order in which tokens were fixed.

Why: the cases were recorded from public reference implementations, so a match says that a method here is the published
one. Their format is described in tests/golden/README.md. Methods that are not offered yet are listed, never hidden.

    python scripts/replay_golden.py --golden tests/golden/decode
    python scripts/replay_golden.py --golden FOLDER --method dllm_var --method llada_vanilla [--model FOLDER]

Exit code: 0 every compared case matches (near ties and optional cases may differ: they are reported), 1 one does not,
2 nothing could be compared.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.model.checkpoint import load_model
from dllm_var.text.special_tokens import SpecialTokens

Case = dict[str, Any]

# The end-of-turn id of the recorded checkpoint, for a folder whose config does not name one.
END_OF_TURN = 257


class NotOfferedError(Exception):
    """A case that asks for something this repository does not do yet."""


def dllm_var(params: dict[str, Any]) -> GenerationConfig:
    """EOS-led blocks; the recordings fill every block, so nothing stops early."""
    if params.pop("enable_editing", False):
        raise NotOfferedError("enable_editing=True")
    return GenerationConfig(method="dllm_var", early_stop=False, **params)


def llada_vanilla(params: dict[str, Any]) -> GenerationConfig:
    """Fixed canvas, scheduled steps."""
    return GenerationConfig(method="vanilla", **params)


# Recorded method -> how its parameters read here. A method of the folder that is not here is not offered yet.
OFFERED: dict[str, Callable[[dict[str, Any]], GenerationConfig]] = {
    "dllm_var": dllm_var,
    "llada_vanilla": llada_vanilla,
    "llada_vanilla_batch": llada_vanilla,
}


@dataclass
class Tally:
    """How the cases of one method came out. `soft`: misses of near ties and optional cases."""

    match: int = 0
    differ: int = 0
    soft: int = 0
    not_offered: int = 0
    reasons: set[str] = field(default_factory=set)


def main(arguments: list[str] | None = None) -> int:
    """Compare the chosen cases; see the module docstring for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", required=True, type=Path, help="folder of recorded cases (*.json)")
    parser.add_argument("--method", action="append", help="only this recorded method (repeatable)")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default tiny_llada beside the golden folder")
    options = parser.parse_args(arguments)
    try:
        cases = read_cases(options.golden, options.method)
        model = open_model(options.model or options.golden.resolve().parent / "tiny_llada")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tallies: dict[str, Tally] = {}
    for case in cases:
        replay(case, model, tallies.setdefault(case["method"], Tally()))
    return report(tallies)


def read_cases(folder: Path, methods: list[str] | None) -> list[Case]:
    """The cases of a folder, of the given methods only.

    Raises:
        ValueError: no such folder, no cases in it, or a method that none of them has.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    cases = [case for file in files for case in json.loads(file.read_text(encoding="utf-8"))["cases"]]
    if not cases:
        raise ValueError(f"--golden {folder}: no recorded cases (*.json) there.")
    known = sorted({case["method"] for case in cases})
    unknown = sorted(set(methods or ()) - set(known))
    if unknown:
        raise ValueError(f"--method {' '.join(unknown)}: no such method in {folder}; it has {', '.join(known)}.")
    return [case for case in cases if not methods or case["method"] in methods]


def open_model(folder: Path) -> Pretrained:
    """The recorded checkpoint, which has no tokenizer: its control tokens are those of its config."""
    model = load_model(folder)
    config = model.config
    eot = getattr(config, "eot_token_id", None) or END_OF_TURN
    special = SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id, pad=config.pad_token_id, eot=eot)
    return Pretrained(model, None, special)


def replay(case: Case, model: Pretrained, tally: Tally) -> None:
    """Decode one case, compare it, and count the outcome."""
    try:
        if case["method"] not in OFFERED:
            raise NotOfferedError("the whole method")
        config = OFFERED[case["method"]](dict(case["params"]))
    except NotOfferedError as reason:
        tally.not_offered += 1
        tally.reasons.add(str(reason))
        return
    answers = generate(model, case["prompt_ids"] if case.get("batch") else [case["prompt_ids"]], config)
    difference = compare(case, answers)
    soft = bool(case.get("near_tie") or case.get("optional"))
    if difference is None:
        tally.match += 1
    elif soft:
        tally.soft += 1
    else:
        tally.differ += 1
    if difference is not None:
        print(f"{'differs (near tie or optional)' if soft else 'DIFFERS'}: {case['id']}: {difference}")


def compare(case: Case, answers: list[Generation]) -> str | None:
    """What differs first between a case and our answers; None when nothing does."""
    expected = case["output_ids"] if case.get("batch") else [case["output_ids"]]
    for row, (answer, ids) in enumerate(zip(answers, expected, strict=True)):
        if answer.raw != ids:
            at = next((i for i, (a, b) in enumerate(zip(answer.raw, ids, strict=False)) if a != b), len(ids))
            return f"row {row}: tokens differ from position {at} on ({len(answer.raw)} tokens, {len(ids)} recorded)"
    forwards = max(answer.forwards for answer in answers)
    if forwards != case["forward_passes"]:
        return f"{forwards} forwards, {case['forward_passes']} recorded"
    if "trace" in case:
        order = fixed_in(answers[0])
        at = next((i for i, (a, b) in enumerate(zip(order, case["trace"], strict=True)) if a != b), None)
        if at is not None:
            return f"forward {at} fixed positions {order[at]}, recorded {case['trace'][at]}"
    return None


def fixed_in(answer: Generation) -> list[list[int]]:
    """Per forward the response positions that it fixed."""
    trace: list[list[int]] = [[] for _ in range(answer.forwards)]
    for position, step in enumerate(answer.steps):
        trace[step].append(position)
    return trace


def report(tallies: dict[str, Tally]) -> int:
    """Print the table and what is not offered; return the exit code."""
    print(f"{'method':<22}{'match':>7}{'differ':>8}{'near tie':>10}{'not offered yet':>17}")
    for method, tally in tallies.items():
        print(f"{method:<22}{tally.match:>7}{tally.differ:>8}{tally.soft:>10}{tally.not_offered:>17}")
    for method, tally in tallies.items():
        for reason in sorted(tally.reasons):
            print(f"not offered yet: {method}: {reason}")
    compared = sum(tally.match + tally.differ + tally.soft for tally in tallies.values())
    differ = sum(tally.differ for tally in tallies.values())
    left = sum(tally.not_offered for tally in tallies.values())
    print(f"compared {compared} cases: {f'{differ} differ' if differ else 'all match'}; {left} not offered yet")
    if not compared:
        print("error: nothing was compared: none of these cases is offered yet.", file=sys.stderr)
        return 2
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
