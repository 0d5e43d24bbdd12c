"""From hidden states to proposals: for each wanted position one token, its confidence, and what else a policy measures.

The head and the choice of a token run together, a chunk of rows at a time, so that the logits of a long canvas over a
large vocabulary never exist as a whole. Called by the model's forward in place of its head (`project`), set up by
`dllm_var.decoding.executor`.

Legend: M wanted rows of a forward, m rows of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_var.decoding.noise import gumbel

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MB in float32


@dataclass(frozen=True)
class Candidates:
    """What a measure sees of a chunk, on the model's device.

    Attributes:
        logits: float32 [m, V], shifted so that the largest of each row is 0; −inf for forbidden tokens.
        logsumexp: float32 [m] of these: logits − logsumexp are log-probabilities.
        ids: int64 [m], the proposed tokens. confidence: float32 [m], their probabilities.
        rows, positions: int64 [m], batch row and canvas position of each.
    """

    logits: Tensor
    logsumexp: Tensor
    ids: Tensor
    confidence: Tensor
    rows: Tensor
    positions: Tensor


Measure = Callable[[Candidates], Tensor]  # -> [m]


@dataclass(frozen=True)
class Proposer:
    """The rule that proposes a token.

    Attributes:
        mask: never proposed. It keeps its share of probability, as in the published decoders: a model that asks for a
            mask is not sure of anything else.
        forbidden: tokens that are taken out before probabilities are formed.
        temperature: 0: the likeliest token (the lowest id among equals); above 0: an exact draw from
            softmax(logits / temperature), by the largest logits + temperature · Gumbel.
        guidance: cfg_scale; above 0 each row comes twice, see `__call__`.
        measures: further numbers by name.
    """

    mask: int
    forbidden: Sequence[int]
    temperature: float
    guidance: float
    measures: Mapping[str, Measure]

    def __call__(self, hidden: Tensor, weight: Tensor, keys: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Readings of M wanted rows.

        Args:
            hidden: [M, D], or [2M, D] under guidance (all conditional rows, then all unconditional ones).
            weight: [V, D], the head. keys: int64 [M], noise keys. rows, positions: int64 [M].

        Returns:
            int32 [2 + measures, M]: ids, then confidence and measures as the bits of float32, so that one transfer
            brings everything to the host.
        """
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        streams = hidden.chunk(2) if self.guidance else (hidden,)
        parts = []
        for start in range(0, len(keys), size):
            at = slice(start, start + size)
            logits = [F.linear(stream[at], weight).float() for stream in streams]  # [m, V] each
            parts.append(self._chunk(logits, keys[at], rows[at], positions[at]))
        empty = torch.empty(2 + len(self.measures), 0, dtype=torch.int32, device=hidden.device)
        return torch.cat([empty, *parts], dim=1)

    def _chunk(self, streams: Sequence[Tensor], keys: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        logits = streams[0]
        if self.guidance:
            logits = streams[1] + (self.guidance + 1) * (logits - streams[1])
        for token in self.forbidden:
            logits[:, token] = float("-inf")
        # Shifted first: with logits around 30, max − logsumexp would lose the digits that rank confidences close to 1.
        logits = logits - logits.max(-1, keepdim=True).values
        total = logits.exp().sum(-1)  # [m]
        allowed = logits.clone()
        allowed[:, self.mask] = float("-inf")
        if self.temperature:
            allowed = allowed.double() + self.temperature * gumbel(keys, logits.shape[1])
        ids = allowed.argmax(-1)
        confidence = logits.gather(1, ids[:, None])[:, 0].exp() / total
        seen = Candidates(logits, total.log(), ids, confidence, rows, positions)
        numbers = [confidence, *(measure(seen) for measure in self.measures.values())]
        return torch.stack([ids.int(), *(number.float().view(torch.int32) for number in numbers)])
