"""The rule that proposes a token: what may be proposed, how probable it is, and by which law it is drawn."""

import pytest
import torch
from torch import Tensor

from dllm_var.decoding import proposal
from dllm_var.decoding.noise import keys
from dllm_var.decoding.proposal import Candidates, Proposer

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

    def entropy(candidates: Candidates) -> Tensor:
        seen.append(candidates)
        logp = candidates.logits - candidates.logsumexp[:, None]
        return torch.special.entr(logp.exp()).sum(-1)

    logits = _logits(8)
    _, _, numbers = _propose(logits, measures={"entropy": entropy})
    p = logits.index_fill(-1, torch.tensor(14), float("-inf")).softmax(-1)
    assert torch.allclose(numbers[0], torch.special.entr(p).sum(-1), atol=1e-5)
    assert seen[0].positions.tolist() == list(range(100, 108))
    assert seen[0].rows.tolist() == list(range(8))
