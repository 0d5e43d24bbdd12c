"""The rule that proposes a token: what may be proposed, how probable it is, and by which law it is drawn."""

import pytest
import torch
from torch import Tensor

from dllm_var.decoding import proposal
from dllm_var.decoding.noise import keys
from dllm_var.decoding.proposal import Candidates, Proposer, entropy, margin

V = 16


def _propose(logits: Tensor, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, confidence, measures) of rows of logits, under an identity head."""
    options = {"mask": 15, "forbidden": (14,), "temperature": 0.0, "guidance": 0.0, "measures": {}} | changes
    rows = torch.arange(len(logits) // (2 if options["guidance"] else 1))
    out = Proposer(**options)(logits, torch.eye(V), keys(0, rows), rows, rows + 100)
    numbers = out[1:].view(torch.float32)
    return out[0], numbers[0], numbers[1:]


def _logits(rows: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(rows))


def _allowed(logits: Tensor) -> Tensor:
    """Probabilities with token 14 forbidden, and the mask's column cut off."""
    return logits.index_fill(-1, torch.tensor(14), float("-inf")).softmax(-1)[..., :15]


def test_the_mask_is_never_proposed_but_keeps_its_share_of_probability() -> None:
    logits = _logits(50)
    logits[:25, 15] = logits[:25].max(-1).values + 1
    ids, confidence, _ = _propose(logits)
    expected = _allowed(logits).max(-1)
    assert torch.equal(ids.long(), expected.indices)
    assert torch.allclose(confidence, expected.values, atol=1e-6)
    assert float(confidence[:25].max()) < 0.5


def test_rows_of_the_embedding_that_no_token_has_are_never_proposed_but_keep_their_share() -> None:
    logits, measures = _logits(50), {"entropy": entropy, "margin": margin}
    logits[:, 11:14] += 50.0
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3, "tempered": True}):
        ids, confidence, numbers = _propose(logits, known=11, measures=measures, **options)
        assert int(ids.max()) < 11
        assert bool((confidence < 1e-9).all()) == ("tempered" not in options)
        assert bool(numbers.isfinite().all())
    within = logits[:, :11].log_softmax(-1)
    _, _, numbers = _propose(logits, known=11, measures=measures)
    assert torch.allclose(numbers[0], -(within.exp() * within).sum(-1), atol=1e-5)


def test_entropy_and_margin_do_not_take_a_wish_for_the_mask_for_certainty() -> None:
    logits, measures = _logits(50), {"entropy": entropy, "margin": margin}
    asked = logits.clone()
    asked[:, 15] = asked.max(-1).values + 5
    plain, wished = _propose(logits, measures=measures)[2], _propose(asked, measures=measures)[2]
    assert torch.allclose(plain[0], wished[0], atol=1e-5)
    best, second = _allowed(asked).topk(2).values.unbind(-1)
    assert torch.allclose(wished[1], best - second, atol=1e-6)
    assert float(wished[1].max()) < 0.01


def test_a_forbidden_token_is_never_proposed_and_has_no_probability() -> None:
    logits = _logits(50)
    logits[:, 14] = 1000.0
    ids, confidence, _ = _propose(logits)
    assert torch.equal(ids.long(), _allowed(logits).argmax(-1))
    assert torch.allclose(confidence, _allowed(logits).max(-1).values, atol=1e-6)


def test_confidences_near_one_keep_their_order_when_logits_are_large() -> None:
    gaps = torch.linspace(12.0, 15.0, 30)
    logits = torch.full((30, V), -100.0)
    logits[:, 0], logits[:, 1] = 40.0, 40.0 - gaps
    _, confidence, _ = _propose(logits)
    assert bool((confidence.diff() >= 0).all())
    assert torch.allclose(confidence.double(), logits.double().softmax(-1)[:, 0], atol=1.2e-7, rtol=0)


def test_among_equal_logits_the_lowest_id_is_proposed() -> None:
    ids, confidence, _ = _propose(torch.zeros(3, V))
    assert ids.tolist() == [0, 0, 0]
    assert torch.allclose(confidence, torch.tensor(1 / 15))  # 14 allowed tokens and the mask


def test_chunks_of_rows_give_what_all_rows_at_once_give(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(37)
    options = {"temperature": 0.7, "measures": {"position": lambda seen: seen.positions}}
    whole = _propose(logits, **options)
    monkeypatch.setattr(proposal, "CHUNK_ELEMENTS", 5 * V)
    for one, other in zip(whole, _propose(logits, **options), strict=True):
        assert torch.equal(one, other)


def test_no_row_is_no_proposal() -> None:
    ids, confidence, numbers = _propose(torch.zeros(0, V), measures={"zero": lambda seen: seen.confidence})
    assert (ids.numel(), confidence.numel(), numbers.shape) == (0, 0, (1, 0))


def test_a_temperature_draws_from_the_tempered_softmax_and_reports_the_plain_probability() -> None:
    row = _logits(1, scale=1.0)
    ids, confidence, _ = _propose(row.expand(40_000, V), temperature=0.5)
    share = torch.bincount(ids.long(), minlength=14) / len(ids)
    assert len(share) == 14  # neither the forbidden token nor the mask was drawn
    assert float((share - (row[0, :14] / 0.5).softmax(0)).abs().max()) < 0.01
    assert torch.allclose(confidence, _allowed(row[0])[ids.long()], atol=1e-6)


def test_guidance_moves_the_logits_away_from_those_without_the_prompt() -> None:
    conditional, unconditional = _logits(20), _logits(21)[:20]
    ids, confidence, _ = _propose(torch.cat((conditional, unconditional)), guidance=1.5)
    guided = _allowed(unconditional + 2.5 * (conditional - unconditional)).max(-1)
    assert torch.equal(ids.long(), guided.indices)
    assert torch.allclose(confidence, guided.values, atol=1e-5)


def test_a_measure_sees_log_probabilities_and_where_each_row_stands() -> None:
    seen: list[Candidates] = []

    def watched(candidates: Candidates) -> Tensor:
        seen.append(candidates)
        logp = candidates.logits - candidates.logsumexp[:, None]
        return torch.special.entr(logp.exp()).sum(-1)

    logits = _logits(8)
    _, _, numbers = _propose(logits, measures={"watched": watched})
    p = logits.index_fill(-1, torch.tensor(14), float("-inf")).softmax(-1)
    assert torch.allclose(numbers[0], torch.special.entr(p).sum(-1), atol=1e-5)
    assert seen[0].positions.tolist() == list(range(100, 108))
    assert seen[0].rows.tolist() == list(range(8))


def test_top_k_and_top_p_leave_the_likeliest_tokens_with_their_proportions() -> None:
    row = torch.full((1, V), -20.0)
    row[0, :5] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    for options, kept in (
        ({"top_k": 3}, 3), ({"top_p": 0.69}, 2), ({"top_p": 0.71}, 3), ({"top_p": 0.9, "top_k": 2}, 2),
        ({"top_p": 0.05}, 1), ({"top_k": 99}, 5), ({}, 5),
    ):  # fmt: skip
        ids, _, _ = _propose(row.expand(20_000, V), temperature=1.0, **options)
        share = torch.bincount(ids.long(), minlength=V)[:V] / len(ids)
        expected = row[0].softmax(0)[:kept] / row[0].softmax(0)[:kept].sum()
        assert float((share[:kept] - expected).abs().max()) < 0.015  # four standard deviations
        assert float(share[kept:].sum()) == 0


def test_the_share_that_top_p_counts_is_that_at_the_temperature() -> None:
    row = torch.full((1, V), -50.0)
    row[0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    for temperature, drawn in ((0.2, {0}), (1.0, {0, 1}), (5.0, {0, 1, 2})):
        ids, _, _ = _propose(row.expand(4000, V), temperature=temperature, top_p=0.7)
        assert set(ids.tolist()) == drawn


def test_truncation_that_leaves_everything_changes_no_draw() -> None:
    logits = _logits(300)
    plain = _propose(logits, temperature=0.9)
    for options in ({"top_p": 1.0}, {"top_k": None}, {"top_k": V}):
        for one, other in zip(plain, _propose(logits, temperature=0.9, **options), strict=True):
            assert torch.equal(one, other)


def test_among_equal_tokens_top_k_keeps_the_lowest_ids() -> None:
    ids, _, _ = _propose(torch.zeros(2000, V), temperature=1.0, top_k=3)
    assert set(ids.tolist()) == {0, 1, 2}


def test_the_mask_is_not_drawn_however_likely_and_takes_no_part_in_top_p() -> None:
    row = torch.zeros(1, V)
    row[0, 15], row[0, 3] = 30.0, 5.0
    ids, _, _ = _propose(row.expand(2000, V), temperature=1.0, top_p=0.9)
    assert set(ids.tolist()) == {3}


def test_a_tempered_confidence_is_the_probability_with_which_the_token_is_drawn() -> None:
    row = torch.full((1, V), -20.0)
    row[0, :3] = torch.tensor([0.5, 0.3, 0.2]).log()
    measures = {"entropy": entropy, "margin": margin}
    options = {"temperature": 0.5, "top_k": 2, "measures": measures}
    p = torch.tensor([0.5, 0.3]) ** 2
    p = p / p.sum()
    ids, confidence, numbers = _propose(row.expand(500, V), tempered=True, **options)
    assert torch.allclose(confidence, p[ids.long()], atol=1e-5)
    assert torch.allclose(numbers[0], torch.special.entr(p).sum(), atol=1e-5)
    assert torch.allclose(numbers[1], p[0] - p[1], atol=1e-5)
    again, raw, _ = _propose(row.expand(500, V), **options)
    assert torch.equal(again, ids)  # the draw is the same
    assert torch.allclose(raw, torch.tensor([0.5, 0.3])[ids.long()], atol=1e-5)


def test_at_temperature_zero_truncation_changes_nothing() -> None:
    logits = _logits(60)
    for one, other in zip(_propose(logits), _propose(logits, top_p=0.3, top_k=2), strict=True):
        assert torch.equal(one, other)


def test_a_row_is_drawn_as_if_it_were_alone() -> None:
    logits = _logits(12)
    together = _propose(logits, temperature=1.3, top_p=0.8, top_k=5, tempered=True)
    for i in range(12):
        at = torch.tensor([i])
        alone = Proposer(15, (14,), 1.3, 0.0, {}, top_p=0.8, top_k=5, tempered=True)(
            logits[at], torch.eye(V), keys(0, at), at, at
        )
        assert int(alone[0]) == int(together[0][i])
        assert float(alone[1].view(torch.float32)) == pytest.approx(float(together[1][i]), rel=1e-6)


def test_the_entropy_of_forbidden_tokens_is_nothing_and_the_margin_is_between_the_best_two() -> None:
    row = torch.full((1, V), -200.0)
    row[0, :2] = torch.tensor([0.75, 0.25]).log()
    _, confidence, numbers = _propose(row, measures={"entropy": entropy, "margin": margin})
    assert float(confidence) == pytest.approx(0.75)
    assert numbers[:, 0].tolist() == pytest.approx([0.562335, 0.5], rel=1e-5)
