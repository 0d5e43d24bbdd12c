"""When an answer to a problem of MATH is right. Named by ``minerva_math.yaml``.

``exact_match`` is the rule of Lewkowycz et al. (arXiv 2206.14858): the phrase "The final answer is … I hope it is correct."
is looked for, both answers are normalised, and they must be the same text or differ by nothing that sympy can find. The
harness reads LaTeX with sympy's own parser, which needs antlr 4.11, while Hydra needs 4.9; here latex2sympy2_extended does
that, so the rare pairs that only one of the two parsers understands may be judged differently. ``math_verify`` is the
library of that name, called as the harness calls it.
"""

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from latex2sympy2_extended import latex2sympy
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.utils import timeout
from sympy import simplify

BOX = "\\boxed{"
NONE_STATED = "[invalidanswer]"
SECONDS = 5  # for one comparison

# Appendix D of the paper: what is replaced, what is dropped (words only where they are no part of a LaTeX command), and
# what is then rewritten by pattern.
REPLACED = [
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), (r"\ ", ""), (" ", ""), ("mbox", "text"), (",\\text{and}", ","),
    ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
]  # fmt: skip
DROPPED = [
    "square", "ways", "integers", "dollars", "mph", "inches", "ft", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', "\\dots",
]  # fmt: skip
REWRITTEN = [
    (r"(.*?)(\$)(.*?)(\$)(.*)", r"$\3$"),
    (r"(\\text\{)(.*?)(\})", r"\2"),
    (r"(\\textbf\{)(.*?)(\})", r"\2"),
    (r"(\\overline\{)(.*?)(\})", r"\2"),
    (r"(\\boxed\{)(.*)(\})", r"\2"),
    (r"(frac)([^{])(.)", r"frac{\2}{\3}"),  # \frac12
    (r"(sqrt)(\[[^\]]*\])(\w)", r"\1\2{\3}"),  # \sqrt[3]2
    (r"(sqrt)(?!\[)([^{])", r"sqrt{\2}"),  # \sqrt2
]


def with_answer(dataset: Dataset) -> Dataset:
    """The problems with ``answer``, what stands in the box of their solution, normalised.

    Raises:
        ValueError: a solution without a box.
    """
    return dataset.map(lambda doc: {"answer": normalize(boxed(doc["solution"]))})


def score(doc: dict[str, Any], results: Sequence[str]) -> dict[str, int]:
    """Both metrics of one answer, 0 or 1."""
    verified = verify(gold=parse(doc["solution"]), target=parse(results[0]))
    return {"exact_match": int(same(normalize(stated(results[0])), doc["answer"])), "math_verify": int(verified)}


def boxed(solution: str) -> str:
    r"""What stands in the last ``\boxed{…}``, or between ``\boxed`` with a space and the end of the formula.

    Raises:
        ValueError: there is no such thing.
    """
    if "\\boxed " in solution:
        return solution.split("\\boxed ")[-1].split("$")[0]
    start, depth = solution.rfind(BOX), 0
    for end in range(start + len(BOX) - 1, len(solution)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start + len(BOX) : end]
    raise ValueError(f"a solution of MATH has no \\boxed{{answer}}, so nothing can be compared with it: {solution[:200]!r}.")


def stated(text: str) -> str:
    """The answer that the text ends with, in the words that the examples taught."""
    found = re.search(r"Final Answer: The final answer is(.*?). I hope it is correct.", text + "I hope it is correct.")
    return found[1].strip() if found else NONE_STATED


def normalize(answer: str) -> str:
    """The answer without units, ornaments and other spellings of the same."""
    answer = answer.split("=")[-1]
    for word in filter(str.isalpha, DROPPED):
        answer = re.sub(rf"(?<!\\)\b{word}\b", "", answer)
    for old, new in REPLACED:
        answer = answer.replace(old, new)
    for part in DROPPED:
        answer = _outside_commands(answer, part) if part.isalpha() else answer.replace(part, "")
    for pattern, new in REWRITTEN:
        answer = re.sub(pattern, new, answer)
    answer = answer.replace("$", "")
    return answer.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+", answer) else answer


def same(answer: str, right: str) -> bool:
    """Whether two normalised answers are the same text, or formulas whose difference simplifies to 0."""
    if answer and answer == right:
        return True
    try:
        return bool(_difference(answer, right) == 0)
    except (Exception, TimeoutException):  # a parser may stumble over a model's text in any way
        return False


@timeout(SECONDS)
def _difference(answer: str, right: str) -> Any:
    return simplify(latex2sympy(answer, normalization_config=None) - latex2sympy(right, normalization_config=None))


def _outside_commands(answer: str, word: str) -> str:
    parts = re.split(r"(\\[a-zA-Z]+)", answer)
    parts[::2] = [part.replace(word, "") for part in parts[::2]]
    return "".join(parts)
