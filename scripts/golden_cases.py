"""How a recorded decoding case reads here, and the defects of the recorded programs that some cases rest on.

Used by ``scripts/replay_golden.py``, which says what the cases are. `read` turns the parameters of a case into our options.
Where a public program differs from its own paper or from itself, ours follows the paper: `DEFECTS` lists these places. Each
says which cases rest on it and how to put it into our decoding, so that a case counts as explained only when our decoding
*with* the defect gives the recorded tokens, forwards and order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_var import Event, GenerationConfig
from dllm_var.decoding.compose import Policies
from dllm_var.decoding.daedal import Daedal
from dllm_var.decoding.editing import Editing
from dllm_var.decoding.length_policies import Fixed
from dllm_var.decoding.priors import Calibrated, CertaintyPrior, PositionPrior, log_score
from dllm_var.decoding.scorers import Scorer
from dllm_var.decoding.selectors import Factor, Selector, Threshold
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Action, Plan, StepView

Case = dict[str, Any]
Params = dict[str, Any]

# Parameters → options, by recorded method.


def dllm_var(p: Params) -> Params:
    """Every block is filled, so nothing stops early. Recorded edits need no confidence."""
    return {"method": "dllm_var", "early_stop": False, "edit_threshold": 0.0 if p["enable_editing"] else None, **p}


def vanilla(p: Params) -> Params:
    """LLaDA's own decoding."""
    return {"method": "vanilla", **p}


def fast_dllm(p: Params) -> Params:
    """A threshold or factor replaces the steps; ``early_stop`` decides nothing behind an EOS."""
    names = {"none": ("none", None), "prefix": ("prefix", False), "dual": ("prefix", True)}
    cache, use_dual = names[p.pop("cache")]
    if p.get("threshold") or p.get("factor"):
        del p["steps"]
    return {"method": "vanilla", "cache": cache, "use_dual": use_dual, "stop_until_eos": p.pop("early_stop", None), **p}


def klass(p: Params) -> Params:
    """KLASS, or one of its baselines."""
    alg, threshold = p.pop("alg"), p.pop("conf_threshold")
    if alg == "klass":
        return {"method": "klass", "threshold": threshold, **p}
    order = {"default": "low_confidence", "topk_margin": "topk_margin"}
    return {
        "method": "vanilla",
        "remasking": order[alg],
        **{name: p[name] for name in ("gen_length", "steps", "block_length")},
    }


def wino(p: Params) -> Params:
    """Both bars under their published names."""
    return {"method": "wino", "wide_in_thres": p.pop("threshold"), "narrow_out_thres": p.pop("threshold_back"), **p}


def pc_sampler(p: Params) -> Params:
    """PC-Sampler, and the entropy-bounded, entropy and margin decoding of its repository."""
    variant = p.pop("variant")
    if variant == "eb":
        return {"method": "eb_sampler", **p}
    if variant in ("entropy", "margin"):
        return {"method": "vanilla", "remasking": {"entropy": "entropy", "margin": "topk_margin"}[variant], **p}
    prior = {"pc": "exponential", "linear_position": "linear"}[variant]
    return {"method": "pc_sampler", "position_prior": prior, "clip_alpha": p.pop("alpha"), **p}


def daedal(p: Params) -> Params:
    """Other names for the same options."""
    names = {
        "high_conf_threshold": "threshold", "low_conf_threshold": "low_conf_expand_thres",
        "eos_confidence_threshold": "initial_eot_expand_thres", "eos_check_tokens": "num_check_last_eot",
        "expand_eos_confidence_threshold": "decode_eot_expand_thres",
    }  # fmt: skip
    return {"method": "daedal", **{names.get(name, name): value for name, value in p.items()}}


def d2cache_repository(p: Params) -> Params:
    """The methods and caches of the d2Cache repository; without another rule it decides one token per forward."""
    method, alg, cache = p.pop("strategy"), p.pop("alg", None), dict(p.pop("cache", None) or {"name": "none"})
    rules = p.keys() & {"threshold", "factor", "gamma", "num_transfer_tokens"}
    options: Params = {"cache": cache.pop("name"), "cache_sigma": cache.pop("sigma", None), **cache}
    if options["cache"] == "d2cache":
        options["rollout_include_masked"] = True
    if method == "klass":
        options |= {"kl_warmup": False, "num_transfer_tokens": 1}
    elif method == "wino":
        options["remask_budget"] = "current"
    elif "gamma" in p:
        method, alg = "eb_sampler", alg or "maskgit_plus"
    elif not rules:
        options["num_transfer_tokens"] = 1
    if p.get("debias"):
        method, options["lambd"] = "pc_sampler", 0.0
    order = {"maskgit_plus": "low_confidence", "entropy": "entropy", "topk_margin": "topk_margin", None: None}
    return {"method": method, "remasking": order[alg], **options, **p}


READINGS: dict[str, Callable[[Params], Params]] = {
    "dllm_var": dllm_var,
    "llada_vanilla": vanilla,
    "llada_vanilla_batch": vanilla,
    "fast_dllm": fast_dllm,
    "fast_dllm_v1": fast_dllm,
    "klass_orig": klass,
    "wino_orig": wino,
    "pc_orig": pc_sampler,
    "pc_linear": pc_sampler,
    "eb_orig": pc_sampler,
    "pc_entropy_margin": pc_sampler,
    "daedal_orig": daedal,
    **{
        f"d2c_{name}": d2cache_repository
        for name in (
            "batch", "d2cache", "dllm", "eb", "factor", "klass", "pc", "prefix", "prefix_klass", "sigma", "stop_until_eos",
            "threshold", "vanilla", "wino",
        )
    },
}  # fmt: skip


def read(case: Case, frequencies: Path) -> GenerationConfig:
    """Our options for a recorded case whose method is one of `READINGS`."""
    options = READINGS[case["method"]](dict(case["params"]))
    if options["method"] == "pc_sampler":
        options["frequency_file"] = str(frequencies)
    return GenerationConfig(**options)


@dataclass(frozen=True)
class Outcome:
    """What a decoding did.

    Attributes:
        raw: per row the response, whole. forwards: calls of the batch.
        blocks: per row and call the block that it decided tokens of, −1 for none.
        commits, remasks, edits: per call of the first row the positions decided, taken back, replaced.
        lengths: per call of the first row the length of the response that it saw.
    """

    raw: list[list[int]]
    forwards: int
    blocks: list[list[int]]
    commits: list[list[int]]
    remasks: list[list[int]]
    edits: list[list[int]]
    lengths: list[int]

    @classmethod
    def of(cls, rows: list[list[Event]], block_length: int) -> "Outcome":
        """From the events of each row."""
        first = rows[0]
        return cls(
            raw=[events[-1].result.raw for events in rows if events[-1].result is not None],
            forwards=max(len(events) for events in rows),
            blocks=[[e.committed[0].position // block_length if e.committed else -1 for e in events] for events in rows],
            commits=[sorted(commit.position for commit in event.committed) for event in first],
            remasks=[sorted(event.remasked) for event in first],
            edits=[sorted(commit.position for commit in event.replaced) for event in first],
            # What the last call left is still there, even if an insertion has dropped some of it since.
            lengths=[
                max(len(event.response) - len(event.inserted), len(last.response) if last else 0)
                for last, event in zip([None, *first], first, strict=False)
            ],
        )


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
