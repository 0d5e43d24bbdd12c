"""Recorded runs of public programs, decoded again: tokens, forwards and order, alone and in batches.

`scripts/replay_golden.py`, `golden_cases.py` and `golden_defects.py` hold the reading of the cases; what they call a match,
or explain by a defect of the recorded program, is what is asserted here. Here only some cases of each method are run; the
script runs all.
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dllm_var import Pretrained

FOLDER = Path(__file__).parents[1] / "golden" / "decode"
CASES = [case for file in sorted(FOLDER.glob("*.json")) for case in json.loads(file.read_text())["cases"]]
FREQUENCIES = FOLDER.parent / "token_freq.json"
LEAST, MOST = 6, 7  # cases of each method that are run here

# A case for each listed defect. The tokens of the last two are not changed by it, only the forwards.
RESTS_ON = {
    "fast_dllm_v1-p000": "last pair",
    "fast_dllm_v1-p019": "fill behind EOS",
    "d2c_sigma-p008": "weighed threshold",
    "d2c_sigma-p016": "inverted density",
    "pc_linear-p001": "mixed scale",
    "daedal_orig-p005": "cut at the end",
    "dllm_var-p008": "edit at commit",
    "fast_dllm-p033": "one call more",
    "d2c_batch-p005": "lockstep",
}


def _settings(case: dict[str, Any]) -> str:
    return json.dumps([case["method"], case["params"]])


def _chosen() -> list[dict[str, Any]]:
    """Some cases of each method, of as many settings as possible."""
    chosen = []
    for method in dict.fromkeys(case["method"] for case in CASES):
        cases = [case for case in CASES if case["method"] == method and case["id"] not in RESTS_ON]
        first = {_settings(case): case for case in reversed(cases)}.values()
        chosen += sorted(cases, key=lambda case: case not in first)[: MOST if len(first) >= MOST else LEAST]
    return chosen


@pytest.fixture(scope="module")
def replay(script: Any) -> ModuleType:
    return script("scripts/replay_golden.py")


def test_there_are_as_many_cases_as_were_recorded_and_some_of_each_method_are_run() -> None:
    assert len(CASES) == 727
    for method in {case["method"] for case in CASES}:
        assert sum(case["method"] == method for case in _chosen()) >= LEAST - sum(method in name for name in RESTS_ON)


@pytest.mark.parametrize("case", _chosen(), ids=lambda case: case["id"])
def test_a_recorded_run_is_reproduced_or_rests_on_a_listed_defect(
    case: dict[str, Any], recorded: Pretrained, replay: ModuleType
) -> None:
    report = replay.Report()
    replay.replay(case, recorded, FREQUENCIES, report)
    tally = report.tallies[case["method"]]
    assert (tally.differ, tally.not_offered) == (0, 0)


@pytest.mark.parametrize("name", RESTS_ON)
def test_with_the_defect_put_in_a_case_that_rests_on_it_is_reproduced(
    name: str, recorded: Pretrained, replay: ModuleType
) -> None:
    case = next(case for case in CASES if case["id"] == name)
    config = replay.read(case, FREQUENCIES)
    assert replay.compare(case, replay.decode(case, recorded, config)) is not None
    assert replay.explain(case, recorded, config) == RESTS_ON[name]


def test_every_listed_defect_has_such_a_case(replay: ModuleType) -> None:
    made_elsewhere = {"ends taken out"}  # no recorded case asks for it: tests/scripts/test_replay_golden.py makes one
    assert {defect.name for defect in replay.DEFECTS} == set(RESTS_ON.values()) | made_elsewhere


def test_recorded_prompts_decoded_together_give_what_each_gave_alone(recorded: Pretrained, replay: ModuleType) -> None:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in CASES:
        if not (case.get("batch") or case.get("near_tie") or case.get("kind") or case["method"] == "pc_linear"):
            groups[_settings(case)].append(case)
    largest = {cases[0]["method"]: cases for cases in sorted(groups.values(), key=len)}
    assert min(map(len, largest.values())) > 1
    reproduced = 0
    for cases in largest.values():
        cases = random.Random(0).sample(cases, k=min(4, len(cases)))
        config = replay.read(cases[0], FREQUENCIES)
        batch = {**cases[0], "batch": True, "prompt_ids": [case["prompt_ids"] for case in cases]}
        for case, events in zip(cases, replay.events(batch, recorded, config), strict=True):
            case = replay.without_masks(case, recorded.special)
            ours = replay.Outcome.of([events], config.block_length)
            fits = replay.compare(case, ours) is None
            # What a defect changes has no record to compare with, but our own answer alone.
            assert fits or ours == replay.decode(case, recorded, config)
            reproduced += fits
    assert reproduced > 70


def test_rows_that_finish_early_do_not_disturb_the_others(recorded: Pretrained, replay: ModuleType) -> None:
    cases = [case for case in CASES if case["method"] == "dllm_var" and case["params"]["block_length"] == 8][:10]
    cases = [case for case in cases if case["params"] == cases[0]["params"]][::-1]
    assert len({case["forward_passes"] for case in cases}) > 2  # they do finish at different times
    config = replay.read(cases[0], FREQUENCIES)
    batch = {**cases[0], "batch": True, "prompt_ids": [case["prompt_ids"] for case in cases]}
    for case, events in zip(cases, replay.events(batch, recorded, config), strict=True):
        assert replay.compare(case, replay.Outcome.of([events], config.block_length)) is None
