"""Counter-based noise: a draw is a function of (seed, request, step, position) and of nothing else.

Used by `dllm_var.decoding.proposal` (Gumbel noise) and `dllm_var.decoding.scorers` (random order). No generator is
carried along, so a row draws the same numbers in any batch, on any device and after any restart. The mixing function is
the output function of SplitMix64 (Steele, Lea, Flood 2014) on int64 tensors, which wrap around like uint64.
"""

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of the SplitMix64 counter
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word (of its lowest 64 bits)."""
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (that of int64 keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """SplitMix64's output function: a bijection of 64-bit words that spreads every bit over all others."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def keys(seed: int, *parts: Tensor) -> Tensor:
    """One int64 key for each combination of the (broadcastable, int64) parts under a seed (any int)."""
    key = mix(torch.tensor(_signed(seed)) + _signed(GOLDEN))
    for part in parts:
        key = mix((key ^ part) + _signed(GOLDEN))
    return key


def uniform(key: Tensor) -> Tensor:
    """A float64 in the open interval (0, 1) for each key."""
    return (_shifted(mix(key), 11).double() + 0.5) * 2.0**-53


def gumbel(key: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise float64 [M, size] for keys int64 [M]: −ln(−ln u)."""
    counter = torch.arange(1, size + 1, device=key.device) * _signed(GOLDEN)
    return -(-uniform(key[:, None] + counter).log()).log()
