"""How a recorded decoding case reads here: its parameters as our options, and what of a decoding is compared with it.

Used by ``scripts/replay_golden.py``, which says what the cases are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_var import Event, GenerationConfig

Case = dict[str, Any]
Params = dict[str, Any]


class NotOffered(Exception):
    """A recorded variant that has no counterpart here."""


def offered(name: Any, ours: dict[Any, Any]) -> Any:
    """What a recorded name is here."""
    if name not in ours:
        raise NotOffered
    return ours[name]


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
    if p.get("threshold") is not None or p.get("factor") is not None:
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
        "remasking": offered(alg, order),
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
    prior = offered(variant, {"pc": "exponential", "linear_position": "linear"})
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
    return {"method": method, "remasking": offered(alg, order), **options, **p}


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


def read(case: Case, frequencies: Path) -> GenerationConfig | None:
    """Our options for a recorded case; None for a method, or a variant of one, that is not offered here."""
    if case["method"] not in READINGS:
        return None
    try:
        options = READINGS[case["method"]](dict(case["params"]))
    except NotOffered:
        return None
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
