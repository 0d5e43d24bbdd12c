"""The committed comparison of decoding methods is what this code does: two of its prompts are decoded again."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dllm_var import GenerationConfig, load_pretrained
from dllm_var.decoding.methods import CACHES, METHODS

RESULT = Path(__file__).parents[2] / "evaluation" / "results" / "compare_decoding.json"


@pytest.fixture(scope="module")
def compare(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/compare_decoding.py")
    return module


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def test_every_method_and_every_cache_takes_part(compare: ModuleType) -> None:
    configs = [GenerationConfig(**options) for options in compare.SYSTEMS.values()]
    assert {config.method for config in configs} == set(METHODS)
    assert {config.cache for config in configs} == set(CACHES)


@pytest.mark.timeout(900)
def test_the_exact_columns_of_the_committed_file_come_out_again(compare: ModuleType, committed: dict[str, Any]) -> None:
    model = load_pretrained("tiny", dtype=torch.float64)
    problems = compare.chosen_problems(model, committed["prompts_per_task"])
    again = [0, len(problems) // 2]  # of different tasks
    outcomes = compare.exact_outcomes(model, [problems[i] for i in again])
    assert set(committed["outcomes"]) == set(compare.SYSTEMS)
    assert committed["fields"] == list(compare.Outcome.__dataclass_fields__)
    for name, kept in committed["outcomes"].items():
        assert len(kept) == len(problems)
        assert [list(vars(outcome).values()) for outcome in outcomes[name]] == [kept[i] for i in again], name


def test_the_table_and_the_picture_can_be_made_of_the_committed_file(
    compare: ModuleType, committed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = {name: [compare.Outcome(*fields) for fields in kept] for name, kept in committed["outcomes"].items()}
    compare.show(outcomes, committed["time_ratio"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in compare.SYSTEMS)
    compare.draw(outcomes, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[1:4] == b"PNG"
    assert committed["time_ratio"]["vanilla"] == 1.0
