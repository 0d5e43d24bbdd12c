"""HumanEval and MBPP scoring, on problems of the same format made for these tests."""

import itertools
import threading

import pytest

from evaluation import programs, sandbox
from evaluation.sandbox import Outcome

HALF = {
    "prompt": "import math\n\n\ndef double(x):\n    return 2 * x\n\n\n"
    'def half(x):\n    """Undo `double`.\n    >>> half(4)\n    2.0\n    """\n',
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    for x in range(5):\n"
    "        assert math.isclose(double(candidate(x)), x)\n    assert candidate(3) == half(3)\n",
}
TOTAL = {  # the function asked for has the name of a builtin
    "text": "Write a function to find the sum of two numbers and one.",
    "code": "import sys\r\ndef sum(a, b):\r\n  return a + b + 1",
    "test_setup_code": "",
    "test_list": ["assert sum(1, 2) == 4", "assert sum(2, sys.maxsize) > sys.maxsize"],
}
DEPTH = {  # the tests use objects that the setup makes with a class of the program
    "code": "class Node:\r\n  def __init__(self):\r\n    self.next = None\r\ndef depth(node):\r\n"
    "  return 0 if node is None else 1 + depth(node.next)",
    "test_setup_code": "root = Node() \r\nroot.next = Node()",
    "test_list": ["assert depth(root) == 2", "assert depth(None) == 0"],
}


@pytest.mark.parametrize("doc", [TOTAL, DEPTH])
def test_the_reference_of_mbpp_passes_and_empty_bodies_fail(doc: dict):
    assert programs.passes("mbpp", doc, doc["code"]).passed
    empty = "class Node: pass\ndef sum(a, b):\n    pass\ndef depth(node):\n    pass\n"
    assert programs.passes("mbpp", doc, empty).reason == "failed"


def test_the_reference_of_humaneval_passes_and_an_empty_body_fails():
    assert programs.passes("humaneval", HALF, HALF["canonical_solution"]).passed
    assert programs.passes("humaneval", HALF, "    pass\n").reason == "failed"
    assert programs.passes("humaneval", HALF, "").reason == "failed"


def test_only_the_instruct_form_is_cut_at_the_closing_fence():
    answer = HALF["canonical_solution"] + "```\nThis divides by two."
    assert programs.passes("humaneval_instruct", HALF, answer).passed
    assert "SyntaxError" in programs.passes("humaneval", HALF, answer).stderr_tail


def test_mbpp_is_cut_at_done():
    assert programs.passes("mbpp", TOTAL, TOTAL["code"] + "\r\n[DONE]\nNow the next one: (").passed


def test_helpers_of_the_prompt_cannot_be_bent_by_the_completion():
    bent = "    return 1.5\n\n\ndef double(x):\n    return Same()\n\n\nclass Same:\n    __eq__ = lambda *_: True\n"
    assert programs.passes("humaneval", HALF, bent).reason == "failed"


def test_limits_reach_the_sandbox():
    assert programs.passes("mbpp", TOTAL, "while True: pass", timeout=0.3).reason == "timeout"
    assert programs.passes("mbpp", TOTAL, "x = bytearray(200 << 20)", memory_mb=128).reason == "memory"


def test_an_unknown_task_and_a_missing_column_are_named():
    with pytest.raises(ValueError, match=r"task=apps: .* use one of humaneval, humaneval_instruct, mbpp"):
        programs.passes("apps", HALF, "")
    with pytest.raises(
        ValueError, match=r"task=mbpp: the problem has no code, test_list; its columns are canonical_solution"
    ):
        programs.passes("mbpp", HALF, "")


@pytest.mark.parametrize("answer", [False, None, "true", 1])
def test_without_consent_nothing_runs(answer: object, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match="say confirm_run_unsafe_code=true or leave"):
        programs.require_consent(answer)


def test_consent_tries_the_sandbox_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch):
    programs.require_consent(True)
    monkeypatch.setattr(sandbox, "run", lambda *_, **__: Outcome(False, "killed", 0.1, "no verdict"))
    with pytest.raises(ValueError, match=r"does not work here \(killed\): no verdict"):
        programs.require_consent(True)


def test_many_programs_are_scored_in_their_order():
    right, wrong = ("mbpp", TOTAL, TOTAL["code"]), ("humaneval", HALF, "    return x\n")
    outcomes = programs.check_many([right, wrong, right, wrong], workers=2)
    assert [outcome.passed for outcome in outcomes] == [True, False, True, False]


def test_no_more_than_the_given_number_run_at_a_time(monkeypatch: pytest.MonkeyPatch):
    running, most, both = 0, 0, threading.Barrier(2)

    def pretend(*job: object, timeout: float) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        both.wait(timeout=30)
        running -= 1
        return job[0]

    monkeypatch.setattr(programs, "passes", pretend)
    assert programs.check_many([(number, {}, "") for number in range(8)], workers=2) == list(range(8))
    assert most == 2


def test_pass_at_k_is_the_share_of_draws_with_a_passing_program():
    for n, correct, k in [(5, 0, 1), (5, 2, 1), (5, 2, 3), (5, 5, 2), (6, 1, 6), (6, 4, 3)]:
        draws = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
        assert programs.pass_at_k(n, correct, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)])
def test_pass_at_k_refuses_impossible_counts(n: int, correct: int, k: int):
    with pytest.raises(ValueError, match=f"pass@{k} of {correct} passed out of {n}"):
        programs.pass_at_k(n, correct, k)
