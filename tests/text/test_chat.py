"""Rendering and decoding: the same text and ids as the published template, and no control token from what a person types."""

import contextlib
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dllm_var.text.chat import CHAT_TEMPLATE, StreamDecoder, decode_text, encode_text, render_prompt, render_sample
from dllm_var.text.special_tokens import SPECIAL_TOKEN_NAMES, control_ids

RELAXED = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
# Text of any kind with no control token written out in it (there the published template and ours are meant to differ).
ORDINARY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=40)
CONVERSATION = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": ORDINARY}),
    min_size=1,
    max_size=4,
)
# Text in which control tokens, and their halves, come up all the time.
HOSTILE = st.lists(
    st.sampled_from([*SPECIAL_TOKEN_NAMES, "<|", "|>", "mdm_mask", "eot", "_id", " ", "\n", "é"]), max_size=12
)


def user(content):
    return [{"role": "user", "content": content}]


def ids_of(tokenizer, *names):
    return [tokenizer.convert_tokens_to_ids(name) for name in names]


def test_the_rendered_prompt_is_the_published_text(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "  what is 12 + 30? \n"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "well?"},
    ]
    expected = (
        "<|startoftext|>"
        "<|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is 12 + 30?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n42<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwell?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert tokenizer.decode(render_prompt(tokenizer, messages), skip_special_tokens=False) == expected
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected


@RELAXED
@given(messages=CONVERSATION)
def test_ordinary_conversations_get_the_ids_of_the_saved_template(tokenizer, messages):
    rendered = tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert render_prompt(tokenizer, messages) == rendered


def test_the_template_ends_with_an_assistant_header_whether_asked_or_not(tokenizer):
    with_header, without = (
        tokenizer.apply_chat_template(user("hi"), tokenize=False, add_generation_prompt=asked) for asked in (True, False)
    )
    assert with_header == without
    assert with_header.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_an_answer_that_is_begun_stays_open_and_keeps_the_line_end_it_stops_at(tokenizer):
    begun = [*user(" well? "), {"role": "assistant", "content": " the sum:\n<|eot_id|>\n"}]
    open_end = render_prompt(tokenizer, begun, continue_final_message=True)
    assert open_end == [*render_prompt(tokenizer, user("well?")), *encode_text(tokenizer, "the sum:\n<|eot_id|>\n")]
    assert tokenizer.decode(open_end).endswith("assistant<|end_header_id|>\n\nthe sum:\n<|eot_id|>\n")
    assert sum(token in control_ids(tokenizer) for token in open_end) == 6  # BOS, two headers of two, one eot
    with pytest.raises(ValueError, match="the last message is the user's: only an assistant's can be continued"):
        render_prompt(tokenizer, user("well?"), continue_final_message=True)


def test_a_saved_tokenizer_carries_the_template(fresh_tokenizer, tmp_path):
    fresh_tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    reloaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert reloaded.apply_chat_template(user("hello"))["input_ids"] == render_prompt(reloaded, user("hello"))


@pytest.mark.parametrize("name", SPECIAL_TOKEN_NAMES)
def test_a_typed_control_token_is_plain_text(tokenizer, name):
    typed = encode_text(tokenizer, f"a {name} b")
    assert control_ids(tokenizer).isdisjoint(typed)
    assert decode_text(tokenizer, typed) == f"a {name} b"
    assert tokenizer(name)["input_ids"] == ids_of(tokenizer, name), "the plain call does make a control token of it"


@RELAXED
@given(pieces=HOSTILE, answer=HOSTILE)
def test_no_wording_of_prompt_or_response_smuggles_in_a_control_token(tokenizer, pieces, answer):
    prompt, response = render_sample(tokenizer, user("".join(pieces)), "".join(answer) + "x", "chat")
    start, header, header_end, eot, eos = ids_of(
        tokenizer, "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>"
    )
    special = control_ids(tokenizer)
    assert [i for i in prompt if i in special] == [start, header, header_end, eot, header, header_end]
    assert [i for i in response if i in special] == [eot, eos]


def test_text_stays_plain_when_the_tokenizer_was_last_used_with_special_parsing_on(tokenizer):
    tokenizer("<|eot_id|>", split_special_tokens=False)
    assert control_ids(tokenizer).isdisjoint(encode_text(tokenizer, "<|eot_id|>"))


def test_a_second_thread_that_parses_control_tokens_cannot_leak_them_into_text(tokenizer):
    stop = threading.Event()

    def parse():
        while not stop.is_set():
            tokenizer("<|eot_id|>", split_special_tokens=False)

    other = threading.Thread(target=parse)
    other.start()
    try:
        for _ in range(300):
            with contextlib.suppress(ValueError):  # refused: the switch was turned between its setting and the encoding
                assert control_ids(tokenizer).isdisjoint(encode_text(tokenizer, "<|eot_id|> " * 20))
    finally:
        stop.set()
        other.join()


def test_a_tokenizer_that_cannot_keep_control_tokens_out_of_text_is_refused():
    words = Tokenizer(models.WordLevel({"<|mdm_mask|>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    whole_words = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    with pytest.raises(ValueError, match=r"control token <\|mdm_mask\|> \(0\)"):
        encode_text(whole_words, "<|mdm_mask|>")


def test_an_unspecial_added_control_token_is_refused_in_text(fresh_tokenizer):
    tokenizer = fresh_tokenizer()
    tokenizer.add_tokens(["<|stop|>"])
    assert len(encode_text(tokenizer, "<|stop|>")) == 1  # an added word without a meaning is only a word
    tokenizer.eos_token = "<|stop|>"
    with pytest.raises(ValueError, match="control token"):
        render_sample(tokenizer, user("q"), "a <|stop|>", "plain")


def test_half_a_surrogate_pair_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match="'ab' is followed by half of a surrogate pair"):
        encode_text(tokenizer, "ab\ud83dc")


def test_the_training_prompt_is_exactly_the_inference_prompt(tokenizer):
    messages = [*user("hello"), {"role": "assistant", "content": "there"}, *user("well?")]
    prompt, response = render_sample(tokenizer, messages, " then: 42\n", "chat")
    assert prompt == render_prompt(tokenizer, messages)
    assert response == [*encode_text(tokenizer, "then: 42"), *ids_of(tokenizer, "<|eot_id|>", "<|endoftext|>")]


def test_prompt_and_response_never_share_a_token(fresh_tokenizer):
    tokenizer = fresh_tokenizer()
    joined = encode_text(tokenizer, "hello")
    prompt, response = render_sample(tokenizer, user("hel"), "lo", "plain")
    assert (prompt, response[:-1]) == (encode_text(tokenizer, "hel"), encode_text(tokenizer, "lo"))
    assert prompt + response[:-1] != joined, "the whole text does merge across the border, so the border was at stake"


def test_the_plain_template_adds_only_eos(tokenizer):
    prompt, response = render_sample(tokenizer, user("what is 12 + 30? "), " 42 ", "plain")
    assert decode_text(tokenizer, prompt) == "what is 12 + 30? "
    assert tokenizer.decode(response, skip_special_tokens=False) == " 42 <|endoftext|>"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "no message"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": "x"}, {"content": "y"}], "message 2 has role None"),
        ([{"role": "user", "content": None}], "NoneType"),
    ],
)
def test_malformed_messages_are_named(tokenizer, messages, complaint):
    with pytest.raises(ValueError, match=complaint):
        render_prompt(tokenizer, messages)


def test_an_empty_response_and_an_unknown_template_are_refused(tokenizer):
    with pytest.raises(ValueError, match="response is empty"):
        render_sample(tokenizer, user("q"), " \n", "chat")
    with pytest.raises(ValueError, match="choose one of chat, plain"):
        render_sample(tokenizer, user("q"), "a", "alpaca")


def test_a_tokenizer_without_chat_tokens_is_named_as_the_reason():
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"q": 0, "</s>": 1}, unk_token="q")), eos_token="</s>"
    )
    with pytest.raises(ValueError, match=r"<\|start_header_id\|> does not resolve to one id"):
        render_prompt(bare, user("q"))
    assert render_sample(bare, user("q"), "q", "plain") == ([0], [0, 1])


def test_a_tokenizer_without_bos_or_eos_is_named_as_the_reason(fresh_tokenizer):
    with pytest.raises(ValueError, match="names no BOS"):
        render_prompt(fresh_tokenizer(bos_token=None), user("q"))
    with pytest.raises(ValueError, match="names no EOS"):
        render_sample(fresh_tokenizer(eos_token=None), user("q"), "a", "plain")


def test_decoding_drops_every_control_token(tokenizer):
    text = encode_text(tokenizer, "42")
    assert (
        decode_text(tokenizer, [*ids_of(tokenizer, *SPECIAL_TOKEN_NAMES), *text, *ids_of(tokenizer, "<|eot_id|>")]) == "42"
    )


@RELAXED
@given(data=st.data())
def test_streamed_text_is_the_whole_text_however_the_tokens_arrive(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    decoder, pieces, at = StreamDecoder(tokenizer), [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        pieces.append(decoder.push(ids[at : at + size]))
        at += size
    pieces.append(decoder.finish())
    assert "".join(pieces) == decode_text(tokenizer, ids)


def test_no_half_character_is_ever_shown(tokenizer):
    ids = encode_text(tokenizer, "a 🦊 ß")
    assert len(ids) > len("a 🦊 ß"), "the characters must be split over tokens for this to test anything"
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token_id]) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert ("".join(pieces), decoder.finish()) == ("a 🦊 ß", "")


def test_an_answer_cut_in_a_character_ends_with_a_replacement_sign_and_the_decoder_starts_anew(tokenizer):
    ids = encode_text(tokenizer, "🦊")
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ids) == "🦊"


def test_long_streams_decode_a_bounded_stretch_at_a_time(tokenizer):
    decoder = StreamDecoder(tokenizer)
    for token_id in encode_text(tokenizer, "the sum is 42 " * 50):
        decoder.push([token_id])
        assert len(decoder._ids) <= 8
