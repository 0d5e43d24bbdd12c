"""A tokenizer of LLaDA's make (byte-level BPE, NFC, its control tokens), trained here in a moment."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllm_var.text.chat import CHAT_TEMPLATE, SPECIAL_TOKEN_NAMES
from dllm_var.text.special_tokens import BOS, EOS

WORDS = (
    "user assistant system hello there, what is 12 + 30? the sum is 42\n\nwell\n\n  then: café 猫 naïve |> <| end of turn "
)


def train_tokenizer(**named: object) -> PreTrainedTokenizerFast:
    """Like the published one, EOS is also the padding and the mask has no role of its own, unless `named` says otherwise."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(SPECIAL_TOKEN_NAMES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 8, trainer)
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS} | named
    return PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, **roles)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One shared tokenizer; a test that changes a tokenizer trains its own."""
    return train_tokenizer()


@pytest.fixture
def fresh_tokenizer():
    """The function that trains a tokenizer, for tests that need other roles or want to change it."""
    return train_tokenizer
