"""Control tokens are found by name, agree between tokenizer and config, and are one id each, or it is said why not."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dllm_var.model.config import LLaDAConfig
from dllm_var.text.chat import SPECIAL_TOKEN_NAMES
from dllm_var.text.special_tokens import SpecialTokens, required_id, resolve, single_id


def config_for(tokenizer, **changes):
    known = dict(
        zip(
            ("bos", "eos", "mask", "header", "header_end", "eot"),
            tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKEN_NAMES)),
            strict=True,
        )
    )
    fields = {
        "d_model": 8, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 12, "vocab_size": 512,
        "max_sequence_length": 64, "rope": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu",
        "mask_token_id": known["mask"], "eos_token_id": known["eos"], "pad_token_id": known["eos"],
    }  # fmt: skip
    return LLaDAConfig(**(fields | changes))


def test_every_token_is_resolved_by_name(tokenizer):
    bos, eos, mask, _, _, eot = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKEN_NAMES))
    stop, size = tuple(sorted((eos, eot))), len(tokenizer)
    assert resolve(tokenizer, config_for(tokenizer)) == SpecialTokens(mask, eos, eos, eot, bos, stop, size)
    assert resolve(tokenizer, config_for(tokenizer, vocab_size=size)).known is None


def test_the_mask_is_taken_from_the_config_when_the_tokenizer_names_none(tokenizer):
    assert tokenizer.mask_token_id is None
    assert resolve(tokenizer, config_for(tokenizer)).mask == tokenizer.convert_tokens_to_ids("<|mdm_mask|>")


def test_a_mask_in_an_unused_embedding_row_is_accepted(fresh_tokenizer):
    words = Tokenizer(models.WordLevel({"q": 0, "<|endoftext|>": 1}, unk_token="q"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>")
    special = resolve(tokenizer, config_for(fresh_tokenizer(), mask_token_id=500, eos_token_id=1, pad_token_id=1))
    assert special == SpecialTokens(mask=500, eos=1, pad=1, known=2)
    assert special.eot is None
    assert special.stop == (1,)


@pytest.mark.parametrize("name", ["mask", "eos", "pad"])
def test_disagreement_names_tokenizer_and_config(fresh_tokenizer, name):
    tokenizer = fresh_tokenizer(mask_token="<|mdm_mask|>")
    said = getattr(tokenizer, f"{name}_token_id")
    other = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    with pytest.raises(ValueError, match=f"(?s)the {name} token: the tokenizer says {said} .*{name}_token_id={other}"):
        resolve(tokenizer, config_for(tokenizer, **{f"{name}_token_id": other}))


def test_a_mask_literal_elsewhere_than_the_config_says_is_a_disagreement(tokenizer):
    with pytest.raises(ValueError, match="disagree about the mask token"):
        resolve(tokenizer, config_for(tokenizer, mask_token_id=500))


@pytest.mark.parametrize("name", ["eos", "pad"])
def test_a_token_that_the_tokenizer_leaves_open_comes_from_the_config(fresh_tokenizer, name):
    tokenizer = fresh_tokenizer(**{f"{name}_token": None})
    assert getattr(resolve(tokenizer, config_for(tokenizer)), name) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_a_token_that_the_config_leaves_open_comes_from_the_tokenizer(tokenizer):
    config = config_for(tokenizer)
    config.eos_token_id = None
    assert resolve(tokenizer, config).eos == tokenizer.eos_token_id


def test_a_token_that_nobody_names_is_an_error(fresh_tokenizer):
    tokenizer = fresh_tokenizer(eos_token=None)
    config = config_for(tokenizer)
    config.eos_token_id = None
    with pytest.raises(ValueError, match="no eos token"):
        resolve(tokenizer, config)


def test_several_eos_ids_in_the_config_are_refused(tokenizer):
    config = config_for(tokenizer)
    config.eos_token_id = [1, 5]
    with pytest.raises(ValueError, match=r"eos_token_id=\[1, 5\] of config.json is not one token id"):
        resolve(tokenizer, config)


def test_an_ordinary_word_cannot_be_the_mask():
    words = Tokenizer(models.WordLevel({"q": 0, "<|endoftext|>": 1, "word": 2}, unk_token="q"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>")
    config = LLaDAConfig(**(config_for_words() | {"mask_token_id": 2}))
    with pytest.raises(ValueError, match="mask=2 is the ordinary token 'word'"):
        resolve(tokenizer, config)


def config_for_words():
    return {
        "d_model": 8, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "mlp_hidden_size": 12, "vocab_size": 8,
        "max_sequence_length": 64, "rope": True, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
        "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "mask_token_id": 7, "eos_token_id": 1,
    }  # fmt: skip


def test_a_tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    with pytest.raises(ValueError, match="outside the 4 embedding rows"):
        resolve(tokenizer, config_for(tokenizer, vocab_size=4))


def test_a_control_token_in_the_vocabulary_that_is_not_parsed_as_one_is_refused():
    pieces = Tokenizer(models.WordLevel({"<|eot_id|>": 0, "<|": 1, "?": 2}, unk_token="?"))
    pieces.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces)
    with pytest.raises(ValueError, match=r"<\|eot_id\|> does not resolve to one id"):
        single_id(tokenizer, "<|eot_id|>")


def test_a_missing_control_token_is_none_or_an_error_where_it_is_needed(tokenizer):
    assert single_id(tokenizer, "<|nothing|>") is None
    with pytest.raises(ValueError, match=r"<\|nothing\|> does not resolve to one id"):
        required_id(tokenizer, "<|nothing|>")


def test_an_unknown_name_is_absent_even_where_unknown_words_have_an_id():
    words = Tokenizer(models.WordLevel({"q": 0}, unk_token="q"))
    assert single_id(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="q"), "<|eot_id|>") is None


def test_the_stop_set_is_eos_and_eot_sorted_unless_given():
    assert SpecialTokens(mask=270, eos=257, pad=257, eot=256).stop == (256, 257)
    assert SpecialTokens(mask=270, eos=257, pad=257).stop == (257,)
    assert SpecialTokens(mask=15, eos=14, pad=14, stop=(13,)).stop == (13,)
    assert SpecialTokens(mask=15, eos=14, pad=14, stop=()).stop == ()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"eos": 9}, "mask and eos are both 9"),
        ({"pad": 9}, "mask and pad are both 9"),
        ({"eot": 9}, "mask and eot are both 9"),
        ({"pad": -1}, "pad=-1"),
        ({"eos": None}, "eos=None"),
        ({"mask": True}, "mask=True"),
        ({"stop": (9,)}, "not the mask"),
        ({"stop": (-3,)}, "must hold token ids"),
    ],
)
def test_impossible_special_tokens_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        SpecialTokens(**({"mask": 9, "eos": 1, "pad": 1} | changes))
