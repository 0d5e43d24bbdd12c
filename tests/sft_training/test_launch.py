"""The launch scripts: from environment and arguments to one command; and their files say what runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from sft_training.config import SftConfig
from sft_training.overrides import CONFIGS, compose_settings
from sft_training.sft import prepare
from sft_training.sharding import OURS, SameWay, acting, asked, check_sharding

FOLDER = CONFIGS.parent / "sft_training"
SEVERAL = {"NNODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "head", "MASTER_PORT": "1234", "DLLM_RUN_DIR": "/shared/run"}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "ACCELERATE_", "FSDP_"))}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A Python that only says how it was called, a machine with four GPUs, and Slurm's list of machines."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, content in {
        "python": 'echo "$@"; echo "run folder $DLLM_RUN_DIR, $TORCH_ELASTIC_SHUTDOWN_TIMEOUT s, threads $OMP_NUM_THREADS"',
        "nvidia-smi": "for i in 0 1 2 3; do echo GPU $i; done",
        "scontrol": 'echo "first-of-$3"; echo second',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{content}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def launch(
    script: str, *arguments: str, folder: Path, programs: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHON": sys.executable}
    if programs is not None:
        paths = {"PYTHON": str(programs / "python"), "PATH": f"{programs}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={**CLEAN, **paths, **environment},
    )  # fmt: skip


def flag(command: str, name: str) -> str:
    """What stands behind a flag."""
    return command.split(f"--{name} ", 1)[1].split()[0]


@pytest.mark.timeout(300)
def test_a_dry_run_of_fp8_prints_command_files_and_every_published_setting(tmp_path: Path) -> None:
    before = set(FOLDER.iterdir())
    made = launch("run_gpus_fp8.sh", folder=FOLDER, DRY_RUN="1", CUDA_VISIBLE_DEVICES="")
    assert made.returncode == 0, made.stderr[-3000:]
    command, files, settings = made.stdout.split("\n\n", 1)[0], made.stdout, made.stdout.split("stands in for it below\n")[1]
    assert (flag(command, "num_processes"), flag(command, "num_machines")) == ("8", "1")
    assert '"stage": 2' in files
    assert "distributed_type: DEEPSPEED" in files
    config = yaml.safe_load(settings)  # what follows the settings is a comment
    training = config["training"]
    published = {"local_batch_size": 2, "grad_accum_steps": 4, "optimizer": "adamw", "learning_rate": 2.5e-5, "schedule":
                 "linear", "warmup_steps": 50, "weight_decay": 0.1, "max_grad_norm": 1.0, "betas": [0.9, 0.999],
                 "save_steps": 4000, "save_total_limit": 10, "logging_steps": 1, "gradient_checkpointing": True}  # fmt: skip
    assert {name: training[name] for name in published} == published
    assert (config["packing"]["max_length"], config["forward_process"]["t_min"]) == (8192, 0.1)
    assert (config["model"]["path"], config["precision"]["dtype"]) == ("LLaDA-8B-Base", "bf16")
    assert config["precision"]["fp8"]["backend"] is not None
    assert "2 rows x 4 micro-batches x 8 process(es) = 64 rows of 8192 = 524288 tokens" in settings
    assert set(FOLDER.iterdir()) == before


def test_arguments_come_last_and_so_win_from_any_folder(programs: Path, tmp_path: Path) -> None:
    script = str(FOLDER / "run_gpus_bf16.sh")
    made = launch(script, "packing.max_length=4096", "dataset.files=a b.jsonl", folder=tmp_path, programs=programs)
    assert made.returncode == 0, made.stderr
    command, environment = made.stdout.splitlines()
    assert command.endswith("precision=bf16 packing.max_length=4096 dataset.files=a b.jsonl")
    assert command.index("packing.max_length=8192") < command.index("packing.max_length=4096")
    assert (flag(command, "num_processes"), flag(command, "main_process_port")) == ("4", "0")
    assert "training.expect_processes=4" in command
    assert flag(command, "config_file") == str(CONFIGS / "accelerate" / "zero2.yaml")
    assert flag(command, "deepspeed_config_file") == str(CONFIGS / "deepspeed" / "zero2.json")
    assert environment.startswith("run folder outputs/sft/20")
    assert environment.endswith(", 3600 s, threads 1")  # a checkpoint takes longer than the launcher's 30 seconds
    assert not [path for path in tmp_path.iterdir() if path != programs]


def test_several_machines_are_told_by_the_usual_variables_and_by_slurm(programs: Path, tmp_path: Path) -> None:
    script = str(FOLDER / "run_gpus_fp8.sh")
    usual = launch(script, folder=tmp_path, programs=programs, GPUS_PER_NODE="2", SHARD="zero3", **SEVERAL).stdout
    assert [flag(usual, name) for name in ("num_machines", "machine_rank", "num_processes")] == ["3", "2", "6"]
    assert (flag(usual, "main_process_ip"), flag(usual, "main_process_port")) == ("head", "1234")
    assert flag(usual, "deepspeed_config_file").endswith("zero3.json")
    assert "run folder /shared/run" in usual
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    told = launch(script, folder=tmp_path, programs=programs, SHARD="fsdp2", **slurm).stdout
    assert [flag(told, name) for name in ("num_machines", "machine_rank", "num_processes")] == ["2", "1", "8"]
    assert (flag(told, "main_process_ip"), flag(told, "main_process_port")) == ("first-of-n[1-2]", "29500")
    assert "deepspeed" not in told
    assert "run folder outputs/sft/job-7" in told


def test_one_process_without_sharding_needs_no_launcher(programs: Path, tmp_path: Path) -> None:
    script = str(FOLDER / "run_cpu.sh")
    alone, pair, sharded = (
        launch(script, folder=tmp_path, programs=programs, **more).stdout
        for more in ({"PROCESSES": "1"}, {}, {"PROCESSES": "1", "SHARD": "zero2"})
    )
    assert alone.startswith(f"{FOLDER}/sft.py training.expect_processes=1 training.device=cpu")
    assert (flag(pair, "num_processes"), Path(flag(pair, "config_file")).name) == ("2", "ddp.yaml")
    assert (flag(sharded, "num_processes"), Path(flag(sharded, "config_file")).name) == ("1", "zero2.yaml")


def test_several_machines_may_name_their_folder_as_a_setting(programs: Path, tmp_path: Path) -> None:
    machines = {"NNODES": "2", "MASTER_ADDR": "head"}
    made = launch(str(FOLDER / "run_gpus_fp8.sh"), "output_dir=/shared/run", folder=tmp_path, programs=programs, **machines)
    assert "output_dir=/shared/run" in made.stdout


def test_a_driver_that_does_not_answer_is_no_gpu(programs: Path, tmp_path: Path) -> None:
    (programs / "nvidia-smi").write_text("#!/bin/bash\necho 'NVIDIA-SMI has failed'\nexit 9\n", encoding="utf-8")
    made = launch(str(FOLDER / "run_gpus_fp8.sh"), folder=tmp_path, programs=programs)
    assert (made.returncode, "no GPU is visible here" in made.stderr) == (2, True)
    assert launch(str(FOLDER / "run_gpus_fp8.sh"), folder=tmp_path, programs=programs, DRY_RUN="1").returncode == 0


def test_a_gpu_run_does_not_fall_back_to_the_cpu(settings: Callable[..., SftConfig], write_samples: Any) -> None:
    with pytest.raises(ValueError, match=r"training\.device='cuda', but torch .* can use no GPU here"):
        prepare(settings(write_samples([9, 9]), "training.device=cuda"))


@pytest.mark.parametrize(
    ("script", "environment", "said"),
    [
        ("run_gpus_fp8.sh", {"CUDA_VISIBLE_DEVICES": ""}, "no GPU is visible here"),
        ("run_gpus_fp8.sh", {"GPUS_PER_NODE": "8"}, "GPUS_PER_NODE=8, but 4 GPU(s) are visible here: ask for at most 4"),
        ("run_gpus_bf16.sh", {"CUDA_VISIBLE_DEVICES": "0,3", "GPUS_PER_NODE": "3"}, "but 2 GPU(s) are visible"),
        ("run_gpus_fp8.sh", {"GPUS_PER_NODE": "08"}, "GPUS_PER_NODE=08: give a whole number from 1 on"),
        ("run_gpus_fp8.sh", {"GPUS_PER_NODE": "many"}, "GPUS_PER_NODE=many: give a whole number from 1 on"),
        ("run_gpus_fp8.sh", {"SHARD": "zero4"}, "SHARD=zero4: choose one of ddp fsdp2 zero2 zero3"),
        ("run_gpus_fp8.sh", {"NNODES": "0"}, "NNODES=0: give a whole number from 1 on"),
        ("run_gpus_fp8.sh", {"NNODES": "2", "NODE_RANK": "2"}, "machines are numbered from 0 to 1"),
        ("run_gpus_fp8.sh", {"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR=HOST"),
        ("run_gpus_fp8.sh", {"NNODES": "2", "MASTER_ADDR": "head"}, "needs DLLM_RUN_DIR=FOLDER (or output_dir"),
        ("run_gpus_bf16.sh", {"CUDA_VISIBLE_DEVICES": "0,-1,1", "GPUS_PER_NODE": "2"}, "but 1 GPU(s) are visible"),
        ("run_gpus_bf16.sh", {"DRY_RUN": "yes"}, "DRY_RUN=yes: give 1 (only show what would run) or 0"),
        ("run_cpu.sh", {"PROCESSES": "0"}, "PROCESSES=0: give a whole number from 1 on"),
        ("run_cpu.sh", {"SHARD": "fsdp2"}, "SHARD=fsdp2 needs GPUs"),
    ],
)
def test_what_was_typed_wrongly_ends_in_a_sentence(
    programs: Path, tmp_path: Path, script: str, environment: dict[str, str], said: str
) -> None:
    made = launch(str(FOLDER / script), folder=tmp_path, programs=programs, **environment)
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith(f"{script}: ")
    assert said in made.stderr


@pytest.mark.parametrize("stage", [2, 3])
def test_the_stage_of_a_deepspeed_file_is_in_its_name_and_settings_are_left_to_the_trainer(
    stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = load_config_from_file(str(CONFIGS / "accelerate" / f"zero{stage}.yaml"))
    assert launcher.distributed_type == DistributedType.DEEPSPEED
    file = CONFIGS.parent / launcher.deepspeed_config["deepspeed_config_file"]
    assert file == CONFIGS / "deepspeed" / f"zero{stage}.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["zero_optimization"]["stage"] == stage
    assert {found[key] if found[key] == "auto" else found[key]["enabled"] for key in OURS if key in found} == {"auto"}
    assert not {"optimizer", "scheduler"} & found.keys()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    assert asked(2) == f"zero{stage}"


def test_the_other_files_ask_for_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config_from_file(str(CONFIGS / "accelerate" / "ddp.yaml")).distributed_type == DistributedType.MULTI_GPU
    fsdp = load_config_from_file(str(CONFIGS / "accelerate" / "fsdp2.yaml"))
    assert (fsdp.distributed_type, fsdp.fsdp_config["fsdp_version"]) == (DistributedType.FSDP, 2)
    assert (asked(1), asked(2)) == ("none", "ddp")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asked(2) == "fsdp2"


def test_every_launcher_file_opens_with_what_it_is_for() -> None:
    for file in (CONFIGS / "accelerate").glob("*.yaml"):
        assert file.read_text(encoding="utf-8").startswith("# "), file


@pytest.mark.parametrize(
    ("content", "environment", "settings", "said"),
    [
        ({"gradient_clipping": 5.0}, {}, (), r"sets gradient_clipping=5\.0, which training\.max_grad_norm decides"),
        ({"optimizer": {"type": "AdamW"}}, {}, (), r"sets optimizer=.*, which training\.optimizer decides"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, (), r"sets scheduler=.*, which training\.schedule decides"),
        ({"bf16": {"enabled": True}}, {}, (), r"sets bf16=.*, which precision\.dtype decides"),
        ({"zero_optimization": {}}, {}, (), r"mine\.json names no zero_optimization\.stage"),
        (None, {}, (), r"the DeepSpeed file .* does not exist"),
        ({}, {}, ("training.optimizer=muon",), r"training\.optimizer='muon' needs whole matrices, which zero2 cuts up"),
        ({}, {"ACCELERATE_USE_CPU": "true"}, (), r"ACCELERATE_USE_CPU is set, with which accelerate runs ddp and not zero2"),
    ],
)
def test_what_contradicts_the_settings_is_refused_before_a_model_is_built(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: dict[str, Any] | None,
    environment: dict[str, str],
    settings: tuple[str, ...],
    said: str,
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(json.dumps({"zero_optimization": {"stage": 2}, **content}), encoding="utf-8")
    told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), **environment}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        check_sharding(compose_settings(["dataset.files=some.jsonl", *settings]), 2)


def test_a_run_stops_before_its_first_step_when_another_way_runs_than_was_asked_for(
    settings: Any, write_samples: Any
) -> None:
    trainer, _ = prepare(settings(write_samples([9] * 30)))
    (guard,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, SameWay))
    assert guard.way == "none"
    guard.way = "zero2"
    with pytest.raises(ValueError, match="the launcher's files ask for zero2, but none runs"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_stage_that_runs_is_read_from_the_engine() -> None:
    engine = SimpleNamespace(zero_optimization_stage=lambda: 2)
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    assert acting(SimpleNamespace(accelerator=accelerator, deepspeed=engine)) == "zero2"  # type: ignore[arg-type]
