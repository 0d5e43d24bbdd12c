"""How likely is a given answer? A Monte-Carlo bound on ln p(answer | prompt) with its error, and a greedy check.

Called by ``evaluation/harness.py`` for tasks that rank answers. With l uniform in 1…L and S a random set of l answer
positions (arXiv 2502.09992)

    ln p(y | r)  ≥  E [ (L / l) · Σ over i in S of ln p(y_i | r, y outside S) ].

Published for LLaDA with 128 samples. Differences here: the error is reported, and the stratified counts are rounded down,
which makes them exactly uniform. The result for a pair is a function of (seed, its request number) and of no other pair,
whatever batches are made of them.

Legend: N samples, in U independent units of S samples each; L answer tokens; B rows of a forward, n tokens of a row, M
masked positions in it; D width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_var.diffusion.corruption import uniforms
from dllm_var.diffusion.objective import masked_cross_entropy
from dllm_var.model.config import warn_beyond_context
from dllm_var.model.llada import LLaDAModelLM

Pair = tuple[Sequence[int], Sequence[int]]  # prompt ids, answer ids
Head = Callable[[Tensor, Tensor], Tensor]  # hidden [M, D], weight [V, D] -> anything per masked position

# Samples of a unit. The error is estimated from whole units, so a larger stratified unit would leave too few of them.
UNIT = {"stratified": 16, "antithetic": 2, "independent": 1}
HEAD_ROWS = 1024  # masked positions whose logits exist at a time


@dataclass(frozen=True)
class Likelihood:
    """An estimate in nats.

    Attributes:
        value: the mean over the samples: below ln p(answer | prompt), up to its error.
        standard_error: of `value`, from the spread of the units' means; NaN for a single unit.
        samples: how many there were.
    """

    value: float
    standard_error: float
    samples: int


def log_likelihood(
    model: LLaDAModelLM,
    mask_id: int,
    pairs: Sequence[Pair],
    *,
    samples: int = 128,
    sampling: str = "stratified",
    batch_size: int = 32,
    cfg_scale: float = 0.0,
    seed: int = 0,
    requests: Sequence[int] | None = None,
) -> list[Likelihood]:
    """The bound for each (prompt, answer).

    Args:
        model: in evaluation mode. mask_id: the absorbing token; a prompt or answer may contain it like any other.
        samples: N, a multiple of the unit of `sampling`.
        sampling: see `draw_masks`.
        batch_size: rows of a forward (twice as many under guidance); changes nothing but speed and memory.
        cfg_scale: guidance w: logits = u + (w + 1)(c − u), u with the prompt masked; 0 is off.
        requests: a number for each pair, the key of its draws; default 0, 1, …. Pairs of one number share them.

    Raises:
        ValueError: an option out of range, an empty answer, or ids that do not fit the model.
    """
    requests = range(len(pairs)) if requests is None else requests
    if len(requests) != len(pairs):
        raise ValueError(f"requests has {len(requests)} numbers for {len(pairs)} pairs: give one for each.")
    _check(model, pairs, batch_size, cfg_scale)
    masks = [
        draw_masks(len(answer), samples, sampling, seed, request)
        for (_, answer), request in zip(pairs, requests, strict=True)
    ]
    return score_masks(model, mask_id, pairs, masks, batch_size=batch_size, cfg_scale=cfg_scale)


def draw_masks(length: int, samples: int, sampling: str, *key: int) -> Tensor:
    """Random sets of answer positions, bool [U, S, L]; more samples extend fewer.

    In every sample the count l is exactly uniform in 1…L, and the set uniform given l. Units are independent; within one

    * ``stratified``: 16 samples share one draw k of {0, …, L − 1}; sample j masks 1 + (k + ⌊j·L / 16⌋) mod L tokens, so
      that the counts are spread evenly. (A sum k + j·L / 16 rounded halves to even brings even counts too often.)
    * ``antithetic``: the first of two samples masks l tokens of a random order from its front, the second L + 1 − l from
      its back: what the one hides the other shows.
    * ``independent``: a unit is one sample.

    Args:
        length: L. samples: N. key: of the draws.

    Raises:
        ValueError: no such sampling, or N is not a multiple of its unit.
    """
    if sampling not in UNIT:
        raise ValueError(f"sampling={sampling!r}: choose one of {', '.join(UNIT)}.")
    size = UNIT[sampling]
    if samples < 1 or samples % size:
        raise ValueError(
            f"samples={samples} must be a multiple of {size} with sampling={sampling!r}: "
            f"give {max(1, math.ceil(samples / size)) * size}."
        )
    units = samples // size
    first = torch.from_numpy(uniforms(units, "likelihood", "count", *key)).double().mul(length).long()  # k [U]
    order = torch.from_numpy(uniforms(samples * length, "likelihood", "order", *key)).view(units, size, length)
    rank = order.argsort(dim=-1, stable=True).argsort(dim=-1)
    count = 1 + (first[:, None] + torch.arange(size) * length // size) % length  # [U, S]
    if sampling == "antithetic":
        count[:, 1], rank[:, 1] = length + 1 - count[:, 0], length - 1 - rank[:, 0]
    return rank < count[..., None]


@torch.inference_mode()
def score_masks(
    model: LLaDAModelLM,
    mask_id: int,
    pairs: Sequence[Pair],
    masks: Sequence[Tensor],
    *,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> list[Likelihood]:
    """As `log_likelihood`, with given sets of masked positions: for each pair a bool [U, S, L].

    Equal sets of a pair are computed once: a short answer has few of them, that of one token a single one.

    Raises:
        ValueError: see `log_likelihood`; or masks of a wrong shape, or a sample without a masked position.
    """
    _check(model, pairs, batch_size, cfg_scale)
    for number, ((_, answer), mask) in enumerate(zip(pairs, masks, strict=True)):
        if mask.dim() != 3 or mask.shape[2] != len(answer) or not bool(mask.any(2).all()):
            raise ValueError(
                f"masks of pair {number} {tuple(mask.shape)} must be [units, samples, {len(answer)}], "
                "each sample with a masked position."
            )
    distinct = [torch.unique(mask.flatten(0, 1), dim=0, return_inverse=True) for mask in masks]
    rows = [(pair, mask) for pair, (sets, _) in zip(pairs, distinct, strict=True) for mask in sets]
    bounds = [torch.zeros(0, dtype=torch.float64)]
    for start in range(0, len(rows), batch_size):
        chunk, chosen = zip(*rows[start : start + batch_size], strict=True)
        bounds.append(_bounds(model, mask_id, chunk, chosen, cfg_scale))
    each = torch.split(torch.cat(bounds), [len(sets) for sets, _ in distinct])
    return [
        _summary(bound[which].view(mask.shape[:2])) for bound, (_, which), mask in zip(each, distinct, masks, strict=True)
    ]


@torch.inference_mode()
def is_greedy(
    model: LLaDAModelLM,
    mask_id: int,
    pairs: Sequence[Pair],
    *,
    known: int | None = None,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> list[bool]:
    """Whether each answer is what the model itself decides, most confident token first, one per forward.

    The canvas is the prompt and one mask for each answer token. Stops at the first token that differs. Arguments and errors
    as for `log_likelihood`; ids from `known` on are no tokens and never decided.
    """
    _check(model, pairs, batch_size, cfg_scale)
    head = _proposals(mask_id, known)
    masked = [torch.ones(len(answer), dtype=torch.bool) for _, answer in pairs]
    greedy, open_rows = [True] * len(pairs), list(range(len(pairs)))
    while open_rows:
        for start in range(0, len(open_rows), batch_size):
            rows = open_rows[start : start + batch_size]
            masks = [masked[row] for row in rows]
            readings = _forward(model, mask_id, [pairs[row] for row in rows], masks, cfg_scale, head)
            for row, (ids, log_p) in zip(rows, _per_row(readings, masks), strict=True):
                best = int(log_p.argmax())
                position = int(masked[row].nonzero()[best])
                greedy[row] = int(ids[best]) == pairs[row][1][position]
                masked[row][position] = False
        open_rows = [row for row in open_rows if greedy[row] and bool(masked[row].any())]
    return greedy


def _proposals(mask_id: int, known: int | None) -> Head:
    """The likeliest token but for the mask and ids from `known` on, and its ln p, float64 [2, M]."""

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        parts = []
        for part in torch.split(hidden, HEAD_ROWS):
            log_p = (part @ weight.to(part.dtype).T).float().log_softmax(-1)
            log_p[:, mask_id] = float("-inf")
            if known is not None:
                log_p[:, known:] = float("-inf")
            parts.append(torch.stack((log_p.argmax(-1).double(), log_p.amax(-1).double())))
        return torch.cat(parts, 1)

    return head


def _bounds(model: LLaDAModelLM, mask_id: int, pairs: Sequence[Pair], masks: Sequence[Tensor], cfg_scale: float) -> Tensor:
    """(L / l) · Σ ln p over each row's masked positions, float64 [B]."""
    targets = [torch.tensor(answer)[mask] for (_, answer), mask in zip(pairs, masks, strict=True)]
    flat = torch.cat(targets).to(model.device)

    def head(hidden: Tensor, weight: Tensor) -> Tensor:
        return masked_cross_entropy(hidden, weight, flat, chunk=HEAD_ROWS)[1]

    losses = _per_row(_forward(model, mask_id, pairs, masks, cfg_scale, head), masks)
    return torch.stack([-len(mask) * loss.double().mean() for loss, mask in zip(losses, masks, strict=True)])


def _per_row(values: Tensor, masks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What belongs to each row of values [..., M]."""
    return torch.split(values, [int(mask.sum()) for mask in masks], dim=-1)


def _forward(
    model: LLaDAModelLM, mask_id: int, pairs: Sequence[Pair], masks: Sequence[Tensor], cfg_scale: float, head: Head
) -> Tensor:
    """One forward of rows prompt + answer, the given answer positions masked; what `head` makes of these, on the host."""
    rows = [torch.tensor([*prompt, *answer]) for prompt, answer in pairs]
    hidden = [torch.cat((mask.new_zeros(len(prompt)), mask)) for (prompt, _), mask in zip(pairs, masks, strict=True)]
    masked = pad_sequence(hidden, batch_first=True)  # bool [B, n]
    ids = pad_sequence(rows, batch_first=True, padding_value=mask_id).masked_fill(masked, mask_id)
    column = torch.arange(ids.shape[1])
    real = column < torch.tensor([len(row) for row in rows])[:, None]
    if cfg_scale:
        prompt = column < torch.tensor([len(prompt) for prompt, _ in pairs])[:, None]
        ids = torch.cat((ids, ids.masked_fill(prompt, mask_id)))
        real, masked = torch.cat((real, real)), torch.cat((masked, masked))

    def project(states: Tensor, weight: Tensor) -> Tensor:
        if cfg_scale:
            given, absent = states.chunk(2)
            # The head is linear: to guide the states is to guide the logits.
            states = absent + (cfg_scale + 1) * (given - absent)
        return head(states, weight)

    out = model(
        input_ids=ids.to(model.device),
        attention_mask=None if bool(real.all()) else real.to(model.device),
        logits_for=masked,
        project=project,
    )
    return cast(Tensor, out.logits).cpu()


def _summary(bounds: Tensor) -> Likelihood:
    """Mean and error of samples [U, S], of which only different units are independent."""
    units = bounds.mean(1)
    error = float(units.std()) / math.sqrt(len(units)) if len(units) > 1 else math.nan
    return Likelihood(value=float(units.mean()), standard_error=error, samples=bounds.numel())


def _check(model: LLaDAModelLM, pairs: Sequence[Pair], batch_size: int, cfg_scale: float) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: give at least 1 row per forward.")
    if not 0.0 <= cfg_scale < math.inf:
        raise ValueError(f"cfg_scale={cfg_scale}: give a number of at least 0; 0 is off.")
    vocabulary = model.config.embedding_rows
    for number, (prompt, answer) in enumerate(pairs):
        if not answer:
            raise ValueError(f"answer {number} is empty: there is nothing to be likely.")
        odd = next((i for i in (*prompt, *answer) if not 0 <= i < vocabulary), None)
        if odd is not None:
            raise ValueError(f"pair {number} holds the id {odd}, but the model has the ids 0..{vocabulary - 1}.")
        warn_beyond_context(model.config, len(prompt) + len(answer))
