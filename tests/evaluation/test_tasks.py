"""The task files: the text they send, what counts as right, and that neither hangs on anything that it should not."""

import ast
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lm_eval
import pytest
from datasets import DatasetDict
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from dllm_var.pretrained import resolve_folder
from dllm_var.text.tokenizer import load_tokenizer
from evaluation.task_files import TASK_NAMES, load_tasks
from evaluation.tasks import build, gpqa, math_answers

PROMPTS = Path(__file__).parents[1] / "golden" / "prompts"
SEED = 1234

pytestmark = pytest.mark.filterwarnings("ignore:.*subtasks have no documents")

Doc = dict[str, Any]


@cache
def tasks(name: str, path: Path = PROMPTS / "data", num_fewshot: int | None = None) -> dict[str, Any]:
    """A task over the documents written for these tests."""
    folder = None if name == "tiny" else path
    return load_tasks(name, path=folder, num_fewshot=num_fewshot, seed=SEED, confirm_run_unsafe_code=True)


@cache
def tokenizer() -> Any:
    return load_tokenizer(resolve_folder("tiny"))


def render(history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """A chat as the harness's own models render it."""
    rendered = tokenizer().apply_chat_template(
        history,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )
    return str(rendered)


def requests(task: ConfigurableTask, chat: bool = False, **options: Any) -> dict[int, tuple[str, Doc]]:
    """What a task sends, by document: the text and the settings of its generation."""
    task.build_all_requests(apply_chat_template=chat, chat_template=render if chat else None, **options)
    return {instance.doc_id: instance.arguments for instance in task.instances}


# The answers read from the data.
ORACLE: dict[str, Callable[[Doc], str]] = {
    "gsm8k": lambda doc: f" {doc['answer']}",
    "gpqa": lambda doc: f"The answer is {doc['answer']}.",
    "mmlu": lambda doc: f" {'ABCD'[doc['answer']]}",
    "humaneval": lambda doc: doc["canonical_solution"],
    "humaneval_instruct": lambda doc: f"{doc['canonical_solution']}```\nThat is all.",
    "mbpp": lambda doc: f"{doc['code']}\n[DONE]\nThat is all.",
    "bbh": lambda doc: f"So the answer is {doc['target']}.\n\nQ: What next?",
    "minerva_math": lambda doc: (
        f"{doc['solution']}\nFinal Answer: The final answer is ${doc['answer']}$. I hope it is correct."
    ),
    "mmlu_pro": lambda doc: f"The answer is ({doc['answer']}).",
    "tiny": lambda doc: doc["output"],
}


class Scripted(LM):
    """A model that knows the document; its answers end at the stop strings, as a real one's do."""

    def __init__(self, answer: Callable[[Doc], str]) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._cut(self.answer(request.doc), request.args[1]["until"]) for request in requests]

    @staticmethod
    def _cut(text: str, until: list[str]) -> str:
        for stop in until:
            text = text.split(stop)[0]
        return text

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: Any) -> Any:
        raise NotImplementedError


def scores(
    name: str, answer: Callable[[Doc], str], limit: int | None = None, found: Any = None, **options: Any
) -> dict[str, float]:
    """Every metric of a task or group, by "metric,filter"."""
    results = lm_eval.evaluate(
        Scripted(answer),
        deepcopy(found or tasks(name)),
        limit=limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
        log_samples=False,
        **options,
    )
    assert results is not None
    of_all = results["results"][TASK_NAMES[name].harness_name]
    return {key: value for key, value in of_all.items() if "," in key and "stderr" not in key}


# --- the text that is sent


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_the_first_request_is_the_recorded_text(name, chat):
    first = next(iter(tasks(name)["tasks"].values()))
    text, _ = requests(first, chat, limit=1)[0]
    recorded = PROMPTS / f"{name}{'.chat' if chat else ''}.txt"
    assert text.encode() == recorded.read_bytes()


class AsTheHarness(ConfigurableTask):
    """A built-in task over documents that are given, all else as it is."""

    def __init__(self, config: Doc, documents: DatasetDict) -> None:
        self.given = documents
        super().__init__(config=config)
        self.set_fewshot_seed(SEED)

    def download(self, *args: Any, **kwargs: Any) -> None:
        self.dataset = self.given


def builtin_config(name: str, task_name: str) -> Doc:
    """The harness's own settings of a task, without what cannot be loaded here (the hub's metric for programs)."""
    found = {}
    for folder in TASK_NAMES[name].harness_folders:
        for file in (build.HARNESS / folder).glob("*.yaml"):
            unresolved = load_yaml(file, resolve_func=False)
            if unresolved.get("task") == task_name:
                found = unresolved if TASK_NAMES[name].runs_programs else resolved(file)
    found.pop("tag", None)
    if TASK_NAMES[name].runs_programs:
        for key in ("metric_list", "filter_list"):
            found.pop(key, None)
    if name == "mbpp":
        source = ast.parse((build.HARNESS / "mbpp" / "utils.py").read_text())
        function = next(node for node in source.body if getattr(node, "name", "") == "list_fewshot_samples")
        space: Doc = {}
        exec(ast.unparse(function), space)
        found["fewshot_config"]["samples"] = space["list_fewshot_samples"]()
    if name == "gpqa":
        found["process_docs"] = gpqa.with_options  # theirs shuffles differently in every run
    return found


def resolved(file: Path) -> Doc:
    with patch("importlib.metadata.version", return_value="4.11"):  # minerva_math asks for antlr's; nothing here needs it
        return load_yaml(file)


@pytest.mark.parametrize("name", [name for name in TASK_NAMES if name != "tiny"])
def test_text_settings_and_filters_are_those_of_the_harness(name):
    for task_name, task in tasks(name)["tasks"].items():
        config = builtin_config(name, task_name)
        theirs = AsTheHarness(config | {"num_fewshot": TASK_NAMES[name].shots}, task.dataset)
        ours, expected = requests(task), requests(theirs)
        assert ours.keys() == expected.keys()
        for doc_id, (text, settings) in expected.items():
            assert ours[doc_id][0] == text
            assert {key: ours[doc_id][1][key] for key in settings} == settings
        assert task.config.metadata["version"] == config["metadata"]["version"]
        for key in ("filter_list", "metric_list"):
            if not TASK_NAMES[name].runs_programs:
                assert getattr(task.config, key) == config.get(key)


@pytest.mark.parametrize("name", ["gsm8k", "gpqa"])
def test_a_document_is_sent_with_the_same_examples_at_every_call(name):
    (task,) = tasks(name)["tasks"].values()
    first = requests(task)
    assert len({text for text, _ in first.values()}) == len(first)
    assert requests(task) == first


def test_another_seed_shows_other_examples():
    (task,) = tasks("gsm8k")["tasks"].values()
    (other,) = load_tasks(
        "gsm8k", path=PROMPTS / "data", num_fewshot=None, seed=1, confirm_run_unsafe_code=False
    )["tasks"].values()  # fmt: skip
    assert requests(other) != requests(task)


def test_no_examples_can_be_asked_for():
    (task,) = tasks("gsm8k", num_fewshot=0)["tasks"].values()
    assert requests(task)[2][0] == "Question: It was 4 degrees and fell by 9. What is it now?\nAnswer:"


def test_gpqa_orders_its_options_by_the_question_alone():
    texts = []
    for seed in (1, 2):
        random.seed(seed)
        found = load_tasks("gpqa", path=PROMPTS / "data", num_fewshot=0, seed=seed, confirm_run_unsafe_code=False)
        (task,) = found["tasks"].values()
        texts.append(requests(task))
    assert texts[0] == texts[1]
    assert len({doc["answer"] for doc in task.eval_docs}) > 1


def test_no_gpqa_question_is_among_its_own_examples():
    (task,) = tasks("gpqa")["tasks"].values()
    for doc_id, (text, _) in requests(task).items():
        assert text.count(task.eval_docs[doc_id]["Question"]) == 1


def test_mbpp_asks_its_test_split_only():
    (task,) = tasks("mbpp")["tasks"].values()
    assert [doc["task_id"] for doc in task.eval_docs] == [11, 510]


# --- what counts as right


@pytest.mark.parametrize("name", TASK_NAMES)
def test_an_oracle_is_always_right_and_an_empty_answer_never(name):
    limit = 20 if name == "tiny" else None
    assert set(scores(name, ORACLE[name], limit).values()) == {1.0}
    assert set(scores(name, lambda doc: "", limit).values()) == {0.0}


def test_gsm8k_has_a_strict_and_a_flexible_score():
    numbers = {"bulbs": "So 45 bulbs.", "seats": "#### 1,000", "degrees": "#### 5"}
    found = scores("gsm8k", lambda doc: next(text for word, text in numbers.items() if word in doc["question"]))
    assert found == {"exact_match,strict-match": pytest.approx(1 / 3), "exact_match,flexible-extract": pytest.approx(2 / 3)}


def test_gpqa_has_a_strict_and_a_flexible_score():
    assert scores("gpqa", lambda doc: f"It is {doc['answer']}") == {
        "exact_match,strict-match": 0.0,
        "exact_match,flexible-extract": 1.0,
    }


def test_a_text_behind_the_closing_fence_is_no_part_of_the_program():
    found = scores("humaneval_instruct", lambda doc: f"{doc['canonical_solution']}```\nreturn nonsense (")
    assert found == {"pass@1,create_test": 1.0}
    assert scores("humaneval", lambda doc: f"{doc['canonical_solution']}```\nreturn nonsense (") == {
        "pass@1,create_test": 0.0
    }


def test_an_answer_to_the_bundled_suite_is_right_only_to_the_last_character_and_only_if_it_was_ended():
    assert scores("tiny", lambda doc: doc["output"] + "\ufffd", limit=3) == {"exact_match,as-it-is": 0.0}
    assert scores("tiny", lambda doc: doc["output"] + " ", limit=3) == {"exact_match,as-it-is": 0.0}
    assert scores("tiny", lambda doc: doc["output"][:-1], limit=3) == {"exact_match,as-it-is": 0.0}
    assert all(task.config.generation_kwargs["must_stop"] is True for task in tasks("tiny")["tasks"].values())


def test_the_kinds_of_the_bundled_suite_count_alike_however_many_were_asked():
    asked = {name: [0, 1, 2] if name == "tiny_add" else [0] for name in tasks("tiny")["tasks"]}
    right = {task.eval_docs[n]["output"] for name, task in tasks("tiny")["tasks"].items() for n in asked[name][:1]}
    answer = lambda doc: doc["output"] if doc["output"] in right else ""  # noqa: E731
    assert scores("tiny", answer, samples=asked) == {"exact_match,as-it-is": pytest.approx((5 + 1 / 3) / 6)}


def test_the_bundled_suite_is_the_one_that_its_own_script_asks(script):
    from dataset.tiny_corpus import fresh_prompts

    seed = script("scripts/eval_tiny.py").HELD_OUT_SEED
    for task in tasks("tiny")["tasks"].values():
        problems = fresh_prompts(task.config.dataset_name, seed, 500)
        assert [doc["instruction"] for doc in task.eval_docs] == [problem.instruction for problem in problems]


# --- mathematics

SPELLINGS = [
    r"\frac12", r"\sqrt2", r"\sqrt[3]2x", "10,000", "0,1", "$5$", r"x = 3\text{ cm}", r"90^\circ", r"\text{odd}", "2\\pi cm",
    r"\left(3, \frac{\pi}{2}\right)", r"\$1{,}200", "12 square feet", r"\boxed{7}", "the $a$ of it", r"\overline{AB}", "",
    "=", r"12\,ft", "5 dollars and 3 cents", r"\mathrm{th}", r"x \in [1,\,2)", "ways", r"3\text{m}^2",
]  # fmt: skip


def harness_rules() -> Any:
    return resolved(build.HARNESS / "minerva_math" / "minerva_math_algebra.yaml")["process_results"].__globals__


@pytest.mark.parametrize("text", SPELLINGS)
def test_an_answer_is_normalised_as_in_the_harness(text):
    assert math_answers.normalize(text) == harness_rules()["normalize_final_answer"](text)


@pytest.mark.parametrize(
    "solution", [r"$\boxed{\frac{1}{2}}$ and \boxed{a{b}{c}} so", r"it is $\boxed 5$ then", r"\boxed{1} \boxed{\{2\}}"]
)
def test_the_box_is_read_as_in_the_harness(solution):
    rules = harness_rules()
    assert math_answers.boxed(solution) == rules["remove_boxed"](rules["last_boxed_only_string"](solution))


def test_a_solution_without_a_box_is_refused():
    with pytest.raises(ValueError, match="of MATH has no"):
        math_answers.boxed(r"It is \boxed{1")


def test_the_stated_answer_is_read_as_in_the_harness():
    for text in [
        "Final Answer: The final answer is $5$. I hope it is correct.",
        "Final Answer: The final answer is 5. ",
        "5",
        "",
    ]:
        assert math_answers.stated(text) == harness_rules()["get_unnormalized_answer"](text)


@pytest.mark.parametrize(
    ("answer", "right", "equal"),
    [
        (r"\frac{1}{2}", "0.5", True), (r"2\sqrt{3}", r"\sqrt{12}", True), ("x+1", "1+x", True), ("[1,5]", "[1,5]", True),
        ("3", "4", False), ("[1,5]", "[1,6]", False), (r"\frac{", "1", False), ("", "", False),
        (math_answers.NONE_STATED, "5", False),
    ],
)  # fmt: skip
def test_equal_formulas_are_the_same_answer(answer, right, equal):
    assert math_answers.same(answer, right) is equal


def test_the_two_metrics_of_mathematics_are_told_apart():
    doc = {"solution": r"so $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"}
    assert math_answers.score(doc, [r"It is $0.5$."]) == {"exact_match": 0, "math_verify": 1}
    said = "Final Answer: The final answer is $0.5$. I hope it is correct."
    assert math_answers.score(doc, [said]) == {"exact_match": 1, "math_verify": 1}


def test_a_formula_that_takes_too_long_is_not_the_same(monkeypatch):
    def endless(*args: Any) -> None:
        raise math_answers.TimeoutException

    monkeypatch.setattr(math_answers, "_difference", endless)
    assert math_answers.same("x", "y") is False
