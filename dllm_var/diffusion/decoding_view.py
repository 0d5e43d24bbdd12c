"""What a training sample has around it, so that training looks like decoding: our departure from the published recipe.

In strictly packed rows almost every EOS stands directly before the visible prompt of the next sample. Under full
attention the model can learn to look right for the end of an answer, but at decoding only masks follow. Cures, applied
sample by sample before packing (`dllm_var.diffusion.packing`):

* a *tail*: some unlabelled masks after the EOS;
* a *block view*: the sample as block decoding meets it. The response is visible up to the start of a block, the block
  itself is trained, masks fill it up behind the EOS, and everything after the block is cut off. Of a sample with several
  responses one is drawn; what follows it is cut off, as in the conversation at that time.
* all block views of a sample in one piece (`every_block`): the sample once as it is, for the blocks to look back at, and
  behind it a copy of every block to be trained. Who sees whom is said by `Piece.stage` and `sees`, as for block diffusion
  (arXiv 2503.09573), but that what is finished sees the block being decided, as in dLLM-Var's decoding.

Nearly all that is decided in decoding is decided in the first look at a block, when all of it is masked; of the blocks of a
view, `first_look_share` are shown just so, the others at the sample's own level.

The masks behind an EOS carry no loss, or (`tail_eos`) are trained to be EOS as well: else nothing tells the model what to
say there, and decoding may decide such a position before the EOS in front of it.

And, for comparison, LLaDA's own way (arXiv 2502.09992): `fill`, one sample per row, the rest of it EOS that is masked and
trained as part of the response.
"""

from dataclasses import dataclass, replace
from typing import Any

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
    positions: Ints | None = None  # position of each token in its sample [n]; None: one after the other from `start`
    stage: Ints | None = None  # see `sees` [n]; None: 0, the tokens of the piece all see each other

    def __len__(self) -> int:
        return len(self.ids)


def sees(query: NDArray[Any], key: NDArray[Any]) -> Bools:
    """Whether a token of stage `query` sees one of stage `key` of its piece; broadcasts.

    The prompt has stage 0, the clean block b (from 0) stage 2b + 2, its trained copy stage 2b + 1. What is clean sees what
    is clean up to its own block, and the trained copy of the next block. A trained copy sees itself and what is clean
    before its block: never the tokens that it is asked for.
    """
    clean = key % 2 == 0
    seen: Bools = np.where(clean, key <= query, (key == query) | (key == query + 1))
    return seen


@dataclass(frozen=True)
class DecodingView:
    """Settings; all shares 0 is the published recipe (strict packing).

    Attributes:
        block_share: share of the samples that are shown as a block view.
        tail_share: share of the others that get a mask-only tail. tail_max: its length is uniform in 0…tail_max.
        block_lengths: a block view draws its block length from these.
        every_block: a block view shows all blocks of its sample at once, where that fits a row. Takes rows of up to twice
            the length, and attention within samples.
        first_look_share: share of the blocks of block views of which every token is masked, whatever the level.
        tail_eos: masks behind the end of an answer, in tails and in blocks, are trained to be EOS.
        fill: every sample is filled up to the length of a row with EOS that counts as response.
    """

    tail_share: float = 0.0
    tail_max: int = 0
    block_share: float = 0.0
    block_lengths: tuple[int, ...] = (8, 16, 32, 64)
    every_block: bool = False
    first_look_share: float = 0.0
    tail_eos: bool = False
    fill: bool = False

    def __post_init__(self) -> None:
        for name in ("tail_share", "block_share", "first_look_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}: a share lies between 0 and 1.")
        if self.tail_max < 0 or (self.tail_share > 0 and self.tail_max == 0):
            raise ValueError(
                f"tail_max={self.tail_max} with tail_share={self.tail_share}: give tail_max >= 1, or tail_share 0."
            )
        if self.block_share > 0 and (not self.block_lengths or min(self.block_lengths) < 1):
            raise ValueError(f"block_lengths={self.block_lengths}: give block lengths >= 1, or block_share 0.")
        for name in ("every_block", "first_look_share"):
            if getattr(self, name) and self.block_share == 0:
                raise ValueError(f"{name}={getattr(self, name)} has no effect with block_share=0: no block is shown.")
        if self.tail_eos and self.block_share == self.tail_share == 0:
            raise ValueError(
                "tail_eos=True has no effect with tail_share=0 and block_share=0: nothing stands behind an answer."
            )
        if self.fill and (self.tail_share > 0 or self.block_share > 0):
            raise ValueError(
                f"fill=true with tail_share={self.tail_share} and block_share={self.block_share}: a filled row has no room "
                "for either. Set both shares to 0, or fill=false."
            )

    def apply(
        self,
        key: str,
        epoch: int,
        ids: Ints,
        response: Bools,
        *,
        seed: int,
        mask_id: int,
        longest: int | None = None,
        eos_id: int | None = None,
    ) -> Piece:
        """The piece that is packed for a sample; all draws are keyed by (seed, epoch, key).

        Args:
            longest: tokens of a row, wanted by `fill`. eos_id: wanted by `fill` and `tail_eos`.
        """
        assert eos_id is not None or not (self.fill or self.tail_eos)
        filler = (mask_id, False, 1.0) if eos_id is None or not self.tail_eos else (eos_id, True, 0.0)
        if self.fill:
            assert longest is not None
            free = max(0, longest - len(ids))
            ids = np.concatenate([ids, np.full(free, eos_id, dtype=ids.dtype)])
            response = np.concatenate([response, np.ones(free, dtype=bool)])
        level, which, extent, where, turn = uniforms(5, seed, epoch, key, "view")
        noise = uniforms(len(ids), seed, epoch, key, "noise")
        spots = np.flatnonzero(response)
        tail = 0
        if which < self.block_share and len(spots):
            block = self.block_lengths[int(extent * len(self.block_lengths))]
            answers = np.split(spots, np.flatnonzero(np.diff(spots) > 1) + 1)
            answer = answers[int(turn * len(answers))]
            first, end = int(answer[0]), int(answer[-1]) + 1
            ids, response, noise = ids[:end], response[:end] & (np.arange(end) >= first), noise[:end]
            blocks = -(-(len(ids) - first) // block)
            whole = uniforms(blocks, seed, epoch, key, "look") < self.first_look_share
            noise[first:][whole.repeat(block)[: len(ids) - first]] = 0.0  # below every level
            if self.every_block:
                piece = _every_block(Piece(key, epoch, ids, response, noise, float(level)), first, block, filler)
                if longest is None or len(piece) <= longest:
                    return piece
            start = first + block * int(where * blocks)
            response = response & (np.arange(len(ids)) >= start)
            tail = max(0, start + block - len(ids))
            ids, response, noise = ids[: start + block], response[: start + block], noise[: start + block]
        elif which < self.block_share + (1.0 - self.block_share) * self.tail_share:
            tail = int(extent * (self.tail_max + 1))
        if tail:
            ids, response, noise = _behind(ids, response, noise, tail, filler)
        return Piece(key, epoch, ids, response, noise, float(level))


def _behind(
    ids: Ints, response: Bools, noise: Floats, length: int, filler: tuple[int, bool, float]
) -> tuple[Ints, Bools, Floats]:
    """The arrays of a sample with `length` tokens behind it; filler: their id, whether they are trained, and their noise."""
    token, trained, draw = filler
    return (
        np.concatenate([ids, np.full(length, token, dtype=ids.dtype)]),
        np.concatenate([response, np.full(length, trained)]),
        np.concatenate([noise, np.full(length, draw, dtype=noise.dtype)]),
    )


def _every_block(piece: Piece, first: int, block: int, filler: tuple[int, bool, float]) -> Piece:
    """A sample whose response starts at `first`: all but its last block clean, then every block to be trained."""
    blocks = -(-(len(piece) - first) // block)
    clean, end = first + (blocks - 1) * block, first + blocks * block
    tail = end - len(piece)
    position = np.arange(end)
    number = np.maximum((position - first) // block, -1)  # of the block; −1: prompt
    trained = _behind(piece.ids[first:], piece.response[first:], piece.noise[first:], tail, filler)
    return replace(
        piece,
        ids=np.concatenate([piece.ids[:clean], trained[0]]),
        response=np.concatenate([np.zeros(clean, bool), trained[1]]),
        noise=np.concatenate([np.ones(clean, np.float32), trained[2]]),
        positions=np.concatenate([position[:clean], position[first:]]),
        stage=np.concatenate([2 * number[:clean] + 2, 2 * number[first:] + 1]),
    )
