"""Replay recorded decoding cases and compare tokens, forward counts and the order in which tokens were fixed.

Why: the cases were recorded from public programs, so a match says that a method here is the published one. Their format is
described in tests/golden/README.md; how their parameters read here in ``golden_cases.py``, and the defects of those
programs that some cases rest on in ``golden_defects.py``. A case that differs from ours only by a listed defect is listed
with it, never hidden.

    python scripts/replay_golden.py --golden tests/golden/decode
    python scripts/replay_golden.py --golden FOLDER --method dllm_var --method llada_vanilla [--model FOLDER]

Exit code: 0 every compared case matches or is explained (near ties and optional cases may differ: they are reported),
1 one does not, or defects change the tokens of too many cases of a whole folder, 2 nothing could be compared.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from golden_cases import Case, Outcome, read
from golden_defects import DEFECTS, Defect

from dllm_var import Event, GenerationConfig, Pretrained
from dllm_var.decoding.compose import compose
from dllm_var.decoding.frequencies import FILE_NAME
from dllm_var.decoding.loop import DecodeLoop
from dllm_var.diffusion.likelihood import score_masks
from dllm_var.model.checkpoint import load_model
from dllm_var.text.special_tokens import SpecialTokens

# The end-of-turn id of the recorded checkpoint, for a folder whose config does not name one.
END_OF_TURN = 257
# The largest share of a folder's cases whose tokens may differ by a defect.
SHARE = 0.06


@dataclass
class Tally:
    """How the cases of one method came out. `soft`: misses of near ties and optional cases."""

    match: int = 0
    explained: int = 0
    differ: int = 0
    soft: int = 0
    not_offered: int = 0


@dataclass
class Report:
    """All that is said at the end: a tally per method, and per defect how many cases rest on it, and with other tokens."""

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    explained: Counter[str] = field(default_factory=Counter)
    other_tokens: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str] | None = None) -> int:
    """Compare the chosen cases; see the module docstring for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", required=True, type=Path, help="folder of recorded cases (*.json)")
    parser.add_argument("--method", action="append", help="only this recorded method (repeatable)")
    parser.add_argument("--model", type=Path, help="checkpoint folder; default tiny_llada beside the golden folder")
    parser.add_argument("--frequencies", type=Path, help=f"token frequencies; default {FILE_NAME} beside the golden folder")
    options = parser.parse_args(arguments)
    beside = options.golden.resolve().parent
    try:
        cases = read_cases(options.golden, options.method)
        model = open_model(options.model or beside / "tiny_llada")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = Report()
    for case in cases:
        replay(case, model, options.frequencies or beside / FILE_NAME, report)
    return conclude(report, whole=not options.method)


def read_cases(folder: Path, methods: list[str] | None) -> list[Case]:
    """The cases of a folder, of the given methods only.

    Raises:
        ValueError: no such folder, no cases in it, or a method that none of them has.
    """
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    cases = [case for file in files for case in cases_in(file)]
    if not cases:
        raise ValueError(f"--golden {folder}: no recorded cases (*.json) there.")
    known = sorted({case["method"] for case in cases})
    unknown = sorted(set(methods or ()) - set(known))
    if unknown:
        raise ValueError(f"--method {' '.join(unknown)}: no such method in {folder}; it has {', '.join(known)}.")
    return [case for case in cases if not methods or case["method"] in methods]


def cases_in(file: Path) -> list[Case]:
    """The cases of a file: a list, or under ``cases``.

    Raises:
        ValueError: neither.
    """
    found = json.loads(file.read_text(encoding="utf-8"))
    cases = found.get("cases") if isinstance(found, dict) else found
    if not isinstance(cases, list):
        raise ValueError(f"{file}: a list of cases, or an object with one as 'cases', belongs there.")
    return cases


def open_model(folder: Path) -> Pretrained:
    """The recorded checkpoint, which has no tokenizer: its control tokens are those of its config."""
    model = load_model(folder)
    config = model.config
    eot = getattr(config, "eot_token_id", None) or END_OF_TURN
    special = SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id, pad=config.pad_token_id, eot=eot)
    return Pretrained(model, None, special)


def replay(case: Case, model: Pretrained, frequencies: Path, report: Report) -> None:
    """Decode one case, compare it, count the outcome, and say what differs."""
    tally, defect, case = report.tallies[case["method"]], None, without_masks(case, model.special)
    if case.get("kind") == "loglik":
        difference = compare_likelihood(case, model)
    elif (config := read(case, frequencies)) is not None:
        difference = compare(case, decode(case, model, config))
        defect = explain(case, model, config) if difference else None
    else:
        tally.not_offered += 1
        return
    soft = bool(case.get("near_tie") or case.get("optional"))
    if difference is None:
        tally.match += 1
        return
    if defect is not None:
        tally.explained += 1
        report.explained[defect] += 1
        report.other_tokens[defect] += difference.startswith("row")
    else:
        tally.soft += soft
        tally.differ += not soft
    kind = f"rests on '{defect}'" if defect else "differs (near tie or optional)" if soft else "DIFFERS"
    print(f"{kind}: {case['id']}: {difference}")


def without_masks(case: Case, special: SpecialTokens) -> Case:
    """The case with EOS for what a recorded program left masked behind its first EOS, as ours puts there."""
    if not case["params"].get("stop_until_eos"):
        return case
    return {**case, "output_ids": [special.eos if token == special.mask else token for token in case["output_ids"]]}


def decode(case: Case, model: Pretrained, config: GenerationConfig, defect: Defect | None = None) -> Outcome:
    """What our decoding does with a case, with a defect put in if one is given."""
    ours = Outcome.of(events(case, model, config, defect), config.block_length)
    return ours if defect is None or defect.miscount is None else defect.miscount(ours)


def events(case: Case, model: Pretrained, config: GenerationConfig, defect: Defect | None = None) -> list[list[Event]]:
    """Those of each prompt of a case."""
    special = model.special
    if case["method"] != "dllm_var":  # the other programs know EOS alone
        special = replace(special, stop=(special.eos,))
    policies = compose(config, special, model.model.config)
    if defect is not None and defect.imitate is not None:
        policies = defect.imitate(policies, config)
    prompts = case["prompt_ids"] if case.get("batch") else [case["prompt_ids"]]
    rows: list[list[Event]] = [[] for _ in prompts]
    for event in DecodeLoop(model.model, special, config, prompts, policies=policies):
        rows[event.request].append(event)
    return rows


def compare(case: Case, ours: Outcome) -> str | None:
    """What differs first between a case and our outcome; None when nothing does."""
    recorded = case["output_ids"] if case.get("batch") else [case["output_ids"]]
    for row, (raw, ids) in enumerate(zip(ours.raw, recorded, strict=True)):
        if raw != ids:
            at = next((i for i, (a, b) in enumerate(zip(raw, ids, strict=False)) if a != b), len(ids))
            return f"row {row}: tokens differ from position {at} on ({len(raw)} tokens, {len(ids)} recorded)"
    if ours.forwards != case["forward_passes"]:
        return f"{ours.forwards} forwards, {case['forward_passes']} recorded"
    if case.get("batch"):
        return None  # without an order
    nothing: list[list[int]] = [[]] * len(ours.remasks)
    for verb, kept, recording in (
        ("fixed positions", ours.commits, case.get("trace", ours.commits)),
        ("took back", ours.remasks, case.get("trace_remask", nothing)),
        ("replaced", ours.edits, case.get("trace_edit", nothing)),
        ("saw a length of", ours.lengths, case.get("trace_gen_length", ours.lengths)),
    ):
        for call, (one, other) in enumerate(zip(kept, recording, strict=True)):
            if one != other:
                return f"forward {call} {verb} {one}, recorded {other}"
    return None


def explain(case: Case, model: Pretrained, config: GenerationConfig) -> str | None:
    """The defect with which our decoding gives what was recorded; None when there is no such."""
    fitting = (defect for defect in DEFECTS if defect.rests(case, config))
    return next((d.name for d in fitting if compare(case, decode(case, model, config, d)) is None), None)


def compare_likelihood(case: Case, model: Pretrained) -> str | None:
    """What differs between a recorded likelihood and ours of the same masks; None when nothing does."""
    answer = case["answer_ids"]
    masks = torch.tensor([[[i in row for i in range(len(answer))] for row in batch] for batch in case["masked_positions"]])
    pair, w = (case["prompt_ids"], answer), case["params"]["cfg_scale"]
    ours = score_masks(model.model, model.special.mask, [pair], [masks], cfg_scale=w)[0].value
    recorded = case["log_likelihood"]
    return None if abs(ours - recorded) <= 1e-3 + 1e-4 * abs(recorded) else f"log-likelihood {ours}, {recorded} recorded"


def conclude(report: Report, whole: bool) -> int:
    """Print the tables; return the exit code. `whole`: every case of the folder was compared."""
    print(f"{'method':<22}{'match':>7}{'explained':>11}{'differ':>8}{'near tie':>10}{'not offered':>13}")
    for method, tally in report.tallies.items():
        counts = f"{tally.explained:>11}{tally.differ:>8}{tally.soft:>10}{tally.not_offered:>13}"
        print(f"{method:<22}{tally.match:>7}{counts}")
    for method, tally in report.tallies.items():
        if tally.not_offered:
            print(f"not offered: {method}")
    if report.explained:
        print(f"\n{'defect':<22}{'cases':>7}{'other tokens':>14}  what the recorded program does")
    for defect in DEFECTS:
        if defect.name in report.explained:
            counts = f"{report.explained[defect.name]:>7}{report.other_tokens[defect.name]:>14}"
            print(f"{defect.name:<22}{counts}  {defect.what}")
    tallies = report.tallies.values()
    differ, left = sum(t.differ for t in tallies), sum(t.not_offered for t in tallies)
    compared = sum(t.match + t.explained + t.differ + t.soft for t in tallies)
    print(f"compared {compared} cases: {f'{differ} differ' if differ else 'all match or are explained'}; {left} not offered")
    if not compared:
        print("error: nothing was compared: none of these cases is offered.", file=sys.stderr)
        return 2
    changed = sum(report.other_tokens.values())
    print(f"tokens that a defect changes: {changed} cases, {changed / compared:.1%} (at most {SHARE:.0%} of a whole folder)")
    return 1 if differ or (whole and changed > SHARE * compared) else 0


if __name__ == "__main__":
    sys.exit(main())
