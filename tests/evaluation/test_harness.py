"""The adapter: requests become the right ids, answers do not depend on batches, and nothing is decoded twice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import dllm_var
from dllm_var import GenerationConfig, Pretrained, load_pretrained
from dllm_var.diffusion.likelihood import is_greedy, log_likelihood
from dllm_var.text.chat import encode_text, render_prompt
from evaluation.harness import UNFINISHED, DiffusionLM, RenderedChat, request_number, until_stop
from evaluation.settings import How
from evaluation.store import Answer, Rating, ResponseStore
from evaluation.team import Team

SHORT = {"max_gen_length": 12, "block_length": 8}
PROMPTS = ["What?", "A longer question, is it not?", "Sum of 1 and 2", "x", "Why so", "What?"]


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> Pretrained:
    """A chatterbox of random weights that says printable signs only and never ends by itself.

    In float64, where the shape of a batch does not change a single token.
    """
    opened = load_pretrained(chat_folder, torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in opened.model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
            if name.endswith("transformer.ff_out.weight"):
                weight[:32] = weight[127:] = 0
    return opened


@pytest.fixture
def adapter(model: Pretrained, tmp_path: Path) -> Any:
    """A function that builds the adapter over a folder of answers, the same one unless it is named."""
    stores: dict[str, ResponseStore] = {}

    def build(
        batch_size: int = 8, settings: Any = None, folder: str = "run", samples: int = 32, seed: int = 0, **options: Any
    ) -> DiffusionLM:
        if folder in stores:
            stores[folder].__exit__(None, None, None)
        stores[folder] = ResponseStore(tmp_path / folder)
        config = GenerationConfig(**({} if "method" in options else SHORT) | options)
        how = How(config, batch_size, samples, "stratified", seed)
        return DiffusionLM(model, how, Team(), stores[folder], settings or {"model_sha256": "1"})

    yield build
    for store in stores.values():
        store.__exit__(None, None, None)


def requests(prompts: list[str], options: Any = None, task: str = "some", kind: str = "generate_until") -> list[Instance]:
    return [
        Instance(kind, {}, (prompt, {"until": []} if options is None else options), 0, (task, number, 1))
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip


def pair(prompt: str, answer: str, doc_id: int = 0, choice: int = 0) -> Instance:
    return Instance("loglikelihood", {}, (prompt, answer), choice, ("some", doc_id, 1))


def what_counts(lm: DiffusionLM) -> dict[str, Any]:
    return {key: {**vars(record), "seconds": None, "latency": None} for key, record in lm.records.items()}


SAMPLED = {"temperature": 1.0, "remasking": "random"}
FIXED = {"method": "vanilla", "gen_length": 8, "cache": "prefix", "block_length": 4}


@pytest.mark.parametrize("options", [{}, SAMPLED, FIXED], ids=["blocks", "sampled", "fixed"])
def test_batch_size_and_order_change_nothing(adapter: Any, options: dict[str, Any]) -> None:
    found = []
    for batch_size in (1, 3, 8):
        lm = adapter(batch_size, folder=f"run{batch_size}", **options)
        asked = requests(PROMPTS)
        texts = dict(zip((r.doc_id for r in asked[::-1]), lm.generate_until(asked[::-1]), strict=True))
        assert [texts[r.doc_id] for r in asked] == adapter(batch_size, folder="other", **options).generate_until(asked)
        found.append((texts, what_counts(lm)))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0][0].values())) > 3
    assert (found[0][0][0] == found[0][0][5]) == (options is not SAMPLED)  # one prompt, two problems: other draws


def test_the_answer_is_the_library_s_own(adapter: Any, model: Pretrained) -> None:
    texts = adapter().generate_until(requests(PROMPTS))
    ids = [encode_text(model.tokenizer, prompt) for prompt in PROMPTS]
    assert texts == [answer.text for answer in dllm_var.generate(model, ids, GenerationConfig(**SHORT))]


def test_every_request_has_its_own_stop_strings(adapter: Any) -> None:
    whole = adapter().generate_until(requests(PROMPTS[:3]))
    stops = [whole[0][4:6], [whole[1][7:9], whole[1][3:5]], [whole[0][4:6] + "?", "not there"]]
    asked = [requests(PROMPTS[:3], {"until": stop})[number] for number, stop in enumerate(stops)]
    cut = adapter().generate_until(asked)
    assert cut == [until_stop(whole[0], [stops[0]]), until_stop(whole[1], stops[1]), whole[2]]
    assert [len(text) for text in cut[:2]] < [len(text) for text in whole[:2]]


def test_a_stop_string_is_cut_at_its_first_place_and_is_one_string_whatever_is_in_it() -> None:
    assert until_stop("the sum is 4\n\nQ: next", ["Q:", "\n\n"]) == "the sum is 4"
    assert until_stop("the sum", ["a sum"]) == "the sum"
    assert until_stop("the sum", []) == "the sum"


def test_a_text_as_stop_string_is_not_taken_apart(adapter: Any) -> None:
    whole = adapter().generate_until(requests(PROMPTS[:1]))[0]
    absent = f"{whole[2]}\x00{whole[3]}"
    assert adapter().generate_until(requests(PROMPTS[:1], {"until": absent})) == [whole]
    assert adapter().generate_until(requests(PROMPTS[:1], {})) == [whole]
    with pytest.raises(ValueError, match="task some has an empty stop string"):
        adapter().generate_until(requests(PROMPTS[:1], {"until": [""]}))


def test_no_answer_is_longer_than_its_task_allows(adapter: Any) -> None:
    asked = requests(PROMPTS, {"until": [], "max_gen_toks": 3})
    blocks, fixed = adapter(), adapter(folder="fixed", **FIXED)
    blocks.generate_until(asked)
    fixed.generate_until(asked)
    for record in blocks.records.values():
        assert (len(record.tokens), record.raw_length, record.stop_reason) == (3, 3, "length")
    for record in fixed.records.values():
        assert (len(record.tokens), record.decided, record.raw_length, record.stop_reason) == (3, 3, 8, "length")
    wide = adapter()
    assert wide.generate_until(requests(PROMPTS, {"max_gen_toks": 12})) == adapter().generate_until(requests(PROMPTS))
    assert {len(record.tokens) for record in wide.records.values()} == {12}


def test_an_answer_that_must_end_by_itself_is_marked_when_it_did_not(adapter: Any) -> None:
    asked = requests(PROMPTS[:1], {"must_stop": True})
    plain = adapter().generate_until(requests(PROMPTS[:1]))
    assert adapter().generate_until(asked) == [plain[0] + UNFINISHED]
    lm = adapter(folder="ended")
    lm._stored = {lm._question(asked[0], 0).key: Answer("some", 0, 1, 1, "4", [], 1, "eos", 1, 1, 1, 0.0, 0.0)}
    assert lm.generate_until(asked) == ["4"]


def test_a_chat_keeps_its_ids_and_what_was_typed_stays_text(adapter: Any, model: Pretrained) -> None:
    lm, messages = adapter(), [{"role": "user", "content": "end <|eot_id|><|mdm_mask|> it"}]
    chat = lm.apply_chat_template(messages)
    assert isinstance(chat, RenderedChat)
    assert chat.ids == render_prompt(model.tokenizer, messages)
    assert chat.ids.count(model.special.eot) == 1
    assert model.special.mask not in chat.ids
    assert chat.endswith("<|end_header_id|>\n\n")
    lm.generate_until(requests([chat]))
    (record,) = lm.records.values()
    assert record.prompt_length == len(chat.ids)
    expected = dllm_var.generate(model, [messages], GenerationConfig(**SHORT))[0]
    assert record.tokens == expected.tokens


def test_the_harness_sends_a_begun_answer_open_and_control_words_as_text(
    adapter: Any, model: Pretrained, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "data.json").write_text('[{"q": "say <|eot_id|> ", "a": "no"}]\n', encoding="utf-8")
    task = {
        "task": "begun", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "data.json")}},
        "output_type": "generate_until", "test_split": "test", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
        "gen_prefix": "Here:\n", "generation_kwargs": {"until": ["\n\n"]}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tasks / "begun.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    lm = adapter()
    found = TaskManager(include_path=str(tasks), include_defaults=False).load(["begun"])
    results = evaluate(lm=lm, task_dict=found, apply_chat_template=True, fewshot_as_multiturn=False, bootstrap_iters=0)
    sent = results["samples"]["begun"][0]["arguments"][0][0]
    begun = [{"role": "user", "content": "say <|eot_id|>"}, {"role": "assistant", "content": "Here:\n"}]
    assert sent.ids == render_prompt(model.tokenizer, begun, continue_final_message=True)
    assert sent.ids[-6:] == encode_text(model.tokenizer, "Here:\n")
    assert [record.prompt_length for record in lm.records.values()] == [len(sent.ids)]


def test_a_rating_is_the_library_s_bound_with_its_error(adapter: Any, model: Pretrained) -> None:
    lm = adapter(batch_size=2, seed=5)
    asked = [pair("The sum is ", word, choice=n) for n, word in enumerate(("four", " five", "six!"))]
    found = lm.loglikelihood([*asked, pair("The sum is", " four", doc_id=3)])
    ids = [
        (encode_text(model.tokenizer, "The sum is"), encode_text(model.tokenizer, a)) for a in (" four", "  five", " six!")
    ]
    number = request_number("some", 0, 0)
    expected = log_likelihood(model.model, model.special.mask, ids, samples=32, seed=5, requests=[number] * 3)
    greedy = is_greedy(model.model, model.special.mask, ids)
    assert [value for value, _ in found[:3]] == pytest.approx([e.value for e in expected], rel=1e-9)
    assert [flag for _, flag in found[:3]] == greedy
    records = list(lm.records.values())
    assert all(isinstance(record, Rating) for record in records)
    assert [r.standard_error for r in records[:3]] == pytest.approx([e.standard_error for e in expected], rel=1e-6)
    assert [(r.choice, r.length, r.samples) for r in records[:3]] == [(0, 5, 32), (1, 6, 32), (2, 5, 32)]
    assert found[3][0] != found[0][0]  # another problem has draws of its own
    assert adapter(batch_size=2, seed=5).loglikelihood(asked) == found[:3]


def test_answers_after_a_chat_are_encoded_apart_from_it(adapter: Any, model: Pretrained) -> None:
    lm, messages = adapter(), [{"role": "user", "content": "Sum?"}]
    value = lm.loglikelihood([pair(lm.apply_chat_template(messages), " four")])[0][0]
    ids = (render_prompt(model.tokenizer, messages), encode_text(model.tokenizer, " four"))
    expected = log_likelihood(model.model, model.special.mask, [ids], samples=32, requests=[request_number("some", 0, 0)])
    assert value == pytest.approx(expected[0].value, rel=1e-9)


def test_what_cannot_be_done_is_said_before_anything_is_decoded(adapter: Any) -> None:
    lm = adapter(**FIXED)
    with pytest.raises(ValueError, match="task some asks for the perplexity of whole texts"):
        lm.loglikelihood_rolling(requests(["text"], kind="loglikelihood_rolling"))
    with pytest.raises(ValueError, match="problem 0 of task some has an empty answer to rate"):
        lm.loglikelihood([pair("1 + 1 =", "")])
    assert not lm.records


def test_a_problem_beyond_the_context_is_answered_and_told(adapter: Any) -> None:
    lm = adapter(**FIXED)
    with pytest.warns(UserWarning, match="beyond the 512 positions"):
        answers = lm.generate_until(requests(["fits", "x" * 505]))
    assert len(answers) == 2
    with pytest.warns(UserWarning, match="beyond the 512 positions"):
        lm.loglikelihood([pair("x" * 510, "abc")])


def test_repetitions_have_draws_of_their_own(adapter: Any) -> None:
    request = requests(PROMPTS[:1])[0]
    lm = adapter(**SAMPLED)
    texts = lm.generate_until([request] * 4)
    assert len(set(texts)) > 1
    assert len(lm.records) == 4
    assert adapter(folder="again", **SAMPLED).generate_until([request] * 4) == texts


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that are decoded from now on, warm-up not counted."""
    seen: list[list[int]] = []
    generate: Callable[..., Any] = dllm_var.generate

    def spy(model: Pretrained, prompts: list[list[int]], config: GenerationConfig, **named: Any) -> Any:
        seen.extend(prompts if "requests" in named else [])
        return generate(model, prompts, config, **named)

    monkeypatch.setattr(dllm_var, "generate", spy)
    return seen


def test_a_stored_answer_is_not_decoded_again(adapter: Any, decoded: list[list[int]]) -> None:
    first = adapter()
    texts = first.generate_until(requests(PROMPTS[:4]))
    assert (len(decoded), first.reused) == (4, 0)
    again = adapter(batch_size=2)
    assert again.generate_until(requests(PROMPTS))[:4] == texts
    assert (len(decoded), again.reused) == (6, 4)
    assert len(again.records) == 6


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({}, {"block_length": 4}),
        ({}, {"method": "vanilla", "gen_length": 12, "block_length": 8}),
        ({}, {"cache": "none"}),
        ({}, {"settings": {"model_sha256": "2"}}),
        ({"prompt": "What!"}, {}),
        ({"until": ["e"]}, {}),
        ({"max_gen_toks": 3}, {}),
        ({"task": "other"}, {}),
    ],
    ids=str,
)
def test_an_answer_to_anything_else_is_never_used(
    adapter: Any, decoded: list[list[int]], asked: dict[str, Any], settings: dict[str, Any]
) -> None:
    adapter().generate_until(requests(PROMPTS[:1]))
    options = {name: asked[name] for name in ("until", "max_gen_toks") if name in asked}
    changed = requests([asked.get("prompt", PROMPTS[0])], options, asked.get("task", "some"))
    adapter(**settings).generate_until(changed)
    assert len(decoded) == 2


def test_a_rating_is_kept_for_the_same_samples_and_seed_only(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [pair("1 + 1 =", " 2")]
    value = adapter().loglikelihood(asked)
    for change in ({"samples": 16}, {"seed": 1}):
        assert adapter(**change).loglikelihood(asked) != value
    monkeypatch.setattr("evaluation.harness.log_likelihood", None)
    again = adapter()
    assert (again.loglikelihood(asked), again.reused) == (value, 1)


def test_what_a_task_asks_for_and_does_not_get_is_kept_for_the_report(adapter: Any) -> None:
    lm = adapter()
    lm.generate_until(requests(PROMPTS[:1], {"until": [], "do_sample": True, "top_p": 0.5, "max_gen_toks": 4}))
    assert lm.unread == {"do_sample": True, "top_p": 0.5}
