"""What a method name stands for, which options it reads, and which caches it goes with: data, and nothing but data.

Read by `dllm_var.decoding.config` (validation) and `dllm_var.decoding.compose` (which policies), printed by
``python -m dllm_var.decoding``. A method is a preset: the loop knows only the policies that its options stand for, so
that any order of decoding goes with any rule of selection.
"""

from dataclasses import dataclass
from typing import Any

SAMPLING: dict[str, Any] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": None, "score_distribution": "raw", "cfg_scale": 0.0, "seed": 0,
}  # fmt: skip
# In which order: read by every method whose order is not fixed.
ORDER: dict[str, Any] = {
    "remasking": "low_confidence", "sigma": None, "debias": False, "clip_alpha": 10.0, "lambd": 0.0,
    "position_prior": "exponential", "special_token_freq": "reference", "frequency_file": None,
}  # fmt: skip
FIXED: dict[str, Any] = {
    "gen_length": 128, "block_length": None, "logits_eos_inf": False, "confidence_eos_eot_inf": False,
    "early_stop": False, "stop_until_eos": False,
}  # fmt: skip
KLASS: dict[str, Any] = {"kl_threshold": None, "kl_history_length": 2, "kl_warmup": True, "unmask_strategy": "all"}
WINO: dict[str, Any] = {"wide_in_thres": None, "narrow_out_thres": 0.9, "remask_budget": "previous"}


@dataclass(frozen=True)
class Method:
    """A preset.

    Attributes:
        summary: one line for people. paper: arXiv id; of two, that of the rules last.
        canvas: "growing" (block by block until a stop token), "fixed", or "elastic" (fixed, but masks may be inserted).
        options: the options it reads beside `SAMPLING`, with their defaults (None: derived, or off unless given).
    """

    summary: str
    paper: str
    canvas: str
    options: dict[str, Any]


METHODS: dict[str, Method] = {
    "dllm_var": Method(
        "blocks of masks are appended until a stop token appears", "2510.24605", "growing",
        {"max_gen_length": 1024, "block_length": 32, "threshold": 0.9, "factor": None, "gamma": None, **KLASS, **WINO,
         "enable_editing": False, "edit_threshold": None, "early_stop": True, **ORDER},
    ),
    "vanilla": Method(
        "fixed canvas with a schedule of tokens per forward, or with Fast-dLLM's threshold or factor",
        "2502.09992, 2505.22618", "fixed",
        {**FIXED, **ORDER, "steps": None, "num_transfer_tokens": None, "threshold": None, "factor": None},
    ),
    "ar": Method(
        "from left to right, one token per forward: the baseline", "2502.09992", "fixed",
        {**FIXED, "remasking": "left_to_right", "num_transfer_tokens": 1},
    ),
    "pc_sampler": Method(
        "confidence calibrated by token frequency, weighted by position", "2508.13021", "fixed",
        {**FIXED, **ORDER, "debias": True, "lambd": 0.25,
         "steps": None, "num_transfer_tokens": None, "threshold": None, "factor": None},
    ),
    "klass": Method(
        "tokens that are confident and whose distribution has stopped moving", "2511.05664", "fixed",
        {**FIXED, **ORDER, **KLASS, "kl_threshold": 0.01, "threshold": 0.9, "steps": None, "num_transfer_tokens": None},
    ),
    "eb_sampler": Method(
        "as many tokens as an entropy bound allows", "2505.24857", "fixed",
        {**FIXED, **ORDER, "remasking": "entropy", "gamma": 0.001},
    ),
    "wino": Method(
        "drafts widely and takes back what a second look doubts", "2507.18578", "fixed",
        {**{name: FIXED[name] for name in FIXED if name != "stop_until_eos"}, **ORDER, **WINO, "wide_in_thres": 0.6},
    ),
    "daedal": Method(
        "a fixed canvas that grows before decoding and at doubtful places while decoding", "2508.00819", "elastic",
        {"max_gen_length": 2048, "block_length": 32, "threshold": 0.9, "initial_gen_length": 64,
         "initial_eot_expand_thres": 0.5, "decode_eot_expand_thres": 0.9, "low_conf_expand_thres": 0.1,
         "num_check_last_eot": 32, "expansion_factor": 8, "eos_tail": None, "early_stop": False},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cache:
    """What may be kept between forwards.

    Attributes:
        summary: one line for people. paper: arXiv id, or "". options: what it reads, with defaults.
        canvases: the kinds of canvas it goes with.
    """

    summary: str
    paper: str
    options: dict[str, Any]
    canvases: tuple[str, ...]


CACHES: dict[str, Cache] = {
    "block_commit": Cache(
        "the prompt and each finished block, computed once, with the next block of masks in sight", "2510.24605", {},
        ("growing",),
    ),
    "none": Cache("nothing: every forward computes the whole canvas", "", {}, ("growing", "fixed", "elastic")),
    "prefix": Cache(
        "what lies before the block (use_dual: and behind it), renewed at the start of every block", "2505.22618",
        {"use_dual": False}, ("fixed", "elastic"),
    ),
    "d2cache": Cache(
        "everything but an adaptive set of positions per forward", "2509.23094",
        {"rollout_p": 0.1, "rollout_include_masked": False, "current_k": 32, "cache_sigma": 10.0, "inflate_w": 0},
        ("fixed",),
    ),
    "dllm": Cache(
        "features of every layer; the prompt's are renewed rarely, the response's often or where they moved",
        "2506.06295", {"kp": 50, "kr": 7, "rou": 0.25}, ("fixed",),
    ),
}  # fmt: skip

# The caches as columns of the matrix: prefix with use_dual is a case of its own.
COLUMNS = ("none", "prefix", "dual", "d2cache", "dllm", "block_commit")


@dataclass(frozen=True)
class Pair:
    """Whether a policy goes with a cache: "sound", "rule" (under the rule that `note` names) or "refused" (why)."""

    verdict: str
    note: str = ""


def _row(none: Any, prefix: Any, dual: Any, d2cache: Any, dllm: Any, block_commit: Any) -> dict[str, Pair]:
    cells = (none, prefix, dual, d2cache, dllm, block_commit)
    made = (cell if isinstance(cell, Pair) else Pair("sound") if cell is True else Pair("rule", cell) for cell in cells)
    return dict(zip(COLUMNS, made, strict=True))


def _no(why: str) -> Pair:
    return Pair("refused", why)


_SHIFTS = _no("inserted masks move what it has stored")
# Policy → cache → verdict. After the analysis of the papers: an approximation of the keys and values must not feed back
# into what the policy measures.
MATRIX: dict[str, dict[str, Pair]] = {
    "schedule": _row(True, True, True, "at most as many tokens as are fresh", True, True),
    "threshold": _row(True, True, True, "the prior ranks only, the threshold tests raw confidence", True, True),
    "factor": _row(True, True, True, "the prior ranks only, the factor tests raw confidence", True, True),
    "entropy_bound": _row(True, True, True, "few positions are fresh, so fewer tokens at equal gamma", True, True),
    "pc_sampler": _row(
        True, "gains only with blocks shorter than the canvas", "gains only with blocks shorter than the canvas",
        "leave sigma off: position is weighted twice otherwise", True, True,
    ),
    "certainty_prior": _row(True, True, True, True, True, "density over the response so far; what follows is unknown"),
    "klass": _row(
        True, True, "history starts anew with every block", "history counts consecutive looks only",
        _no("positions whose features are reused do not move, so every token would look stable"),
        "history starts anew with every block",
    ),
    "wino": _row(
        True, "the shadow block is computed, never stored", "the shadow block is computed, never stored",
        _no("verification needs every position of the block fresh"),
        _no("verification needs every position of the block fresh"),
        "drafts and verifies inside a block, final once the block is stored",
    ),
    "daedal": _row(
        True, "the search for EOS sees the block and what follows it",
        _no("the search for EOS must see what follows the block, and insertions move it"), _SHIFTS, _SHIFTS,
        _no("the canvas is sized before decoding, not block by block"),
    ),
    "editing": _row(True, True, True, True, True, "only inside the block that is not stored yet"),
    "cfg": _row(True, *["a store for each stream"] * 5),
}  # fmt: skip
