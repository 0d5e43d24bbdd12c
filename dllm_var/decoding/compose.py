"""From a configuration to the policies that it stands for: the one place where option names meet classes.

Called by `dllm_var.decoding.loop`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.d2cache import D2Cache
from dllm_var.decoding.daedal import Daedal
from dllm_var.decoding.editing import Editing
from dllm_var.decoding.frequencies import FILE_NAME, read_frequencies
from dllm_var.decoding.klass import Klass
from dllm_var.decoding.kv_policies import BlockCommit, KVPolicy, Prefix, Recompute
from dllm_var.decoding.length_policies import EosBlocks, Fixed, LengthPolicy
from dllm_var.decoding.priors import Calibrated, CertaintyPrior, PositionPrior
from dllm_var.decoding.proposal import Measure
from dllm_var.decoding.scorers import Confidence, DecidedLast, LeftToRight, Margin, NegativeEntropy, Random, Scorer
from dllm_var.decoding.selectors import EntropyBound, Factor, Quota, Schedule, Selector, Threshold
from dllm_var.decoding.wino import Wino
from dllm_var.model.config import LLaDAConfig
from dllm_var.text.special_tokens import SpecialTokens


@dataclass(frozen=True)
class Policies:
    """A decoding method: how long, what is recomputed, in which order, how many."""

    length: LengthPolicy
    kv: KVPolicy
    scorer: Scorer
    selector: Selector

    def scratch(self, config: GenerationConfig) -> int | None:
        """The most columns of a row that pass through a store in one forward; None: nothing is kept in a store."""
        return None if self.kv.scratch is None else self.kv.scratch + self.selector.scratch(config.longest_block)

    @property
    def measures(self) -> Mapping[str, Measure]:
        """What the policies want measured at every wanted position."""
        return {**self.scorer.measures, **self.selector.measures, **self.length.measures}


def compose(config: GenerationConfig, special: SpecialTokens, model: LLaDAConfig | None = None) -> Policies:
    """The policies that a configuration stands for; `model` is needed by ``debias`` alone.

    Raises:
        ValueError: no token frequencies where ``debias`` needs them.
    """
    return Policies(_length(config, special), _kv(config), _scorer(config, special, model), _selector(config))


def _length(config: GenerationConfig, special: SpecialTokens) -> LengthPolicy:
    if config.canvas == "elastic":
        return Daedal(config, special)
    kind = EosBlocks if config.canvas == "growing" else Fixed
    # What may be taken back is final at the end of its block only.
    return kind(
        config.block_length,
        special.stop,
        early_stop=config.early_stop,
        revocable=config.rule == "wino" or bool(config.enable_editing),
        stop_until_eos=bool(config.stop_until_eos),
    )


def _kv(config: GenerationConfig) -> KVPolicy:
    if config.cache == "block_commit":
        return BlockCommit(config.longest_block)
    if config.cache == "prefix":
        return Prefix(config.use_dual)
    if config.cache == "d2cache":
        return D2Cache(
            config.rollout_p, config.current_k, config.cache_sigma, config.inflate_w, config.rollout_include_masked
        )
    return Recompute()  # cache="dllm" is an executor, not a plan: it computes every position, from what it has kept


def _scorer(config: GenerationConfig, special: SpecialTokens, model: LLaDAConfig | None) -> Scorer:
    if config.canvas == "elastic":
        return Confidence()
    plain: dict[str, Callable[[], Scorer]] = {
        "low_confidence": Confidence,
        "topk_margin": Margin,
        "entropy": NegativeEntropy,
        "left_to_right": LeftToRight,
    }
    scorer: Scorer = Random(config.seed) if config.remasking == "random" else plain[config.remasking]()
    if config.debias:
        scorer = Calibrated(_frequencies(config, special, model), config.clip_alpha)
    if config.lambd:
        scorer = PositionPrior(scorer, config.lambd, config.position_prior)
    if config.sigma is not None:
        scorer = CertaintyPrior(scorer, config.sigma, open_end=config.canvas == "growing")
    if config.confidence_eos_eot_inf:
        scorer = DecidedLast(scorer, tuple(end for end in (special.eos, special.eot) if end is not None))
    return scorer


def _frequencies(config: GenerationConfig, special: SpecialTokens, model: LLaDAConfig | None) -> torch.Tensor:
    assert model is not None, "debias needs to know the model"
    beside = Path(model.name_or_path, FILE_NAME) if model.name_or_path else None
    file = config.frequency_file or beside
    if file is None or (file == beside and not beside.is_file()):
        raise ValueError(
            f"debias=True needs the frequencies of tokens, and the model has no {FILE_NAME} beside its weights: give "
            "frequency_file=FILE, made with scripts/count_tokens.py from text like that of the task."
        )
    frequencies = read_frequencies(file, model.embedding_rows)
    if config.special_token_freq == "trivial":
        frequencies[list(special.stop)] = frequencies.max()
    return frequencies


def _selector(config: GenerationConfig) -> Selector:
    rule = _rule(config)
    if not config.enable_editing:
        return rule
    given = (config.edit_threshold, config.threshold, 0.9)
    return Editing(rule, next(value for value in given if value is not None))


def _rule(config: GenerationConfig) -> Selector:
    """How many tokens a forward decides."""
    c, least = config, config.num_transfer_tokens or 1
    schedule = Quota(least) if c.steps is None else Schedule(c.steps, c.blocks, catches_up=c.rule != "klass")
    if c.wide_in_thres is not None:
        return Wino(c.wide_in_thres, c.narrow_out_thres, c.remask_budget)
    if c.kl_threshold is not None and c.threshold is not None:
        return Klass(
            c.threshold, c.kl_threshold, c.kl_history_length, c.kl_warmup, c.unmask_strategy, schedule, c.block_length,
            c.response_limit, c.seed,
        )  # fmt: skip
    if c.gamma is not None:
        return EntropyBound(c.gamma)
    if c.factor is not None:
        return Factor(c.factor, least)
    if c.threshold is not None:
        return Threshold(c.threshold, c.canvas == "fixed", least, by_margin=c.remasking == "topk_margin")
    return schedule
