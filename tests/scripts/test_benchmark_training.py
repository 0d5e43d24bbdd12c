"""The training benchmark compares what it says: the same tokens in every arm, and a formula that counts what runs."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_var import Pretrained, load_pretrained

RESULT = Path(__file__).parents[2] / "evaluation" / "results" / "benchmark_training.json"


@pytest.fixture(scope="module")
def benchmark(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/benchmark_training.py")
    return module


@pytest.fixture(scope="module")
def samples(benchmark: ModuleType) -> list[Any]:
    return [benchmark.Sample([1 + i] * (3 + i), [90 + i] * (5 + 7 * i) + [257, 256]) for i in range(5)]


@pytest.fixture(scope="module")
def arms(benchmark: ModuleType, recorded: Pretrained, samples: list[Any]) -> dict[str, Any]:
    built: dict[str, Any] = benchmark.build_arms(recorded, samples, 64, 2)
    return built


def test_every_arm_trains_on_the_same_responses(arms: dict[str, Any], samples: list[Any]) -> None:
    words = sorted(token for sample in samples for token in sample.response if token < 256)
    for name, loads in arms.items():
        found = []
        for load in loads:
            clean = load.ids.clone()
            clean[load.wanted] = load.targets
            once = clean[:, : clean.shape[1] // 2] if name == "two copies" else clean
            found += [token for token in once.flatten().tolist() if 90 <= token < 256]
        assert sorted(found) == words


def test_the_formula_gives_the_flops_that_are_counted(
    benchmark: ModuleType, recorded: Pretrained, arms: dict[str, Any]
) -> None:
    for loads in arms.values():
        counted = benchmark.counted_flops(recorded.model, loads)
        assert benchmark.analytic_flops(recorded.model.config, loads) == pytest.approx(counted, rel=0.001)


def test_two_copies_give_a_noisy_block_itself_and_the_clean_blocks_before_it(
    benchmark: ModuleType, arms: dict[str, Any]
) -> None:
    ours, theirs = arms["packed, one copy"][0], benchmark.two_copies(arms["packed, one copy"][:1], block=16)[0]
    assert torch.equal(theirs.ids[:, :64], ours.ids)
    assert torch.equal(theirs.positions[0], torch.arange(64).repeat(2))
    sees = theirs.sees[0]
    assert sees[20].nonzero().flatten().tolist() == [*range(16, 32), *range(64, 80)]
    assert sees[64 + 20].nonzero().flatten().tolist() == list(range(64, 96))


def test_the_figure_at_llada_scale_is_the_formula_of_the_arms(benchmark: ModuleType) -> None:
    width, layers, inner, length = 4096, 32, 12288, 8192
    shape = SimpleNamespace(
        d_model=width, n_layers=layers, mlp_width=inner, embedding_rows=126_464, num_key_value_heads=32, head_dim=128
    )
    row = torch.zeros(1, length, dtype=torch.long)
    one = benchmark.Load(row, row.bool(), torch.zeros(length // 2))
    two = benchmark.two_copies([benchmark.Load(row, row.bool(), torch.zeros(0, dtype=torch.long))])[0]
    two = replace(two, targets=one.targets)
    found = benchmark.analytic_flops(shape, [two], allowed_pairs_only=True) / benchmark.analytic_flops(shape, [one])
    assert benchmark.at_llada_scale() == pytest.approx(found, rel=1e-6)


def test_full_logits_and_chunks_are_the_same_loss(benchmark: ModuleType, recorded: Pretrained, arms: dict[str, Any]) -> None:
    for ours, full in zip(arms["packed, one copy"], arms["full logits"], strict=True):
        losses = [benchmark.loss_of(recorded.model, load).item() for load in (ours, full)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_committed_costs_come_out_again(benchmark: ModuleType) -> None:
    tiny = load_pretrained("tiny")
    committed = json.loads(RESULT.read_text(encoding="utf-8"))
    samples = benchmark.read_samples(tiny, committed["samples"])
    tokens = sum(len(sample.response) for sample in samples)
    assert tokens == committed["trained_tokens"]
    arms = benchmark.build_arms(tiny, samples, committed["length"], committed["rows"])
    for name, loads in arms.items():
        stated = committed["per_trained_token"][name]
        assert sum(load.ids.numel() for load in loads) / tokens == stated["positions"]
        assert benchmark.analytic_flops(tiny.model.config, loads) / tokens == stated["flops_by_formula"]
    assert committed["two_copies_at_llada_scale"] == benchmark.at_llada_scale() > 1.7
    assert committed["loss_bytes"]["full"] > 8 * committed["loss_bytes"]["chunked"]
