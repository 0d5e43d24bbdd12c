"""From the answer to a programming problem to its score. Named by ``humaneval*.yaml`` and ``mbpp.yaml``."""

from collections.abc import Sequence
from typing import Any

from evaluation.programs import check_many, pass_at_k

FENCE = "```"


def before_fence(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Each answer up to the fence that closes the code; the fence that opens it was put down for the model."""
    return [[text.split(FENCE, 1)[0] for text in of_one] for of_one in answers]


def score_humaneval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the prompt with its completion passes the tests. Executes the program."""
    return _score("humaneval", doc, results)


def score_mbpp(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer, as it is, passes the tests. Executes the program."""
    return _score("mbpp", doc, results)


def _score(task: str, doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    passed = sum(outcome.passed for outcome in check_many((task, doc, text) for text in results))
    return {"pass@1": pass_at_k(len(results), passed, 1)}
