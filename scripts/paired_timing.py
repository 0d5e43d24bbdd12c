"""Wall time of several arms as ratios that a noisy machine cannot bend much: interleaved, paired, with an interval.

Used by the benchmarks of this folder. Arms run in turn, forwards and backwards in alternate rounds (A B C, C B A, …), so
that a slow minute hits all of them; what is compared is the median of the ratios within rounds, never a ratio of means.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios and its 95 % bootstrap interval; unclear when the interval holds 1."""

    median: float
    low: float
    high: float

    @property
    def unclear(self) -> bool:
        """Whether the measurement does not tell which of the two is faster."""
        return self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        return "unclear" if self.unclear else f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interleave(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            arms[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: list[float], below: list[float], draws: int = 2000) -> Ratio:
    """The ratio of two arms timed in the same rounds."""
    paired = np.array(above) / np.array(below)
    picks = np.random.default_rng(0).integers(len(paired), size=(draws, len(paired)))
    low, high = np.quantile(np.median(paired[picks], axis=1), [0.025, 0.975])
    return Ratio(statistics.median(paired.tolist()), float(low), float(high))
