"""Settings: every option of every group composes, and a mistake ends in one sentence that helps."""

import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from omegaconf import OmegaConf

from sft_training.config import SftConfig
from sft_training.overrides import CONFIGS, check_overrides, compose_settings, typed

ENOUGH = ["dataset.files=some.jsonl", "training.max_steps=10"]
OPTIONS = sorted(
    f"{group}={path.stem}"
    for group in ("model", "dataset", "precision", "adapter", "debug")
    for path in (CONFIGS / group).glob("*.yaml")
)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    extra = {
        "model=scratch": ["model.config=F", "model.tokenizer=F"],
        "dataset=hub": ["dataset.files=null", "dataset.hub=OWNER/NAME"],
        "dataset=sources": ["dataset.files=null"],
    }
    config = compose_settings([*ENOUGH, option, *extra.get(option, [])])
    assert isinstance(config, SftConfig)


def test_the_yaml_files_name_every_setting_there_is() -> None:
    written = OmegaConf.load(CONFIGS / "sft.yaml")
    for section, kind in get_type_hints(SftConfig).items():
        if not is_dataclass(kind):
            assert section in written
            continue
        groups = sorted((CONFIGS / section).glob("*.yaml"))
        places = [set(OmegaConf.load(path)) for path in groups] or [set(written[section])]
        if section == "adapter":  # "none" has nothing to set, and "qlora" begins as "lora"
            places = [set().union(*places) - {"defaults"}]
        for place in places:
            assert place == {f.name for f in fields(kind)}, section


def test_every_key_of_the_main_file_has_a_comment() -> None:
    bare = []
    for line in (CONFIGS / "sft.yaml").read_text(encoding="utf-8").splitlines():
        key = line.strip().split(":")[0]
        if line.startswith("  ") and not line.startswith("    ") and ": " in line and "#" not in line and key != "chdir":
            bare.append(line)
    assert len(bare) <= 4, bare  # the four whose line above says it


def test_the_defaults_are_the_published_recipe_but_for_rows_and_view() -> None:
    config = compose_settings(ENOUGH)
    training, process = config.training, config.forward_process
    assert (training.local_batch_size, training.grad_accum_steps, training.learning_rate) == (2, 4, 2.5e-5)
    assert (training.warmup_steps, training.schedule, training.weight_decay) == (50, "linear", 0.1)
    assert (training.max_grad_norm, training.betas, training.save_steps) == (1.0, [0.9, 0.999], 4000)
    assert (process.t_min, process.t_max, process.t_per, process.always_mask_eos) == (0.1, 0.9, "row", True)
    assert config.loss.name == "plain_mean"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "training.max_stepz=3",
            r"training\.max_stepz does not exist\. Did you mean training\.max_steps\? Valid keys of training: max_",
        ),
        ("forward_process.edit_share=1.5", r"edit_share=1\.5: a share lies between 0 and 1"),
        ("+training.foo=1", r"training\.foo does not exist\. Valid keys of training: max_steps, .*trace_rows\."),
        (
            "++view.foo=1",
            r"view\.foo does not exist\. Valid keys of view: tail_share, tail_max, block_share, block_lengths, every_block",
        ),
        ("trainings.max_steps=3", r"trainings\.max_steps does not exist\. Did you mean training\? Valid keys of the config"),
        ("training.seed.x=3", r"training\.seed\.x does not exist: training\.seed holds a value"),
        ("training.max_steps=abc", r"training\.max_steps: Value 'abc' .* could not be converted to Integer"),
        ("training.compile=maybe", r"training\.compile: Value .maybe. is not a valid bool"),
        ("training=5", r"training=5 is a section: set one of its keys \(max_steps, "),
        ("model=nope", "Could not find 'model/nope' Available options in 'model': llada_8b_base scratch tiny"),
        ("training.optimizer=sgd", r"training\.optimizer='sgd': choose one of adamw, muon\."),
        ("training.schedule=wsd", r"training\.schedule='wsd' with training\.decay_steps=0: wsd needs decay_steps >= 1"),
        ("training.betas=[0.9]", r"training\.betas=\[0\.9\]: give two numbers"),
        ("training.local_batch_size=0", r"training\.local_batch_size=0: must be at least 1"),
        ("training.learning_rate=inf", r"training\.learning_rate=inf: must be finite"),
        ("training.weight_decay=nan", r"training\.weight_decay=nan: must be at least 0"),
        ("training.threads=100000", r"training\.threads=100000: must be at least 1 and at most 1024"),
        ("training.seed=-1", r"training\.seed=-1: must be at least 0 and at most 4294967295"),
        ("training.learning_rate=-1", r"training\.learning_rate=-1.0: must be at least 0"),
        ("loss.name=mean", r"loss\.name='mean': choose one of plain_mean"),
        ("view.tail_share=2", "tail_share=2.0: a share lies between 0 and 1"),
        ("view.fill=true", r"fill=true with tail_share=0\.8"),
        (
            "view.every_block=true view.block_share=0.5",
            r"view\.every_block=true with packing\.attention='full' and packing\.",
        ),
        ("view.every_block=true", r"every_block=True has no effect with block_share=0"),
        ("view.first_look_share=0.6", r"first_look_share=0\.6 has no effect with block_share=0"),
        ("view.tail_eos=true view.tail_share=0", "tail_eos=True has no effect with tail_share=0 and block_share=0"),
        ("loss.name=next_token view.block_share=0.5", r"view\.block_share=0\.5 with loss\.name='next_token'"),
        ("+adapter.r=64", r"adapter\.r=64 has no effect without an adapter: add adapter=lora"),
        ("packing.mode=tight", "packing='tight': choose 'split'"),
        ("forward_process.t_max=3", "t_max=3.0"),
        ("validation.decodes=-1", r"validation\.decodes=-1: must be at least 0"),
        ("validation.threshold=90", r"validation\.threshold=90\.0: a confidence to reach"),
        ("training.betas=[0.9", r"training\.betas=\[0\.9 cannot be read \(.*\)\. A value with signs like"),
        ("model.path=null", r"model\.path is null: give a checkpoint folder or 'tiny'"),
        ("model.from_scratch=true", r"model\.from_scratch=true needs model\.config=FOLDER"),
        ("model.config=F", r"model\.config='F' only goes with model\.from_scratch=true"),
        ("dataset.files=null", r"dataset\.files is not set: give one tokenised JSON Lines file"),
    ],
)
def test_a_mistake_is_answered_by_name(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compose_settings([*ENOUGH, *override.split()])


@pytest.mark.parametrize(
    "name", ["runs/t=0.1/a.jsonl", "my texts (1).jsonl", "ré sumé.jsonl", "it's.jsonl", "[a.jsonl", "1e5", "a,b/c.jsonl"]
)
def test_a_path_is_taken_as_it_is_typed(name: str) -> None:
    assert compose_settings([f"dataset.files={name}"]).dataset.files == name


def test_warm_up_and_decay_must_have_room_in_the_run() -> None:
    wsd = [*ENOUGH, "training.schedule=wsd", "training.warmup_steps=20", "training.max_steps=100"]
    assert compose_settings([*wsd, "training.decay_steps=80"]).training.decay_steps == 80
    with pytest.raises(
        ValueError, match=r"warmup_steps=20 and training\.decay_steps=81 take 101 steps, but the run has 100"
    ):
        compose_settings([*wsd, "training.decay_steps=81"])


def test_a_sample_per_row_cannot_be_cut_anywhere() -> None:
    strict = ["view.fill=true", "view.tail_share=0", "view.tail_max=0"]
    assert compose_settings([*ENOUGH, *strict]).view.fill
    with pytest.raises(ValueError, match=r"view\.fill=true with packing\.mode='split'"):
        compose_settings([*ENOUGH, *strict, "packing.mode=split"])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"training": {"max_stepz": 1}},
            r"training\.max_stepz does not exist\. Did you mean training\.max_steps\? Valid keys",
        ),
        ({"trainer": {}}, r"trainer does not exist\. Did you mean training\? Valid keys of the config: model, dataset"),
        ({"view": 3}, r"view=3 is a section: set one of its keys \(tail_share, "),
    ],
)
def test_a_key_of_a_yaml_file_that_does_not_exist_is_answered_by_name_too(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        typed(OmegaConf.create(section))


def test_overrides_for_hydra_itself_and_for_groups_pass() -> None:
    check_overrides(["hydra.run.dir=x", "precision=fp32", "debug=limit", "training.betas=[0.9,0.95]", "--cfg", "job"])


def run(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = CONFIGS.parent / "sft_training" / "sft.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_the_command_line_says_it_in_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    made = run("dataset.files=x.jsonl", "training.max_stepz=3", folder=tmp_path)
    assert made.returncode == 1
    assert "sft.py: config key training.max_stepz does not exist. Did you mean training.max_steps?" in made.stderr
    assert "Traceback" not in made.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_resolved_settings_and_stops(tmp_path: Path) -> None:
    made = run(*ENOUGH, "precision=bf16", folder=tmp_path, DRY_RUN="1")
    assert made.returncode == 0, made.stderr
    printed: Any = OmegaConf.to_container(OmegaConf.create(made.stdout))
    assert printed["precision"]["dtype"] == "bf16"
    assert printed["training"]["max_steps"] == 10
    assert not list(tmp_path.iterdir())


def test_visible_tokens_are_not_trained_under_a_loss_that_has_no_place_for_them() -> None:
    for loss in ("elbo", "next_token"):
        with pytest.raises(ValueError, match=rf"edit_share=0\.1 with loss\.name='{loss}'"):
            compose_settings([*ENOUGH, "forward_process.edit_share=0.1", f"loss.name={loss}"])
