"""Cross-entropy on the masked positions only, in chunks: the full logits [L, V] never exist.

Called by ``sft_training/trainer.py`` through the model's `project` argument, so that the head runs inside the wrapped
forward. At LLaDA's 126,464 vocabulary rows the logits of one 8,192-token row would take 4 GB in float32.

Legend: M masked positions, D width, V vocabulary rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("plain_mean", "token_sum_global", "elbo", "next_token")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Σ w·CE with gradients taken chunk by chunk in the forward, so that one chunk of logits is alive at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        head = weight.to(hidden.dtype)
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            h, y = hidden[part], targets[part]
            log_p = (h @ head.T).float().log_softmax(-1)  # [chunk, V]
            losses[part] = -log_p.gather(1, y[:, None])[:, 0]
            g = log_p.exp_()
            g[torch.arange(len(y), device=y.device), y] -= 1.0
            g *= token_weight[part, None]
            g = g.to(hidden.dtype)
            grad_hidden[part] = g @ head
            grad_weight += g.T @ h
            del log_p, g  # before the next chunk's logits are made
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * token_weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return _scaled(grad_hidden, grads[0]), _scaled(grad_weight, grads[0]), None, None, None


def _scaled(value: Tensor, by: Tensor) -> Tensor:
    """Value · by, multiplied in float32 a piece at a time: 1/3, the weight of one of three micro-batches, is no bfloat16."""
    scaled = torch.empty_like(value)
    for piece, out in zip(torch.split(value, 4096), torch.split(scaled, 4096), strict=True):
        out.copy_(piece.float() * by)
    return scaled


def masked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, token_weight: Tensor | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross-entropy at masked positions, and the cross-entropy of each (float32 [M], no gradient).

    Args:
        hidden: [M, D] after the final norm, only masked positions. weight: the head [V, D].
        targets: clean ids int64 [M]. token_weight: float32 [M], default 1.
        chunk: positions whose logits exist at a time.

    With M = 0 the sum is 0 and still connected to hidden and weight. First-order gradients only.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: give at least 1 position per chunk.")
    if token_weight is None:
        token_weight = torch.ones(len(targets), dtype=torch.float32, device=hidden.device)
    if not torch.is_grad_enabled():
        losses = [
            F.cross_entropy((h @ weight.to(h.dtype).T).float(), y, reduction="none")
            for h, y in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        ]
        flat = torch.cat(losses) if len(targets) else torch.zeros(0, device=hidden.device)
        return (flat * token_weight).sum(), flat
    with torch.autocast(hidden.device.type, enabled=False):
        total, losses_each = _ChunkedCrossEntropy.apply(hidden, weight, targets, token_weight.float(), chunk)  # type: ignore[no-untyped-call]
    return total, losses_each


def token_weights(
    loss: str, t: Tensor, *, masked: int, responses: int, masked_global: Tensor | float | None = None
) -> Tensor:
    """Weight of each masked position, so that the weighted sum is the loss.

    * ``plain_mean`` (dLLM-Var's code): 1 / masked positions of this micro-batch.
    * ``token_sum_global``: 1 / masked positions of the whole optimizer step, over ranks and accumulation steps.
    * ``next_token``: as plain_mean, where "masked" positions are those that predict a response token from what precedes it
      (an autoregressive warm-up, or yardstick; there is no forward process then).
    * ``elbo`` (LLaDA, 2502.09992 Eq. 5): 1 / (t · response tokens of this micro-batch).

    Args:
        t: mask level of each masked position [M]. masked: M. responses: response tokens, masked or not.
        masked_global: for ``token_sum_global``.
    """
    if loss in ("plain_mean", "next_token"):
        return torch.full_like(t, 1.0 / max(masked, 1), dtype=torch.float32)
    if loss == "token_sum_global":
        if masked_global is None:
            raise ValueError("loss=token_sum_global needs the number of masked tokens of the whole optimizer step.")
        count = torch.as_tensor(masked_global, dtype=torch.float32, device=t.device).clamp(min=1.0)
        return torch.ones_like(t, dtype=torch.float32) / count
    if loss == "elbo":
        return 1.0 / (t.float() * max(responses, 1))
    raise ValueError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}.")
