"""Settings of an evaluation: the documented commands compose, and a mistake ends in one sentence."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from evaluation.settings import EvalConfig, ModelSection, check_model, compose_settings
from sft_training.overrides import CONFIGS

GSM8K = "dataset.name=gsm8k batch_size=1 seed=1234"
FIXED = "generation.gen_length=256 generation.block_length=32"
# Every command line of the methods' documentation, and what it must come to.
COMMANDS: dict[str, dict[str, Any]] = {
    f"{GSM8K} generation=vanilla generation.steps=256 {FIXED} model=llada-inst": {"steps": 256, "seed": 1234},
    f"{GSM8K} generation=vanilla generation.threshold=0.9 {FIXED} model=llada-inst": {"threshold": 0.9, "steps": None},
    f"{GSM8K} generation=vanilla generation.factor=1 {FIXED} model=llada-inst": {"factor": 1, "rule": "factor"},
    f"{GSM8K} generation=pc_sampler generation.debias=true {FIXED} model=llada-inst": {"debias": True, "lambd": 0.25},
    f"{GSM8K} generation=vanilla generation.sigma=10 {FIXED} model=llada-base": {"sigma": 10},
    "generation=daedal generation.initial_gen_length=128 dataset.name=humaneval_instruct batch_size=8 model=llada-1.5 "
    "confirm_run_unsafe_code=true": {"method": "daedal", "initial_gen_length": 128},
    f"{GSM8K} generation=klass {FIXED} model=llada-inst": {"method": "klass", "kl_threshold": 0.01},
    f"{GSM8K} generation=eb_sampler generation.gamma=0.001 {FIXED} model=llada-inst": {"rule": "entropy_bound"},
    f"{GSM8K} generation=wino {FIXED} model=llada-inst": {"method": "wino", "wide_in_thres": 0.6},
    f"{GSM8K} generation=vanilla cache=prefix {FIXED} model=llada-inst": {"cache": "prefix"},
    f"{GSM8K} generation=vanilla cache=d2cache cache.sigma=5 {FIXED} model=llada-inst": {"cache_sigma": 5},
    f"{GSM8K} generation=vanilla cache=dllm {FIXED} model=llada-inst": {"cache": "dllm", "kp": 50},
    f"{GSM8K} model=dllm-var generation.threshold=0.8": {"method": "dllm_var", "cache": "block_commit", "threshold": 0.8},
    "": {"method": "dllm_var", "seed": 0},
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_command_composes_to_what_it_says(command: str) -> None:
    decoding = compose_settings(command.split()).decoding()
    assert {name: getattr(decoding, name) for name in COMMANDS[command]} == COMMANDS[command]


def test_every_model_has_its_place_and_a_base_model_no_chat() -> None:
    found = {}
    for file in (CONFIGS / "eval_model").glob("*.yaml"):
        config = compose_settings([f"model={file.stem}", "dataset.name=gsm8k"])
        found[file.stem] = (config.model.path, config.chat_template)
    assert found == {
        "tiny": ("tiny", True),
        "llada-base": ("GSAI-ML/LLaDA-8B-Base", False),
        "llada-inst": ("GSAI-ML/LLaDA-8B-Instruct", True),
        "llada-1.5": ("GSAI-ML/LLaDA-1.5", True),
        "dllm-var": ("maomaocun/dLLM-Var", True),
    }


def test_the_template_is_the_protocol_s_unless_said_otherwise() -> None:
    assert not compose_settings(["dataset.name=gpqa"]).chat_template
    assert compose_settings(["dataset.name=gpqa", "model.template=chat"]).chat_template
    assert not compose_settings(["model.template=plain"]).chat_template


def test_one_seed_is_everyone_s_but_decoding_may_have_its_own() -> None:
    assert compose_settings(["seed=5"]).decoding().seed == 5
    own = compose_settings(["seed=5", "generation.seed=6", "generation=vanilla"])
    assert (own.seed, own.decoding().seed) == (5, 6)


def test_a_path_that_looks_like_a_number_stays_a_path() -> None:
    assert compose_settings(["model.path=1e5", "output_dir=7"]).model.path == "1e5"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("dataset.name=gsm9k", r"dataset\.name='gsm9k' is unknown: did you mean gsm8k"),
        (
            "dataset.nam=gsm8k",
            r"dataset\.nam does not exist\. Did you mean dataset\.name\? Valid keys of dataset: name, path",
        ),
        ("+dataset.foo=1", r"dataset\.foo does not exist\..* Valid keys of dataset: name"),
        ("dataset=gsm8k", r"dataset=gsm8k: a task is chosen with dataset\.name=gsm8k"),
        ("precision=bf16", r"config key precision does not exist\. .*Valid keys of the config: model, dataset"),
        ("model=llada", r"model='llada' is unknown: choose one of dllm-var, llada-1\.5, .*, or model\.path=FOLDER"),
        ("model=scratch", r"model='scratch' is unknown: choose one of dllm-var"),
        ("model.config=F", r"model\.config does not exist"),
        ("model.dtype=fp8", r"model\.dtype='fp8': choose one of auto, fp32, bf16"),
        ("model.template=true", r"model\.template='true': choose one of auto, chat, plain"),
        ("generation=nope", "Could not find 'generation/nope' Available options in 'generation': ar daedal"),
        ("generation.treshold=0.9", r"generation\.treshold is no option: did you mean generation\.threshold"),
        ("cache=prefix", r"cache='prefix' does not go with method='dllm_var'"),
        ("cache=nope generation=vanilla", "Could not find 'cache/nope' Available options in 'cache'"),
        ("cache.use_dual=true generation=vanilla", r"use_dual=True has no effect with cache='none'"),
        ("generation=vanilla generation.gamma=0.1", r"gamma=0\.1 has no effect with method='vanilla'"),
        ("generation.block_length=0", "block_length=0 is not a whole number of at least 1"),
        ("generation.threshold=2", r"generation\.threshold=2 is above 1, which no confidence reaches"),
        ("generation=vanilla generation.gen_length=64 generation.steps=256", r"steps=256 must lie in 1\.\.64"),
        ("batch_size=0", "batch_size=0: give at least 1"),
        ("batch_size=many", "batch_size: Value 'many' .* could not be converted to Integer"),
        ("limit=0", "limit=0: give at least 1"),
        ("seed=-1", "seed=-1: give at least 0 and below"),
        ("likelihood_samples=100", "likelihood_samples=100: give a multiple of 16"),
        ("dataset.num_fewshot=-1", r"dataset\.num_fewshot=-1"),
        ("dataset.name=mbpp", "confirm_run_unsafe_code=true"),
        ("dataset.name=gsm8k dataset.path=/nowhere", r"dataset\.path=/nowhere is no folder"),
        (
            "dataset.name=gsm8k dataset.path=/nowhere dataset.builtin=true",
            r"dataset\.path=/nowhere goes with our own task files only",
        ),
        ("dataset.name=mbpp dataset.builtin=true confirm_run_unsafe_code=true", "programs of mbpp outside a sandbox"),
        ("seed=[1", r"seed=\[1 cannot be read \(.*\)\. A value with signs like"),
    ],
)
def test_a_mistake_is_answered_in_a_sentence(overrides: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as refusal:
        compose_settings(overrides.split())
    assert "\n" not in str(refusal.value)


def test_a_file_with_a_wrong_column_is_answered_with_file_line_and_column(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"question": "1 + 1?", "reply": "#### 2"}) + "\n", encoding="utf-8"
        )
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1, column 'answer' is missing"):
        compose_settings(["dataset.name=gsm8k", f"dataset.path={tmp_path}"])


def test_a_task_that_only_the_harness_has_is_left_for_it_to_find() -> None:
    assert compose_settings(["dataset.name=arc_easy", "dataset.builtin=true"]).chat_template


def test_the_yaml_files_name_every_setting_there_is() -> None:
    written = OmegaConf.load(CONFIGS / "eval.yaml")
    for name, kind in get_type_hints(EvalConfig).items():
        if name in ("model", "generation", "cache"):
            continue  # groups
        assert name in written
        assert not is_dataclass(kind) or set(written[name]) == {f.name for f in fields(kind)}
    for file in (CONFIGS / "eval_model").glob("*.yaml"):
        assert set(OmegaConf.load(file)) == {f.name for f in fields(ModelSection)}, file


def test_a_model_is_looked_at_before_it_is_loaded(tmp_path: Path, chat_folder: Path) -> None:
    assert check_model(ModelSection(path=str(chat_folder))) == chat_folder
    with pytest.raises(ValueError, match="is no folder: give 'tiny', a checkpoint folder, or a hub name"):
        check_model(ModelSection(path=str(tmp_path / "absent")))
    (tmp_path / "config.json").write_bytes((chat_folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"is not a checkpoint folder: it has neither model\.safetensors nor"):
        check_model(ModelSection(path=str(tmp_path)))
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        check_model(ModelSection(path=str(chat_folder), adapter=str(tmp_path)))
