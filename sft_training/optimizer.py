"""The optimizers: AdamW, or Muon for the matrices inside the blocks with AdamW for the rest.

Called by ``trainer.py``. Norm weights are never decayed, by shape and not by name, since the last norm is called ``ln_f``.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def build_optimizer(model: nn.Module, kind: str, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> Optimizer:
    """The optimizer of a run over all parameters that want a gradient.

    ``muon``: update sizes are matched to AdamW's, so both parts share one learning rate.
    """
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    if kind == "adamw":
        return _adamw([value for _, value in named], lr, weight_decay, betas)
    inside = [value for name, value in named if ".blocks." in name and value.ndim == 2]
    chosen = {id(value) for value in inside}
    rest = [value for _, value in named if id(value) not in chosen]
    return Together(
        [
            Muon(inside, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            _adamw(rest, lr, weight_decay, betas),
        ]
    )


def _adamw(values: Iterable[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    values = list(values)
    groups = [
        {"params": [value for value in values if value.ndim >= 2], "weight_decay": weight_decay},
        {"params": [value for value in values if value.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


class Together(Optimizer):
    """Several optimizers over different parameters that schedulers, clipping and checkpoints see as one.

    Their parameter groups are shared objects: a learning rate set here is the one the part uses.
    """

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of the parts, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave.

        Raises:
            ValueError: it has another number of parts, as from another optimizer.
        """
        states = state_dict.get("parts", [])
        if len(states) != len(self.parts):
            raise ValueError(f"the saved optimizer has {len(states)} parts, this one {len(self.parts)}")
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # loading made new ones
