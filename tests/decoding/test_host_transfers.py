"""One transfer from device to host per forward: on an accelerator every further one would stop the queue of kernels.

There is no accelerator here, so what comes from the model is followed instead: operations on it that would need its values
on the host are counted, and `.cpu()` is where it is allowed to arrive.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_var import GenerationConfig, Pretrained
from dllm_var.decoding.loop import decode
from dllm_var.text.special_tokens import SpecialTokens

# Operations whose result, or its shape, depends on values: an accelerator is waited for.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}


class Followed(TorchDispatchMode):
    """Marks what is computed from the parameters of a model, as an accelerator's memory would hold it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.kept: dict[int, Tensor] = {id(p): p for p in model.parameters()}
        self.waits: list[str] = []
        self.transfers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        on_device = [tensor for tensor in given if id(tensor) in self.kept]
        name = func._schema.name
        if on_device and name in WAITS:
            self.waits.append(name)
        if name.startswith("aten::index"):  # a mask that is itself on the device has to be counted first
            masks = [t for t in tree_leaves(args[1]) if isinstance(t, Tensor) and t.dtype == torch.bool]
            self.waits += [name for mask in masks if id(mask) in self.kept]
        made = func(*args, **(kwargs or {}))
        if on_device:
            self.kept |= {id(leaf): leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)}
        return made


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_length": 24, "block_length": 8, "threshold": 0.6},
        {"max_gen_length": 24, "block_length": 8, "threshold": 0.6, "cache": "none"},
        {"max_gen_length": 16, "block_length": 8, "temperature": 0.7, "top_p": 0.9},
        {"max_gen_length": 24, "block_length": 8, "threshold": 0.6, "cfg_scale": 0.5},
        {"max_gen_length": 24, "block_length": 8, "gamma": 0.5},
        {"method": "vanilla", "gen_length": 16, "block_length": 8, "threshold": 0.6, "cache": "prefix", "use_dual": True},
    ],
)
def test_a_forward_makes_one_transfer_and_waits_for_nothing_else(
    recorded: Pretrained, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    follow, forwards = Followed(recorded.model), 0
    whole_cpu, whole_tolist = Tensor.cpu, Tensor.tolist

    def cpu(tensor: Tensor) -> Tensor:
        if id(tensor) not in follow.kept:
            return whole_cpu(tensor)
        follow.transfers += 1
        return torch.from_numpy(whole_cpu(tensor).numpy().copy())  # a tensor of the host, which nobody follows

    def tolist(tensor: Tensor) -> Any:
        follow.waits += ["tolist"] * (id(tensor) in follow.kept)
        return whole_tolist(tensor)

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(Tensor, "tolist", tolist)
    handle = recorded.model.register_forward_pre_hook(count)
    silent = SpecialTokens(mask=270, eos=268, pad=268, eot=269, bos=258)  # it never says these, so answers are long
    try:
        with follow:
            decode(recorded.model, silent, GenerationConfig(**options), [[97, 98, 99], [100] * 9])
    finally:
        handle.remove()
    assert follow.waits == []
    assert follow.transfers == forwards > 1


def test_an_operation_that_waits_is_noticed(recorded: Pretrained) -> None:
    with Followed(recorded.model) as follow, torch.no_grad():
        hidden = recorded.model.model.head_weight.float() * 2
        bool((hidden > 0).any())
        hidden[hidden > 0]
    assert follow.waits == ["aten::_local_scalar_dense", "aten::index"]
