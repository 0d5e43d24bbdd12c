"""The options of a GPQA question, in an order that is its own. Named by ``gpqa.yaml``."""

import random
from typing import Any

from datasets import Dataset
from lm_eval.tasks.gpqa.generative.utils import preprocess


def with_options(dataset: Dataset) -> Dataset:
    """The questions with ``choices``, ``choice1`` to ``choice4`` and ``answer``, the letter of the right one in brackets.

    The harness shuffles with Python's global generator, so that its prompts hang on all that drew from it before, and a
    question can be among its own examples in another order. Here the order hangs on the text of the question alone.
    """
    return dataset.map(_options)


def _options(doc: dict[str, Any]) -> dict[str, Any]:
    right = preprocess(doc["Correct Answer"])
    choices = [*(preprocess(doc[f"Incorrect Answer {n}"]) for n in (1, 2, 3)), right]
    random.Random(doc["Question"]).shuffle(choices)
    named = {f"choice{n}": choice for n, choice in enumerate(choices, start=1)}
    return {**named, "choices": choices, "answer": f"({'ABCD'[choices.index(right)]})"}
