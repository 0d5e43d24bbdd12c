"""Counter-based noise: known values, the right laws, and nothing but its key decides a draw."""

import torch

from dllm_var.decoding.noise import GOLDEN, gumbel, keys, mix, uniform


def test_the_mixing_function_is_that_of_splitmix64() -> None:
    counter = torch.tensor([1, 2, 3]) * (GOLDEN - 2**64)
    words = [int(x) % 2**64 for x in mix(counter)]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # published outputs of seed 0


def test_a_key_depends_on_each_of_its_parts() -> None:
    parts = [torch.tensor(0), torch.tensor(0), torch.tensor(0)]
    seen = {int(keys(7, *parts)), int(keys(8, *parts)), int(keys(-7, *parts)), int(keys(7 + 2**63, *parts))}
    for i in range(3):
        seen.add(int(keys(7, *(part + (i == j) for j, part in enumerate(parts)))))
    assert len(seen) == 7


def test_draws_do_not_depend_on_what_is_drawn_beside_them() -> None:
    steps = torch.arange(50)
    together = gumbel(keys(1, torch.tensor(4), steps), 9)
    alone = torch.stack([gumbel(keys(1, torch.tensor(4), step)[None], 9)[0] for step in steps])
    assert torch.equal(together, alone)


def test_uniform_draws_fill_the_open_interval_evenly() -> None:
    u = uniform(keys(3, torch.arange(100_000)))
    assert u.dtype == torch.float64
    assert 0 < float(u.min()) < 1e-4
    assert 1 - 1e-4 < float(u.max()) < 1
    share = torch.histc(u.float(), bins=20, min=0, max=1) / len(u)
    assert float((share - 0.05).abs().max()) < 0.003  # four standard deviations of a bin
    assert abs(float(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1])) < 0.015


def test_the_largest_of_logits_plus_gumbel_noise_is_a_draw_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    picks = (logits + gumbel(keys(5, torch.arange(40_000)), 5)).argmax(-1)
    share = torch.bincount(picks, minlength=5) / len(picks)
    assert float((share - logits.softmax(0)).abs().max()) < 0.01  # four standard deviations
