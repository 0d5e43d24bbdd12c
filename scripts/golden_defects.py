"""The defects of the recorded programs that some golden cases rest on, each proven by putting it into our decoding.

Used by ``scripts/replay_golden.py``. Where a public program differs from its own paper or from itself, ours follows the
paper: `DEFECTS` lists these places. Each says which cases rest on it and how to imitate it, so that a case counts as
explained only when our decoding *with* the defect gives the recorded tokens, forwards and order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from golden_cases import Case, Outcome
from torch import Tensor

from dllm_var import GenerationConfig
from dllm_var.decoding.compose import Policies
from dllm_var.decoding.daedal import Daedal
from dllm_var.decoding.editing import Editing
from dllm_var.decoding.length_policies import Fixed
from dllm_var.decoding.priors import Calibrated, CertaintyPrior, PositionPrior, log_score
from dllm_var.decoding.proposal import Candidates, Measure
from dllm_var.decoding.scorers import DecidedLast, Scorer
from dllm_var.decoding.selectors import Factor, Selector, Threshold
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView


@dataclass(frozen=True)
class Defect:
    """A place where a recorded program differs from its paper or from itself.

    Attributes:
        name, what: for people. rests: whether a case may rest on it.
        imitate: our policies with the defect. miscount: our outcome with the calls that the defect made.
    """

    name: str
    what: str
    rests: Callable[[Case, GenerationConfig], bool]
    imitate: Callable[[Policies, GenerationConfig], Policies] | None = None
    miscount: Callable[[Outcome], Outcome] | None = None


class LastPairTogether(Factor):
    """Also takes the last candidate when only that one fails."""

    def select(self, view: StepView, score: Tensor) -> Action:
        commit = super().select(view, score).commit
        one_left = (view.eligible & ~commit).sum(1, keepdim=True) == 1
        return Action(commit=torch.where(one_left, view.eligible, commit))


class ScoreThreshold(Threshold):
    """Tests the score that priors have weighed (a logarithm) in place of the confidence."""

    def select(self, view: StepView, score: Tensor) -> Action:
        return super().select(replace(view, confidence=score.exp().float()), score)


class InvertedPrior(CertaintyPrior):
    """Multiplies minus the entropy by the density, so that tokens far from everything decided come first."""

    def __call__(self, view: StepView) -> Tensor:
        density = (super().__call__(view) - log_score(self.inner, view)).exp()
        return self.inner(view).double() * density


class MixedScale(Scorer):
    """A linear position prior whose score is scaled over all of the block.

    For decided positions it multiplies the confidence in the likeliest token by the information of the one that stands
    there.
    """

    def __init__(self, prior: PositionPrior) -> None:
        assert isinstance(prior.inner, Calibrated)
        self.calibrated, self.weight = prior.inner, prior.weight

    def __call__(self, view: StepView) -> Tensor:
        state = view.state
        standing = state.tokens.gather(1, view.positions).where(~view.eligible, view.ids)
        score = self.calibrated(replace(view, ids=standing)).exp()
        low, high = (score.masked_fill(~view.real, edge) for edge in (float("inf"), -float("inf")))
        scaled = (score - low.amin(1, keepdim=True)) / (high.amax(1, keepdim=True) - low.amin(1, keepdim=True))
        length = (state.block_end - state.block_start)[:, None]
        index = view.positions - state.block_start[:, None]
        return (1 - self.weight) * scaled + self.weight * (length - index) / length


class WithoutEnds(Scorer):
    """Takes the tokens that end an answer out of the probabilities once a token is proposed: where one of them is proposed
    its confidence is 0, and everywhere else confidences grow by what the two had.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"without ends": self._share}

    def _share(self, seen: Candidates) -> Tensor:
        left = seen.logits.index_fill(1, self.ids.to(seen.logits.device), -float("inf"))
        return left.softmax(-1).gather(1, seen.ids[:, None])[:, 0]

    def __call__(self, view: StepView) -> Tensor:
        return view.measures["without ends"]


class SeesBlock(Selector):
    """Another rule; the scorer sees the decided positions of the block as well."""

    def __init__(self, inner: Selector) -> None:
        self.inner = inner

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        inside = (plan.positions >= state.block_start[:, None]) & (plan.positions < state.block_end[:, None])
        return replace(plan, wanted=plan.real & inside)

    def select(self, view: StepView, score: Tensor) -> Action:
        return self.inner.select(view, score)


class FillsBehindEos(Fixed):
    """Puts EOS behind the first EOS at once, so that the tokens before it are decided in sight of it.

    Args:
        config: its cache, which keeps the first call of a block from doing so.
    """

    stops_at_block_end = True

    def __init__(self, config: GenerationConfig, stop_ids: tuple[int, ...]) -> None:
        super().__init__(config.block_length, stop_ids, early_stop=False)
        self.cached = config.cache != "none"

    def after(self, state: DecodeState) -> None:
        again = state.block_forwards > 1
        if not self.cached or bool(again.all()):
            first = state.stopped(self.stop_ids)
            behind = torch.arange(state.tokens.shape[1]) > first[:, None]
            state.tokens, state.masked = state.tokens.masked_fill(behind, self.stop_ids[0]), state.masked & ~behind
            super().after(state)


class CutsAtTheEnd(Daedal):
    """Inserts all masks also where there is no room, and drops as many tokens at the right end, decided or not."""

    def adjust(self, action: Action, view: StepView) -> Action:
        state = view.state
        self.limit = state.limit
        state.limit = self.limit + (state.end < self.limit) * self.config.expansion_factor
        return super().adjust(action, view)

    def after(self, state: DecodeState) -> None:
        state.limit, state.end = self.limit, state.end.minimum(self.limit)
        super().after(state)


class EditsAtCommit(Editing):
    """Also replaces tokens of the block whose keys and values are stored in this very forward, from the old tokens."""

    def _standing(self, state: DecodeState) -> Tensor:
        column = torch.arange(state.tokens.shape[1])
        given = column < torch.maximum(state.prompt, state.stored)[:, None]
        return ~state.masked & ~given & (column < state.end[:, None])

    def extend(self, plan: Plan, state: DecodeState) -> Plan:
        plan = self.inner.extend(plan, state)
        return replace(plan, wanted=plan.wanted | plan.real & self._standing(state).gather(1, plan.positions))

    def select(self, view: StepView, score: Tensor) -> Action:
        standing = view.real & self._standing(view.state).gather(1, view.positions)
        other = view.ids != view.state.tokens.gather(1, view.positions)
        return replace(self.inner.select(view, score), replace=standing & other)


def _last_pair(policies: Policies, config: GenerationConfig) -> Policies:
    assert config.factor is not None
    return replace(policies, selector=LastPairTogether(config.factor))


def _weighed(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.selector, Threshold)
    return replace(policies, selector=ScoreThreshold(policies.selector.threshold, inclusive=True))


def _inverted(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.scorer, CertaintyPrior)
    return replace(policies, scorer=InvertedPrior(policies.scorer.inner, policies.scorer.sigma))


def _mixed_scale(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.scorer, PositionPrior)
    return replace(policies, scorer=MixedScale(policies.scorer), selector=SeesBlock(policies.selector))


def _without_ends(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.scorer, DecidedLast)
    return replace(policies, scorer=WithoutEnds(policies.scorer.ids))


def _cut(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.length, Daedal)
    return replace(policies, length=CutsAtTheEnd(config, policies.length.special))


def _edit_at_commit(policies: Policies, config: GenerationConfig) -> Policies:
    assert isinstance(policies.selector, Editing)
    return replace(policies, selector=EditsAtCommit(policies.selector.inner, policies.selector.threshold))


def _one_call_more(ours: Outcome) -> Outcome:
    calls: list[list[int]] = []
    for call, block in zip(ours.commits, ours.blocks[0], strict=True):
        calls += [call, []] if ours.blocks[0].count(block) == 1 else [call]
    return replace(ours, forwards=len(calls), commits=calls)


def _lockstep(ours: Outcome) -> Outcome:
    blocks = {block for row in ours.blocks for block in row}
    return replace(ours, forwards=sum(max(row.count(block) for row in ours.blocks) for block in blocks))


def _density(case: Case, config: GenerationConfig) -> bool:
    return case["method"].startswith("d2c_") and config.sigma is not None


DEFECTS = (
    Defect(
        "ends taken out", "LLaDA's confidence_eos_eot_inf also raises the confidences of all other tokens, unequally",
        lambda case, config: config.confidence_eos_eot_inf is True and config.remasking == "low_confidence",
        imitate=_without_ends,
    ),
    Defect(
        "last pair", "Fast-dLLM's factor takes the last token as well when only that one fails",
        lambda case, config: case["method"] == "fast_dllm_v1" and config.factor is not None,
        imitate=_last_pair,
    ),
    Defect(
        "fill behind EOS", "Fast-dLLM's early_stop fills what follows an EOS before the tokens in front of it are decided",
        lambda case, config: case["method"] == "fast_dllm_v1" and bool(config.stop_until_eos),
        imitate=lambda policies, config: replace(policies, length=FillsBehindEos(config, policies.length.stop_ids)),
    ),
    Defect(
        "one call more", "Fast-dLLM calls the model again for a block that the first, cache-filling call has finished",
        lambda case, config: case["method"] == "fast_dllm" and config.cache == "prefix",
        miscount=_one_call_more,
    ),
    Defect(
        "lockstep", "d2Cache lets the rows of a batch wait for each other at the end of every block",
        lambda case, config: bool(case.get("batch")),
        miscount=_lockstep,
    ),
    Defect(
        "weighed threshold", "d2Cache compares the threshold with the score that the density has weighed",
        lambda case, config: _density(case, config) and config.threshold is not None,
        imitate=_weighed,
    ),
    Defect(
        "inverted density", "d2Cache multiplies minus the entropy by the density, which inverts it",
        lambda case, config: _density(case, config) and config.remasking == "entropy",
        imitate=_inverted,
    ),
    Defect(
        "mixed scale", "PC-Sampler's linear prior takes the confidence of one token times the information of another",
        lambda case, config: case["method"] == "pc_linear",
        imitate=_mixed_scale,
    ),
    Defect(
        "cut at the end", "DAEDAL drops tokens at the right end, decided ones too, when it inserts without room",
        lambda case, config: case["method"] == "daedal_orig",
        imitate=_cut,
    ),
    Defect(
        "edit at commit", "dLLM-Var's editing changes a block while the keys and values of its old tokens are stored",
        lambda case, config: bool(config.enable_editing),
        imitate=_edit_at_commit,
    ),
)  # fmt: skip
