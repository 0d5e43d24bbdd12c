"""In which order are tokens decided? A scorer gives every eligible column a score; higher is decided earlier.

Composed by `dllm_var.decoding.compose`, called once per step. Scores rank; the thresholds of selectors test the raw
confidence. A scorer that needs more than the confidence names it in `measures` and finds it in `StepView.measures`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_var.decoding.noise import keys, uniform
from dllm_var.decoding.proposal import Measure, entropy, margin
from dllm_var.decoding.step import StepView


class Scorer(ABC):
    """What the loop asks of a scorer.

    Attributes:
        logarithmic: whether its scores are logarithms (of something not negative), as priors need to know.
    """

    logarithmic = False

    @property
    def measures(self) -> Mapping[str, Measure]:
        """Numbers wanted for every column, by name, found in `StepView.measures`; by default none."""
        return {}

    @abstractmethod
    def __call__(self, view: StepView) -> Tensor:
        """Scores [B, w] for the columns of a view; those of columns that are not eligible do not matter."""


class Confidence(Scorer):
    """The probability of the proposed token ("low-confidence remasking" of arXiv 2502.09992)."""

    def __call__(self, view: StepView) -> Tensor:
        return view.confidence


class Margin(Scorer):
    """The probability of the likeliest token minus that of the runner-up (arXiv 2508.13021's "margin")."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"margin": margin}

    def __call__(self, view: StepView) -> Tensor:
        return view.measures["margin"]


class NegativeEntropy(Scorer):
    """Minus the entropy (nats) of the distribution: what the model is sure of comes first. The logarithm of e^−H."""

    logarithmic = True

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {"entropy": entropy}

    def __call__(self, view: StepView) -> Tensor:
        return -view.measures["entropy"]


class LeftToRight(Scorer):
    """The first mask first: the order of an autoregressive model. A logarithm, so that priors add to it."""

    logarithmic = True

    def __call__(self, view: StepView) -> Tensor:
        return -view.positions.float()


class Random(Scorer):
    """Uniform noise keyed by (seed, request, step, position): a random order that no other row can change."""

    def __init__(self, seed: int) -> None:
        # The complement keeps these draws apart from the Gumbel noise of the same step and position.
        self.seed = ~seed

    def __call__(self, view: StepView) -> Tensor:
        state = view.state
        return uniform(keys(self.seed, state.request[:, None], state.forwards[:, None], view.positions))


class DecidedLast(Scorer):
    """Another scorer, with the columns that propose one of the given tokens ranked behind all others."""

    def __init__(self, inner: Scorer, ids: tuple[int, ...]) -> None:
        self.inner, self.ids = inner, torch.tensor(ids)

    @property
    def measures(self) -> Mapping[str, Measure]:
        return self.inner.measures

    def __call__(self, view: StepView) -> Tensor:
        score = self.inner(view)
        return score.masked_fill(torch.isin(view.ids, self.ids), torch.finfo(score.dtype).min)
