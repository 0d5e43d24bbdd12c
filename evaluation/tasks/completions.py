"""From the answer to a programming problem to its score. Named by ``humaneval*.yaml`` and ``mbpp.yaml``."""

from collections.abc import Sequence
from typing import Any

from evaluation.programs import passes

FENCE = "```"


def before_fence(answers: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Each answer up to the fence that closes the code; the fence that opens it was put down for the model."""
    return [[text.split(FENCE, 1)[0] for text in of_one] for of_one in answers]


def score_humaneval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the prompt with its completion passes the tests. Executes the program."""
    return {"pass@1": float(passes("humaneval", doc, results[0]).passed)}


def score_mbpp(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer, as it is, passes the tests. Executes the program."""
    return {"pass@1": float(passes("mbpp", doc, results[0]).passed)}
