"""The Monte-Carlo bound on ln p(answer | prompt) against enumeration, its error against its spread, and the greedy check."""

import math
from copy import deepcopy
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var import GenerationConfig, Pretrained, generate
from dllm_var.diffusion.likelihood import Likelihood, draw_masks, is_greedy, log_likelihood, score_masks

MASK = 270
PROMPT = [258, 259, *b"rev abc", 257, 260]
SAMPLINGS = pytest.mark.parametrize("sampling", ["stratified", "antithetic", "independent"])


def _scored(model: Pretrained, pairs: Any, **options: Any) -> list[Likelihood]:
    return log_likelihood(model.model, MASK, pairs, **options)


def _log_p(model: Pretrained, prompt: list[int], answer: list[int], hidden: tuple[int, ...], guidance: float) -> list[float]:
    """ln p of each answer token from the canvas with the given answer positions masked, by the full logits."""
    shown = [MASK if i in hidden else token for i, token in enumerate(answer)]
    with torch.inference_mode():
        logits = model.model(torch.tensor([prompt + shown])).logits[0]
        if guidance:
            plain = model.model(torch.tensor([[MASK] * len(prompt) + shown])).logits[0]
            logits = plain + (guidance + 1) * (logits - plain)
    log_p = logits.double().log_softmax(-1)
    return [float(log_p[len(prompt) + i, token]) for i, token in enumerate(answer)]


def _in_any_order(model: Pretrained, prompt: list[int], answer: list[int], guidance: float = 0.0) -> float:
    """The bound by another road: the mean over all orders of revealing the answer of Σ ln p(next | those revealed)."""
    known = {
        hidden: _log_p(model, prompt, answer, hidden, guidance)
        for size in range(1, len(answer) + 1)
        for hidden in combinations(range(len(answer)), size)
    }
    orders = list(permutations(range(len(answer))))
    return sum(known[tuple(sorted(o[at:]))][o[at]] for o in orders for at in range(len(answer))) / len(orders)


def _every_set(length: int) -> Tensor:
    """A unit in which every count has the same weight, and every set of a count: bool [1, S, L]."""
    rows = []
    for count in range(1, length + 1):
        sets = list(combinations(range(length), count))
        rows += sets * (math.lcm(*(math.comb(length, k) for k in range(1, length + 1))) // len(sets))
    return torch.tensor([[[i in chosen for i in range(length)] for chosen in rows]])


@pytest.mark.parametrize("guidance", [0.0, 0.7])
def test_the_mean_over_all_sets_is_the_mean_over_all_orders(guidance: float, recorded64: Pretrained) -> None:
    answer = [99, 98, 97]
    exact = _in_any_order(recorded64, PROMPT, answer, guidance)
    ours = score_masks(recorded64.model, MASK, [(PROMPT, answer)], [_every_set(3)], cfg_scale=guidance)[0]
    assert ours.value == pytest.approx(exact, rel=1e-6)


@SAMPLINGS
def test_the_estimate_approaches_the_bound(sampling: str, recorded64: Pretrained) -> None:
    answer = [99, 98, 97]
    exact = _in_any_order(recorded64, PROMPT, answer)
    ours = _scored(recorded64, [(PROMPT, answer)], samples=40_000, sampling=sampling, seed=5)[0]
    assert ours.samples == 40_000
    assert 0 < ours.standard_error < 0.02 * abs(exact)
    assert abs(ours.value - exact) < 3 * ours.standard_error


@SAMPLINGS
def test_the_standard_error_is_the_spread_over_seeds(sampling: str, recorded64: Pretrained) -> None:
    runs = _scored(recorded64, [(PROMPT, [99, 98, 97])] * 150, samples=160, sampling=sampling)
    spread = torch.tensor([run.value for run in runs]).std()
    stated = torch.tensor([run.standard_error for run in runs]).square().mean().sqrt()
    assert float(stated / spread) == pytest.approx(1.0, abs=0.2)


def test_a_model_that_knows_nothing_gives_the_same_in_every_sample(recorded: Pretrained) -> None:
    model = deepcopy(recorded.model)
    torch.nn.init.zeros_(model.model.head_weight)
    ours = log_likelihood(model, MASK, [(PROMPT, [1, 2, 3, 4, 5])], samples=32)[0]
    assert ours.value == pytest.approx(-5 * math.log(model.config.embedding_rows), rel=1e-6)
    assert ours.standard_error == pytest.approx(0.0, abs=1e-6)


def test_an_answer_of_one_token_has_no_variance_and_needs_one_row(
    recorded64: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    forward = type(recorded64.model).forward

    def count(self: Any, input_ids: Tensor, **arguments: Any) -> Any:
        rows.append(len(input_ids))
        return forward(self, input_ids, **arguments)

    monkeypatch.setattr(type(recorded64.model), "forward", count)
    ours = _scored(recorded64, [(PROMPT, [99])])[0]
    assert (ours.standard_error, ours.samples, rows) == (0.0, 128, [1])
    monkeypatch.undo()
    assert ours.value == pytest.approx(_log_p(recorded64, PROMPT, [99], (0,), 0.0)[0], rel=1e-6)


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_pair_does_not_know_its_batch_mates(guidance: float, recorded64: Pretrained) -> None:
    pairs = [(PROMPT, [99, 98, 97, 256]), ([], [1, 2]), (PROMPT[:5], [7] * 9), ([5], [99])]
    options: dict[str, Any] = {"samples": 16, "seed": 3, "cfg_scale": guidance}
    together = _scored(recorded64, pairs, batch_size=7, requests=[4, 5, 6, 7], **options)
    for pair, request, ours in zip(pairs, (4, 5, 6, 7), together, strict=True):
        alone = _scored(recorded64, [pair], batch_size=64, requests=[request], **options)[0]
        assert ours.value == pytest.approx(alone.value, rel=1e-6)
    greedy = is_greedy(recorded64.model, MASK, pairs, batch_size=3, cfg_scale=guidance)
    assert greedy == [is_greedy(recorded64.model, MASK, [pair], cfg_scale=guidance)[0] for pair in pairs]


def test_a_literal_mask_token_is_a_token_like_any_other(recorded64: Pretrained) -> None:
    prompt, answer = [*PROMPT, MASK, MASK], [99, MASK, 97]
    exact = _in_any_order(recorded64, prompt, answer)
    ours = score_masks(recorded64.model, MASK, [(prompt, answer)], [_every_set(3)])[0]
    assert ours.value == pytest.approx(exact, rel=1e-6)


@SAMPLINGS
@pytest.mark.parametrize("length", [1, 5, 24])
def test_every_count_is_equally_likely_and_so_is_every_position(sampling: str, length: int) -> None:
    masks = draw_masks(length, 16_000, sampling, 0, 0).flatten(0, 1)
    counts = masks.sum(1).bincount(minlength=length + 1)[1:].double()
    expected = 16_000 / length
    assert counts.sum() == 16_000  # no sample is empty
    assert bool(((counts - expected).abs() < 6 * math.sqrt(expected) + 1e-9).all())
    for count in (1, (length + 1) // 2):
        of_count = masks[masks.sum(1) == count].double()
        share = of_count.mean(0)
        assert bool(((share - count / length).abs() < 6 * math.sqrt(count / length / len(of_count))).all())


@pytest.mark.parametrize("length", [3, 16, 24, 40])
def test_the_counts_of_a_stratified_unit_are_spread_evenly(length: int) -> None:
    counts = draw_masks(length, 16 * 400, "stratified", 1).sum(-1)
    for unit in counts:
        ordered = torch.cat((unit.sort().values, unit.min()[None] + length))
        assert int(ordered.diff().max()) <= -(-length // 16)  # around the circle no gap is wider than a stratum
    odd = (counts % 2).double().mean(0)  # of each stratum: rounding halves to even would make every second one even
    assert bool(((odd - (length + 1) // 2 / length).abs() < 6 * 0.5 / 20).all())


def test_what_one_of_an_antithetic_pair_hides_the_other_shows() -> None:
    first, second = draw_masks(9, 200, "antithetic", 2).unbind(1)
    assert bool((first | second).all())
    assert (first & second).sum(1).tolist() == [1] * 100


def test_draws_depend_on_the_key_alone_and_more_samples_extend_fewer() -> None:
    few, many = draw_masks(7, 32, "stratified", 3, 1), draw_masks(7, 64, "stratified", 3, 1)
    assert torch.equal(few, many[:2])
    assert not torch.equal(few, draw_masks(7, 32, "stratified", 3, 2))
    assert not torch.equal(few, draw_masks(7, 32, "stratified", 4, 1))


def test_greedy_is_what_decoding_one_token_per_forward_gives(recorded: Pretrained) -> None:
    prompts = [[258, 259, *text, 257, 260] for text in (b"rev abc", b"add 12 7=", b"say hi")]
    config = GenerationConfig(method="vanilla", gen_length=8, steps=8)
    pairs = [(prompt, answer.raw) for prompt, answer in zip(prompts, generate(recorded, prompts, config), strict=True)]
    assert is_greedy(recorded.model, MASK, pairs) == [True] * 3
    for place in range(8):
        prompt, answer = pairs[0][0], list(pairs[0][1])
        answer[place] += 1
        assert is_greedy(recorded.model, MASK, [(prompt, answer), pairs[1]]) == [False, True]


def test_greedy_never_proposes_the_mask(recorded: Pretrained) -> None:
    model = deepcopy(recorded.model)
    model.model.head_weight.data[MASK] *= -2  # what training made least likely
    answer = generate(Pretrained(model, None, recorded.special), [PROMPT], GenerationConfig(method="vanilla", gen_length=8))
    with torch.inference_mode():
        wanted = model(torch.tensor([PROMPT + [MASK] * 8])).logits[0, -8:].argmax(-1)
    assert MASK in wanted.tolist()
    assert is_greedy(model, MASK, [(PROMPT, answer[0].raw)]) == [True]


def test_greedy_never_proposes_an_id_that_no_token_has(recorded: Pretrained) -> None:
    (answer,) = generate(recorded, [PROMPT], GenerationConfig(method="vanilla", gen_length=1))
    pairs = [(PROMPT, answer.raw)]
    assert is_greedy(recorded.model, MASK, pairs, known=answer.raw[0] + 1) == [True]
    assert is_greedy(recorded.model, MASK, pairs, known=answer.raw[0]) == [False]


def test_a_single_unit_has_no_error_to_state(recorded: Pretrained) -> None:
    assert math.isnan(_scored(recorded, [(PROMPT, [1, 2])], samples=16)[0].standard_error)


def test_nothing_asked_nothing_answered(recorded: Pretrained) -> None:
    assert _scored(recorded, []) == []
    assert is_greedy(recorded.model, MASK, []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 20}, "samples=20 must be a multiple of 16 with sampling='stratified': give 32"),
        ({"samples": 0, "sampling": "independent"}, "samples=0 .* give 1"),
        ({"samples": 3, "sampling": "antithetic"}, "samples=3 .* give 4"),
        ({"sampling": "best"}, "sampling='best'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0"),
        ({"requests": [1, 2]}, "requests has 2 numbers for 1 pairs"),
        ({"pairs": [([1], [])]}, "answer 0 is empty"),
        ({"pairs": [([1], [2]), ([1, 999], [3])]}, "pair 1 holds the id 999"),
    ],
)
def test_a_bad_value_is_named(options: dict[str, Any], message: str, recorded: Pretrained) -> None:
    pairs = options.pop("pairs", [(PROMPT, [1])])
    with pytest.raises(ValueError, match=message):
        _scored(recorded, pairs, **options)


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(1, 2, 3), torch.zeros(1, 2, 2)])
def test_masks_that_do_not_fit_their_answer_are_refused(mask: Tensor, recorded: Pretrained) -> None:
    with pytest.raises(ValueError, match="masks of pair 0"):
        score_masks(recorded.model, MASK, [(PROMPT, [1, 2])], [mask.bool()])
