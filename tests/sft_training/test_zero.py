"""Training under DeepSpeed and FSDP2 on CPU processes: the same losses, exact resume, and other numbers of processes.

Three launches make all runs; the tests look at what they left. FSDP2 runs here with accelerate told that gloo serves GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dllm_var.model.checkpoint import load_model
from sft_training.overrides import CONFIGS, compose_settings
from sft_training.records import read_metrics
from sft_training.sft import prepare, train
from sft_training.universal import needs_universal

FOLDER = CONFIGS.parent / "sft_training"
SEVERAL = Path(__file__).with_name("several_runs.py")
LENGTHS = [3 + (5 * i) % 19 for i in range(60)]


class Runs:
    """Folders of runs on the same rows: 6 steps of 8 rows, a checkpoint after every second."""

    def __init__(self, folder: Path, start: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(4)
        lines = []
        for n in LENGTHS:
            ids = [*rng.integers(97, 123, 5 + n - 2).tolist(), 257, 256]
            lines.append(json.dumps({"input_ids": ids, "prompt_length": 5}))
        files = folder / "train.jsonl"
        files.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.shared = [
            "model=scratch", f"model.config={start}", f"model.tokenizer={start}", f"dataset.files={files}",
            "packing.max_length=48", "training.local_batch_size=2", "training.warmup_steps=1", "training.max_steps=6",
            "training.schedule=constant", "training.learning_rate=3e-3", "training.save_steps=2", "training.device=cpu",
            "loss.name=token_sum_global", f"validation.files={files}", "validation.every=4", "validation.samples=4",
            "validation.decodes=1", "validation.block_length=8", "validation.max_gen_length=16",
        ]  # fmt: skip

    def settings(self, name: str, processes: int, *more: str) -> list[str]:
        """Overrides for a run of that name; accumulation makes up for a smaller number of processes."""
        steps = f"training.grad_accum_steps={4 // processes}"
        return [*self.shared, steps, f"output_dir={self.folder / name}", "precision=fp32", *more]

    def start(self, processes: int, *runs: tuple[str, str, tuple[str, ...]]) -> str:
        """Some runs (name, shard, settings) one after the other in the same processes; what they printed."""
        plan = self.folder / "plan.json"
        told = [{"shard": shard, "settings": self.settings(name, processes, *more)} for name, shard, more in runs]
        plan.write_text(json.dumps(told), encoding="utf-8")
        command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "accelerate" / "zero2.yaml"),
                   "--deepspeed_config_file", str(CONFIGS / "deepspeed" / "zero2.json"),
                   "--num_processes", str(processes), str(SEVERAL), str(plan)]  # fmt: skip
        return self._run([sys.executable, *command])

    def start_script(self, name: str, shard: str) -> str:
        """A run through run_cpu.sh on two processes."""
        settings = self.settings(name, 2)
        return self._run(["bash", str(FOLDER / "run_cpu.sh"), *settings], PYTHON=sys.executable, SHARD=shard)

    def _run(self, command: list[str], **environment: str) -> str:
        clean = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
        clean["PYTHONPATH"] = os.pathsep.join([str(CONFIGS.parent), *clean.get("PYTHONPATH", "").split(os.pathsep)])
        made = subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr[-4000:]
        return made.stdout

    def metric(self, name: str, key: str = "loss") -> dict[int, float]:
        """A logged value by step."""
        return {line["step"]: line[key] for line in read_metrics(self.folder / name) if key in line}

    def facts(self, name: str, *keys: str) -> list[Any]:
        """What run.json says."""
        run = json.loads((self.folder / name / "run.json").read_text(encoding="utf-8"))
        return [run[key] for key in keys]

    def furthest(self, name: str, other: str) -> float:
        """Largest difference between the final weights of two runs."""
        ours, theirs = (load_model(self.folder / run / "final").state_dict() for run in (name, other))
        return max((ours[key] - theirs[key]).abs().max().item() for key in ours)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, start_folder: Path) -> Runs:
    """All of them: one process without DeepSpeed, then the three launches."""
    made = Runs(tmp_path_factory.mktemp("zero"), start_folder)
    train(compose_settings(made.settings("plain", 1)))
    made.start_script("pair", "zero2")
    half = f"resume={made.folder / 'pair' / 'checkpoint-4'}"
    (made.folder / "pair" / "checkpoint-4" / "global_step4_universal" / "zero").mkdir(parents=True)  # interrupted before
    made.printed = made.start(1, ("one", "zero2", ()), ("down", "zero2", (half,)), ("three_one", "zero3", ()))
    saving = "training.gradient_checkpointing=true"
    made.start(
        2,
        ("again", "zero2", (half,)),
        ("up", "zero2", (f"resume={made.folder / 'one' / 'checkpoint-2'}",)),
        ("low", "zero2", ("precision=bf16",)),
        ("wide", "ddp", (f"resume={made.folder / 'plain' / 'checkpoint-2'}",)),
        ("three", "zero3", (saving,)),
        ("three_up", "zero3", (f"resume={made.folder / 'three_one' / 'checkpoint-2'}",)),
        ("three_again", "zero3", (saving, f"resume={made.folder / 'three' / 'checkpoint-4'}")),
        ("fsdp", "fsdp2", (saving,)),
        ("fsdp_again", "fsdp2", (saving, f"resume={made.folder / 'fsdp' / 'checkpoint-4'}")),
    )
    return made


pytestmark = pytest.mark.timeout(1200)


@pytest.mark.dist
def test_zero2_on_two_processes_trains_what_one_process_trains(runs: Runs) -> None:
    assert runs.facts("pair", "sharding", "distributed_type", "world_size") == ["zero2", "DEEPSPEED", 2]
    assert runs.metric("pair") == pytest.approx(runs.metric("plain"), abs=1e-5)
    assert runs.metric("pair", "grad_norm") == pytest.approx(runs.metric("plain", "grad_norm"), rel=1e-4)
    for name in ("prompt", "response", "masked", "eos"):
        assert runs.metric("pair", f"tokens/{name}") == runs.metric("plain", f"tokens/{name}")
    assert runs.furthest("pair", "plain") < 1e-5
    assert runs.metric("pair")[6] < runs.metric("pair")[1] - 0.5


@pytest.mark.dist
def test_the_run_file_says_what_the_built_engine_does(runs: Runs) -> None:
    assert runs.facts("pair", "optimizer", "lr_at_steps") == [["AdamW"], {"0": 0.0, "50": 3e-3, "100": 3e-3}]
    assert runs.facts("pair", "weights", "master_weights", "autocast") == ["float32", "float32", "no"]
    assert runs.facts("low", "weights", "master_weights", "autocast") == ["bfloat16", "float32", "bf16"]
    for name in ("plain", "pair", "three", "fsdp", "down"):
        assert runs.facts(name, "tokens_per_step", "parameters") == [8 * 48, runs.facts("plain", "parameters")[0]]
    assert runs.metric("pair", "learning_rate") == {1: 0.0, **dict.fromkeys(range(2, 7), 3e-3)}


@pytest.mark.dist
def test_a_checkpoint_holds_weights_data_position_and_a_piece_of_the_optimizer_for_each_process(runs: Runs) -> None:
    folder = runs.folder / "pair" / "checkpoint-6"
    assert len(list(folder.glob("global_step6/*optim_states.pt"))) == 2
    assert (folder / "data_position.json").is_file()
    saved, final = (load_model(path).state_dict() for path in (folder, runs.folder / "pair" / "final"))
    assert all(torch.equal(saved[name], final[name]) for name in saved)


@pytest.mark.dist
@pytest.mark.parametrize(("resumed", "whole"), [("again", "pair"), ("three_again", "three"), ("fsdp_again", "fsdp")])
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(runs: Runs, resumed: str, whole: str) -> None:
    for key in ("loss", "grad_norm", "tokens/masked"):
        values = runs.metric(whole, key)
        assert runs.metric(resumed, key) == {step: values[step] for step in (5, 6)}
    assert runs.furthest(resumed, whole) == 0.0


@pytest.mark.dist
@pytest.mark.parametrize(
    ("resumed", "whole", "first"),
    [("down", "pair", 5), ("up", "one", 3), ("three_up", "three_one", 3), ("wide", "plain", 3)],
)
def test_a_run_goes_on_with_the_same_losses_on_another_number_of_processes(
    runs: Runs, resumed: str, whole: str, first: int
) -> None:
    losses, expected = runs.metric(resumed), runs.metric(whole)
    assert list(losses) == list(range(first, 7))
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-6)
    assert runs.furthest(resumed, whole) < 1e-5
    assert runs.facts(resumed, "world_size") != runs.facts(whole, "world_size")


@pytest.mark.dist
def test_a_change_of_processes_is_told_and_the_next_checkpoint_has_pieces_for_the_new_number(runs: Runs) -> None:
    assert "checkpoint-4 comes from 2 process(es), this run has 1: putting its pieces together" in runs.printed
    assert len(list((runs.folder / "down" / "checkpoint-6").glob("global_step6/*optim_states.pt"))) == 1


@pytest.mark.dist
@pytest.mark.parametrize(("name", "way"), [("three", "zero3"), ("fsdp", "fsdp2")])
def test_sharded_weights_train_and_validate_the_same_with_recomputed_blocks_and_are_saved_whole(
    runs: Runs, name: str, way: str
) -> None:
    assert runs.facts(name, "sharding", "world_size", "master_weights") == [way, 2, "float32"]
    assert runs.metric(name) == pytest.approx(runs.metric("plain"), abs=1e-5)
    assert runs.furthest(name, "plain") < 1e-5
    ours, theirs = (runs.metric(run, "eval_loss") for run in (name, "plain"))
    assert list(ours) == [4, 6]
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.dist
def test_bf16_under_zero2_computes_in_bf16_weights_with_nearly_the_same_losses(runs: Runs) -> None:
    assert runs.metric("low") == pytest.approx(runs.metric("plain"), rel=2e-2)
    assert runs.metric("low") != runs.metric("plain")


def fake_checkpoint(folder: Path, way: str, pieces: int = 2) -> Path:
    """A checkpoint folder as far as its names say under what it was written."""
    states = folder / "global_step4"
    if way.startswith("zero"):
        states.mkdir(parents=True)
        name = "mp_rank_00_model_states.pt" if way == "zero2" else "zero_pp_rank_0_mp_rank_00_model_states.pt"
        for file in (name, *(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(pieces))):
            (states / file).touch()
        (folder / "global_step4_universal").mkdir()
    else:
        folder.mkdir(parents=True)
        (folder / ("optimizer.bin" if way == "fsdp2" else "optimizer.pt")).touch()
    return folder


def test_only_pieces_for_another_number_of_processes_are_put_together(tmp_path: Path) -> None:
    for way in ("zero2", "zero3"):
        folder = fake_checkpoint(tmp_path / way, way)
        assert [needs_universal(folder, way, processes) for processes in (1, 2, 4)] == [True, False, True]
    for way in ("ddp", "fsdp2"):
        folder = fake_checkpoint(tmp_path / way, way)
        assert [needs_universal(folder, way, processes) for processes in (1, 2, 4)] == [False] * 3
    assert not needs_universal(tmp_path / "ddp", "none", 1)


@pytest.mark.parametrize(
    ("then", "now"), [("zero2", "ddp"), ("zero2", "none"), ("ddp", "zero2"), ("zero3", "zero2"), ("fsdp2", "zero3")]
)
def test_an_optimizer_that_this_way_cannot_read_is_refused_instead_of_forgotten(tmp_path: Path, then: str, now: str) -> None:
    folder = fake_checkpoint(tmp_path / "checkpoint-4", then)
    with pytest.raises(ValueError, match=rf"was written under {then}, whose optimizer {now} cannot read.*SHARD={then}"):
        needs_universal(folder, now, 2)


@pytest.mark.parametrize(
    ("way", "precision", "dtype"),
    [("zero2", "bf16", torch.bfloat16), ("zero2", "fp32", torch.float32), ("fsdp2", "bf16", torch.float32)],
)
def test_only_what_keeps_masters_of_its_own_loads_bf16_weights(
    settings: Any, write_samples: Any, monkeypatch: pytest.MonkeyPatch, way: str, precision: str, dtype: torch.dtype
) -> None:
    class Built(Exception):
        """Holds the dtype that the model was to have."""

    def build_model(config: Any, dtype: torch.dtype) -> None:
        raise Built(dtype)

    monkeypatch.setattr("sft_training.sft.check_sharding", lambda config, processes: way)
    monkeypatch.setattr("sft_training.sft.build_model", build_model)
    with pytest.raises(Built) as built:
        prepare(settings(write_samples(LENGTHS), f"precision={precision}"))
    assert built.value.args == (dtype,)


def test_mask_levels_stay_float32_where_the_library_casts_its_inputs(
    settings: Any, write_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = prepare(settings(write_samples(LENGTHS)))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.is_deepspeed_enabled = True
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    assert torch.equal(trainer._prepare_inputs(batch)["t"], batch["t"])
    assert batch["t"].dtype == torch.float32
