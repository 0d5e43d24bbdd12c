"""The benchmark of decoding: its counts are those of the forwards that run, and every bar is held against them."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmark_report import failures, tables
from eval_ar_twin import as_llama
from forward_counts import Replay, Shape, fixed_canvas, flops, left_to_right, nbytes, recorded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dllm_var import GenerationConfig, Pretrained, generate, load_pretrained

RESULT = Path(__file__).parents[2] / "evaluation" / "results" / "benchmark.json"
QUESTION = "Write 4072 in words."


@pytest.fixture(scope="module")
def benchmark(script: Any) -> ModuleType:
    module: ModuleType = script("scripts/benchmark.py")
    return module


@pytest.fixture(scope="module")
def tiny() -> Pretrained:
    return load_pretrained("tiny")


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_length": 64, "block_length": 16},
        {"max_gen_length": 64, "block_length": 16, "cache": "none"},
        {"method": "vanilla", "gen_length": 32, "block_length": 16, "cache": "prefix", "use_dual": True, "steps": 8},
        {"method": "vanilla", "gen_length": 24, "block_length": 16},
    ],
)
def test_the_formula_counts_the_operations_that_run(tiny: Pretrained, options: dict[str, Any]) -> None:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), recorded(tiny.model) as record:
        (answer,) = generate(tiny, [QUESTION], GenerationConfig(**options))
    assert len(record.shapes) == answer.forwards
    assert sum(shape.columns for shape in record.shapes) == answer.positions
    assert sum(flops(tiny.model.config, shape) for shape in record.shapes) == counter.get_total_flops()


def test_forwards_of_several_rows_are_counted_too(tiny: Pretrained) -> None:
    prompts = [QUESTION, "Add 512 and 341. Show each column.", "Write 5 in words."]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), recorded(tiny.model) as record:
        generate(tiny, prompts, GenerationConfig(max_gen_length=64))
    assert max(shape.rows for shape in record.shapes) > 1
    assert sum(flops(tiny.model.config, shape) for shape in record.shapes) == counter.get_total_flops()


def test_a_fixed_canvas_is_known_without_running(tiny: Pretrained) -> None:
    with recorded(tiny.model) as record:
        generate(tiny, [QUESTION], GenerationConfig(method="vanilla", gen_length=32, block_length=16))
    assert record.shapes == fixed_canvas(len(tiny.prompt_ids(QUESTION)), 32, 16)


def test_an_autoregressive_model_has_a_forward_for_each_token_but_the_last(tiny: Pretrained) -> None:
    llama = as_llama(tiny.model, tiny.special)
    seen = []
    llama.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True)
    llama.generate(torch.tensor([[5] * 9]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert seen == [shape.columns for shape in left_to_right(9, 4)]
    assert [shape.keys for shape in left_to_right(9, 4)] == [9, 10, 11, 12]


def test_bytes_are_weights_once_and_keys_and_values_once(tiny: Pretrained) -> None:
    blocks = sum(p.numel() for name, p in tiny.model.named_parameters() if "blocks" in name and p.dim() == 2)
    config = tiny.model.config
    head, kept = config.embedding_rows * config.d_model, 2 * config.n_layers * config.d_model
    assert nbytes(config, Shape(1, 32, 100, 5), 4) == 4 * (blocks + head + 100 * kept)
    assert nbytes(config, Shape(3, 32, 100, 0), 2) == 2 * (blocks + 300 * kept)


@pytest.mark.parametrize("cache", ["block_commit", "none"])
def test_a_replay_runs_the_same_forwards(tiny: Pretrained, cache: str) -> None:
    with recorded(tiny.model, calls=True) as record:
        generate(tiny, [QUESTION], GenerationConfig(max_gen_length=64, block_length=8, cache=cache))
    for _ in range(2):  # it can be run again
        with recorded(tiny.model) as again:
            Replay(tiny.model, record)()
        assert again.shapes == record.shapes


def test_the_shortest_canvas_holds_nearly_all_answers(benchmark: ModuleType, tiny: Pretrained) -> None:
    problems = benchmark.chosen(60)
    assert tiny.tokenizer is not None
    lengths = [len(tiny.tokenizer.encode(p.output, add_special_tokens=False)) + 1 for p in problems]
    holding = benchmark.holding_length(tiny, problems)
    assert holding % 32 == 0
    assert sum(length <= holding for length in lengths) >= 59 > sum(length <= holding - 32 for length in lengths)


def test_a_small_benchmark_runs_from_end_to_end(
    benchmark: ModuleType, tiny: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "LENGTHS", (64, 32))
    monkeypatch.setattr(benchmark, "MAX_GEN_LENGTH", 32)
    monkeypatch.setitem(benchmark.GROWING, "max_gen_length", 32)
    problems = benchmark.chosen(2)
    single = benchmark.one_at_a_time(tiny, problems, tiny, 32, 1)
    assert {*single["costs"]} == {*benchmark.arms(32), benchmark.LEFT_TO_RIGHT} == {*single["tokens"]}
    assert all(len(each) == 2 for each in single["costs"].values())
    assert set(single["ratio"]) == {*single["costs"], benchmark.BARE} - {benchmark.OURS}
    engine = json.loads(json.dumps(benchmark.many_at_a_time(tiny, problems, 1)))
    assert engine["same_tokens"]
    large = {"parameters": 1e8, "memory": 1.0, "overhead": {"median": 1.02, "low": 1.01, "high": 1.03}}
    result = {"single": single, "engine": engine, "large": large, "holding": 32, "at_best": 0.1}
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "8589934592")
    result["environment"] = benchmark.environment(1)
    result["formats"] = {"bfloat16": {"seconds ÷ float32": large["overhead"], "same answers": 0.5}}
    printed = tables(result)
    assert all(f"| {name} |" in printed for name in single["costs"])
    assert "MALLOC_TRIM_THRESHOLD_=8589934592" in printed  # what the seconds depend on


def good() -> dict[str, Any]:
    """A result that meets every bar."""
    ratio = {"median": 100.0, "low": 90.0, "high": 110.0}
    names = ("LLaDA 1024", "Fast-dLLM dual 96", "autoregressive")
    return {
        "holding": 96,
        "single": {"ratio": dict.fromkeys(names, ratio), "overhead": ratio | {"median": 1.2}},
        "engine": {"ratio": {"16": ratio}, "wasted": {"16": 0.04}, "same_tokens": True},
        "large": {"overhead": ratio | {"median": 1.04}, "memory": 1.09},
        "accuracy": {"mean": {"dLLM-Var": 0.9, "autoregressive": 0.92}},
    }


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("single", "ratio", "LLaDA 1024", "median"), 30.0, "LLaDA 1024, the bar is 30.1"),
        (("single", "ratio", "LLaDA 1024", "low"), 0.9, "unclear times as fast as LLaDA 1024"),
        (("single", "ratio", "Fast-dLLM dual 96", "median"), 1.9, "dual cache, the bar is 2.0"),
        (("single", "ratio", "autoregressive", "median"), 2.3, "autoregressive model, the bar is 2.4"),
        (("single", "overhead", "median"), 1.26, "bundled model: 1.260, the bar is 1.25"),
        (("large", "overhead", "median"), 1.06, "100 M: 1.060, the bar is 1.05"),
        (("large", "memory"), 1.11, "peak memory"),
        (("engine", "ratio", "16", "median"), 1.4, "16 at a time, the bar is 1.5"),
        (("engine", "wasted", "16"), 0.06, "wasted columns"),
        (("engine", "same_tokens"), False, "depend on how many"),
        (("accuracy", "mean", "dLLM-Var"), 0.88, "exact match 0.880 is over .03 below"),
    ],
)
def test_every_bar_is_held_against_the_result(path: tuple[str, ...], value: Any, said: str) -> None:
    result = json.loads(json.dumps(good()))
    assert failures(result) == []
    at = result
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    (line,) = failures(result)
    assert said in line


def test_without_an_autoregressive_model_its_bar_is_not_met() -> None:
    result = good()
    del result["single"]["ratio"]["autoregressive"]
    assert failures(result) == ["no autoregressive model was measured: give --twin"]


ALL_WRONG = json.dumps(
    dict.fromkeys(("environment", "holding", "single", "engine", "large", "formats", "accuracy", "at_best"), 1)
)


@pytest.mark.parametrize("text", ['{"single": {}}', "[]", "{", ALL_WRONG])
def test_another_file_is_not_taken_for_a_result(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    monkeypatch.setattr("sys.argv", ["benchmark.py", "--check", str(file)])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f"{file} cannot be read as a result of this script" in capsys.readouterr().err


def test_the_exact_columns_of_the_committed_result_come_out_again(benchmark: ModuleType, tiny: Pretrained) -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    single = result["single"]
    problems = benchmark.chosen(len(single["tokens"][benchmark.OURS]))
    assert result["holding"] == benchmark.holding_length(tiny, benchmark.chosen(600))
    assert single["ways"] == benchmark.arms(result["holding"])
    double = Pretrained(type(tiny.model)(tiny.model.config).double().eval(), tiny.tokenizer, tiny.special)
    double.model.load_state_dict(tiny.model.state_dict())
    for name in ("LLaDA 1024", "LLaDA 256, parallel", benchmark.OURS, "dLLM-Var, no cache"):
        found = [list(vars(benchmark.cost(double, problem, single["ways"][name])).values()) for problem in problems]
        assert found == single["costs"][name], name


def test_the_readme_shows_the_committed_result() -> None:
    shown = (RESULT.parents[2] / "README.md").read_text(encoding="utf-8")
    assert tables(json.loads(RESULT.read_text(encoding="utf-8"))) in shown
