"""The objective on masked rows equals the one on full logits, and the recorded training step is reproduced."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_var.diffusion.corruption import corrupt
from dllm_var.diffusion.objective import masked_cross_entropy, token_weights
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM


def random_problem(m: int, d: int = 12, v: int = 50) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m)
    hidden = torch.randn(m, d, generator=draw, requires_grad=True)
    weight = torch.randn(v, d, generator=draw, requires_grad=True)
    return hidden, weight, torch.randint(0, v, (m,), generator=draw), torch.rand(m, generator=draw)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_loss_and_gradients_equal_those_of_full_logits(chunk: int) -> None:
    hidden, weight, targets, each = random_problem(64)
    expected = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * each).sum()
    wanted = torch.autograd.grad(expected, (hidden, weight))
    total, losses = masked_cross_entropy(hidden, weight, targets, each, chunk)
    found = torch.autograd.grad(total, (hidden, weight))
    assert abs(total - expected) < 1e-5
    assert (losses * each).sum().item() == pytest.approx(expected.item(), abs=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_without_gradients_the_values_are_the_same() -> None:
    hidden, weight, targets, each = random_problem(33)
    total, losses = masked_cross_entropy(hidden, weight, targets, each, 8)
    with torch.no_grad():
        quiet, quiet_losses = masked_cross_entropy(hidden, weight, targets, each, 8)
    assert (quiet - total).abs() < 1e-5
    assert (quiet_losses - losses).abs().max() < 1e-5


def test_the_gradient_scales_with_what_the_loss_is_multiplied_by() -> None:
    hidden, weight, targets, _ = random_problem(9)
    once = torch.autograd.grad(masked_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    thrice = torch.autograd.grad(3 * masked_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    for a, b in zip(once, thrice, strict=True):
        assert torch.allclose(3 * a, b)


def test_nothing_masked_gives_0_and_zero_gradients_that_are_connected() -> None:
    hidden, weight, targets, each = random_problem(0)
    total, losses = masked_cross_entropy(hidden, weight, targets, each)
    total.backward()
    assert total.item() == 0.0
    assert len(losses) == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bf16_hidden_states_keep_their_dtype_in_the_gradient() -> None:
    hidden, weight, targets, _ = random_problem(20)
    half = hidden.detach().bfloat16().requires_grad_()
    total, losses = masked_cross_entropy(half, weight, targets)
    total.backward()
    assert losses.dtype == torch.float32
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)


def test_a_loss_in_bf16_divided_by_three_has_gradients_divided_by_three_and_not_by_what_bf16_has_nearest() -> None:
    hidden, weight, targets, _ = random_problem(20)
    inputs = [value.detach().bfloat16().requires_grad_() for value in (hidden, weight)]
    total, _ = masked_cross_entropy(*inputs, targets)
    whole = torch.autograd.grad(total, inputs, retain_graph=True)
    third = torch.autograd.grad(total / 3, inputs)
    for part, full in zip(third, whole, strict=True):
        assert torch.equal(part, (full.float() / 3).bfloat16())


def test_weights_of_the_three_losses_are_what_their_papers_say() -> None:
    t = torch.tensor([0.2, 0.2, 0.5])
    assert token_weights("plain_mean", t, masked=3, responses=8).tolist() == pytest.approx([1 / 3] * 3)
    assert token_weights("token_sum_global", t, masked=3, responses=8, masked_global=12).tolist() == pytest.approx(
        [1 / 12] * 3
    )
    assert token_weights("elbo", t, masked=3, responses=8).tolist() == pytest.approx([1 / 1.6, 1 / 1.6, 1 / 4.0])


def test_no_masked_token_never_divides_by_zero() -> None:
    empty = torch.zeros(0)
    for name in ("plain_mean", "elbo"):
        assert len(token_weights(name, empty, masked=0, responses=0)) == 0
    assert len(token_weights("token_sum_global", empty, masked=0, responses=0, masked_global=0)) == 0


def test_errors_name_the_option_and_the_fix() -> None:
    with pytest.raises(ValueError, match="loss='mean': choose one of plain_mean, token_sum_global, elbo"):
        token_weights("mean", torch.zeros(1), masked=1, responses=1)
    with pytest.raises(ValueError, match="token_sum_global needs the number of masked tokens"):
        token_weights("token_sum_global", torch.zeros(1), masked=1, responses=1)
    with pytest.raises(ValueError, match="chunk=0"):
        masked_cross_entropy(*random_problem(3)[:3], chunk=0)


# The recorded training step: a model of 21 tensors by formula, one packed row, its noise, and what comes out.
CLEAN = [5, 2, 9, 4, 6, 13, 14, 7, 1, 8, 14, 3]
RESPONSE = [0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0]
NOISE = [0.05, 0.05, 0.05, 0.30, 0.70, 0.95, 0.99, 0.01, 0.20, 0.60, 0.88, 0.02]
NOISY = [5, 2, 9, 15, 6, 13, 15, 7, 15, 8, 15, 3]
LOSSES = [5.385614, 6.398208, 1.279100, 6.631428]
TOLERANCE = 5e-6


def vector_model() -> LLaDAModelLM:
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=8, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=12, vocab_size=16, embedding_size=16,
            mask_token_id=15, eos_token_id=14, pad_token_id=14, rope=True, rope_theta=500000.0, rms_norm_eps=1e-5,
            weight_tying=False, max_sequence_length=64, block_type="llama", layer_norm_type="rms", activation_type="silu",
        )
    )  # fmt: skip
    with torch.no_grad():
        for n, (_, weight) in enumerate(sorted(model.state_dict().items())):
            j = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(0.7 * j**2 + 1.3 * n + 0.1)
            weight.copy_((1 + 0.1 * wave if weight.dim() == 1 else 0.7 * wave).view_as(weight))
    return model


@pytest.mark.parametrize(("name", "expected"), [("plain_mean", 4.923587), ("elbo", 5.626957)])
def test_the_recorded_training_step_is_reproduced(name: str, expected: float) -> None:
    model = vector_model()
    clean, response = torch.tensor([CLEAN]), torch.tensor([RESPONSE], dtype=torch.bool)
    made = corrupt(clean, response, torch.tensor([NOISE]), torch.tensor(0.5), mask_id=15, stop=(14,))
    assert made.noisy.tolist() == [NOISY]
    assert made.masked[0].nonzero()[:, 0].tolist() == [3, 6, 8, 10]
    weights = token_weights(name, made.t[made.masked], masked=4, responses=7)
    seen = []

    def project(hidden: Tensor, head: Tensor) -> Tensor:
        total, losses = masked_cross_entropy(hidden, head, clean[made.masked], weights, chunk=3)
        seen.extend(losses.tolist())
        return total

    loss = model(input_ids=made.noisy, logits_for=made.masked, project=project).logits
    loss.backward()
    assert seen == pytest.approx(LOSSES, abs=TOLERANCE)
    assert loss.item() == pytest.approx(expected, abs=TOLERANCE)
    if name == "plain_mean":
        norm = torch.stack([value.grad.norm() for value in model.parameters()]).norm()
        assert norm.item() == pytest.approx(6.841288, abs=TOLERANCE)


def test_the_head_on_masked_rows_equals_full_logits_through_the_whole_model() -> None:
    clean, response = torch.tensor([CLEAN]), torch.tensor([RESPONSE], dtype=torch.bool)
    made = corrupt(clean, response, torch.tensor([NOISE]), torch.tensor(0.5), mask_id=15, stop=(14,))
    ours, theirs = vector_model(), vector_model()
    ours(
        input_ids=made.noisy,
        logits_for=made.masked,
        project=lambda h, w: masked_cross_entropy(h, w, clean[made.masked], chunk=2)[0],
    ).logits.backward()
    F.cross_entropy(theirs(made.noisy).logits[made.masked], clean[made.masked], reduction="sum").backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-5, name
