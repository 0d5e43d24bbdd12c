"""scripts/export.py: from a run's folder or an adapter to a folder for others, with a card that says what is known."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from dllm_var import load_pretrained
from dllm_var.model.adapter import save_adapter
from dllm_var.model.checkpoint import load_config, load_model, save_model, weights_hash
from sft_training.adapters import Plan, attach, resolve_targets
from sft_training.config import AdapterSection

IDS = [[258, 97, 98, 270, 270, 99, 270]]
STRANGER = """
import socket, sys
sys.modules["dllm_var"] = None
def refuse(*arguments, **named):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
question = [{"role": "user", "content": "rep xy 3"}]
prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
answer = model.generate(prompt, max_gen_length=8, block_length=4)
with torch.no_grad():
    save_file({"logits": model(torch.tensor(IDS)).logits, "answer": answer}, sys.argv[2])
""".replace("IDS", str(IDS))

Export = Callable[..., str]


@pytest.fixture
def export(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """Run the script here; gives what it printed."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", *arguments])
        script("scripts/export.py").main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_folder(chat_folder: Path, tmp_path: Path) -> Path:
    """A run with a checkpoint and an adapter as its last word."""
    run = tmp_path / "run"
    for name in ("checkpoint-4", "final"):
        save_model(load_model(chat_folder), run / name)
        for file in chat_folder.glob("tokenizer*"):
            (run / name / file.name).write_bytes(file.read_bytes())
    facts = {"samples": 40, "tokens_per_step": 192, "max_steps": 6, "steps": 6}
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    settings = {
        "model": {"path": str(chat_folder)}, "dataset": {"files": ["/secret/place/train.jsonl"], "epochs": 2},
        "packing": {"max_length": 48}, "training": {"learning_rate": 3e-3}, "output_dir": "/secret/place/run",
    }  # fmt: skip
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    lines = [{"step": step, "loss": 7.0 - step, "eval_loss": 8.0 - step} for step in range(1, 7)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return run


@pytest.fixture
def adapter_folder(chat_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the recorded model that changes every logit."""
    targets = resolve_targets(load_config(chat_folder), ["q_proj", "ff_out"])
    plan = Plan(AdapterSection("lora", r=4, alpha=8), targets, str(chat_folder), weights_hash(chat_folder))
    wrapped = attach(load_model(chat_folder), plan, 0, torch.device("cpu"))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    save_adapter(wrapped, tmp_path / "lora" / "final")
    return tmp_path / "lora" / "final"


def test_an_adapter_becomes_a_folder_that_transformers_opens_offline(
    export: Export, adapter_folder: Path, chat_folder: Path, tmp_path: Path
) -> None:
    said = export("--model", str(adapter_folder), "--dtype", "fp32", "--max_shard_gb", "0.0002")
    out = adapter_folder.with_name("final-export")
    assert "bit for bit (largest difference 0)" in said
    assert "rounding" not in said
    assert f"{out}: " in said
    assert all(file.stat().st_size < 210_000 for file in out.glob("model-*.safetensors"))
    assert subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=out, capture_output=True).returncode == 0
    (tmp_path / "stranger.py").write_text(STRANGER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "stranger.py", str(out), "found.safetensors"], cwd=tmp_path, capture_output=True, text=True,
        timeout=240, env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, ours = load_file(tmp_path / "found.safetensors"), load_pretrained(adapter_folder).model
    with torch.no_grad():
        assert torch.equal(found["logits"], ours(torch.tensor(IDS)).logits)
        assert (found["logits"] - load_model(chat_folder)(torch.tensor(IDS)).logits).abs().max() > 0.1
    assert found["answer"].shape[0] == 1
    text = (out / "README.md").read_text(encoding="utf-8")
    assert f"A LoRA adapter, merged with its base `{chat_folder.name}`" in text
    assert f"(SHA-256 of its weights: `{weights_hash(chat_folder)}`)" in text
    assert "Data, recipe and number of steps: no run.json and config.yaml" in text
    assert "Under which licence" in text


@pytest.mark.parametrize(
    ("name", "steps", "loss"), [("checkpoint-4", 4, "4.5000 (mean of the last 4"), ("final", 6, "3.5000")]
)
def test_the_card_tells_what_the_run_recorded_and_nothing_about_places(
    export: Export, run_folder: Path, chat_folder: Path, name: str, steps: int, loss: str
) -> None:
    said = export("--model", str(run_folder / name), "--output", str(run_folder / "out"))
    assert "rounding to bf16 moved logits by at most" in said
    assert {value.dtype for value in load_model(run_folder / "out").state_dict().values()} == {torch.bfloat16}
    text = (run_folder / "out" / "README.md").read_text(encoding="utf-8")
    assert "40 samples" in text
    assert f"{steps} of 6 optimizer steps of 192 positions" in text
    assert f"Training loss: {loss}" in text
    assert f"fixed noise: {8 - steps:.4f} (step {steps})" in text
    assert '"files": ["train.jsonl"]' in text
    assert f"starting from `{chat_folder.name}`" in text
    assert "learning_rate: 0.003" in text
    assert "secret" not in text
    assert str(run_folder.parent) not in text
    assert "weights in bfloat16" in text
    assert f"What `{chat_folder.name}` was trained on." in text


def test_a_card_that_the_model_has_already_travels_with_it(export: Export, run_folder: Path) -> None:
    theirs = "---\nlicense: mit\n---\n\n# Mine\n\nIt sorts words.\n"
    (run_folder / "final" / "README.md").write_text(theirs, encoding="utf-8")
    export("--model", str(run_folder / "final"), "--output", str(run_folder / "out"))
    text = (run_folder / "out" / "README.md").read_text(encoding="utf-8")
    assert text.endswith("## Its own card\n\n# Mine\n\nIt sorts words.\n")
    assert "Not known" not in text


@pytest.mark.parametrize("output", [".", "link"])
def test_an_earlier_export_is_replaced_in_the_present_folder_and_behind_a_link(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    folder = tmp_path / "folder"
    export("--model", "tiny", "--output", str(folder))
    before = sorted(path.name for path in folder.iterdir())
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder if output == "." else tmp_path)
    export("--model", "tiny", "--output", output, "--dtype", "fp32")
    assert sorted(path.name for path in folder.iterdir()) == before
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_an_earlier_export_that_cannot_be_moved_stays(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export("--model", "tiny", "--output", str(tmp_path / "folder"))
    before = (tmp_path / "folder" / "SHA256SUMS").read_bytes()
    replace = os.replace

    def fails(source: Any, target: Any) -> None:
        if Path(target).name == "folder" and Path(source).name != "earlier":
            raise OSError(errno.EBUSY, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(SystemExit, match=r"cannot be replaced \(Device or resource busy\): choose a new folder"):
        export("--model", "tiny", "--output", str(tmp_path / "folder"), "--dtype", "fp32")
    assert (tmp_path / "folder" / "SHA256SUMS").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "model 'nowhere' is no folder"),
        (["--model", "tests"], "not a checkpoint folder"),
        (["--model", "tiny", "--base", "tiny"], "base='tiny' only goes with an adapter"),
        (["--model", "tiny", "--output", "tests"], "holds files that no export of ours wrote"),
        (
            ["--model", "tiny", "--output", "README.md/new"],
            r"README\.md.* cannot be written \((Not a directory|File exists)\)",
        ),
    ],
)
def test_a_mistake_is_one_sentence(export: Export, arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(SystemExit, match=said):
        export(*arguments)
