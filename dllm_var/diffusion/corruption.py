"""The forward process: which response tokens become masks, at level t. Prompts stay; the end of an answer never does.

Called by ``sft_training/data.py``. All randomness comes from counters: a sample's draws
are a function of (seed, epoch, sample key) alone, so no rank count, batch shape or restart can change them.

Legend: B rows, L tokens of a row.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]


def uniforms(n: int, *key: int | str) -> Floats:
    """n numbers U[0, 1), float32, decided by ``key`` alone; a longer draw extends a shorter.

    Philox keyed with the 128-bit hash of ``key``: the same on every machine and with every release of numpy.
    """
    digest = blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(n, dtype=np.float32)


@dataclass(frozen=True)
class ForwardProcess:
    """Settings of the forward process; the defaults are the reference's (arXiv 2510.24605 and its code).

    Attributes:
        t_min, t_max: the mask level is t = t_min + (t_max − t_min)·u. LLaDA's plain process (2502.09992): 1e-3 and 1.
        t_per: one u per packed "row" or per "sample".
        always_mask_eos: mask every stop token of a response whatever its draw. False is LLaDA's process.
        edit_share: share of the visible response tokens that are trained in place, for decoding with enable_editing. Half of
            them are first replaced by another token of the row's responses. An experiment of ours: no recipe is published.
    """

    t_min: float = 0.1
    t_max: float = 0.9
    t_per: str = "row"
    always_mask_eos: bool = True
    edit_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.t_min <= self.t_max <= 1.0 or self.t_max == 0.0:
            raise ValueError(f"t_min={self.t_min}, t_max={self.t_max}: need 0 <= t_min <= t_max <= 1 and t_max > 0.")
        if self.t_per not in ("row", "sample"):
            raise ValueError(f"t_per={self.t_per!r}: choose 'row' (reference) or 'sample'.")
        if not 0.0 <= self.edit_share <= 1.0:
            raise ValueError(f"edit_share={self.edit_share}: a share lies between 0 and 1.")

    def level(self, u: Tensor) -> Tensor:
        """Mask level t of uniform draws u, any shape."""
        return self.t_min + (self.t_max - self.t_min) * u


@dataclass(frozen=True)
class Corrupted:
    """What a forward process makes of clean rows, all [B, L].

    Attributes:
        noisy: ids int64. t: mask level float32.
        masked: the masked response positions. checked: visible ones that are trained in place. Both are the loss set.
    """

    noisy: Tensor
    masked: Tensor
    t: Tensor
    checked: Tensor


def corrupt(
    ids: Tensor,
    response: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    mask_id: int,
    stop: tuple[int, ...],
    always_mask_eos: bool = True,
    edit_share: float = 0.0,
) -> Corrupted:
    """Replace response tokens by the mask: those whose noise lies below t, and (always) those in the stop set.

    Args:
        ids: clean tokens, int64 [B, L].
        response: bool [B, L]; everything else (prompts, mask-only tails, padding) is returned untouched.
        noise: U[0, 1) per position, [B, L].
        t: mask level, broadcastable to [B, L].
        mask_id: the absorbing token. stop: ids that end a response; a stop token inside a prompt stays.
        edit_share: see `ForwardProcess`; a stop token is never checked, nor put in another's place.
    """
    t = torch.broadcast_to(t, ids.shape)
    stops = torch.isin(ids, torch.tensor(stop, dtype=ids.dtype, device=ids.device))
    masked = response & (noise < t)
    if always_mask_eos:
        masked = masked | response & stops
    noisy = ids.masked_fill(masked, mask_id)
    words = response & ~stops
    # Where nothing was masked, noise lies in [t, 1): moved to [0, 1), the same draw also decides about checking.
    draw = (noise - t) / (1.0 - t).clamp(min=torch.finfo(torch.float32).tiny)
    checked = words & ~masked & (draw < edit_share)
    for row, share in enumerate(draw / max(edit_share, torch.finfo(torch.float32).tiny)):
        wrong = checked[row] & (share < 0.5)
        pool = ids[row, words[row]]
        noisy[row, wrong] = pool[(2.0 * share[wrong] * len(pool)).long()]
    return Corrupted(noisy=noisy, masked=masked, t=t, checked=checked)
