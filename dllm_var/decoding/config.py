"""How to decode: one frozen object with every option, checked as a whole before any model is loaded.

Built by users, the demo, `evaluation/` and the Hydra groups; read by `dllm_var.decoding.loop.compose`. What a method is
made of, which options it reads and which caches go with it is data (`METHODS`), so a new method is a new row.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

# Default of an option that was not given: replaced by the method's own default, or left None where the method has none.
UNSET: Any = None


@dataclass(frozen=True)
class Method:
    """What a method name stands for.

    Attributes:
        summary: one line for people.
        length: "eos_blocks" (the canvas grows block by block until a stop token) or "fixed".
        caches: the caches that go with it; the first is its default.
        defaults: the options it reads beside `COMMON`, with their defaults (None: derived, or off unless given).
        inclusive: whether a confidence equal to the threshold passes.
    """

    summary: str
    length: str
    caches: tuple[str, ...]
    defaults: dict[str, Any]
    inclusive: bool


METHODS: dict[str, Method] = {
    "dllm_var": Method(
        summary="EOS-led blocks, keys and values stored with the next block in sight (arXiv 2510.24605)",
        length="eos_blocks",
        caches=("block_commit", "none"),
        defaults={"max_gen_length": 1024, "block_length": 32, "threshold": 0.9, "early_stop": True},
        inclusive=False,
    ),
    "vanilla": Method(
        summary="fixed canvas, a schedule of tokens per step (arXiv 2502.09992), or a threshold (arXiv 2505.22618)",
        length="fixed",
        caches=("none",),
        defaults={
            "gen_length": 128,
            "block_length": None,
            "steps": None,
            "threshold": None,
            "remasking": "low_confidence",
            "logits_eos_inf": False,
            "confidence_eos_eot_inf": False,
            "early_stop": False,
        },
        inclusive=True,
    ),
}

COMMON: dict[str, Any] = {"temperature": 0.0, "cfg_scale": 0.0, "seed": 0}

Check = tuple[Callable[[Any], bool], str]


def _whole(low: int) -> Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= low, f"a whole number of at least {low}"


def _number(finite: bool) -> Check:
    def fits(v: Any) -> bool:
        real = isinstance(v, (int, float)) and not isinstance(v, bool)
        return real and v >= 0 and (math.isfinite(v) or not finite)

    return fits, "a number of at least 0" + (" that is finite" if finite else "")


def _choice(*names: str) -> Check:
    return lambda v: v in names, "one of " + ", ".join(repr(name) for name in names)


_switch: Check = (lambda v: isinstance(v, bool), "True or False")

CHECKS: dict[str, Check] = {
    "max_gen_length": _whole(1),
    "gen_length": _whole(1),
    "block_length": _whole(1),
    "steps": _whole(1),
    "threshold": _number(finite=False),
    "remasking": _choice("low_confidence", "random"),
    "logits_eos_inf": _switch,
    "confidence_eos_eot_inf": _switch,
    "early_stop": _switch,
    "temperature": _number(finite=True),
    "cfg_scale": _number(finite=True),
    "seed": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
}


@dataclass(frozen=True)
class GenerationConfig:
    """Every decoding option. An option that the method does not read must be left out, and is None.

    Attributes:
        method: "dllm_var" or "vanilla", see `METHODS`.
        cache: what is kept between forwards. "block_commit": the prompt's and each finished block's keys and values,
            computed once, with the next mask block visible. "none": recompute the whole canvas in every forward.
        max_gen_length: dllm_var: the longest answer in tokens; the end of the model's context may come earlier.
        gen_length: vanilla: tokens of the canvas after the prompt, all of them decoded.
        block_length: positions decoded together; the last block may be shorter. vanilla: default `gen_length`.
        steps: vanilla: forwards, spread evenly over the blocks, earlier blocks first; default `gen_length`.
        threshold: commit every token whose confidence is above it (dllm_var) or at least it (vanilla, instead of
            `steps`), and the best one if there is none. Above 1: one token per forward.
        remasking: vanilla: "low_confidence" keeps the most confident tokens, "random" keeps random ones.
        logits_eos_inf: vanilla: the EOS token is never proposed.
        confidence_eos_eot_inf: vanilla: positions where EOS or eot is proposed are decided last.
        early_stop: end a row as soon as everything before its first stop token is decided. The text is the same, the
            forwards are fewer. Off reproduces the published pass counts.
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature). Confidences are
            probabilities at temperature 1 in either case.
        cfg_scale: guidance w: logits = u + (w + 1)(c − u), u from the canvas with its prompt masked. 0 is off.
        seed: of sampling and of random remasking.

    Raises:
        ValueError: an unknown method or cache, a value out of range, an option that the method does not read, or options
            that contradict each other; the message names the option, the value and what to do.
    """

    method: str = "dllm_var"
    cache: str = UNSET
    max_gen_length: int = UNSET
    gen_length: int = UNSET
    block_length: int = UNSET
    steps: int | None = UNSET
    threshold: float | None = UNSET
    remasking: str = UNSET
    logits_eos_inf: bool = UNSET
    confidence_eos_eot_inf: bool = UNSET
    early_stop: bool = UNSET
    temperature: float = UNSET
    cfg_scale: float = UNSET
    seed: int = UNSET

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is unknown: choose one of {', '.join(METHODS)}.")
        self._fill_defaults()
        for name, (fits, expected) in CHECKS.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name}={value!r} is not {expected}: change it, or leave it out for the default.")
        self._check_cache()
        if self.method == "vanilla":
            self._check_schedule()

    def _fill_defaults(self) -> None:
        method = METHODS[self.method]
        defaults = {"cache": method.caches[0], **COMMON, **method.defaults}
        for field in fields(self):
            if field.name != "method" and getattr(self, field.name) is None:
                self._set(field.name, defaults.get(field.name))
            elif field.name != "method" and field.name not in defaults:
                users = [name for name, other in METHODS.items() if field.name in other.defaults]
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r} has no effect with method={self.method!r}: "
                    f"leave it out, or use method={' or '.join(map(repr, users))}."
                )

    def _check_cache(self) -> None:
        caches = METHODS[self.method].caches
        if self.cache in caches:
            return
        known = {cache for method in METHODS.values() for cache in method.caches}
        why = "it stores a block when the canvas grows, and this one is fixed" if self.cache in known else "unknown"
        raise ValueError(
            f"cache={self.cache!r} does not go with method={self.method!r} ({why}): "
            f"use cache={' or '.join(map(repr, caches))}."
        )

    def _check_schedule(self) -> None:
        if self.block_length is None:
            self._set("block_length", self.gen_length)
        if self.steps is not None and self.threshold is not None:
            raise ValueError(
                f"steps={self.steps} and threshold={self.threshold} exclude each other: "
                "steps fixes how many tokens a forward commits, threshold lets the confidence decide. Leave one out."
            )
        if self.threshold is not None:
            return
        if self.steps is None:
            self._set("steps", self.gen_length)
        blocks = self.blocks
        if not blocks <= self.steps <= self.gen_length:  # type: ignore[operator]
            raise ValueError(
                f"steps={self.steps} must lie in {blocks}..{self.gen_length}: every block (gen_length={self.gen_length}, "
                f"block_length={self.block_length}: {blocks} of them) needs a forward, and a forward at least one token."
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def response_limit(self) -> int:
        """The most tokens that an answer can have."""
        return self.max_gen_length if METHODS[self.method].length == "eos_blocks" else self.gen_length

    @property
    def blocks(self) -> int:
        """How many blocks `response_limit` makes, a short last one included."""
        return -(-self.response_limit // self.block_length)
