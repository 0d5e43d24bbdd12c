"""Policies that are not ours, plugged into the loop: what a policy may ask for and do without a change to the loop."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.kv_policies import BlockCommit, Recompute
from dllm_var.decoding.length_policies import Fixed
from dllm_var.decoding.loop import DecodeLoop, Policies, compose
from dllm_var.decoding.proposal import Candidates, Measure
from dllm_var.decoding.scorers import Confidence, Scorer
from dllm_var.decoding.selectors import Selector, Threshold, best
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView

VANILLA = GenerationConfig(method="vanilla", gen_length=6, block_length=3)


def _run(loop: DecodeLoop) -> Any:
    return next(event.result for event in loop if event.result is not None)


class Margin(Scorer):
    """Best minus second-best probability, measured on the device."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        def margin(seen: Candidates) -> Tensor:
            first, second = (seen.logits - seen.logsumexp[:, None]).exp().topk(2).values.unbind(-1)
            return first - second

        return {"margin": margin}

    def __call__(self, view: StepView) -> Tensor:
        return view.measures["margin"]


def test_a_scorer_can_measure_what_the_loop_does_not(rule_model: Any, special: Any) -> None:
    def rule(ids: Tensor, positions: Tensor) -> Tensor:
        logits = torch.full((*ids.shape, 12), -9.0)
        logits[..., 1], logits[..., 2] = 3.0, 0.1 * positions  # the later, the smaller the margin
        logits[..., 3] = torch.where(positions == 4, 2.9, -9.0)  # the smallest margin of all
        return logits

    policies = replace(compose(VANILLA, special), scorer=Margin())
    assert _run(DecodeLoop(rule_model(rule), special, VANILLA, [[1, 1]], policies=policies)).steps == [0, 1, 2, 3, 4, 5]
    flat = replace(VANILLA, block_length=6)
    policies = replace(compose(flat, special), scorer=Margin())
    assert _run(DecodeLoop(rule_model(rule), special, flat, [[1, 1]], policies=policies)).steps == [0, 1, 5, 2, 3, 4]


class ShadowVerify(Selector):
    """Asks for a second opinion on the block's decided tokens, by passing masks at their positions; takes back one, once."""

    def __init__(self) -> None:
        self.opinions: list[list[int]] = []

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        start, end = int(state.block_start[0]), int(state.block_end[0])
        positions = torch.arange(start, end)[None]
        decided = ~state.masked[:, start:end]
        true = torch.ones_like(decided)
        assert plan.slots is not None
        return replace(
            plan,
            positions=torch.cat((plan.positions, positions), 1),
            ids=torch.cat((plan.ids, torch.full_like(positions, state.mask)), 1),
            real=torch.cat((plan.real, true), 1),
            wanted=torch.cat((plan.wanted, decided), 1),
            slots=torch.cat((plan.slots, torch.full_like(positions, -1)), 1),
        )

    def select(self, view: StepView, score: Tensor) -> Action:
        shadow = view.real & ~view.eligible
        self.opinions.append(view.positions[shadow].tolist())
        commit = best(score, view.eligible, torch.ones(len(score), dtype=torch.int64))
        once = len(self.opinions) == 2
        return Action(commit=commit, remask=shadow if once else None)


def test_a_selector_can_ask_about_decided_tokens_and_take_them_back(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(block_length=3, max_gen_length=3, early_stop=False)
    selector = ShadowVerify()
    policies = replace(compose(config, special), selector=selector, kv=BlockCommit(2 * 3))
    loop = DecodeLoop(rule_model(says({})), special, config, [[5, 5]], policies=policies)
    events = list(loop)
    assert [event.remasked for event in events] == [(), (0,), (), ()]
    assert selector.opinions == [[], [2], [3], [2, 3]]
    result = events[-1].result
    assert result is not None
    assert result.steps == [2, 1, 3]


class Attentive(Recompute):
    """Wants the attention of every forward and remembers something per row."""

    def plan(self, state: DecodeState) -> Plan:
        return replace(super().plan(state), attention=True)

    def observe(self, view: StepView, action: Action) -> None:
        assert view.attentions is not None
        incoming = view.attentions[0].sum(1)  # [B, n]
        assert incoming.shape == view.state.tokens.shape
        view.state.notes["rows_seen"] = view.state.notes.get("rows_seen", torch.zeros(view.state.rows)) + incoming[:, 0]


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_kv_policy_can_see_attention_and_keep_notes_that_follow_the_rows(
    cfg_scale: float, rule_model: Any, says: Any, special: Any
) -> None:
    config = replace(VANILLA, cfg_scale=cfg_scale, early_stop=True)
    policies = replace(compose(config, special), kv=Attentive())
    stops_early = says({1: (special.eos, 99.0)}, default=(1, 1.0))
    loop = DecodeLoop(rule_model(stops_early), special, config, [[1], [1, 2]], policies=policies)
    while loop.state.rows:
        loop.step()
        assert loop.state.notes["rows_seen"].shape == (loop.state.rows,)
    assert loop.executor.calls == 6


class GrowOnce(Fixed):
    """Widens the first doubtful mask of each row by two masks, in its second forward; its limit is the end of the canvas."""

    def adjust(self, action: Action, view: StepView) -> Action:
        if int(view.state.forwards[0]) != 1:
            return action
        left = (view.eligible & ~action.commit).int().argmax(1, keepdim=True)
        view.state.limit = view.state.limit + 2
        return replace(action, insert_at=view.positions.gather(1, left)[:, 0], insert_count=torch.tensor([2]))


def test_a_length_policy_can_insert_masks_in_the_middle(rule_model: Any, says: Any, special: Any) -> None:
    config = GenerationConfig(method="vanilla", gen_length=8, threshold=2)
    policies = Policies(GrowOnce(8, special.stop, False), Recompute(), Confidence(), Threshold(2, inclusive=True))
    loop = DecodeLoop(rule_model(says({5: (7, 9.0)})), special, config, [[5]], policies=policies)
    loop.state.limit = torch.tensor([6])
    events = list(loop)
    result = events[-1].result
    assert events[1].inserted == (2, 3)
    assert (len(events[0].response), len(events[1].response)) == (5, 7)
    assert result is not None
    assert len(result.raw) == 7
    assert (result.raw[6], result.steps[6]) == (7, 0)  # decided at position 4, moved two to the right
