"""Sources mixed by weight: which sample is the n-th of a training.

Called by ``data.py``. A draw that is keyed by its number decides which source the next sample comes from; each source goes
through its own samples in its own seeded order, epoch after epoch. So where a mixture stands is one number per source: how
many samples were taken of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dllm_var.diffusion.corruption import uniforms
from dllm_var.diffusion.decoding_view import Ints
from sft_training.samples import Sample, Samples


@dataclass(frozen=True)
class Source:
    """One of the sources; `weight` is its share of the drawn samples, compared with the others' weights."""

    name: str
    samples: Samples
    weight: float = 1.0


class Mixture:
    """One endless sequence of samples from all sources.

    With several sources, a sample's key is ``<source>/<its own key>``, so that no two have the same.

    Args:
        sources: at least one, with different names.
        seed: of the draws between sources.
        shuffle_seed: epoch e of a source is in the order drawn with shuffle_seed + e; None keeps the order of its files.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int, shuffle_seed: int | None) -> None:
        self.sources, self.seed, self.shuffle_seed = tuple(sources), seed, shuffle_seed
        self.names = tuple(source.name for source in sources)
        weights = np.array([source.weight for source in sources], np.float64)
        self.shares = (weights / weights.sum()).tolist()
        self._borders = np.cumsum(self.shares)[:-1]
        self._orders: dict[int, tuple[int, Ints]] = {}

    def __len__(self) -> int:
        """Samples of all sources together."""
        return sum(len(source.samples) for source in self.sources)

    def draw(self, number: int) -> int:
        """Which source the ``number``-th sample of the mixture comes from."""
        if len(self.sources) == 1:
            return 0
        return int(np.searchsorted(self._borders, uniforms(1, self.seed, number, "source")[0], side="right"))

    def sample(self, which: int, taken: int) -> tuple[Sample, int]:
        """The sample that a source gives after ``taken`` others, and the epoch of the source to which it belongs."""
        source = self.sources[which]
        epoch, cursor = divmod(taken, len(source.samples))
        sample = source.samples[int(self.order(which, epoch)[cursor])]
        if len(self.sources) > 1:
            sample = replace(sample, key=f"{source.name}/{sample.key}")
        return sample, epoch

    def order(self, which: int, epoch: int) -> Ints:
        """Sample numbers of a source in the order in which an epoch reads them."""
        known = self._orders.get(which)
        if known is None or known[0] != epoch:
            source = self.sources[which]
            everyone = np.arange(len(source.samples))
            if self.shuffle_seed is not None:
                key = ("order",) if len(self.sources) == 1 else ("order", source.name)
                drawn = uniforms(len(everyone), self.shuffle_seed + epoch, *key)
                everyone = np.argsort(drawn, kind="stable")
            known = self._orders[which] = (epoch, everyone)
        return known[1]

    def fingerprint(self) -> dict[str, list[list[Any]]]:
        """Every source's fingerprint by name."""
        return {source.name: source.samples.fingerprint() for source in self.sources}


def source_of(key: str, names: Sequence[str]) -> int:
    """Which of several sources a sample belongs to, by its key in the mixture."""
    return names.index(key.partition("/")[0])
