"""Wall time of several arms as ratios that a noisy machine cannot bend much: interleaved, paired, with an interval.

Used by the benchmarks of this folder. Arms run in turn, forwards and backwards in alternate rounds (A B C, C B A, …), so
that a slow minute hits all of them; what is compared is the median of the ratios within rounds, never a ratio of means.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Case, Made = TypeVar("Case"), TypeVar("Made")


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
    work = {name: lambda _, arm=arm: arm() for name, arm in arms.items()}  # type: ignore[misc]
    return {name: times[1:] for name, times in interleave_over(work, range(rounds + 1))[0].items()}


def interleave_over(
    arms: Mapping[str, Callable[[Case], Made]], cases: Iterable[Case]
) -> tuple[dict[str, list[float]], dict[str, list[Made]]]:
    """Seconds of every arm on every case, a case being a round, and what the arm made of it."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    made: dict[str, list[Made]] = {name: [] for name in arms}
    for number, case in enumerate(cases):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            began = time.perf_counter()
            result = arms[name](case)
            seconds[name].append(time.perf_counter() - began)
            made[name].append(result)
    return seconds, made


def ratio(above: list[float], below: list[float], draws: int = 2000) -> Ratio:
    """The ratio of two arms timed in the same rounds."""
    paired = np.array(above) / np.array(below)
    picks = np.random.default_rng(0).integers(len(paired), size=(draws, len(paired)))
    low, high = np.quantile(np.median(paired[picks], axis=1), [0.025, 0.975])
    return Ratio(statistics.median(paired.tolist()), float(low), float(high))


def matmul_rate(size: int = 1024, repeats: int = 20) -> float:
    """The floating-point operations a second that this machine reaches in plain matrix products: what 100 % would be."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = interleave({"product": lambda: a @ b}, repeats)["product"]
    return 2 * size**3 / statistics.median(seconds)


def copy_rate(megabytes: int = 256, repeats: int = 20) -> float:
    """The bytes a second that this machine reads and writes in a plain copy."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.empty_like(source)
    seconds = interleave({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.nbytes / statistics.median(seconds)
