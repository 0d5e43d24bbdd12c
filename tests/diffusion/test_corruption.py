"""The forward process: what is masked, how often, and that nothing but the sample's own key decides it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dllm_var.diffusion.corruption import ForwardProcess, corrupt, uniforms

MASK, EOS, EOT = 15, 14, 13
STOP = (EOT, EOS)


def draw(rows: int, length: int, *key: int | str) -> Tensor:
    return torch.from_numpy(uniforms(rows * length, *key)).view(rows, length)


def sample_row(length: int = 4000) -> tuple[Tensor, Tensor]:
    """One row: a prompt with stop tokens in it, then a response with stop tokens in it."""
    ids = torch.from_numpy((uniforms(length, "ids") * 15).astype(np.int64))[None]
    response = torch.zeros(1, length, dtype=torch.bool)
    response[:, length // 2 :] = True
    return ids, response


@pytest.mark.parametrize("t", [0.1, 0.37, 0.9])
def test_the_share_of_masked_response_tokens_is_t(t: float) -> None:
    ids, response = sample_row(20_000)
    made = corrupt(ids, response, draw(1, 20_000, "noise"), torch.tensor(t), mask_id=MASK, stop=STOP)
    plain = response & ~torch.isin(ids, torch.tensor(STOP))
    n = int(plain.sum())
    share = made.masked[plain].float().mean().item()
    assert abs(share - t) < 4 * (t * (1 - t) / n) ** 0.5


def test_eos_is_always_masked() -> None:
    ids, response = sample_row()
    made = corrupt(ids, response, torch.ones(ids.shape), torch.tensor(0.1), mask_id=MASK, stop=STOP)
    ends = torch.isin(ids, torch.tensor(STOP)) & response
    assert ends.sum() > 100
    assert torch.equal(made.masked, ends)  # noise 1 masks nothing else


def test_without_the_rule_eos_is_a_token_like_any_other() -> None:
    ids, response = sample_row()
    made = corrupt(ids, response, torch.ones(ids.shape), torch.tensor(0.9), mask_id=MASK, stop=STOP, always_mask_eos=False)
    assert not made.masked.any()


def test_prompts_stay_clean_and_so_does_an_eot_inside_a_prompt() -> None:
    ids, response = sample_row()
    made = corrupt(ids, response, torch.zeros(ids.shape), torch.tensor(0.9), mask_id=MASK, stop=STOP)
    assert bool((ids[~response] == EOT).any())
    assert torch.equal(made.noisy[~response], ids[~response])
    assert not made.masked[~response].any()


def test_masked_positions_hold_the_mask_and_all_others_the_clean_token() -> None:
    ids, response = sample_row()
    made = corrupt(ids, response, draw(1, ids.shape[1], "noise"), torch.tensor(0.5), mask_id=MASK, stop=STOP)
    assert torch.equal(made.noisy == MASK, made.masked)
    assert torch.equal(made.noisy[~made.masked], ids[~made.masked])


def test_each_row_and_each_position_can_have_its_own_level() -> None:
    ids = torch.zeros(2, 1000, dtype=torch.int64)
    response = torch.ones(2, 1000, dtype=torch.bool)
    t = torch.tensor([[0.0], [1.0]])
    made = corrupt(ids, response, draw(2, 1000, "n"), t, mask_id=MASK, stop=STOP)
    assert made.masked.sum(1).tolist() == [0, 1000]
    t = torch.arange(1000) >= 600
    made = corrupt(ids, response, draw(2, 1000, "n"), t.float(), mask_id=MASK, stop=STOP)
    assert torch.equal(made.masked, t.expand(2, -1))


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 2**31), st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_same_key_gives_the_same_draws_and_a_longer_draw_extends_a_shorter(
    n: int, more: int, seed: int, key: str
) -> None:
    short, long = uniforms(n, seed, key), uniforms(n + more, seed, key)
    assert np.array_equal(short, long[:n])
    assert short.dtype == np.float32
    assert short.min() >= 0.0
    assert short.max() < 1.0


def test_keys_that_only_look_alike_give_other_draws() -> None:
    keys = [(1, 23, "a"), (12, 3, "a"), (1, 2, "3a"), (1, 23, "b"), (2, 23, "a")]
    firsts = {float(uniforms(1, *key)[0]) for key in keys}
    assert len(firsts) == len(keys)


def test_draws_are_pinned_so_that_old_checkpoints_resume_exactly() -> None:
    expected = np.array([0.17994756, 0.77262837, 0.5156556], dtype=np.float32)
    assert np.array_equal(uniforms(3, 42, 0, "train:1", "noise"), expected)


def test_levels_cover_the_configured_range() -> None:
    process = ForwardProcess(t_min=0.2, t_max=0.6)
    levels = process.level(torch.from_numpy(uniforms(20_000, "levels")))
    assert 0.2 <= levels.min() < 0.201
    assert 0.599 < levels.max() < 0.6
    assert abs(levels.mean().item() - 0.4) < 0.004


@pytest.mark.parametrize(
    "bad", [{"t_min": -0.1}, {"t_max": 1.1}, {"t_min": 0.7, "t_max": 0.5}, {"t_min": 0.0, "t_max": 0.0}]
)
def test_a_level_range_outside_0_and_1_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"t_min=.*t_max=.*need 0 <="):
        ForwardProcess(**bad)


def test_an_unknown_t_per_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"t_per='token': choose 'row' .* or 'sample'"):
        ForwardProcess(t_per="token")


def test_without_editing_no_visible_token_is_trained() -> None:
    ids, response = sample_row()
    made = corrupt(ids, response, draw(1, ids.shape[1], "noise"), torch.tensor(0.5), mask_id=MASK, stop=STOP)
    assert not made.checked.any()


@pytest.mark.parametrize(("t", "share"), [(0.0, 0.3), (0.5, 0.2), (0.8, 1.0)])
def test_a_share_of_the_visible_words_is_checked_and_half_of_those_replaced_by_other_words_of_the_row(
    t: float, share: float
) -> None:
    ids, response = sample_row(40_000)
    settings = {"mask_id": MASK, "stop": STOP}
    made = corrupt(ids, response, draw(1, 40_000, "noise"), torch.tensor(t), edit_share=share, **settings)
    plain = corrupt(ids, response, draw(1, 40_000, "noise"), torch.tensor(t), **settings)
    assert torch.equal(made.masked, plain.masked)
    assert not (made.checked & (made.masked | ~response)).any()
    assert torch.equal(made.noisy[~made.checked], plain.noisy[~made.checked])
    words = response & ~torch.isin(ids, torch.tensor(STOP))
    visible = words & ~made.masked
    assert abs(made.checked.sum() / visible.sum() - share) < 0.02
    changed = made.noisy != plain.noisy
    # a replacement is the right word by chance once in 13
    assert abs(changed.sum() / made.checked.sum() - 0.5 * 12 / 13) < 0.03
    assert not torch.isin(made.noisy[made.checked], torch.tensor([*STOP, MASK])).any()
    found = torch.bincount(made.noisy[changed], minlength=13)[:13] / changed.sum()
    assert (found - 1 / 13).abs().max() < 0.02


def test_a_row_without_response_has_nothing_to_check() -> None:
    ids, response = sample_row(100)
    made = corrupt(
        ids, torch.zeros_like(response), draw(1, 100, "n"), torch.tensor(0.5), mask_id=MASK, stop=STOP, edit_share=1.0
    )
    assert not made.checked.any()
    assert torch.equal(made.noisy, ids)
