"""What a training saw since its last log line: tokens by kind, and cross-entropy by mask level and by source.

Called by ``trainer.py``, for every micro-batch and every log line.

Legend: B rows of a micro-batch, L tokens of a row, M masked positions, S sources.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LEVELS = 4  # the loss is also logged for this many equal ranges of the mask level
COUNTED = ("prompt", "response", "masked", "eos")


class Tally:
    """Sums over micro-batches. With one source there are no figures by source.

    Attributes:
        sums: all of them in one vector, so that one call adds them up over ranks, and a skipped step can be taken back.
    """

    def __init__(self, low: float, high: float, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names) if len(names) > 1 else ()
        self.edges = torch.linspace(low, high, LEVELS + 1, device=device)
        size = len(COUNTED) + 2 * LEVELS + (len(COUNTED) + 2) * len(self.names)
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, inputs: dict[str, Any], losses: Tensor) -> None:
        """Count a micro-batch of `Collate`, with the cross-entropies [M] of its masked positions."""
        masked, counts = inputs["masked"], inputs["counts"]
        level = torch.bucketize(inputs["t"][masked], self.edges[1:-1], right=True)
        parts = [torch.tensor([getattr(counts, name) for name in COUNTED]), *_by(level, losses, LEVELS)]
        if self.names:
            parts.append(torch.tensor(counts.by_source).flatten())  # [S * 4]
            parts += _by(inputs["source"][masked], losses, len(self.names))
        self.sums += torch.cat([part.to(self.sums) for part in parts])

    def logs(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The figures since the last call, after adding them up ``over_ranks``."""
        seen = iter(over_ranks(self.sums).tolist())
        self.sums.zero_()
        logs = {f"tokens/{name}": next(seen) for name in COUNTED}
        levels = [f"t_{low:.2f}-{high:.2f}" for low, high in zip(self.edges[:-1], self.edges[1:], strict=True)]
        logs |= _means(levels, seen)
        logs |= {f"tokens/source_{source}/{name}": next(seen) for source in self.names for name in COUNTED}
        return logs | _means([f"source_{source}" for source in self.names], seen)


def _by(group: Tensor, losses: Tensor, groups: int) -> list[Tensor]:
    """Sum [groups] and number [groups] of the losses of each group."""
    sums = torch.zeros(groups, device=group.device).index_add_(0, group, losses)
    return [sums, torch.bincount(group, minlength=groups)]


def _means(names: Sequence[str], seen: Any) -> dict[str, float]:
    totals, numbers = [next(seen) for _ in names], [next(seen) for _ in names]
    return {f"ce/{name}": total / n for name, total, n in zip(names, totals, numbers, strict=True) if n}
