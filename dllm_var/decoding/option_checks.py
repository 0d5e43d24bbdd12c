"""Which values each decoding option may have by itself: data, read by `dllm_var.decoding.config`."""

import math
from collections.abc import Callable
from typing import Any

MOST = 2**31 - 1  # of anything that is counted
WIDEST = 1e6  # of anything that is squared, or multiplied with logits

Check = tuple[Callable[[Any], bool], str]


def _whole(low: int) -> Check:
    words = f"a whole number of at least {low} and at most {MOST}"
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= MOST, words


def _number(low: float = 0.0, high: float = math.inf, *, above: bool = False, finite: bool = False) -> Check:
    def fits(v: Any) -> bool:
        real = isinstance(v, float) or (isinstance(v, int) and not isinstance(v, bool) and abs(v) <= MOST)
        return real and low <= v <= high and not (above and v == low) and (math.isfinite(v) or not finite)

    words = f"a number {'above' if above else 'of at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    return fits, words + (" that is finite" if finite else "")


def _choice(*names: str) -> Check:
    return lambda v: v in names, "one of " + ", ".join(repr(name) for name in names)


_switch: Check = (lambda v: isinstance(v, bool), "True or False")

CHECKS: dict[str, Check] = {
    "max_gen_length": _whole(1),
    "gen_length": _whole(1),
    "block_length": _whole(1),
    "steps": _whole(1),
    "num_transfer_tokens": _whole(1),
    "threshold": _number(),
    "factor": _number(above=True),
    "gamma": _number(),
    "kl_threshold": _number(),
    "kl_history_length": _whole(1),
    "kl_warmup": _switch,
    "unmask_strategy": _choice("all", "max_conf", "min_kl", "random"),
    "wide_in_thres": _number(),
    "narrow_out_thres": _number(),
    "remask_budget": _choice("previous", "current"),
    "enable_editing": _switch,
    "edit_threshold": _number(),
    "initial_gen_length": _whole(1),
    "initial_eot_expand_thres": _number(),
    "decode_eot_expand_thres": _number(),
    "low_conf_expand_thres": _number(),
    "num_check_last_eot": _whole(1),
    "expansion_factor": _whole(2),
    "eos_tail": _whole(0),
    "remasking": _choice("low_confidence", "random", "entropy", "topk_margin", "left_to_right"),
    "sigma": _number(high=WIDEST, above=True),
    "debias": _switch,
    "clip_alpha": _number(above=True),
    "lambd": _number(finite=True),
    "position_prior": _choice("exponential", "linear"),
    "special_token_freq": _choice("reference", "trivial"),
    "frequency_file": (lambda v: isinstance(v, str), "the path of a JSON file"),
    "logits_eos_inf": _switch,
    "confidence_eos_eot_inf": _switch,
    "early_stop": _switch,
    "stop_until_eos": _switch,
    "use_dual": _switch,
    "rollout_p": _number(0.0, 1.0),
    "rollout_include_masked": _switch,
    "current_k": _whole(1),
    "cache_sigma": _number(high=WIDEST, above=True),
    "inflate_w": _whole(0),
    "kp": _whole(1),
    "kr": _whole(1),
    "rou": _number(0.0, 1.0),
    "temperature": _number(finite=True),
    "top_p": _number(0.0, 1.0, above=True),
    "top_k": _whole(1),
    "score_distribution": _choice("raw", "tempered"),
    "cfg_scale": _number(high=WIDEST),
    "seed": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
}
