"""Editing: tokens of the open block follow the model's present choice, those of a full block stay."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import GenerationConfig, Pretrained
from dllm_var.decoding.loop import DecodeLoop
from dllm_var.decoding.results import Event

FILE = Path(__file__).parents[1] / "golden" / "decode" / "dllm_var.json"
RECORDED = [case for case in json.loads(FILE.read_text())["cases"] if case["params"].get("enable_editing")]
PROMPTS = [[258, 259, *text, 257, 260] for text in (b"rev abcde", b"rep xy 3", b"")]


def _config(**options: Any) -> GenerationConfig:
    base = {"block_length": 5, "max_gen_length": 12, "enable_editing": True, "edit_threshold": 0.0, "early_stop": False}
    return GenerationConfig(**base | options)


def _events(model: Any, special: Any, config: GenerationConfig, prompts: list[list[int]]) -> list[Event]:
    return list(DecodeLoop(model, special, config, prompts))


def _changes(event: Event) -> tuple[list[int], list[int]]:
    return sorted(c.position for c in event.committed), sorted(c.position for c in event.replaced)


def _parts(case: dict[str, Any]) -> int:
    """The first forward in which a recorded run edits a full block; their number where none does."""
    decided, length = 0, case["params"]["block_length"]
    for forward, (commits, edits) in enumerate(zip(case["trace"], case["trace_edit"], strict=True)):
        if edits and min(edits) < decided // length * length:
            return forward
        decided += len(commits)
    return case["forward_passes"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["id"])
def test_a_recorded_run_is_reproduced_until_it_edits_a_full_block(case: dict[str, Any], recorded: Pretrained) -> None:
    """The public code edits a full block while its keys and values are stored; from there on the texts part."""
    events = _events(recorded.model, recorded.special, _config(**case["params"]), [case["prompt_ids"]])
    same, result = _parts(case), events[-1].result
    assert [_changes(event) for event in events[:same]] == list(zip(case["trace"], case["trace_edit"], strict=True))[:same]
    assert result is not None
    assert same < case["forward_passes"] or (result.raw, result.forwards) == (case["output_ids"], same)


def test_eleven_of_the_recorded_runs_never_edit_a_full_block() -> None:
    assert (len(RECORDED), sum(_parts(case) == case["forward_passes"] for case in RECORDED)) == (20, 11)


def _wavering(ids: Tensor, positions: Tensor) -> Tensor:
    """Says 1 at every position, but 2 at position 1 (weakly) and 3 at position 2 (strongly) once these are decided."""
    logits = torch.zeros(*ids.shape, 12)
    logits[..., 1] = 9.0 - positions
    decided = ids != 11
    logits[..., 2] = torch.where(decided & (positions == 1), 8.5, 0.0)
    logits[..., 3] = torch.where(decided & (positions == 2), 12.0, 0.0)
    return logits


def test_a_token_gives_way_to_a_sure_enough_other_one(rule_model: Any, special: Any) -> None:
    config = _config(block_length=4, max_gen_length=8, threshold=1.1, edit_threshold=0.9)
    events = _events(rule_model(_wavering), special, config, [[1]])
    assert [_changes(event) for event in events[:4]] == [([0], []), ([1], []), ([2], [1]), ([3], [])]
    assert [(c.id, c.confidence > 0.9) for c in events[2].replaced] == [(3, True)]
    assert events[2].response == [1, 3, 1, special.mask]
    result = events[-1].result
    assert result is not None
    assert result.raw == [1, 3, *[1] * 6]
    assert result.steps == [0, 2, 2, 3, 4, 5, 6, 7]  # the forward that fixed the token that stands there
    assert result.confidence[1] == events[2].replaced[0].confidence
    unsure = _events(rule_model(_wavering), special, _config(block_length=4, threshold=1.1, edit_threshold=0.5), [[1]])
    assert [_changes(event)[1] for event in unsure[:4]] == [[], [0], [1], []]


def test_the_threshold_of_edits_is_strict_and_defaults_to_that_of_commits(rule_model: Any, special: Any) -> None:
    sure = _events(rule_model(_wavering), special, _config(block_length=4, threshold=1.1), [[1]])[2].replaced[0].confidence
    for options, edits in (
        ({"edit_threshold": sure}, 0),
        ({"edit_threshold": sure - 1e-6}, 1),
        ({"edit_threshold": None}, 0),
    ):
        events = _events(rule_model(_wavering), special, _config(block_length=4, threshold=1.1, **options), [[1]])
        assert sum(len(event.replaced) for event in events) == edits


@pytest.mark.parametrize(
    "options",
    [
        {"cache": "none", "threshold": 0.5},
        {"factor": 0.7},
        {"threshold": 0.5, "kl_threshold": 0.05, "kl_history_length": 1},
        {"gamma": 0.5},
    ],
    ids=["none", "factor", "klass", "gamma"],
)
def test_only_the_open_block_changes_and_every_forward_decides_a_mask(options: dict[str, Any], recorded: Pretrained) -> None:
    config, replaced = _config(**options), 0
    for prompt in PROMPTS:
        settled: list[int] = []
        for event in _events(recorded.model, recorded.special, config, [prompt]):
            block = len(settled)
            assert event.response[:block] == settled
            assert event.committed
            assert all(block <= c.position for c in event.replaced)
            assert not {c.position for c in event.replaced} & {c.position for c in event.committed}
            assert all(event.response[c.position] == c.id for c in event.replaced)
            replaced += len(event.replaced)
            if recorded.special.mask not in event.response:
                settled = event.response
    assert replaced


def test_edits_that_nothing_passes_are_no_edits(recorded: Pretrained) -> None:
    config = _config(edit_threshold=1.0, threshold=0.5)
    plain = GenerationConfig(block_length=5, max_gen_length=12, threshold=0.5, early_stop=False)
    for prompt in PROMPTS:
        one, other = (_events(recorded.model, recorded.special, use, [prompt])[-1].result for use in (config, plain))
        assert one is not None
        assert other is not None
        assert (one.raw, one.steps) == (other.raw, other.steps)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-6)


@pytest.mark.parametrize(
    "config",
    [_config(threshold=0.5), _config(threshold=0.5, cache="none", cfg_scale=0.5), _config(kl_threshold=0.05, threshold=0.5)],
    ids=range(3),
)
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(config: GenerationConfig, recorded64: Pretrained) -> None:
    def rows(prompts: list[list[int]]) -> list[list[Any]]:
        events = _events(recorded64.model, recorded64.special, config, prompts)
        return [[(_changes(e), e.response) for e in events if e.request == row] for row in range(len(prompts))]

    together = rows(PROMPTS)
    assert together == [rows([prompt])[0] for prompt in PROMPTS]
    assert any(replaced for row in together for (_, replaced), _ in row)


def test_a_model_that_never_keeps_its_word_and_loves_the_mask_still_ends(rule_model: Any, special: Any) -> None:
    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        logits = torch.zeros(*ids.shape, 12)
        logits.scatter_(2, ((ids + 1) % 9)[..., None], 5.0)  # always another token than the one that stands there
        logits[..., special.mask] = 9.0
        return logits

    for room in (1, 11):
        events = _events(
            rule_model(rule), special, _config(block_length=4, max_gen_length=room, threshold=1.1), [[1], [1, 2]]
        )
        assert len(events) == 2 * room
        assert all(special.mask not in event.result.raw for event in events[-2:] if event.result is not None)
        assert room == 1 or sum(len(event.replaced) for event in events) == 2 * (6 + 6 + 3)
