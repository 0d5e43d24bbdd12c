"""FP8 on two processes under DeepSpeed ZeRO-2: it trains as bf16 does, covers the same layers, and resumes to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var.model.checkpoint import load_model
from sft_training.records import read_metrics

SCRIPT = Path(__file__).with_name("several_runs.py")
ROOT = SCRIPT.parents[2]
LENGTHS = [3 + (5 * i) % 19 for i in range(60)]


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_two_zero2_ranks_train_in_fp8_and_resume_bit_for_bit(write_samples: Any, start_folder: Path, tmp_path: Path) -> None:
    shared = [
        "model=scratch", f"model.config={start_folder}", f"model.tokenizer={start_folder}", "training.device=cpu",
        f"dataset.files={write_samples(LENGTHS)}", "packing.max_length=48", "packing.open_rows=2",
        "training.grad_accum_steps=1", "training.warmup_steps=1", "training.learning_rate=3e-3", "training.max_steps=4",
        "training.expect_processes=2", "training.save_steps=2",
    ]  # fmt: skip
    folders = {name: tmp_path / name for name in ("bf16", "fp8", "again")}
    options = {
        "bf16": ["precision=bf16"],
        "fp8": ["precision=fp8"],
        "again": ["precision=fp8", f"resume={folders['fp8'] / 'checkpoint-2'}"],
    }
    runs = [
        {"shard": "zero2", "settings": [*shared, *options[name], f"output_dir={folder}"]} for name, folder in folders.items()
    ]
    (tmp_path / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    made = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            SCRIPT, tmp_path / "runs.json",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-3000:]

    facts = json.loads((folders["fp8"] / "run.json").read_text(encoding="utf-8"))
    assert (facts["sharding"], facts["world_size"]) == ("zero2", 2)
    assert (facts["weights"], facts["master_weights"]) == ("bfloat16", "float32")
    assert len(facts["fp8"]["layers"]) == 14
    losses = {
        name: {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}
        for name, folder in folders.items()
    }
    assert losses["fp8"] == pytest.approx(losses["bf16"], rel=0.01)
    assert losses["fp8"] != losses["bf16"]
    assert losses["again"] == {step: losses["fp8"][step] for step in (3, 4)}
    weights, wanted = (load_model(folders[name] / "final").state_dict() for name in ("again", "fp8"))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
