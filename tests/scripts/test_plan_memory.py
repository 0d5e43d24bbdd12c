"""The memory planner as a command."""

import json
from typing import Any

import pytest

from dllm_var.model.config import LLaDAConfig


@pytest.fixture(scope="module")
def planner(script: Any) -> Any:
    return script("scripts/plan_memory.py")


def test_the_planner_prints_a_table_and_ends_with_one_json_object(planner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert planner.main(["model=llada-8b", "precision=fp8", "gpus=8", "max_length=8192"]) == 0
    printed = capsys.readouterr().out
    for word in ("weights", "gradients", "optimizer", "activations", "logits and loss", "total", "It fits"):
        assert word in printed
    report = json.loads(printed.splitlines()[-1])
    assert report["fits"]
    assert report["precision"] == "fp8"
    assert sum(report["gb"][report["peak"]].values()) == pytest.approx(report["total_gb"], abs=0.01)


def test_a_run_that_does_not_fit_ends_with_code_1_and_a_way_out(planner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert planner.main(["gradient_checkpointing=false"]) == 1
    printed = capsys.readouterr().out
    assert "Too large first: activations, by gradient_checkpointing=false" in printed
    report = json.loads(printed.splitlines()[-1])
    assert report["suggestion"] == {"gradient_checkpointing": True}
    assert planner.main(["gpu_memory_gb=1"]) == 1
    assert "Nothing that this planner knows makes it fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=8"], "'gpu=8' is not a setting: give name=value with one of model, precision, gpus"),
        (["8"], "'8' is not a setting"),
        (["precision=int8"], "precision='int8': choose one of fp32, bf16, fp8"),
        (["zero=1"], "zero='1': choose one of 0, 2, 3"),
        (["gpus=many"], "gpus='many': give a whole number"),
        (["max_length=0"], "max_length=0: must be above 0"),
        (["gradient_checkpointing=yes"], "gradient_checkpointing='yes': give true or false"),
        (["model=nowhere"], "model='nowhere': choose llada-8b, tiny, or a folder"),
        (
            ["precision=fp8", "max_length=50", "local_batch_size=1"],
            "max_length=50: FP8 needs a micro-batch of a multiple of 16",
        ),
        (["lora=8", "zero=3"], "lora with zero=3: adapters need a whole base"),
    ],
)
def test_wrong_words_are_errors(planner: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert planner.main(words) == 2
    assert said in capsys.readouterr().err


def test_help_names_every_setting(planner: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert planner.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name} " in printed for name in ("model", *planner.KINDS))


def test_the_known_shape_is_that_of_llada_8b(planner: Any) -> None:
    shape = planner.shape("llada-8b")
    assert isinstance(shape, LLaDAConfig)
    assert (shape.d_model, shape.n_layers, shape.mlp_width, shape.embedding_rows) == (4096, 32, 12288, 126464)
