"""A small model to train, tokenised samples, and settings that train it in seconds."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from dllm_var.text.chat import render_sample
from dllm_var.text.tokenizer import load_tokenizer
from sft_training.config import SftConfig
from sft_training.overrides import compose_settings

MASK = 270  # of the byte tokenizer in tests/conftest.py
EOS, EOT = 256, 257

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def start_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training from scratch starts from: a tokenizer of bytes, and the config.json of a model of 33,000 weights."""
    folder = tmp_path_factory.mktemp("start")
    for file in chat_folder.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder / file.name)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields |= {"d_model": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 48}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(start_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(start_folder)


@pytest.fixture
def write_samples(tmp_path: Path) -> Write:
    """Write tokenised samples of the given response lengths, as dataset/transfer_text2token.py does."""

    def write(lengths: Sequence[int], name: str = "train.jsonl", prompt: int = 5) -> Path:
        rng = np.random.default_rng(len(lengths))
        lines = []
        for number, length in enumerate(lengths, start=1):
            ids = [*rng.integers(97, 123, prompt + length - 2).tolist(), EOT, EOS]
            key = f"{Path(name).stem}:{number}"
            lines.append(json.dumps({"id": key, "input_ids": ids, "prompt_length": prompt, "num_tokens": len(ids)}))
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


@pytest.fixture
def write_chat(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Write tokenised questions and answers."""

    def write(pairs: Sequence[tuple[str, str]], name: str = "chat.jsonl") -> Path:
        lines = []
        for number, (question, answer) in enumerate(pairs, start=1):
            prompt, response = render_sample(tokenizer, [{"role": "user", "content": question}], answer, "chat")
            record = {"id": f"chat:{number}", "input_ids": prompt + response, "prompt_length": len(prompt)}
            lines.append(json.dumps(record))
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write


def small_settings(start: Path, output: Path, files: Path, *more: str) -> list[str]:
    """Overrides for a run of seconds; later ones win."""
    return [
        "model=scratch", f"model.config={start}", f"model.tokenizer={start}", f"dataset.files={files}",
        "packing.max_length=48", "packing.open_rows=2", "training.local_batch_size=2", "training.grad_accum_steps=2",
        "training.warmup_steps=1", "training.learning_rate=3e-3", "training.max_steps=6", "training.device=cpu",
        f"output_dir={output}", "precision=fp32", *more,
    ]  # fmt: skip


@pytest.fixture
def settings(start_folder: Path, tmp_path: Path) -> Callable[..., SftConfig]:
    """Small settings, with overrides."""

    def build(files: Path, *more: str, output: str = "run") -> SftConfig:
        return compose_settings(small_settings(start_folder, tmp_path / output, files, *more))

    return build
