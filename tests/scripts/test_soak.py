"""The endurance run of the engine: a short one finds nothing, and what it would find is said."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dllm_var import load_pretrained

RESULT = Path(__file__).parents[2] / "evaluation" / "results" / "soak.json"


@pytest.fixture(scope="module")
def soak(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/soak.py")
    return module


@pytest.fixture
def found() -> dict[str, Any]:
    result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return result


def test_a_short_run_loses_nothing(soak: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "COMPARED", 5)  # of every fiftieth of so few, each might have been cancelled
    found = soak.soak(load_pretrained("tiny"), 150, 8, 1)
    assert found["ended"] == 150 == sum(found["stop_reasons"].values())
    assert {"cancelled", "forwards", "deadline", "eos"} <= set(found["stop_reasons"])
    assert found["compared"] >= 5
    assert [line for line in soak.complaints(found) if "memory" not in line] == []  # so short a run still warms up


def test_the_committed_run_found_nothing(soak: ModuleType, found: dict[str, Any]) -> None:
    assert found["requests"] >= 10_000
    assert soak.complaints(found) == []


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("differing", 1, "differing is 1"), ("unanswered", 2, "unanswered is 2"), ("live_rows", 1, "live_rows is 1"),
        ("waiting", 1, "waiting is 1"), ("rows_in_stores", 1, "rows_in_stores is 1"), ("ended", 5, "ended 5 times"),
        ("memory_growth", 0.021, "memory grew by 2.1%"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said(soak: ModuleType, found: dict[str, Any], name: str, value: Any, said: str) -> None:
    (line,) = soak.complaints(found | {name: value})
    assert said in line
