"""Token frequencies: reading, where they are looked for, and what they do to the order."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var import GenerationConfig, Pretrained, generate
from dllm_var.decoding.compose import compose
from dllm_var.decoding.frequencies import check_frequency_file, read_frequencies, write_frequencies
from dllm_var.decoding.priors import Calibrated, PositionPrior
from dllm_var.model.checkpoint import load_model

GOLDEN = Path(__file__).parents[1] / "golden"


def test_a_token_that_never_occurs_counts_as_having_occurred_once(tmp_path: Path) -> None:
    write_frequencies(tmp_path / "f.json", {3: 6, 1: 2})
    f = read_frequencies(tmp_path / "f.json", 5)
    assert f.tolist() == [1 / 8, 2 / 8, 1 / 8, 6 / 8, 1 / 8]


def test_a_written_file_is_the_published_format_and_is_read_back(tmp_path: Path) -> None:
    assert write_frequencies(tmp_path / "f.json", {7: 1, 0: 4}) == 5
    assert json.loads((tmp_path / "f.json").read_text()) == {"num_token": 5, "p_baseline_dict": {"0": 4, "7": 1}}
    assert check_frequency_file(tmp_path / "f.json") == (5, {0: 4, 7: 1})
    assert [file.name for file in tmp_path.iterdir()] == ["f.json"]


def test_the_recorded_file_is_read() -> None:
    total, counts = check_frequency_file(GOLDEN / "token_freq.json")
    assert sum(counts.values()) == total == 67087
    assert float(read_frequencies(GOLDEN / "token_freq.json", 288)[32]) == 7040 / 67087


def test_counts_of_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path, recorded: Pretrained) -> None:
    write_frequencies(tmp_path / "f.json", {288: 1})
    config = GenerationConfig(debias=True, frequency_file=str(tmp_path / "f.json"))
    with pytest.raises(ValueError, match=r"counts the id 288, but the model has 0\.\.287"):
        generate(recorded, [[258]], config)


def _frequencies(model: Pretrained, **options: Any) -> torch.Tensor:
    scorer = compose(GenerationConfig(debias=True, **options), model.special, model.model.config).scorer
    assert isinstance(scorer, Calibrated)
    return (-scorer.information).exp()


def test_the_file_beside_the_model_is_found_and_a_named_one_wins(tmp_path: Path, recorded: Pretrained) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "tiny_llada", folder)
    write_frequencies(folder / "token_freq.json", {1: 1, 2: 3})
    write_frequencies(tmp_path / "other.json", {1: 1, 2: 1})
    model = Pretrained(load_model(folder), None, recorded.special)
    assert float(_frequencies(model)[2]) == pytest.approx(3 / 4)
    assert float(_frequencies(model, frequency_file=str(tmp_path / "other.json"))[2]) == pytest.approx(1 / 2)
    assert str(folder) not in model.model.config.to_json_string()  # what is saved from it does not name the place


def test_without_a_file_the_way_to_make_one_is_told(recorded: Pretrained, rule_model: Any, says: Any, special: Any) -> None:
    with pytest.raises(ValueError, match=r"no token_freq\.json beside its weights.*frequency_file=FILE.*count_tokens"):
        _frequencies(recorded)


def test_a_model_of_no_folder_does_not_take_a_file_that_happens_to_lie_around(
    recorded: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_frequencies(tmp_path / "token_freq.json", {1: 1})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorded.model.config, "name_or_path", "")
    with pytest.raises(ValueError, match="frequency_file=FILE"):
        _frequencies(recorded)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """The recorded counts without control tokens, as a corpus gives them."""
    counts = {token: n for token, n in check_frequency_file(GOLDEN / "token_freq.json")[1].items() if token < 256}
    write_frequencies(tmp_path / "corpus.json", counts)
    return str(tmp_path / "corpus.json")


def test_stop_tokens_can_count_as_the_most_frequent_token(recorded: Pretrained, corpus: str) -> None:
    reference = _frequencies(recorded, frequency_file=corpus)
    trivial = _frequencies(recorded, frequency_file=corpus, special_token_freq="trivial")
    stops = list(recorded.special.stop)
    assert float(reference[stops].max()) == pytest.approx(float(reference.min()))
    assert float(trivial[stops].min()) == pytest.approx(float(reference.max()))
    rest = [i for i in range(288) if i not in stops]
    assert torch.equal(reference[rest], trivial[rest])


def test_stop_tokens_come_early_where_they_are_rare_and_late_where_they_are_trivial(
    recorded: Pretrained, corpus: str
) -> None:
    prompts = [[258, 259, *b"rev abc", 257, 260], [258, 259, *b"add 7 8", 257, 260]]

    def first_stop(special: str) -> list[int]:
        config = GenerationConfig(
            method="pc_sampler", gen_length=24, lambd=0.0, frequency_file=corpus, special_token_freq=special
        )
        answers = generate(recorded, prompts, config)
        return [min(step for token, step in zip(a.raw, a.steps, strict=True) if token in (256, 257)) for a in answers]

    for rare, trivial in zip(first_stop("reference"), first_stop("trivial"), strict=True):
        assert rare < trivial


def test_pc_sampler_is_calibrated_confidence_under_a_position_prior(recorded: Pretrained) -> None:
    config = GenerationConfig(method="pc_sampler", frequency_file=str(GOLDEN / "token_freq.json"))
    scorer = compose(config, recorded.special, recorded.model.config).scorer
    assert isinstance(scorer, PositionPrior)
    assert isinstance(scorer.inner, Calibrated)
    assert (scorer.weight, scorer.kind, scorer.inner.clip) == (0.25, "exponential", 10.0)
