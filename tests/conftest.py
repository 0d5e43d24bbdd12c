"""What all tests share: one thread, the recorded checkpoint, and the same weights as a chat model with a tokenizer."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_var import Pretrained
from dllm_var.model.checkpoint import load_model
from dllm_var.text.chat import CHAT_TEMPLATE
from dllm_var.text.special_tokens import BOS, EOS, EOT, HEADER, HEADER_END, MASK, SpecialTokens

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


def load_script(path: str) -> ModuleType:
    """A script of the repository as a module, whatever its file name."""
    spec = importlib.util.spec_from_file_location(Path(path).stem.replace("-", "_"), ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def script():
    """`load_script`, for tests of scripts."""
    return load_script


@pytest.fixture(scope="session")
def recorded() -> Pretrained:
    """The recorded checkpoint of tests/golden with its control tokens; it has no tokenizer."""
    special = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)
    return Pretrained(load_model(GOLDEN / "tiny_llada"), None, special)


@pytest.fixture(scope="session")
def recorded64(recorded: Pretrained) -> Pretrained:
    """The same in float64, where the batch shape does not change a single token."""
    return Pretrained(load_model(GOLDEN / "tiny_llada", dtype=torch.float64), None, recorded.special)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `load_pretrained` opens: the recorded weights and a tokenizer of one token per byte."""
    folder = tmp_path_factory.mktemp("chat_model")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "tiny_llada" / name, folder / name)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0–255 are bytes; control tokens have the ids of the recorded checkpoint, gaps are reserved tokens."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs, spare = {}, 0
    for byte in range(256):  # the printable stand-ins that byte-level tokenizers use
        signs[byte] = chr(byte) if byte in plain else chr(256 + spare)
        spare += byte not in plain
    base = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in signs.items()}, merges=[]))
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    control = [EOS, EOT, BOS, HEADER, HEADER_END, *(f"<|reserved_{i}|>" for i in range(9)), MASK]
    base.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=base, bos_token=BOS, eos_token=EOS, pad_token=EOS, chat_template=CHAT_TEMPLATE
    )
