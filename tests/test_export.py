"""An exported folder, opened by transformers in another process: no network, and this package cannot be imported there."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dllm_var import export as export_module
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.loop import decode
from dllm_var.export import ENTRY, export, flat_name, reachable_modules
from dllm_var.hub_model import LLaDAModelLM as HubModel
from dllm_var.model.checkpoint import load_config, load_model, verify_checkpoint
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.special_tokens import SpecialTokens

GOLDEN = Path(__file__).parent / "golden" / "tiny_llada"
CONTROL = {
    "<|endoftext|>": 256,
    "<|eot_id|>": 257,
    "<|startoftext|>": 258,
    "<|start_header_id|>": 259,
    "<|end_header_id|>": 260,
    "<|mdm_mask|>": 270,
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|eot_id|>{% endfor %}"
QUESTIONS = (b"rev abc", b"add 12 30", b"say hello 3")
PROMPTS = [[258, 259, *question, 257, 260] for question in QUESTIONS]  # the form that this checkpoint was trained on
LENGTHS = {"max_gen_length": 48, "block_length": 16}
FAR = [0, 5, 9_000, 9_001, 40_000]

# Runs where only the exported folder is known. Arguments: folder, file for the tensors that came out.
STRANGER = """
import socket, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "dllm_var":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
def refuse(*arguments, **named):
    raise AssertionError("the network was used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
folder, given, out = sys.argv[1:]
batch = load_file(given)
found = {}
for name, auto in (("causal", AutoModelForCausalLM), ("plain", AutoModel)):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert type(model).__name__ == "LLaDAModelLM" and not model.training and model.dtype == torch.float32
    with torch.no_grad():
        found[f"{name}.logits"] = model(batch["ids"], attention_mask=batch["mask"]).logits
        found[f"{name}.far"] = model(batch["far_ids"], positions=batch["far"]).logits
lengths = {"max_gen_length": 48, "block_length": 16}
found["left"] = model.generate(batch["ids"], attention_mask=batch["mask"], **lengths)
found["right"] = model.generate(batch["right_ids"], batch["right_mask"], threshold=0.9, eos_token_id=[256, 257], **lengths)
found["defaults"] = model.generate(batch["ids"][1:2], batch["mask"][1:2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert tokenizer.eos_token_id == tokenizer.pad_token_id == 256
text = tokenizer.apply_chat_template([{"role": "user", "content": "rev abc"}], tokenize=False)
assert text == "rev abc<|eot_id|>", text
found["tokens"] = torch.tensor(tokenizer(text)["input_ids"])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__name__ == "LLaDAConfig" and config.model_type == "llada" and config.eot_token_id == 257
assert not any(name.split(".")[0] == "dllm_var" for name in sys.modules)
save_file({name: value.contiguous() for name, value in found.items()}, out)
"""


def _tokenizer(size: int = 288) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the ids of the golden checkpoint, all 288 or the first of them."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    reserved = {f"<|reserved_token_{i}|>": i for i in range(256, size) if i not in CONTROL.values()}
    names = {i: name for name, i in (CONTROL | reserved).items()}
    bpe = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.add_special_tokens([names[i] for i in range(256, size)])
    assert all(bpe.token_to_id(name) == i for name, i in CONTROL.items())
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end, chat_template=TEMPLATE)


def _padded(side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, PROMPTS))
    fill = [[261] * (width - len(prompt)) for prompt in PROMPTS]
    rows = [(gap, prompt) if side == "left" else (prompt, gap) for gap, prompt in zip(fill, PROMPTS, strict=True)]
    ids = torch.tensor([first + second for first, second in rows])
    return ids, (ids != 261).long()


@pytest.fixture(scope="module")
def model() -> LLaDAModelLM:
    return load_model(GOLDEN)


@pytest.fixture(scope="module")
def folder(model: LLaDAModelLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "llada-tiny.v1"
    export(model, _tokenizer(), folder, max_shard_bytes=200_000, model_card="# A model\n")
    return folder


@pytest.fixture(scope="module")
def stranger(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What came out of the other process."""
    room = tmp_path_factory.mktemp("stranger")
    left, right = _padded("left"), _padded("right")
    given = {"ids": left[0], "mask": left[1], "right_ids": right[0], "right_mask": right[1]}
    far = {"far_ids": torch.tensor([[1, 270, 2, 270, 3]]), "far": torch.tensor([FAR])}
    save_file(given | far, room / "given.safetensors")
    (room / "stranger.py").write_text(STRANGER, encoding="utf-8")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON", "TRANSFORMERS"))}
    run = subprocess.run(
        [sys.executable, "stranger.py", str(folder), "given.safetensors", "out.safetensors"],
        cwd=room,
        env={**inherited, "HF_HOME": str(room / "hf"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return load_file(room / "out.safetensors")


@pytest.fixture(scope="module")
def answers(model: LLaDAModelLM) -> list[list[int]]:
    """Ours, each prompt decoded alone."""
    special = SpecialTokens(mask=270, eos=256, pad=256, eot=257)
    config = GenerationConfig(threshold=0.9, **LENGTHS)
    found = [decode(model, special, config, [prompt])[0].tokens for prompt in PROMPTS]
    assert len({len(answer) for answer in found}) > 1  # so that padding of the output is looked at
    return found


@pytest.mark.parametrize("auto", ["causal", "plain"])
def test_logits_of_the_exported_folder_are_ours_bit_for_bit(
    stranger: dict[str, Tensor], model: LLaDAModelLM, auto: str
) -> None:
    ids, mask = _padded("left")
    with torch.no_grad():
        assert torch.equal(stranger[f"{auto}.logits"], model(ids, attention_mask=mask).logits)
        far = model(torch.tensor([[1, 270, 2, 270, 3]]), positions=torch.tensor([FAR])).logits
    assert torch.equal(stranger[f"{auto}.far"], far)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_on_a_padded_batch_equals_each_prompt_alone(
    stranger: dict[str, Tensor], answers: list[list[int]], side: str
) -> None:
    longest = max(map(len, answers))
    assert stranger[side].tolist() == [answer + [256] * (longest - len(answer)) for answer in answers]


def test_generate_needs_nothing_but_a_prompt(stranger: dict[str, Tensor], model: LLaDAModelLM) -> None:
    special = SpecialTokens(mask=270, eos=256, pad=256, eot=257)
    config = GenerationConfig(max_gen_length=1024, block_length=64, threshold=0.9)
    expected = decode(model, special, config, PROMPTS[1:2])[0].tokens
    assert expected
    assert stranger["defaults"].tolist() == [expected]


def test_tokenizer_and_template_travel_with_the_folder(stranger: dict[str, Tensor], folder: Path) -> None:
    text = "rev abc<|eot_id|>"
    assert stranger["tokens"].tolist() == _tokenizer()(text)["input_ids"]
    assert stranger["tokens"][-1] == 257
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE
    fields = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert fields["chat_template"] == TEMPLATE
    assert fields["model_input_names"] == ["input_ids", "attention_mask"]
    assert not isinstance(fields.get("extra_special_tokens"), list)  # which releases before 5 cannot read


def test_config_names_the_code_and_keeps_every_field(folder: Path) -> None:
    theirs = json.loads((GOLDEN / "config.json").read_text(encoding="utf-8"))
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert {name: ours[name] for name in theirs if name != "transformers_version"} == {
        name: value for name, value in theirs.items() if name != "transformers_version"
    }
    assert ours["model_type"] == "llada"
    assert ours["eot_token_id"] == 257
    for target in ours["auto_map"].values():
        assert (folder / f"{target.split('.')[0]}.py").is_file()
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [256, 257]


def test_our_own_loader_opens_the_folder_without_its_code(folder: Path, model: LLaDAModelLM) -> None:
    again = load_model(folder)
    assert type(again) is LLaDAModelLM
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert load_config(folder).eot_token_id == 257
    assert len(verify_checkpoint(folder).files) > 1


def test_licence_and_card_are_in_the_folder(folder: Path) -> None:
    assert (folder / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    assert (folder / "README.md").read_text(encoding="utf-8") == "# A model\n"


def test_exported_code_is_every_reachable_module_and_knows_only_its_folder(folder: Path) -> None:
    modules = reachable_modules(ENTRY)
    files = {path.stem for path in folder.glob("*.py")}
    assert files == {flat_name(module) for module in modules}
    assert {"modeling_llada", "configuration_llada", "model_kv_store", "decoding_loop"} <= files
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        compile(text, str(path), "exec")
        imports = [line.strip() for line in text.splitlines() if line.strip().startswith(("import ", "from "))]
        assert not [line for line in imports if "dllm_var" in line]
        assert {line.split()[1][1:] for line in imports if line.startswith("from .")} <= files


def test_the_modeling_file_names_every_file(folder: Path) -> None:
    """Before release 5 transformers copies only those that are named in it."""
    text = (folder / "modeling_llada.py").read_text(encoding="utf-8")
    assert all(f"from .{path.stem} import" in text for path in folder.glob("*.py") if path.stem != "modeling_llada")


def test_exported_code_has_no_import_cycle(folder: Path) -> None:
    """The tool of transformers that gathers remote code walks the imports, and in some releases for ever."""
    imports = {
        path.stem: {
            line.split()[1][1:]
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip().startswith("from .")
        }
        for path in folder.glob("*.py")
    }
    while leaves := {name for name, needed in imports.items() if not needed}:
        imports = {name: needed - leaves for name, needed in imports.items() if name not in leaves}
    assert not imports


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import dllm_var.model.config\n", 1),
        ("import os\nfrom dllm_var import generate\n", 2),
        ("import os\n\nfrom dllm_var.model import config\n", 3),
        ("from . import config\n", 1),
        ("def f():\n    from .config import LLaDAConfig\n", 2),
    ],
)
def test_an_import_that_cannot_be_laid_flat_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, line: int
) -> None:
    (tmp_path / "entry.py").write_text(text, encoding="utf-8")
    real: Callable[[str], Path] = export_module._source_file
    monkeypatch.setattr(export_module, "_source_file", lambda m: tmp_path / "entry.py" if m == "entry" else real(m))
    with pytest.raises(ValueError, match=rf"entry\.py:{line}: imports inside the package must read"):
        reachable_modules("entry")


def test_imports_are_made_relative_wherever_they_stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (
        "from typing import TYPE_CHECKING\n"
        "from dllm_var.model.kv_store import (\n    KVStore,\n    Placement as P,\n)\n"
        "if TYPE_CHECKING:\n    from dllm_var.model.llada import (\n        LLaDAModelLM,\n    )\n"
        "def f():\n    from dllm_var.model.config import LLaDAConfig\n    return LLaDAConfig\n"
    )
    (tmp_path / "entry.py").write_text(text, encoding="utf-8")
    real: Callable[[str], Path] = export_module._source_file
    monkeypatch.setattr(export_module, "_source_file", lambda m: tmp_path / "entry.py" if m == "entry" else real(m))
    modules = reachable_modules("entry")
    assert set(modules) == {"entry", "dllm_var.model.kv_store", "dllm_var.model.config"}
    lines = modules["entry"].splitlines()
    assert lines[2] == "from .model_kv_store import ("
    assert lines[7] == "    pass"
    assert "    from .configuration_llada import LLaDAConfig" in lines
    compile(modules["entry"], "entry.py", "exec")


def test_a_tokenizer_of_another_model_is_refused(model: LLaDAModelLM, tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.eos_token = "<|reserved_token_262|>"
    with pytest.raises(ValueError, match="disagree about the eos token"):
        export(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- generate itself, in this process --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_model(folder: Path) -> HubModel:
    return HubModel.from_pretrained(folder).eval()


def test_a_single_stop_id_is_enough(hub_model: HubModel, model: LLaDAModelLM) -> None:
    ids = torch.tensor(PROMPTS[1:2])
    only = SpecialTokens(mask=270, eos=256, pad=256, eot=257, stop=(257,))
    expected = decode(model, only, GenerationConfig(threshold=0.9, **LENGTHS), PROMPTS[1:2])[0].tokens
    assert 256 in expected
    assert hub_model.generate(ids, eos_token_id=257, **LENGTHS).tolist() == [expected]


def test_rows_of_the_embedding_that_no_token_has_are_known_to_the_folder(model: LLaDAModelLM, tmp_path: Path) -> None:
    export(model, _tokenizer(280), tmp_path / "few")
    few, stop = HubModel.from_pretrained(tmp_path / "few"), (256, 257)
    assert few._special_tokens(None) == SpecialTokens(mask=270, eos=256, pad=256, eot=257, stop=stop, known=280)
    assert few._special_tokens(257) == SpecialTokens(mask=270, eos=256, pad=256, eot=257, stop=(257,), known=280)


def test_the_config_s_end_of_turn_ends_an_answer_by_default(
    hub_model: HubModel, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first letter of an answer is declared the end of turn: nothing is left of it. EOS still ends the others."""
    monkeypatch.setattr(hub_model.config, "eot_token_id", answers[1][0])
    assert answers[1][0] not in answers[2]
    assert hub_model.generate(torch.tensor(PROMPTS[1:2]), **LENGTHS).shape == (1, 0)
    assert hub_model.generate(torch.tensor(PROMPTS[2:]), **LENGTHS).tolist() == answers[2:]


def test_answers_are_padded_with_the_id_that_was_asked_for(hub_model: HubModel, answers: list[list[int]]) -> None:
    out = hub_model.generate(*_padded("left"), pad_token_id=261, **LENGTHS)
    assert out.tolist() == [answer + [261] * (out.shape[1] - len(answer)) for answer in answers]


def test_an_empty_answer_has_no_column(hub_model: HubModel) -> None:
    everything = set(range(288)) - {270}
    assert hub_model.generate(torch.tensor(PROMPTS[1:2]), eos_token_id=everything, **LENGTHS).shape == (1, 0)


def test_further_options_of_the_decoder_are_passed_on(hub_model: HubModel) -> None:
    ids, mask = _padded("left")
    drawn = [hub_model.generate(ids, mask, temperature=1.0, seed=seed, **LENGTHS).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding in the middle of the prompt in row 0"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "no prompt token at all in row 0"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask \(1, 4\) must have the shape of input_ids \(1, 3\)"),
        ({"input_ids": torch.tensor([1, 2, 3])}, "input_ids must be"),
        ({"do_sample": True, "num_beams": 4}, "does not know do_sample, num_beams"),
        ({"block_length": 0}, "block_length=0"),
        ({"eos_token_id": 270}, "270"),
    ],
)
def test_bad_arguments_of_generate_are_named(hub_model: HubModel, changes: dict[str, Any], message: str) -> None:
    arguments = {"input_ids": torch.tensor([[258, 1, 2]]), **changes}
    with pytest.raises(ValueError, match=message):
        hub_model.generate(**arguments)
