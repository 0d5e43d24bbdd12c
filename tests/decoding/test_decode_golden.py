"""Recorded runs of public implementations, decoded again: tokens, forwards and order, alone and in batches.

`scripts/replay_golden.py` holds the reading of the cases; what it calls a match is what is asserted here.
"""

import json
import random
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dllm_var import Generation, Pretrained, generate

FOLDER = Path(__file__).parents[1] / "golden" / "decode"
CASES = [case for file in sorted(FOLDER.glob("*.json")) for case in json.loads(file.read_text())["cases"]]
OFFERED = [case for case in CASES if not case["params"].get("enable_editing")]


@pytest.fixture(scope="module")
def replay(script: Any) -> ModuleType:
    return script("scripts/replay_golden.py")


def _config(replay: ModuleType, case: dict[str, Any]) -> Any:
    return replay.OFFERED[case["method"]](dict(case["params"]))


def _check(replay: ModuleType, case: dict[str, Any], answers: list[Generation]) -> None:
    difference = replay.compare(case, answers)
    assert difference is None or case.get("near_tie"), f"{case['id']}: {difference}"


def test_there_are_as_many_cases_as_were_recorded() -> None:
    assert len(CASES) == 113
    assert len(OFFERED) == 93


@pytest.mark.parametrize("case", OFFERED, ids=lambda case: case["id"])
def test_a_recorded_run_is_reproduced(case: dict[str, Any], recorded: Pretrained, replay: ModuleType) -> None:
    prompts = case["prompt_ids"] if case.get("batch") else [case["prompt_ids"]]
    _check(replay, case, generate(recorded, prompts, _config(replay, case)))


def test_recorded_prompts_decoded_together_give_what_each_gave_alone(recorded: Pretrained, replay: ModuleType) -> None:
    groups = defaultdict(list)
    for case in OFFERED:
        if not case.get("batch"):
            groups[json.dumps([case["method"], case["params"]])].append(case)
    assert max(map(len, groups.values())) >= 5
    for cases in groups.values():
        random.Random(0).shuffle(cases)
        answers = generate(recorded, [case["prompt_ids"] for case in cases], _config(replay, cases[0]))
        for case, answer in zip(cases, answers, strict=True):
            _check(replay, case, [answer])


def test_rows_that_finish_early_do_not_disturb_the_others(recorded: Pretrained, replay: ModuleType) -> None:
    cases = [case for case in OFFERED if case["method"] == "dllm_var" and case["params"]["block_length"] == 8][:10]
    cases = [case for case in cases if case["params"] == cases[0]["params"]]
    forwards = {case["forward_passes"] for case in cases}
    assert len(forwards) > 2  # they do finish at different times
    answers = generate(recorded, [case["prompt_ids"] for case in reversed(cases)], _config(replay, cases[0]))
    for case, answer in zip(reversed(cases), answers, strict=True):
        _check(replay, case, [answer])
