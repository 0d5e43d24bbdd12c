"""Stand-in models whose logits are a rule, for tests that script what a model says."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllm_var.model.kv_store import KVStore
from dllm_var.model.llada import LLaDAOutput
from dllm_var.text.special_tokens import SpecialTokens

Rule = Callable[[Tensor, Tensor], Tensor]  # ids [B, n], positions [B, n] -> logits [B, n, V]

VOCABULARY = 12
SPECIAL = SpecialTokens(mask=11, eos=10, pad=10, eot=9)


class RuleModel(nn.Module):
    """A model of `dllm_var`'s forward contract with a rule in place of a network; it remembers its calls."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule, self.calls = rule, []
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.config = SimpleNamespace(
            embedding_rows=VOCABULARY, max_sequence_length=64, num_key_value_heads=1, head_dim=2, n_layers=1
        )

    def forward(
        self, input_ids: Tensor, positions: Tensor, logits_for: Tensor, project: Any, kv: KVStore | None, step: int,
        slots: Tensor | None, attention_mask: Tensor | None, query_mask: Tensor | None, output_attentions: bool,
    ) -> LLaDAOutput:  # fmt: skip
        if kv is not None:
            kv.place(slots, None if attention_mask is None else attention_mask.bool(), step)
        self.calls.append(SimpleNamespace(ids=input_ids, positions=positions, real=attention_mask, step=step, slots=slots))
        hidden = self.rule(input_ids, positions)[logits_for]
        rows, n = input_ids.shape
        seen = (torch.full((rows, n, n), 1 / n),) if output_attentions else None
        return LLaDAOutput(logits=project(hidden, torch.eye(VOCABULARY)), attentions=seen)


@pytest.fixture
def special() -> SpecialTokens:
    """Mask 11, EOS 10, eot 9."""
    return SPECIAL


@pytest.fixture
def rule_model() -> type[RuleModel]:
    """The class, to be called with a rule."""
    return RuleModel


@pytest.fixture
def says() -> Callable[..., Rule]:
    """``says({position: (token, strength)}, default=(token, strength))``: a rule that prefers one token per position."""

    def build(table: dict[int, tuple[int, float]], default: tuple[int, float] = (1, 1.0)) -> Rule:
        def rule(ids: Tensor, positions: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, VOCABULARY)
            for index in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
                token, strength = table.get(int(positions[tuple(index)]), default)
                logits[index[0], index[1], token] = strength
            return logits

        return rule

    return build
