"""Validation: the right places are asked, with only masks to the right, and a known model gets the known marks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_var import Pretrained
from dllm_var.diffusion.corruption import uniforms
from dllm_var.model.llada import LLaDAOutput
from dllm_var.text.special_tokens import SpecialTokens
from sft_training.config import SftConfig, ValidationSection
from sft_training.records import read_metrics
from sft_training.samples import Sample, SampleFiles, SampleRules
from sft_training.sft import train
from sft_training.validation import LEVELS, Validator, answer_of

SPECIAL = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)
VOCABULARY = 288


class Oracle(torch.nn.Module):
    """Stands in for the network: answers each wanted position by a rule on (row of ids, position), with certainty."""

    def __init__(self, rule: Callable[[list[int], int], int]) -> None:
        super().__init__()
        self.rule = rule
        self.weight = torch.nn.Parameter(20.0 * torch.eye(VOCABULARY))
        self.config = type("Config", (), {"max_sequence_length": 512, "embedding_rows": VOCABULARY})()
        self.asked: list[tuple[list[int], int]] = []
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, logits_for: Tensor, project: Any) -> LLaDAOutput:
        self.modes.append(self.training)
        answers = []
        for ids, real, wanted in zip(input_ids.tolist(), attention_mask, logits_for, strict=True):
            row = ids[: int(real.sum())]
            for position in wanted.nonzero()[:, 0].tolist():
                self.asked.append((row, position))
                answers.append(self.rule(row, position))
        return LLaDAOutput(logits=project(torch.eye(VOCABULARY)[answers], self.weight))


def samples(write: Any, lengths: Sequence[int]) -> SampleFiles:
    return SampleFiles([write(lengths)], SampleRules(VOCABULARY, SPECIAL.mask))


def validator(
    write: Any, rule: Callable[[list[int], int], int], lengths: Sequence[int] = (12, 20, 7), **section: Any
) -> Validator:
    fields = {"block_length": 8, "decodes": 0, "samples": 10, **section}
    held_out = samples(write, lengths)
    return Validator(ValidationSection(**fields), held_out, Pretrained(Oracle(rule), None, SPECIAL), print)


def truth(found: Validator) -> Callable[[list[int], int], int]:
    """The clean token: rows are recognised by their first five (prompt) tokens."""
    clean = {tuple(sample.ids[:5].tolist()): sample.ids.tolist() for sample in found.samples}
    return lambda row, position: clean[tuple(row[:5])][position] if position < len(clean[tuple(row[:5])]) else 270


def test_a_model_that_knows_the_answers_has_no_loss_and_perfect_ends(write_samples: Any) -> None:
    found = validator(write_samples, lambda row, position: 0)
    found.pretrained.model.rule = truth(found)
    measured = found.measure()
    assert measured["loss"] < 1e-5
    assert measured["elbo"] < 1e-5
    assert measured["eos_recall"] == measured["eos_precision"] == 1.0
    assert measured["eos_false_stop"] == 0.0
    assert {f"loss_t{t}" for t in LEVELS} <= measured.keys()
    assert {f"eos_recall_d{d}" for d in (0, 4, 8, 16)} <= measured.keys()


def test_a_model_that_always_stops_has_full_recall_and_half_precision(write_samples: Any) -> None:
    measured = validator(write_samples, lambda row, position: 257).measure()
    assert measured["eos_recall"] == 1.0
    assert measured["eos_false_stop"] == 1.0
    assert measured["eos_precision"] == 0.5


def test_a_model_that_never_stops_has_no_recall_and_no_precision(write_samples: Any) -> None:
    measured = validator(write_samples, lambda row, position: 97).measure()
    assert (measured["eos_recall"], measured["eos_false_stop"], measured["eos_precision"]) == (0.0, 0.0, 0.0)
    assert measured["loss"] > 10


def test_recall_and_precision_are_also_told_by_the_place_of_the_end(write_samples: Any) -> None:
    # a model that stops wherever 16 tokens or more of the answer are visible: right at late ends, wrong inside long answers
    found = validator(write_samples, lambda row, position: 257 if position - 5 >= 16 else 97, [6, 12, 40, 90])
    measured = found.measure()
    assert measured["eos_recall"] == 0.5
    assert measured["eos_recall_at_0-15"] == 0.0
    assert measured["eos_recall_at_16-63"] == measured["eos_recall_at_64-255"] == 1.0
    assert not any("256+" in name for name in measured)
    cuts = {position - 5 for row, position in found.pretrained.model.asked[-4:]}
    assert min(cuts) < 16 <= max(cuts)
    assert measured["eos_false_stop_at_0-15"] == 0.0
    assert measured["eos_precision_at_0-15"] == 0.0
    late = [name for name in measured if name.startswith("eos_false_stop_at_") and not name.endswith("_0-15")]
    assert late
    assert all(measured[name] == 1.0 for name in late)
    assert all(measured[name.replace("false_stop", "precision")] == 0.5 for name in late)


def test_plain_and_elbo_loss_are_those_of_their_formulas(write_samples: Any) -> None:
    found = validator(write_samples, lambda row, position: 97, [30] * 10)
    model = found.pretrained.model
    model.weight.data.zero_()  # every token is equally likely
    measured = found.noisy_loss()
    nats = np.log(VOCABULARY)
    assert measured["loss"] == pytest.approx(nats)
    assert all(measured[f"loss_t{t}"] == pytest.approx(nats) for t in LEVELS)
    share = []
    for t in LEVELS:  # of the response tokens, those that the noise alone masks: stop tokens only where it falls on them
        hidden = [uniforms(35, 0, sample.key, "validation")[5:] < t for sample in found.samples]
        share.append(np.mean(hidden) / t)
    assert measured["elbo"] == pytest.approx(nats * np.mean(share))
    assert np.mean(share) == pytest.approx(1.0, abs=0.1)  # the weights 1/t make up for what is not masked


def test_ends_are_probed_with_the_answer_visible_and_only_masks_to_the_right(write_samples: Any) -> None:
    found = validator(write_samples, lambda row, position: 97)
    found.stopping()
    seen = found.pretrained.model.asked
    clean = {tuple(sample.ids[:5].tolist()): sample.ids.tolist() for sample in found.samples}
    at_end = 0
    for row, position in seen:
        original = clean[tuple(row[:5])]
        assert row[:position] == original[:position]
        assert set(row[position:]) == {SPECIAL.mask}
        assert position <= len(original) - 2
        at_end += position == len(original) - 2
    assert at_end == 4 * len(found.samples)  # four distances; the cuts all lie before the end
    assert len(seen) == 5 * len(found.samples)
    assert sorted({len(row) - 1 - position for row, position in seen}) == [0, 4, 7, 8, 16]


def test_the_noise_is_the_same_at_every_call_and_grows_with_the_level(write_samples: Any) -> None:
    found = validator(write_samples, lambda row, position: 97, [30] * 10)
    found.noisy_loss()
    first = list(found.pretrained.model.asked)
    found.pretrained.model.asked.clear()
    found.noisy_loss()
    assert found.pretrained.model.asked == first
    masks = [sum(token == SPECIAL.mask for token in row) for row, _ in first]
    assert max(masks) > 25
    for row, position in first:
        assert row[position] == SPECIAL.mask
        assert row[-2:] == [SPECIAL.mask] * 2  # eot and EOS, whatever the level


def test_measuring_uses_evaluation_mode_and_gives_the_training_mode_back(write_samples: Any) -> None:
    found = validator(write_samples, lambda row, position: 97)
    found.pretrained.model.train()
    found.measure()
    assert not any(found.pretrained.model.modes)
    assert found.pretrained.model.training


def test_samples_too_long_for_the_model_are_left_out_and_counted(
    write_samples: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = validator(write_samples, lambda row, position: 97, [12, 700, 9])
    assert [len(sample.ids) for sample in found.samples] == [17, 14]
    assert "validation.files: 1 of the first 3 samples are left out, for more than 496 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"validation\.files: no sample has a response and at most 496 tokens"):
        validator(write_samples, lambda row, position: 97, [700])


def test_the_answer_of_a_sample_ends_before_its_first_stop_token() -> None:
    response = np.array([0, 0, 1, 1, 1, 1], bool)
    found = answer_of(Sample("a", np.array([257, 4, 5, 6, 257, 256]), response), SPECIAL.stop)
    assert found is not None
    assert (found.prompt.tolist(), found.tokens.tolist()) == ([257, 4], [5, 6])
    assert answer_of(Sample("cut", np.array([257, 4, 5, 6, 7, 8]), response), SPECIAL.stop) is None


def test_a_run_with_validation_logs_it_beside_the_loss_and_trains_the_same(
    settings: Callable[..., SftConfig], write_chat: Any
) -> None:
    files = write_chat([(f"q{i}", "answer " * (i % 4 + 1)) for i in range(24)])
    quiet = settings(files, "packing.max_length=96", output="quiet")
    loud = settings(
        files, "packing.max_length=96", f"validation.files={files}", "validation.every=4", "validation.decodes=2",
        "validation.max_gen_length=24", "validation.block_length=8", "validation.samples=5", output="loud",
    )  # fmt: skip
    train(quiet)
    train(loud)
    lines = read_metrics(Path(loud.output_dir))
    measured = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in measured] == [4, 6]
    for line in measured:
        assert {"eval_exact_match", "eval_length_error", "eval_stops_by_eos", "eval_tokens_per_forward"} <= line.keys()
        assert 0 < line["eval_loss_t0.5"] < 10
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses == [line["loss"] for line in read_metrics(Path(quiet.output_dir)) if "loss" in line]
    assert len(losses) == 6
