"""What a training sample has around it, so that training looks like decoding: our departure from the published recipe.

In strictly packed rows almost every EOS stands directly before the visible prompt of the next sample. Under full
attention the model then learns to look right for the end of an answer, and at decoding, where only masks follow, it
never stops. Two cures, both applied sample by sample before packing (`dllm_var.diffusion.packing`):

* a *tail*: some unlabelled masks after the EOS;
* a *block view*: the sample as block decoding meets it. The response is visible up to the start of a block, the block
  itself is trained, masks fill it up behind the EOS, and everything after the block is cut off.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dllm_var.diffusion.corruption import Floats, uniforms

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one sample: clean ids [n], which of them may be masked and trained [n], and their draws [n]."""

    key: str
    epoch: int
    ids: Ints
    response: Bools
    noise: Floats  # one U[0, 1) per token: is it masked?
    level: float  # one U[0, 1) per sample: at which level t? (used by t_per="sample")
    start: int = 0  # where the run starts in its sample: above 0 for the rest of a split sample

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class DecodingView:
    """Settings; all shares 0 is the published recipe (strict packing).

    Attributes:
        tail_share: share of the samples that get a mask-only tail. tail_max: its length is uniform in 0…tail_max.
        block_share: share of the samples that are shown as a block view instead.
        block_lengths: a block view draws its block length from these.
    """

    tail_share: float = 0.0
    tail_max: int = 0
    block_share: float = 0.0
    block_lengths: tuple[int, ...] = (8, 16, 32, 64)

    def __post_init__(self) -> None:
        for name in ("tail_share", "block_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: a share lies between 0 and 1.")
        if self.tail_max < 0 or (self.tail_share > 0 and self.tail_max == 0):
            raise ValueError(
                f"tail_max={self.tail_max} with tail_share={self.tail_share}: give tail_max >= 1, or tail_share 0."
            )
        if self.block_share > 0 and (not self.block_lengths or min(self.block_lengths) < 1):
            raise ValueError(f"block_lengths={self.block_lengths}: give block lengths >= 1, or block_share 0.")

    def apply(self, key: str, epoch: int, ids: Ints, response: Bools, *, seed: int, mask_id: int) -> Piece:
        """The piece that is packed for a sample; all draws are keyed by (seed, epoch, key)."""
        level, which, extent, where = uniforms(4, seed, epoch, key, "view")
        noise = uniforms(len(ids), seed, epoch, key, "noise")
        spots = np.flatnonzero(response)
        tail = 0
        if which < self.block_share and len(spots):
            block = self.block_lengths[int(extent * len(self.block_lengths))]
            first, length = int(spots[0]), len(ids) - int(spots[0])
            start = first + block * int(where * -(-length // block))
            response = response & (np.arange(len(ids)) >= start)
            tail = max(0, start + block - len(ids))
            ids, response, noise = ids[: start + block], response[: start + block], noise[: start + block]
        elif which < self.block_share + (1.0 - self.block_share) * self.tail_share:
            tail = int(extent * (self.tail_max + 1))
        if tail:
            ids = np.concatenate([ids, np.full(tail, mask_id, dtype=ids.dtype)])
            response = np.concatenate([response, np.zeros(tail, dtype=bool)])
            noise = np.concatenate([noise, np.ones(tail, dtype=noise.dtype)])
        return Piece(key, epoch, ids, response, noise, float(level))
