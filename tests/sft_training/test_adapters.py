"""LoRA runs: which weights are trained, what a checkpoint holds, resuming, and the adapter folder as a model."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from dllm_var import load_pretrained
from dllm_var.model.adapter import save_adapter
from dllm_var.model.checkpoint import load_config, load_model, save_model, weights_hash
from sft_training import adapters, build
from sft_training.adapters import Plan, attach, base_name, plan_adapter, resolve_targets
from sft_training.config import AdapterSection, SftConfig
from sft_training.records import read_metrics
from sft_training.sft import prepare, train

SCRIPT = Path(__file__).resolve().parents[2] / "sft_training" / "run_cpu.sh"
LENGTHS = [3 + (5 * i) % 19 for i in range(40)]
QKV = [f"model.transformer.blocks.{i}.{name}" for i in range(3) for name in ("q_proj", "k_proj", "v_proj")]
HEAD = "model.transformer.ff_out"
IDS = torch.tensor([[258, 97, 98, 270, 270, 99, 270]])
CPU = torch.device("cpu")

Settings = Callable[..., SftConfig]


@pytest.fixture
def lora(settings: Settings, write_samples: Any, chat_folder: Path) -> Settings:
    """Settings of a small LoRA run on the recorded model."""
    files = write_samples(LENGTHS)

    def build(*more: str, output: str = "run") -> SftConfig:
        return settings(
            files, "model=tiny", f"model.path={chat_folder}", "model.config=null", "model.tokenizer=null", "adapter=lora",
            "adapter.r=4", "adapter.alpha=8", "training.learning_rate=2e-2", *more, output=output,
        )  # fmt: skip

    return build


@pytest.fixture
def adapter_folder(chat_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the recorded model, on one layer of every block and on the head, that changes every logit."""
    targets = resolve_targets(load_config(chat_folder), ["ff_out", HEAD])
    section = AdapterSection("lora", r=4, alpha=8, dropout=0.5, targets=[])
    plan = Plan(section, targets, str(chat_folder), weights_hash(chat_folder))
    wrapped = attach(load_model(chat_folder), plan, 0, CPU)
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.1)
    save_adapter(wrapped, tmp_path / "adapter")
    return tmp_path / "adapter"


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def metrics(config: SftConfig, key: str = "loss") -> dict[int, Any]:
    return {line["step"]: line[key] for line in read_metrics(Path(config.output_dir)) if key in line}


def tensors(config: SftConfig) -> dict[str, Tensor]:
    return load_file(Path(config.output_dir) / "final" / "adapter_model.safetensors")


def change(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = state.global_step == self.step
        torch.rand(3)  # as anything else might that draws random numbers: dropout does not depend on it


def test_only_the_adapters_of_the_named_layers_are_trained_and_saved(lora: Settings, chat_folder: Path) -> None:
    config = lora("training.save_steps=3")
    trainer = train(config)
    base = load_model(chat_folder).state_dict()
    kept = {name: value for name, value in trainer.network.get_base_model().state_dict().items() if "lora_" not in name}
    assert {name.replace("base_layer.", "") for name in kept} == base.keys()
    assert all(torch.equal(value, base[name.replace("base_layer.", "")]) for name, value in kept.items())
    facts = json.loads((Path(config.output_dir) / "run.json").read_text(encoding="utf-8"))
    assert facts["adapter"]["layers"] == QKV
    assert facts["trained_parameters"] == 9 * 2 * 4 * 64
    assert facts["optimizer"] == ["AdamW"]
    for name in ("checkpoint-3", "checkpoint-6", "final"):
        folder = Path(config.output_dir) / name
        assert not list(folder.glob("model*.safetensors"))
        assert not (folder / "config.json").exists()
        assert (folder / "tokenizer.json").is_file()
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
            names = set(opened.keys())
            assert {opened.get_tensor(key).dtype for key in names} == {torch.float32}
            assert all(opened.get_tensor(key).any() for key in names)
        assert names == {f"base_model.model.{path}.lora_{side}.weight" for path in QKV for side in "AB"}
        fields = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        assert fields["base_model_name_or_path"] == str(chat_folder.resolve())
        assert fields["auto_mapping"]["base_sha256"] == weights_hash(chat_folder)
        assert (fields["r"], fields["lora_alpha"], fields["target_modules"]) == (4, 8, QKV)


def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(lora: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("training.save_steps=2", "adapter.dropout=0.2", "training.gradient_checkpointing=true")
    whole, stopped = lora(*options, output="whole"), lora(*options, output="stopped")
    train(whole)
    trainer, _ = prepare(stopped)
    trainer.add_callback(StopAt(5))  # one step after the last checkpoint: that step is done again
    trainer.train()
    train(stopped)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert metrics(stopped, key) == metrics(whole, key)
    ours, theirs = tensors(stopped), tensors(whole)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    monkeypatch.setattr(build, "FIRST_LOOK", 0)  # these are ids of another tokenizer than that of "tiny"
    for other, said in (
        (("adapter.r=8",), r"'r': 4.*this run asks for.*'r': 8"),
        (
            ("adapter.kind=none", "adapter.r=32", "adapter.alpha=256", "adapter.dropout=0.05"),
            "adapter.kind='none', but .*checkpoint-6 holds an adapter",
        ),
        (("adapter.targets=[q_proj]",), "target_modules"),
        (("model.path=tiny",), "was trained on other weights than those of model.path='tiny'"),
    ):
        with pytest.raises(ValueError, match=said):
            prepare(lora(*options, *other, output="stopped"))


def test_without_dropout_the_loss_does_not_depend_on_recomputing_blocks(lora: Settings) -> None:
    """The head's adapter gets its gradient although the loss reads the head as a matrix; validation sees adapters too."""
    options = (
        f"adapter.targets=[q_proj,{HEAD}]", "adapter.dropout=0", "loss.name=next_token", "training.max_steps=3",
        "validation.every=3", "validation.samples=4", "validation.decodes=1", "validation.max_gen_length=4",
    )  # fmt: skip
    plain, saving = lora(*options, output="a"), lora(*options, "training.gradient_checkpointing=true", output="b")
    for config in (plain, saving):
        config.validation.files = config.dataset.files
        train(config)
    assert metrics(plain) == pytest.approx(metrics(saving), abs=1e-5)
    assert metrics(plain, "eval_loss").keys() == {3}
    assert tensors(plain)[f"base_model.model.{HEAD}.lora_B.weight"].any()


def test_the_base_is_held_as_stored_when_the_run_computes_in_bf16(lora: Settings, chat_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(chat_folder, tmp_path / "half")
    save_model(load_model(chat_folder), tmp_path / "half", dtype=torch.bfloat16)
    short = ("training.max_steps=2", "adapter.dropout=0")
    config = lora("precision=bf16", f"model.path={tmp_path / 'half'}", "model.final_dtype=bf16", *short)
    trainer = train(config)
    for name, value in trainer.network.named_parameters():
        assert value.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert value.requires_grad == ("lora_" in name)
    assert {value.dtype for value in tensors(config).values()} == {torch.bfloat16}
    exact = lora(*short, output="exact")
    train(exact)
    assert metrics(config) == pytest.approx(metrics(exact), rel=2e-2)


def test_a_merged_adapter_computes_what_the_adapter_computes(adapter_folder: Path, chat_folder: Path) -> None:
    merged, beside, base = (
        load_pretrained(adapter_folder).model, load_pretrained(adapter_folder, merge=False).model, load_model(chat_folder)
    )  # fmt: skip
    with torch.no_grad():
        logits = [model(IDS).logits for model in (merged, beside, base)]
        projected = [model(IDS, project=lambda hidden, head: hidden @ head.T).logits for model in (merged, beside)]
    for one, other in ((logits[0], logits[1]), projected, (logits[0], projected[0])):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 0.1
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert not any(value.requires_grad for value in merged.parameters())


def test_names_mean_layers_of_the_blocks_and_the_head_only_by_its_full_path(chat_folder: Path) -> None:
    config = load_config(chat_folder)
    inside = tuple(f"model.transformer.blocks.{i}.ff_out" for i in range(3))
    assert resolve_targets(config, ["ff_out"]) == inside
    assert resolve_targets(config, [HEAD, "ff_out"]) == (*inside, HEAD)
    assert resolve_targets(config, ["transformer.blocks.1.q_proj"]) == ("model.transformer.blocks.1.q_proj",)
    assert resolve_targets(config, ["v_proj", "q_proj", "k_proj"]) == tuple(QKV)
    for wrong in ("qproj", "wte", "blocks.0.q_proj", "model.transformer.blocks.7.q_proj"):
        with pytest.raises(ValueError, match=rf"{wrong}' matches no linear layer.*q_proj, k_proj.*the head \({HEAD}\)"):
            resolve_targets(config, ["q_proj", wrong])


def test_a_base_that_is_gone_or_another_one_is_refused(adapter_folder: Path, chat_folder: Path, tmp_path: Path) -> None:
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(chat_folder, moved)
    change(adapter_folder, base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"is an adapter of .*gone, give that with base= \(--base\)"):
        load_pretrained(adapter_folder)
    assert load_pretrained(adapter_folder, base=moved).model.config.n_layers == 3
    shutil.copytree(chat_folder, other)
    model = load_model(chat_folder)
    with torch.no_grad():
        model.model.transformer["ln_f"].weight[0] += 1e-3
    save_model(model, other)
    with pytest.raises(ValueError, match=r"was trained on other weights than those in .*other"):
        load_pretrained(adapter_folder, base=other)
    with pytest.raises(ValueError, match="base='tiny' only goes with an adapter"):
        load_pretrained(chat_folder, base="tiny")
    with pytest.raises(ValueError, match="holds an adapter, not a whole model"):
        load_config(adapter_folder)


def test_the_demo_talks_to_an_adapter_and_finds_its_base(
    adapter_folder: Path, chat_folder: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = script("demo_dLLM-var.py")
    asked = ["--model", str(adapter_folder), "--prompt", "rep xy 3", "--max_gen_length", "8", "--block_length", "4"]
    assert demo.main(asked) == 0
    first = capsys.readouterr().out
    change(adapter_folder, base_model_name_or_path="gone")
    assert demo.main(asked) == 2
    assert "is an adapter of gone, give that with base= (--base)" in capsys.readouterr().err
    assert demo.main([*asked, "--base", str(chat_folder)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == first.splitlines()[0]


def test_the_hash_of_a_base_does_not_depend_on_its_files_but_on_every_weight(chat_folder: Path, tmp_path: Path) -> None:
    model = load_model(chat_folder)
    save_model(model, tmp_path / "cut", max_shard_bytes=100_000)
    assert weights_hash(tmp_path / "cut") == weights_hash(chat_folder)
    save_model(model, tmp_path / "half", dtype=torch.bfloat16)
    assert weights_hash(tmp_path / "half") != weights_hash(chat_folder)


def test_an_adapter_of_other_software_is_taken_with_a_warning(adapter_folder: Path) -> None:
    before = load_pretrained(adapter_folder).model.state_dict()
    change(adapter_folder, auto_mapping=None, task_type="CAUSAL_LM", init_lora_weights="gaussian", some_future_field=None)
    with pytest.warns(UserWarning, match="carries no hash of its base"):
        after = load_pretrained(adapter_folder).model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "uses use_dora, which is not supported"),
        ({"modules_to_save": ["wte"], "init_lora_weights": "pissa"}, "uses init_lora_weights, modules_to_save"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type='PROMPT_TUNING' is not supported"),
        ({"r": 2}, "does not hold the tensors that adapter_config.json asks"),
        ({"target_modules": ["q_proj"]}, "does not hold the tensors that adapter_config.json asks"),
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
    ],
)
def test_what_would_be_applied_wrongly_is_refused(adapter_folder: Path, fields: dict[str, Any], said: str) -> None:
    change(adapter_folder, **fields)
    with pytest.raises(ValueError, match=said):
        load_pretrained(adapter_folder)


def test_a_pickle_or_a_torn_file_is_never_an_adapter(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        load_pretrained(adapter_folder)
    file.rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickles are never read"):
        load_pretrained(adapter_folder)


def test_without_peft_there_is_one_sentence(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch, lora: Settings) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for attempt in (lambda: load_pretrained(adapter_folder), lambda: prepare(lora())):
        with pytest.raises(ValueError, match="adapters need the package peft, which is not installed: pip install peft"):
            attempt()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("training.optimizer=muon",), r"training\.optimizer='muon' with an adapter"),
        (("adapter.r=0",), r"adapter\.r=0: must be at least 1"),
        (("adapter.dropout=1",), r"adapter\.dropout=1\.0: must be at least 0 and below 1"),
        (("adapter.targets=[]",), r"adapter\.targets=\[\]: name at least one layer"),
        (("adapter.targets=[qproj]",), "'qproj' matches no linear layer"),
        (("adapter=qlora",), "adapter.kind='qlora' needs a CUDA GPU"),
        (("adapter.kind=dora",), "adapter.kind='dora': choose one of none, lora, qlora"),
        (("model.from_scratch=true", "model.path=null", "model.config=x", "model.tokenizer=x"), "its base would be lost"),
    ],
)
def test_unusable_settings_end_before_a_model_is_built(
    lora: Settings, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("sft_training.sft.build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=said):
        prepare(lora(*options))


def test_a_base_that_would_be_cut_up_is_refused(lora: Settings) -> None:
    with pytest.raises(ValueError, match="adapters need a whole base, take SHARD=zero2"):
        plan_adapter(lora(), None, "zero3")


def test_a_base_is_named_so_that_it_is_found_again(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chat_folder.parent)
    assert base_name(chat_folder.name, chat_folder) == str(chat_folder)
    assert base_name("tiny", Path("somewhere")) == "tiny"
    assert base_name("owner/model", Path("cache")) == "owner/model"


@pytest.mark.dist
@pytest.mark.timeout(1300)
def test_two_processes_with_zero2_train_the_adapter_that_one_process_trains_and_resume_exactly(
    lora: Settings, chat_folder: Path, tmp_path: Path
) -> None:
    """Dropout is on: it is keyed by the rows, so that it does not matter which process has them."""
    alone = lora("training.grad_accum_steps=2", "training.max_steps=4", "adapter.dropout=0.3", output="alone")
    train(alone)
    pair = tmp_path / "pair"
    arguments = [
        "model=tiny", f"model.path={chat_folder}", f"dataset.files={alone.dataset.files}", "adapter=lora", "adapter.r=4",
        "adapter.alpha=8", "adapter.dropout=0.3", "training.learning_rate=2e-2", "packing.max_length=48",
        "packing.open_rows=2", "training.local_batch_size=2", "training.grad_accum_steps=1", "training.warmup_steps=1",
        "training.max_steps=4", "training.save_steps=2", "precision=fp32", f"output_dir={pair}",
    ]  # fmt: skip
    first = launch(tmp_path, *arguments, SHARD="zero2")
    assert first.returncode == 0, first.stderr[-3000:]
    facts = json.loads((pair / "run.json").read_text(encoding="utf-8"))
    assert (facts["sharding"], facts["trained_parameters"]) == ("zero2", 9 * 2 * 4 * 64)
    losses, wanted = ({line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}
                      for folder in (pair, Path(alone.output_dir)))  # fmt: skip
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert len(losses) == 4
    made = load_file(pair / "final" / "adapter_model.safetensors")
    assert max((made[name] - value).abs().max().item() for name, value in tensors(alone).items()) < 1e-5
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(pair / name)
    again = launch(tmp_path, *arguments, SHARD="zero2")
    assert again.returncode == 0, again.stderr[-3000:]
    assert {line["step"]: line["loss"] for line in read_metrics(pair) if "loss" in line} == losses
    resumed = load_file(pair / "final" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in made.items())


# --- 4 bits, with a stand-in for bitsandbytes ------------------------------------------------------------------------


class Params4bit(nn.Parameter):
    """Keeps what it was told."""

    def __new__(cls, data: Tensor, **told: Any) -> "Params4bit":
        made = nn.Parameter.__new__(cls, data, requires_grad=told.pop("requires_grad"))
        made.told = told
        return made


class Linear4bit(nn.Linear):
    """Rounds coarsely where the real one quantises: when it is moved to a device."""

    def __init__(self, inside: int, outside: int, bias: bool, compute_dtype: torch.dtype, quant_type: str) -> None:
        super().__init__(inside, outside, bias=bias)
        assert compute_dtype == torch.bfloat16
        assert quant_type == "nf4"

    def to(self, device: torch.device) -> "Linear4bit":  # type: ignore[override]
        assert self.weight.told == {"quant_type": "nf4", "compress_statistics": True}
        self.weight.data = (8 * self.weight.data).round() / 8
        return self


def test_qlora_holds_the_blocks_in_4_bits_and_trains_adapters_on_them(
    lora: Settings, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = ModuleType("bitsandbytes")
    stand_in.nn = ModuleType("bitsandbytes.nn")  # type: ignore[attr-defined]
    stand_in.nn.Linear4bit, stand_in.nn.Params4bit = Linear4bit, Params4bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setattr(adapters, "check_bitsandbytes", lambda cuda: None)
    config = lora("adapter=qlora", "adapter.r=4", "training.max_steps=2")
    trainer = train(config)
    base, small = load_model(chat_folder), trainer.network.get_base_model()
    assert small.is_loaded_in_4bit
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear):
            now = small.get_submodule(name)
            now = getattr(now, "base_layer", now)
            assert isinstance(now, Linear4bit) == (".blocks." in name)
            assert torch.equal(now.weight.data, layer.weight) != (".blocks." in name)
    assert len(tensors(config)) == 18
    assert metrics(config)[2] != metrics(config)[1]
    opened = load_pretrained(Path(config.output_dir) / "final").model  # on the whole base, not on the rounded one
    wte = "model.transformer.wte.weight"
    assert torch.equal(opened.state_dict()[wte], base.state_dict()[wte])


def test_qlora_without_its_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes, which is not installed: pip install"):
        adapters.check_bitsandbytes(cuda=True)


def test_tensors_that_nobody_asked_for_are_refused(adapter_folder: Path) -> None:
    file = adapter_folder / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.more": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"base_model\.model\.more"):
        load_pretrained(adapter_folder)
