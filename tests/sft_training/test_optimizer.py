"""Muon and AdamW as one optimizer: who gets what, one learning rate, and a state that goes on exactly."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from sft_training.optimizer import Together, build_optimizer


class Toy(nn.Module):
    """Named like the network: matrices and a norm in blocks, an embedding, a last norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        block = nn.ModuleDict({"q_proj": nn.Linear(6, 6, bias=False), "ff_out": nn.Linear(9, 6, bias=False)})
        block["attn_norm"] = nn.RMSNorm(6)
        parts = {"wte": nn.Embedding(5, 6), "ln_f": nn.RMSNorm(6), "ff_out": nn.Linear(6, 5, bias=False)}
        self.model.transformer = nn.ModuleDict({**parts, "blocks": nn.ModuleList([block])})


def built(kind: str, seed: int = 0) -> tuple[Toy, Optimizer]:
    torch.manual_seed(seed)
    model = Toy()
    return model, build_optimizer(model, kind, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    chosen = {id(value) for value in group["params"]}
    return {
        name.removeprefix("model.transformer.").removesuffix(".weight")
        for name, v in model.named_parameters()
        if id(v) in chosen
    }


def advance(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for value in model.parameters():
            value.grad = torch.randn_like(value)
        optimizer.step()


def test_muon_gets_the_matrices_inside_blocks_and_adamw_the_rest() -> None:
    model, optimizer = built("muon")
    assert isinstance(optimizer, Together)
    assert [type(part) for part in optimizer.parts] == [Muon, AdamW]
    inside, decayed, plain = optimizer.param_groups
    assert names(model, inside) == {"blocks.0.q_proj", "blocks.0.ff_out"}
    assert names(model, decayed) == {"wte", "ff_out"}
    assert names(model, plain) == {"ln_f", "blocks.0.attn_norm"}
    assert inside["adjust_lr_fn"] == "match_rms_adamw"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_matrices_are_decayed_and_norm_weights_are_not(kind: str) -> None:
    _, optimizer = built(kind)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim == 2 else 0.0)


def test_a_learning_rate_set_on_the_whole_acts_in_every_part() -> None:
    model, optimizer = built("muon")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 0 else 1.0)
    before = [value.clone() for value in model.parameters()]
    advance(model, optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    scheduler.step()
    advance(model, optimizer, range(1, 2))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_zero_grad_reaches_every_part() -> None:
    model, optimizer = built("muon")
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    optimizer.zero_grad()
    assert all(value.grad is None for value in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_state_goes_on_bit_for_bit_and_stays_linked_to_schedules(kind: str) -> None:
    model, optimizer = built(kind)
    advance(model, optimizer, range(3))
    other, again = built(kind, seed=1)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))  # a checkpoint file shares no memory either
    for one in (optimizer, again):
        for group in one.param_groups:
            group["lr"] = 0.003
    advance(model, optimizer, range(3, 6))
    advance(other, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="saved optimizer has 0 parts, this one 2"):
        built("muon")[1].load_state_dict(built("adamw")[1].state_dict())


def test_step_runs_a_closure_once() -> None:
    model, optimizer = built("muon")
    calls: list[int] = []
    closure: Callable[[], float] = lambda: float(len(calls)) if calls.append(1) is None else 0.0  # noqa: E731
    advance(model, optimizer, range(1))
    assert optimizer.step(closure) == 1.0
    assert len(calls) == 1
