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

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.noise import gumbel
from dllm_var.text.special_tokens import SpecialTokens

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk: 64 MB in float32


@dataclass(frozen=True)
class Candidates:
    """What a measure sees of a chunk, on the model's device.

    Attributes:
        logits: float32 [m, V] of the distribution that confidences come from, shifted so that the largest of each row is 0;
            −inf for forbidden tokens, and under `Proposer.tempered` for all that cannot be sampled.
        logsumexp: float32 [m] of these: logits − logsumexp are log-probabilities.
        ids: int64 [m], the proposed tokens. confidence: float32 [m], their probabilities.
        rows, positions: int64 [m], batch row and canvas position of each.
        mask, known: the mask id, and the first id that no token has; they have a share of the probability but are never
            proposed (under `tempered` they have none).
    """

    logits: Tensor
    logsumexp: Tensor
    ids: Tensor
    confidence: Tensor
    rows: Tensor
    positions: Tensor
    mask: int
    known: int | None = None

    @property
    def proposable(self) -> Tensor:
        """`logits` with −inf for what is never proposed."""
        return _proposable(self.logits, self.mask, self.known)


Measure = Callable[[Candidates], Tensor]  # -> [m]


def entropy(seen: Candidates) -> Tensor:
    """−Σ p ln p in nats [m] over the tokens that can be proposed: to be sure of the mask is not to be sure."""
    log_p = seen.proposable.log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def margin(seen: Candidates) -> Tensor:
    """Largest minus second largest probability [m], of the tokens that can be proposed."""
    first, second = seen.proposable.topk(2).values.unbind(-1)
    return (first - seen.logsumexp).exp() - (second - seen.logsumexp).exp()


@dataclass(frozen=True)
class Proposer:
    """The rule that proposes a token.

    Attributes:
        mask: never proposed. It keeps its share of probability (but for `tempered`), as in the published decoders: a model
            that asks for a mask is not sure of anything else.
        known: ids from here on are no tokens, and treated like the mask.
        forbidden: tokens that are taken out before probabilities are formed.
        temperature: 0: the likeliest token (the lowest id among equals); above 0: an exact draw from
            softmax(logits / temperature), by the largest logits / temperature + Gumbel.
        guidance: cfg_scale; above 0 each row comes twice, see `__call__`.
        measures: further numbers by name.
        top_p, top_k: sampling draws from the likeliest tokens only: those that make up this share of the probability at
            this temperature (the one that passes it included), and this many. With the mask's share left out.
        tempered: confidences and measures come from the distribution that is sampled, not from the one at temperature 1.
    """

    mask: int
    forbidden: Sequence[int]
    temperature: float
    guidance: float
    measures: Mapping[str, Measure]
    top_p: float = 1.0
    top_k: int | None = None
    tempered: bool = False
    known: int | None = None

    @classmethod
    def build(cls, config: GenerationConfig, special: SpecialTokens, measures: Mapping[str, Measure]) -> "Proposer":
        """The rule that a configuration asks for."""
        return cls(
            mask=special.mask,
            forbidden=(special.eos,) if config.logits_eos_inf else (),
            temperature=config.temperature,
            guidance=config.cfg_scale,
            measures=measures,
            top_p=config.top_p,
            top_k=config.top_k,
            tempered=config.score_distribution == "tempered",
            known=special.known,
        )

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
        allowed = _proposable(logits, self.mask, self.known)
        if self.temperature:
            allowed = self._truncate(allowed / self.temperature)
            ids = (allowed.double() + gumbel(keys, logits.shape[1])).argmax(-1)
        else:
            ids = allowed.argmax(-1)
        if self.tempered:
            logits = allowed - allowed.max(-1, keepdim=True).values
        total = logits.exp().sum(-1)  # [m]
        confidence = logits.gather(1, ids[:, None])[:, 0].exp() / total
        seen = Candidates(logits, total.log(), ids, confidence, rows, positions, self.mask, self.known)
        numbers = [confidence, *(measure(seen) for measure in self.measures.values())]
        return torch.stack([ids.int(), *(number.float().view(torch.int32) for number in numbers)])

    def _truncate(self, logits: Tensor) -> Tensor:
        """Logits [m, V], −inf for all but the likeliest that `top_k` and `top_p` leave; among equals the lowest id."""
        if self.top_k is None and self.top_p >= 1.0:
            return logits
        best, order = logits.sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            best[:, self.top_k :] = float("-inf")
        if self.top_p < 1.0:
            share = best.softmax(-1)
            before = share.cumsum(-1) - share
            best = best.masked_fill(before >= self.top_p, float("-inf"))  # what stands before it makes up top_p already
        return torch.empty_like(logits).scatter_(1, order, best)


def _proposable(logits: Tensor, mask: int, known: int | None) -> Tensor:
    """Logits [m, V] with −inf for the mask and for ids that no token has."""
    allowed = logits.clone()
    allowed[:, mask] = float("-inf")
    if known is not None:
        allowed[:, known:] = float("-inf")
    return allowed
