"""Whole runs on several sources: what is logged and counted, exact resume, and settings that make no sense."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from test_training_run import StopAt, _quiet, equal, metrics, weights  # noqa: F401

from dllm_var.text.special_tokens import SpecialTokens
from sft_training import build
from sft_training.build import build_stream, training_steps
from sft_training.config import SftConfig
from sft_training.overrides import compose_settings
from sft_training.records import read_metrics
from sft_training.sft import prepare, train
from sft_training.tally import Tally

Settings = Callable[..., SftConfig]
SPECIAL = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)
KINDS = ("prompt", "response", "masked", "eos")


@pytest.fixture
def mixed(settings: Settings, write_samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a mixture: token ids in JSON Lines, and text in a saved dataset that is tokenised when it is read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    files = write_samples([3 + (5 * i) % 19 for i in range(20)] + [90])
    texts = [f"{'ab' * (i % 4)} {i}" for i in range(9)]
    columns = {"instruction": ["say"] * 9, "input": texts, "output": texts}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "texts")
    hub = tmp_path / "texts"
    sources = f"dataset.sources=[{{name: ids, files: {files}, weight: 3}}, {{name: text, hub: {hub}, weight: 1}}]"

    def build(*more: str, output: str = "run") -> SftConfig:
        return settings(Path("x"), "dataset.files=null", sources, "packing.max_length=64", *more, output=output)

    return build


@pytest.mark.filterwarnings("ignore:sample ids/:UserWarning")
def test_a_run_on_several_sources_logs_each_and_resumes_bit_for_bit(mixed: Settings) -> None:
    options = ("training.save_steps=2", "training.logging_steps=2", "training.max_steps=4", "view.tail_share=0")
    whole = mixed(*options, output="whole")
    trainer = train(whole)
    lines = [line for line in read_metrics(Path(whole.output_dir)) if "loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        for kind in KINDS:
            parts = [line[f"tokens/source_{name}/{kind}"] for name in ("ids", "text")]
            assert min(parts) > 0
            assert sum(parts) == line[f"tokens/{kind}"]
        ids, text = (line[f"tokens/source_{name}/masked"] for name in ("ids", "text"))
        levels = [line[key] for key in line if key.startswith("ce/t_")]
        assert all(2.0 < value < 9.0 for value in levels)
        mean = (line["ce/source_ids"] * ids + line["ce/source_text"] * text) / (ids + text)
        assert min(levels) <= mean <= max(levels)
        assert line["ce/source_ids"] != line["ce/source_text"]
    run = json.loads((Path(whole.output_dir) / "run.json").read_text(encoding="utf-8"))
    assert run["samples"] == 30
    assert run["sources"]["ids"]["share"] == 0.75
    assert run["sources"] == trainer.stream.sources(4 * 4)
    assert run["dropped_samples"] == run["sources"]["ids"]["dropped"] == lines[-1]["data/dropped_ids"] >= 1
    assert run["sources"]["text"]["dropped"] == 0

    stopped, _ = prepare(mixed(*options, output="stopped"))
    stopped.add_callback(StopAt(3))
    stopped.train()
    resumed = mixed(*options, output="stopped")
    train(resumed)
    for key in ("loss", "tokens/source_text/masked", "ce/source_ids", "data/passes_text", "epoch"):
        assert metrics(resumed, key) == metrics(whole, key)
    assert equal(weights(resumed), weights(whole))


def test_the_cross_entropy_of_a_source_is_the_mean_over_its_masked_tokens() -> None:
    tally = Tally(0.0, 1.0, ("a", "b", "c"), torch.device("cpu"))

    class Counts:
        prompt, response, masked, eos = 9, 8, 4, 2
        by_source = ((4, 3, 1, 1), (5, 5, 3, 1), (0, 0, 0, 0))

    inputs = {
        "masked": torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.bool), "t": torch.full((2, 3), 0.1), "counts": Counts,
        "source": torch.tensor([[1, 0, 1], [0, 1, -1]]),
    }  # fmt: skip
    for _ in range(2):
        tally.add(inputs, torch.tensor([1.0, 2.0, 7.0, 6.0]))
    logs = tally.logs(lambda sums: 2 * sums)  # two ranks that saw the same
    assert logs["ce/source_a"] == 7.0
    assert logs["ce/source_b"] == 3.0
    assert "ce/source_c" not in logs
    assert logs["ce/t_0.00-0.25"] == 4.0
    assert [logs[f"tokens/source_b/{kind}"] for kind in KINDS] == [20.0, 20.0, 12.0, 4.0]
    assert logs["tokens/response"] == 32.0
    assert tally.sums.abs().sum() == 0


def test_one_source_adds_nothing_to_the_log(settings: Settings, write_samples: Any) -> None:
    files = write_samples([5 + i % 7 for i in range(30)])
    one = f"dataset.sources=[{{name: only, files: {files}, weight: 7}}]"
    named, plain = settings(Path("x"), "dataset.files=null", one), settings(files)
    first, second = (list(zip(build_stream(config, 288, SPECIAL), range(30), strict=False)) for config in (named, plain))
    for (ours, _), (theirs, _) in zip(first, second, strict=True):
        assert ours.pieces == theirs.pieces  # the same rows as without a name
        assert np.array_equal(ours.noise, theirs.noise)
    assert set(build_stream(plain, 288, SPECIAL).metrics(0)) == {"data/dropped_samples"}
    assert len(Tally(0.0, 1.0, ("only",), torch.device("cpu")).sums) == 12


def test_a_mixture_has_as_many_steps_as_its_draws_give(mixed: Settings, tokenizer: Any) -> None:
    config = mixed("dataset.epochs=2", "training.max_steps=null", "training.grad_accum_steps=1")
    with pytest.warns(UserWarning, match="left out"):
        steps = training_steps(config, 288, SPECIAL, tokenizer)
    with pytest.warns(UserWarning, match="left out"):
        rows = [row for row, _ in build_stream(config, 288, SPECIAL, tokenizer)._rows()]
    assert steps == len(rows) // 2
    dropped = 60 - sum(start == 0 for row in rows for *_, start in row.pieces)
    assert 1 <= dropped <= 5


def test_ids_of_another_tokenizer_are_told_by_their_missing_ends(settings: Settings, tmp_path: Path) -> None:
    endless = json.dumps({"id": "a", "input_ids": [97] * 30, "prompt_length": 5})
    (tmp_path / "endless.jsonl").write_text("\n".join([endless] * 150), encoding="utf-8")
    with pytest.raises(ValueError, match=r"data: none of the first 100 responses holds a stop token \(256, 257\)"):
        prepare(settings(tmp_path / "endless.jsonl", "training.max_steps=1"))


@pytest.fixture
def bad_line(tmp_path: Path) -> Path:
    good = json.dumps({"id": "a", "input_ids": [97] * 30 + [257, 256], "prompt_length": 5})
    (tmp_path / "bad.jsonl").write_text("\n".join([good] * 20 + ["{oops"] + [good] * 20), encoding="utf-8")
    return tmp_path / "bad.jsonl"


def test_a_fault_that_the_background_meets_ends_the_run_with_its_sentence(
    settings: Settings, bad_line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FIRST_LOOK", 20)
    config = settings(bad_line, "dataset.shuffle=false", "training.max_steps=20", "training.save_steps=1")
    with pytest.raises(
        ValueError, match=r"bad\.jsonl, line 21 is not a tokenised sample: .* \(the line starts at byte \d+\)"
    ):
        train(config)
    steps = sorted(metrics(config))
    assert steps  # everything before was trained
    assert (Path(config.output_dir) / f"checkpoint-{steps[-1]}" / "trainer_state.json").is_file()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset.files=null"], r"dataset\.files is not set: give .* or set dataset\.hub or dataset\.sources"),
        (["dataset.hub=x"], r"dataset\.files and dataset\.hub are both set: give one"),
        (["dataset.sources=[{name: a, files: x, weight: 1}]"], r"dataset\.files and dataset\.sources are both set"),
        (["S=[{name: a, files: x}]"], r"dataset\.sources\[0\]\.weight=None: give a number above 0"),
        (["S=[{name: a, files: x, weight: 0}]"], r"dataset\.sources\[0\]\.weight=0\.0: give a number above 0"),
        (["S=[{name: a, files: x, weight: inf}]"], r"sources\[0\]\.weight=inf: give a number above 0"),
        (["S=[{name: a, weight: 1}]"], r"dataset\.sources\[0\] \(a\): give either files or hub"),
        (["S=[{name: a, files: x, hub: y, weight: 1}]"], r"dataset\.sources\[0\] \(a\): give either files or hub"),
        (["S=[{name: a/b, files: x, weight: 1}]"], r"sources\[0\]\.name='a/b': every source needs a name of its own"),
        (
            ["S=[{name: a, files: x, weight: 1}, {name: a, files: y, weight: 1}]"],
            r"sources\[0\]\.name='a': every source needs a name of its own",
        ),
        (
            ["S=[{name: a, files: x, wheight: 1}]"],
            r"sources\[0\]\.wheight does not exist\. Did you mean dataset\.sources\[0\]\.weight\? .*: name, weight, files",
        ),
        (["S=[a.jsonl]"], r"config key dataset\.sources\[0\]='a\.jsonl': give {name: …} and so on"),
        (["S=[{name: a, files: x, weight: much}]"], r"weight: Value 'much' .* could not be converted to Float"),
        (["dataset.split=test"], r"dataset\.split='test': only a hub dataset has splits, and dataset\.hub is not set"),
        (["S=[{name: a, files: x, weight: 1, split: test}]"], r"dataset\.sources\[0\]\.split='test': only a hub dataset"),
        (["dataset.template=alpaca"], r"dataset\.template='alpaca': choose one of chat, plain"),
        (["dataset.prefetch_steps=-1"], r"dataset\.prefetch_steps=-1: must be at least 0"),
    ],
)
def test_sources_that_make_no_sense_are_refused_by_name(overrides: list[str], said: str) -> None:
    if overrides[0].startswith("S="):
        overrides = ["dataset.files=null", "dataset.sources" + overrides[0][1:]]
    with pytest.raises(ValueError, match=said):
        compose_settings(["dataset.files=x.jsonl", "training.max_steps=1", *overrides])


def test_a_source_that_is_not_there_is_named_by_its_number(settings: Settings) -> None:
    sources = "dataset.sources=[{name: a, files: nowhere.jsonl, weight: 1}]"
    with pytest.raises(ValueError, match=r"dataset\.sources\[0\]\.files: no file matches 'nowhere\.jsonl'"):
        build_stream(settings(Path("x"), "dataset.files=null", sources), 288, SPECIAL)
