"""The public face: opening a model, asking it in text or ids, and watching it answer."""

import json
import shutil
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload

import dllm_var.pretrained
from dllm_var import Event, GenerationConfig, Pretrained, generate, load_pretrained, stream
from dllm_var.generation import MASK_SIGN, event_with_text
from dllm_var.text.chat import decode_text, render_prompt

CONFIG = GenerationConfig(block_length=8, max_gen_length=24, threshold=0.6)


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> Pretrained:
    return load_pretrained(chat_folder)


def test_a_folder_opens_in_float32_with_its_control_tokens(chat: Pretrained) -> None:
    assert chat.model.dtype == torch.float32
    assert not chat.model.training
    assert (chat.special.mask, chat.special.stop) == (270, (256, 257))


def test_text_messages_and_ids_are_the_same_prompt(chat: Pretrained) -> None:
    messages = [{"role": "user", "content": "add 7 8"}]
    assert chat.tokenizer is not None
    ids = render_prompt(chat.tokenizer, messages)
    answers = generate(chat, ["add 7 8", messages, ids], CONFIG)
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].text == decode_text(chat.tokenizer, answers[0].tokens)


def test_control_tokens_typed_by_a_user_stay_text(chat: Pretrained) -> None:
    ids = chat.prompt_ids("<|mdm_mask|>")
    assert chat.special.mask not in ids
    assert bytes(i for i in ids if i < 256).endswith(b"<|mdm_mask|>assistant\n\n")


def test_batches_of_any_size_give_the_same_answers_in_order(chat: Pretrained) -> None:
    prompts = ["add 7 8", "rev abc", "count 9", "seq 2 6", "rep xy 3"]
    whole = [answer.raw for answer in generate(chat, prompts, CONFIG)]
    for size in (1, 2, 5, 9):
        assert [answer.raw for answer in generate(chat, prompts, CONFIG, batch_size=size)] == whole


def test_the_events_of_a_stream_add_up_to_the_answer(chat: Pretrained) -> None:
    prompts = ["rep xy 3", "rev abc"]
    expected = generate(chat, prompts, CONFIG)
    events: dict[int, list[Any]] = {0: [], 1: []}
    for event in stream(chat, prompts, CONFIG):
        events[event.request].append(event)
    for request, answer in enumerate(expected):
        mine = events[request]
        assert [event.step for event in mine] == list(range(answer.forwards))
        assert [event.result for event in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].result == answer
        assert (mine[-1].text, mine[-1].provisional) == (answer.text, "")
        fixed = {c.position: (c.id, event.step, c.confidence) for event in mine for c in event.committed}
        assert fixed == {i: (answer.raw[i], step, answer.confidence[i]) for i, step in enumerate(answer.steps) if step >= 0}
        for before, after in pairwise(mine):
            assert after.text.startswith(before.text)  # what was settled stays
            assert before.settled <= after.settled
        assert MASK_SIGN in mine[0].provisional


def test_settled_text_ends_at_the_first_mask_and_provisional_text_at_the_first_stop_token(chat: Pretrained) -> None:
    for event in stream(chat, ["rep xy 3", "count 9"], CONFIG):
        assert event.text is not None
        assert MASK_SIGN not in event.text
        assert event.settled <= event.length <= len(event.response)
        assert chat.special.mask not in event.response[: event.settled]
        assert not set(event.response[: event.length]) & set(chat.special.stop)


def test_a_character_whose_bytes_are_not_all_decided_is_not_shown_as_settled(chat: Pretrained) -> None:
    first, second = "é".encode()
    for response, settled, text, provisional in (
        ([104, first, 270, 105], 2, "h", "░i"),
        ([104, first, second, 270], 3, "hé", "░"),
    ):
        bare = Event(0, 0, (), (), (), response=response, length=4, settled=settled)
        shown = event_with_text(chat, bare)
        assert (shown.text, shown.provisional) == (text, provisional)


def test_without_a_tokenizer_ids_are_answered_with_ids(recorded: Pretrained) -> None:
    answer = generate(recorded, [[258, 259, 97, 257, 260]], CONFIG)[0]
    assert answer.text is None
    with pytest.raises(ValueError, match="no tokenizer: give prompts as token ids"):
        generate(recorded, ["text"], CONFIG)


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ("add 7 8", {}, r"one text: give a list"),
        ([[{"role": "user", "content": "a"}, 5]], {}, "not a mixture"),
        ([[{"role": "user"}]], {}, "content"),
        ([{"role": "user", "content": "a"}], {}, "not a dict: of a conversation give the list of its messages"),
        ([None], {}, "not a NoneType"),
        ([["a"]], {}, "these are no token ids"),
        ([[3.7, 4.2]], {}, "these are no token ids"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        (["a"], {"requests": [1, 2]}, "must be 1 different numbers"),
        (["a", "b"], {"requests": [1, 1], "batch_size": 1}, "must be 2 different numbers"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(
    prompts: Any, options: dict[str, Any], said: str, chat: Pretrained
) -> None:
    with pytest.raises(ValueError, match=said):
        generate(chat, prompts, CONFIG, **options)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names that were asked of the hub; every one of them is answered with an error."""
    asked: list[str] = []

    def refuse(name: str, **_: Any) -> str:
        asked.append(name)
        raise OSError("no route to the hub\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    return asked


def test_a_wrong_path_is_told_without_asking_the_hub(no_network: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "runs/last", "/a/b/c", "./x/y", "~/nowhere at all"):
        with pytest.raises(ValueError, match=f"model '{name}' is no folder"):
            load_pretrained(name)
    assert no_network == []


def test_a_hub_name_is_asked_of_the_hub_and_its_failure_is_one_sentence(no_network: list[str]) -> None:
    with pytest.raises(ValueError, match=r"'somebody/model' is no folder here.*: no route to the hub$"):
        load_pretrained("somebody/model")
    assert no_network == ["somebody/model"]


def test_a_hub_model_is_data_only(monkeypatch: pytest.MonkeyPatch, chat_folder: Path) -> None:
    asked: list[Any] = []

    def give(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(chat_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", give)
    assert load_pretrained("somebody/model").special.mask == 270
    assert not any(pattern.endswith((".py", ".bin", ".pt", "*")) for pattern in asked[0])


def test_a_folder_that_is_no_checkpoint_or_has_no_tokenizer_is_told(tmp_path: Path, chat_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a checkpoint folder: it has no config\.json"):
        load_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(chat_folder / name, tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "bfloat16"}, r"dtype='bfloat16': give a torch\.dtype"),
        ({"device": "gpu"}, "device='gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here"),
    ],
)
def test_a_dtype_or_device_that_is_none_is_told(chat_folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_pretrained(chat_folder, **options)


def test_a_model_that_is_not_on_one_device_is_refused_before_it_answers_nonsense(chat_folder: Path) -> None:
    model = load_pretrained(chat_folder)
    cpu_offload(model.model.model.transformer["ff_out"], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weights lie on cpu, meta \(device_map; meta: offloaded\)"):
        generate(model, ["rep xy 3"], CONFIG)


def test_a_model_too_big_for_the_memory_is_told_before_it_is_loaded(
    tmp_path: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dllm_var.model.checkpoint.LARGE", 0)
    monkeypatch.setattr("dllm_var.model.checkpoint.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB of memory as torch\.float32, but only 0\.0 GB are free"):
        load_pretrained(chat_folder)


def test_the_bundled_name_is_a_folder_of_the_package() -> None:
    folder = dllm_var.pretrained.resolve_folder("tiny")
    assert folder.parts[-3:] == ("dllm_var", "bundled", "tiny")


def test_tokens_per_forward_count_the_stop_token_but_nothing_behind_it(chat: Pretrained) -> None:
    stopped, cut = (
        generate(chat, ["rep xy 3"], GenerationConfig(block_length=4, max_gen_length=n, threshold=2))[0] for n in (60, 8)
    )
    assert (stopped.stop_reason, cut.stop_reason) == ("eos", "length")
    assert stopped.tokens_per_forward == (len(stopped.tokens) + 1) / stopped.forwards
    assert cut.tokens_per_forward == 1


def test_an_answer_can_be_written_as_json(chat: Pretrained) -> None:
    answer = generate(chat, ["add 7 8"], CONFIG)[0]
    assert json.loads(json.dumps(asdict(answer)))["stop_reason"] == answer.stop_reason
