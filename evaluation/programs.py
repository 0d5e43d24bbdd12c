"""HumanEval and MBPP: does a generated program pass the tests of its problem?

The tasks of `evaluation/tasks` call `require_consent` before a model is loaded and `passes` or `check_many` afterwards.
Every program runs in `evaluation.sandbox`. What a test may take from the program is fixed by the problem, not by the
program: the function asked for, and what the reference solution defines under the names that the tests use. The rest of a
HumanEval prompt (imports, helper functions) and the imports of an MBPP reference are given to the tests as published.
"""

import ast
import os
import symtable
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import comb
from typing import Any

from evaluation import sandbox
from evaluation.sandbox import Outcome

COLUMNS = {
    "humaneval": ("prompt", "test", "entry_point"),
    "humaneval_instruct": ("prompt", "test", "entry_point"),
    "mbpp": ("code", "test_list"),
}


def require_consent(confirm_run_unsafe_code: bool) -> None:
    """ValueError unless the user has agreed to run generated programs and the sandbox works on this machine."""
    if confirm_run_unsafe_code is not True:
        raise ValueError(
            "humaneval and mbpp run the programs that the model writes, on this machine, in a sandbox whose limits are "
            f"listed in evaluation/sandbox.py; confirm_run_unsafe_code={confirm_run_unsafe_code} forbids it, so say "
            "confirm_run_unsafe_code=true or leave these tasks out"
        )
    sandbox.check()


def passes(task: str, doc: Mapping[str, Any], completion: str, *, timeout: float = 10.0, memory_mb: int = 1024) -> Outcome:
    """Run a completion against the tests of its problem.

    Args:
        task: `humaneval` (prompt + completion), `humaneval_instruct` (prompt + completion up to the closing code fence) or
            `mbpp` (the completion alone, up to `[DONE]`).
        doc: the problem as published: HumanEval's `prompt test entry_point`, MBPP's `code test_list` and, if it has one,
            `test_setup_code`, which runs after the program.
        completion: the model's text; code fences of MBPP answers are the task's business.
        timeout, memory_mb: limits of one program, in seconds of processor time and MiB.

    Raises:
        ValueError: an unknown task, or a problem that lacks a column.
    """
    if task not in COLUMNS:
        raise ValueError(f"task={task}: no programs are scored there; use one of {', '.join(COLUMNS)}")
    if missing := [column for column in COLUMNS[task] if column not in doc]:
        raise ValueError(f"task={task}: the problem has no {', '.join(missing)}; its columns are {', '.join(sorted(doc))}")
    if task == "mbpp":
        program, checks = _mbpp(doc, completion)
    else:
        program, checks = _humaneval(doc, completion.split("```")[0] if task == "humaneval_instruct" else completion)
    return sandbox.run(program, **checks, timeout=timeout, memory_mb=memory_mb)


def check_many(
    jobs: Iterable[tuple[str, Mapping[str, Any], str]], *, workers: int | None = None, timeout: float = 10.0
) -> list[Outcome]:
    """`passes` for many (task, doc, completion), `workers` at a time (None: one per core), in the order given."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda job: passes(*job, timeout=timeout), jobs))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that at least one of k programs passes, estimated without bias from n tries (arXiv 2107.03374).

    Args:
        n: programs tried for one problem.
        correct: how many of them passed.
        k: size of the draw, at most n.
    """
    if not (0 <= correct <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {correct} passed out of {n}: needs 1 <= k <= n and 0 <= passed <= n")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def _humaneval(doc: Mapping[str, Any], completion: str) -> tuple[str, dict[str, Any]]:
    entry = doc["entry_point"]
    tests = f"{doc['test']}\ncheck({entry})\n"
    return doc["prompt"] + completion, {"tests": tests, "names": [entry], "prelude": doc["prompt"]}


def _mbpp(doc: Mapping[str, Any], completion: str) -> tuple[str, dict[str, Any]]:
    setup, tests = doc.get("test_setup_code") or "", "\n".join(doc["test_list"])
    reference = f"{doc['code']}\n{setup}"
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    names = [
        symbol.get_name()
        for symbol in symtable.symtable(reference, "reference", "exec").get_symbols()
        if symbol.is_assigned() and symbol.get_name() in used
    ]
    imports = [node for node in ast.parse(reference).body if isinstance(node, ast.Import | ast.ImportFrom)]
    prelude = "\n".join(map(ast.unparse, imports))
    return f"{completion.split('[DONE]')[0]}\n{setup}", {"tests": tests, "names": names, "prelude": prelude}
