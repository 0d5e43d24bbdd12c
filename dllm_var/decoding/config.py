"""How to decode: one frozen object with every option, checked as a whole before any model is loaded.

Built by users, the demo, `evaluation/` and the Hydra groups; read by `dllm_var.decoding.compose`. Which options a method
reads and which caches go with it is data (`dllm_var.decoding.methods`).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dllm_var.decoding.frequencies import check_frequency_file
from dllm_var.decoding.methods import CACHES, MATRIX, METHODS, SAMPLING
from dllm_var.decoding.option_checks import CHECKS

# Default of an option that was not given: replaced by the method's own default, or left None where the method has none.
UNSET: Any = None

# The options that say how many tokens a forward decides, and the rule that each stands for; the first that is set wins.
# `threshold` belongs to KLASS where both are set.
RULES = {
    "kl_threshold": "klass",
    "wide_in_thres": "wino",
    "gamma": "entropy_bound",
    "factor": "factor",
    "threshold": "threshold",
}

# Options that only shape another one: to change them without that one would change nothing.
NEEDS = {
    "kl_history_length": "kl_threshold", "kl_warmup": "kl_threshold", "unmask_strategy": "kl_threshold",
    "narrow_out_thres": "wide_in_thres", "remask_budget": "wide_in_thres", "edit_threshold": "enable_editing",
    "clip_alpha": "debias", "special_token_freq": "debias", "frequency_file": "debias",
    "top_p": "temperature", "top_k": "temperature", "score_distribution": "temperature",
}  # fmt: skip


@dataclass(frozen=True)
class GenerationConfig:
    """Every decoding option. An option that the method or cache does not read must be left out, and is None.

    Defaults are filled in when it is built, and some follow from other options (`steps` and `block_length` of a fixed canvas
    from `gen_length`, `eos_tail` from `num_check_last_eot`): `dataclasses.replace` keeps them, so build a new one instead.

    Attributes:
        method: a preset, see `METHODS` and ``python -m dllm_var.decoding``.
        cache: what is kept between forwards, see `CACHES`.

        max_gen_length: dllm_var, daedal: the longest answer in tokens.
        gen_length: tokens of a fixed canvas after the prompt, all of them decoded.
        block_length: positions decoded together; the last block may be shorter. Fixed canvas: default `gen_length`.
        initial_gen_length: daedal: masks to begin with.

        steps: forwards, spread evenly over the blocks, earlier blocks first; default `gen_length`. klass: the schedule
            for forwards in which no token is ready.
        num_transfer_tokens: instead of `steps`: tokens per forward. Beside a threshold or factor: the least number.
        threshold: decide every token whose confidence passes, and the best one if there is none. Equality passes on a
            fixed canvas (arXiv 2505.22618), not with dllm_var, klass and daedal. Above 1: one token per forward. With
            ``remasking="topk_margin"`` it is the margin that must pass, but for klass.
        factor: decide the n best tokens, n as large as (n + 1)(1 − confidence of the n-th) < factor allows (2505.22618).
        gamma: decide tokens in order while the sum of their entropies (nats) without the largest is at most gamma.
        kl_threshold: klass: a token is ready when its distribution moved less than this (nats) in each of the last
            kl_history_length forwards and its confidence is above `threshold`. kl_warmup: never in the first
            kl_history_length − 1 forwards of a block. unmask_strategy: decide "all" ready tokens, or the one with
            "max_conf" or "min_kl", or one at "random".
        wide_in_thres: wino: draft every token whose confidence is above this, at most 0.7 of the masks and between 5
            and 20. narrow_out_thres: take back drafts whose probability in a second look is below this. remask_budget:
            fewer than were drafted in the "previous" forward, or in the "current" one.
        enable_editing: dllm_var: also replace decided tokens of the open block by the model's present choice where its
            confidence is above edit_threshold (default `threshold`, 0.9 under another rule). A full block is final.

        remasking: which tokens first: "low_confidence" keeps the most confident ones, "topk_margin" those far ahead of
            the runner-up, "entropy" those with the least entropy, "random" any, "left_to_right" the first.
        sigma: weighs that order by the density of decided tokens nearby (2509.23094), a Gaussian of this width.
        debias: order by confidence × information of the token, −ln frequency, at most clip_alpha (2508.13021).
            frequency_file: the frequencies, see `dllm_var.decoding.frequencies`; default token_freq.json beside the
            model. special_token_freq: control tokens never occur in a corpus: count them once ("reference") or as the
            most frequent token ("trivial").
        lambd: weighs the order by position: e^(−lambd · i) times the score ("exponential"), or lambd parts position to
            1 − lambd parts normalised score ("linear"). position_prior: which of the two.

        initial_eot_expand_thres: daedal: grow before decoding while the confidence in EOS at the end is below this.
            decode_eot_expand_thres: the same while decoding, where the least sure mask below low_conf_expand_thres is
            replaced by expansion_factor masks. num_check_last_eot: EOS positions that are averaged. eos_tail: EOS
            tokens appended after the growth; default half of num_check_last_eot.

        logits_eos_inf: the EOS token is never proposed.
        confidence_eos_eot_inf: positions where EOS or eot is proposed come last in the order. A threshold, which looks at
            no order, decides them as any others.
        early_stop: end a row as soon as everything before its first stop token is final. The text is the same, the
            forwards are fewer. Off reproduces the published pass counts.
        stop_until_eos: as soon as a stop token is decided nothing behind it is decided any more. The text may differ.

        use_dual: prefix: keep what lies behind the block as well.
        current_k: d2cache: masks renewed per forward. rollout_p: share of attention rollout whose positions are renewed.
            rollout_include_masked: masks that were not chosen take part in that share (the public code), or decided tokens
            alone (the paper). cache_sigma: width of the density that ranks the masks. inflate_w: chosen positions that are
            at most this far apart are joined.
        kp, kr: dllm: forwards between two renewals of the prompt's and the response's features. rou: share of the
            response that is renewed in between.

        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
        top_p, top_k: sampling is limited to the likeliest tokens that make up this probability, to this many.
        score_distribution: confidences come from the distribution at temperature 1 ("raw") or from the one that is
            sampled ("tempered").
        cfg_scale: guidance w: logits = u + (w + 1)(c − u), u from the canvas with its prompt masked. 0 is off.
        seed: of sampling and of random order.

    Raises:
        ValueError: an unknown method or cache, a value out of range, an option that the method does not read, or options
            that contradict each other; the message names the option, the value and what to do.
    """

    method: str = "dllm_var"
    cache: str = UNSET
    max_gen_length: int = UNSET
    gen_length: int = UNSET
    block_length: int = UNSET
    initial_gen_length: int = UNSET
    steps: int | None = UNSET
    num_transfer_tokens: int | None = UNSET
    threshold: float | None = UNSET
    factor: float | None = UNSET
    gamma: float | None = UNSET
    kl_threshold: float | None = UNSET
    kl_history_length: int = UNSET
    kl_warmup: bool = UNSET
    unmask_strategy: str = UNSET
    wide_in_thres: float | None = UNSET
    narrow_out_thres: float = UNSET
    remask_budget: str = UNSET
    enable_editing: bool = UNSET
    edit_threshold: float | None = UNSET
    remasking: str = UNSET
    sigma: float | None = UNSET
    debias: bool = UNSET
    clip_alpha: float = UNSET
    lambd: float = UNSET
    position_prior: str = UNSET
    special_token_freq: str = UNSET
    frequency_file: str | None = UNSET
    initial_eot_expand_thres: float = UNSET
    decode_eot_expand_thres: float = UNSET
    low_conf_expand_thres: float = UNSET
    num_check_last_eot: int = UNSET
    expansion_factor: int = UNSET
    eos_tail: int | None = UNSET
    logits_eos_inf: bool = UNSET
    confidence_eos_eot_inf: bool = UNSET
    early_stop: bool = UNSET
    stop_until_eos: bool = UNSET
    use_dual: bool = UNSET
    rollout_p: float = UNSET
    rollout_include_masked: bool = UNSET
    current_k: int = UNSET
    cache_sigma: float = UNSET
    inflate_w: int = UNSET
    kp: int = UNSET
    kr: int = UNSET
    rou: float = UNSET
    temperature: float = UNSET
    top_p: float = UNSET
    top_k: int | None = UNSET
    score_distribution: str = UNSET
    cfg_scale: float = UNSET
    seed: int = UNSET

    @classmethod
    def from_groups(cls, generation: Mapping[str, Any], cache: Mapping[str, Any] | None = None) -> "GenerationConfig":
        """From two groups of settings, as ``configs/generation`` and ``configs/cache`` hold them; null leaves an option out.

        Args:
            generation: ``method`` and its options.
            cache: ``name`` and its options, of which ``cache_sigma`` is called ``sigma`` there; None: the method's own.

        Raises:
            ValueError: a key that is no option, with the nearest one that is; or whatever the class refuses.
        """
        own = {"method", *SAMPLING}.union(*(method.options for method in METHODS.values()))
        kept = {"name": "cache", **{name.removeprefix("cache_"): name for c in CACHES.values() for name in c.options}}
        options: dict[str, Any] = {}
        for group, values, names in (
            ("generation", generation, {name: name for name in own}),
            ("cache", cache or {}, kept),
        ):
            for key, value in values.items():
                if key not in names:
                    nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)[0]
                    raise ValueError(f"{group}.{key} is no option: did you mean {group}.{nearest}?")
                options[names[key]] = value
        return cls(**options)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(METHODS)}.")
        if self.cache is None:
            self._set("cache", "block_commit" if self.canvas == "growing" else "none")
        if self.cache not in CACHES:
            raise ValueError(f"cache={self.cache!r} is unknown: choose one of {', '.join(CACHES)}.")
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        for name, (fits, expected) in CHECKS.items():
            if name in given and not fits(given[name]):
                raise ValueError(f"{name}={given[name]!r} is not {expected}: change it, or leave it out for the default.")
        self._fill_defaults(given)
        self._check_rule()
        self._check_order()
        self._check_lengths()
        self._check_cache()

    def _fill_defaults(self, given: dict[str, Any]) -> None:
        defaults = {**SAMPLING, **METHODS[self.method].options, **CACHES[self.cache].options}
        for name in given.keys() - defaults.keys() - {"method", "cache"}:
            methods = [other for other, m in METHODS.items() if name in m.options]
            caches = [other for other, c in CACHES.items() if name in c.options]
            kind, own, users = ("method", self.method, methods) if methods else ("cache", self.cache, caches)
            raise ValueError(
                f"{name}={given[name]!r} has no effect with {kind}={own!r}: "
                f"leave it out, or use {kind}={' or '.join(map(repr, users))}."
            )
        rules = [name for name in RULES if name in given]
        if "threshold" not in given and rules and rules != ["kl_threshold"]:
            defaults["threshold"] = None  # another rule was asked for
        for name, default in defaults.items():
            if name not in given:
                self._set(name, default)
        for name, needed in NEEDS.items():
            shaped = getattr(self, needed)
            off = shaped is None or shaped is False or (needed == "temperature" and not shaped)
            if off and name in given and given[name] != defaults[name]:
                raise ValueError(f"{name}={given[name]!r} has no effect without {needed}: leave it out, or give {needed}.")

    def _check_rule(self) -> None:
        """At most one rule of selection."""
        chosen = [name for name in RULES if getattr(self, name) is not None]
        klass = "kl_threshold" in chosen
        if klass and "threshold" in chosen:
            chosen.remove("threshold")
        if self.method != "klass" and self.steps is not None:
            chosen.append("steps")
        if len(chosen) > 1:
            pair = " and ".join(f"{name}={getattr(self, name)}" for name in chosen)
            raise ValueError(
                f"{pair} exclude each other: each says by itself how many tokens a forward decides. Leave all but one out."
            )
        if klass and self.threshold is None:
            raise ValueError(f"kl_threshold={self.kl_threshold} needs threshold as well: give threshold=0.9, say.")
        if self.steps is not None and self.num_transfer_tokens is not None:
            raise ValueError(
                f"steps={self.steps} and num_transfer_tokens={self.num_transfer_tokens} exclude each other: "
                "the first fixes the forwards, the second the tokens of each. Leave one out."
            )
        cut = [name for name, given in (("top_p", self.top_p < 1), ("top_k", self.top_k is not None)) if given]
        passed = next((name for name in ("threshold", "wide_in_thres") if getattr(self, name) is not None), None)
        if cut and passed is not None and self.score_distribution == "tempered":
            raise ValueError(
                f"{cut[0]}={getattr(self, cut[0])} and score_distribution='tempered' leave {passed}={getattr(self, passed)} "
                f"without meaning: a token that {cut[0]} alone leaves has the confidence 1. Give score_distribution='raw'."
            )
        if self.enable_editing and self.wide_in_thres is not None:
            raise ValueError("enable_editing=True and wide_in_thres exclude each other: wino has its own way to take back.")

    def _check_order(self) -> None:
        if self.sigma is not None and self.lambd:
            raise ValueError(
                f"sigma={self.sigma} and lambd={self.lambd} exclude each other: position would be weighted twice. "
                "Leave sigma out, or give lambd=0."
            )
        if self.debias and self.remasking != "low_confidence":
            raise ValueError(
                f"debias=True weighs confidence, so it goes with remasking='low_confidence', not {self.remasking!r}."
            )
        if self.position_prior == "linear" and not 0 < self.lambd <= 1:
            raise ValueError(f"lambd={self.lambd} is a share with position_prior='linear': give more than 0, at most 1.")
        if self.frequency_file is not None:
            check_frequency_file(self.frequency_file)

    def _check_lengths(self) -> None:
        if self.block_length is None:
            self._set("block_length", self.gen_length)
        if self.canvas == "elastic" and self.initial_gen_length > self.max_gen_length:
            raise ValueError(
                f"initial_gen_length={self.initial_gen_length} is above max_gen_length={self.max_gen_length}: lower it."
            )
        if self.eos_tail is None and self.num_check_last_eot is not None:
            self._set("eos_tail", self.num_check_last_eot // 2)
        if self.rule not in ("schedule", "klass") or self.num_transfer_tokens is not None or self.canvas != "fixed":
            return
        if self.steps is None:
            self._set("steps", self.gen_length)
        if not self.blocks <= self.steps <= self.gen_length:  # type: ignore[operator]
            raise ValueError(
                f"steps={self.steps} must lie in {self.blocks}..{self.gen_length}: every block "
                f"(gen_length={self.gen_length}, block_length={self.block_length}: {self.blocks} of them) needs a forward, "
                "and a forward at least one token."
            )

    def _check_cache(self) -> None:
        """The compatibility matrix; the refusal names the nearest pair that works."""
        column = self.cache_column
        fitting = [name for name, cache in CACHES.items() if self.canvas in cache.canvases]
        sensible = [c for c in fitting if all(MATRIX[policy][c].verdict != "refused" for policy in self.policies)]
        nearest = "use cache=" + " or ".join(map(repr, sensible)) + "."
        refused = [MATRIX[p][column].note for p in self.policies if MATRIX[p][column].verdict == "refused"]
        if refused or self.cache not in fitting:
            canvas = {"growing": "it needs the whole canvas from the start, and this one grows",
                      "fixed": "it stores a block when the canvas grows, and this one is fixed"}  # fmt: skip
            name = f"cache={self.cache!r}" + (" with use_dual=True" if column == "dual" else "")
            why = refused[0] if refused else canvas[self.canvas]
            raise ValueError(f"{name} does not go with method={self.method!r} ({why}): {nearest}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def canvas(self) -> str:
        """ "growing", "fixed" or "elastic", see `Method`."""
        return METHODS[self.method].canvas

    @property
    def rule(self) -> str:
        """How many tokens a forward decides: a value of `RULES`, or "schedule"."""
        return next((rule for name, rule in RULES.items() if getattr(self, name) is not None), "schedule")

    @property
    def cache_column(self) -> str:
        """The cache as a column of the compatibility matrix."""
        return "dual" if self.use_dual else self.cache

    @property
    def policies(self) -> list[str]:
        """The rows of the compatibility matrix that this configuration is made of."""
        parts = {
            "daedal" if self.canvas == "elastic" else self.rule: True,
            "pc_sampler": self.debias or bool(self.lambd),
            "certainty_prior": self.sigma is not None,
            "editing": self.enable_editing,
            "cfg": bool(self.cfg_scale),
        }
        return [name for name, present in parts.items() if present]

    @property
    def response_limit(self) -> int:
        """The most tokens that an answer can have."""
        return self.gen_length if self.canvas == "fixed" else self.max_gen_length

    @property
    def longest_block(self) -> int:
        """The most positions of a block: an answer may be shorter than `block_length`."""
        return min(self.block_length, self.response_limit)

    @property
    def blocks(self) -> int:
        """How many blocks `response_limit` makes, a short last one included."""
        return -(-self.response_limit // self.block_length)
