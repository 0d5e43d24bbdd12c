"""The bundled model's corpus: right answers, and a held-out part that stays held out."""

import json
import re
import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path

import pytest

from dllm_var.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dataset"))

import tiny_corpus  # noqa: E402
from tiny_corpus import TASKS, Problem, fresh_prompts, in_words, problems  # noqa: E402


def some(task: str, number: int = 200, *, held_out: bool = False) -> list[Problem]:
    return list(islice(problems(task, 5, held_out=held_out), number))


@pytest.mark.parametrize("task", list(TASKS))
def test_no_problem_is_in_both_parts(task: str) -> None:
    train = {p.content for p in some(task, 400)}
    held_out = {p.content for p in some(task, 100, held_out=True)}
    assert not train & held_out


@pytest.mark.parametrize("task", list(TASKS))
def test_the_part_does_not_depend_on_the_wording(task: str) -> None:
    for problem in some(task, 50):
        assert not Problem(task, problem.content, "another wording", problem.output).held_out


@pytest.mark.parametrize("task", list(TASKS))
def test_a_problem_depends_on_its_seed_task_and_index_alone(task: str) -> None:
    assert some(task, 20) == some(task, 30)[:20]
    assert list(islice(problems(task, 6, held_out=False), 20)) != some(task, 20)


@pytest.mark.parametrize("task", list(TASKS))
def test_there_are_five_hundred_different_held_out_problems(task: str) -> None:
    assert len({p.content for p in fresh_prompts(task, 1, 500)}) == 500


def test_asking_for_more_held_out_problems_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="task table has no 900 different"):
        fresh_prompts("table", 1, 900)


@pytest.mark.parametrize(
    ("n", "words"),
    [(0, "zero"), (13, "thirteen"), (40, "forty"), (508, "five hundred eight"), (21_015, "twenty-one thousand fifteen")],
)
def test_numbers_are_spelled_right(n: int, words: str) -> None:
    assert in_words(n) == words


def test_every_column_of_an_addition_is_right() -> None:
    for problem in some("add"):
        a, b = map(int, problem.content.split("+"))
        *lines, last = problem.output.splitlines()
        assert last == f"The sum is {a + b}."
        for place, line in enumerate(lines):
            x, y, carry, total, carried = map(int, re.findall(r"\d+", line))
            below = 10**place
            assert (x, y) == (a // below % 10, b // below % 10)
            assert carry == (a % below + b % below) // below
            assert (total, carried) == (x + y + carry, (x + y + carry) // 10)


def test_every_step_of_a_word_problem_is_right_and_leads_to_the_answer() -> None:
    for problem in some("word"):
        *steps, last = problem.output.splitlines()
        results = []
        for step in steps:
            x, sign, y, z = re.match(r"(\d+) ([-+*/]) (\d+) = (\d+)", step).groups()  # type: ignore[union-attr]
            right = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y), "/": int(x) / int(y)}[sign]
            assert right == int(z) > 0, problem
            results.append(z)
        assert last == f"#### {results[-1]}"


def test_tables_and_counts_are_right() -> None:
    for problem in some("table"):
        n, first, last = map(int, re.split("[:-]", problem.content))
        assert problem.output.splitlines() == [f"{n} x {k} = {n * k}" for k in range(first, last + 1)]
    for problem in some("count"):
        first, last, step = map(int, problem.content.split(":"))
        numbers = [int(n) for n in problem.output.split()]
        assert (numbers[0], numbers[-1]) == (first, last)
        assert {b - a for a, b in pairwise(numbers)} == {step}


def test_the_json_says_what_the_text_says() -> None:
    for problem in some("json"):
        for person in json.loads(problem.output):
            assert all(str(value) in problem.instruction for value in person.values())


def test_answers_are_from_four_to_over_two_hundred_tokens_long() -> None:
    tokenizer = load_tokenizer("tiny")
    lengths = [len(tokenizer(p.output)["input_ids"]) + 2 for task in TASKS for p in some(task, 300)]
    assert min(lengths) == 4
    assert max(lengths) > 200
    assert sum(length > 2 * 32 for length in lengths) > len(lengths) / 3, "many answers are longer than two blocks"


def test_the_written_files_hold_both_parts(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "dataset" / "tiny_corpus.py"), "--output_dir", str(tmp_path)]
    subprocess.run([*command, "--samples", "60", "--held_out_samples", "12"], check=True)
    for part, number in (("train", 60), ("held_out", 12)):
        lines = (tmp_path / part / "problems.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == number
        made = [next(iter(problems(task, 1, held_out=part == "held_out"))) for task in TASKS]
        assert [json.loads(line)["output"] for line in lines[: len(TASKS)]] == [p.output for p in made]
    made_of = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert made_of == {"samples": 60, "seed": 1, "turns": list(TASKS)}


def test_a_task_that_is_named_twice_comes_twice_and_never_with_the_same_problem(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "dataset" / "tiny_corpus.py"), "--output_dir", str(tmp_path)]
    subprocess.run([*command, "--samples", "9", "--turns", "word", "add", "word"], check=True)
    lines = (tmp_path / "train" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    words, sums = (list(islice(problems(task, 1, held_out=False), 6)) for task in ("word", "add"))
    expected = [words[0], sums[0], words[1], words[2], sums[1], words[3], words[4], sums[2], words[5]]
    assert [json.loads(line)["output"] for line in lines] == [p.output for p in expected]


def test_no_number_below_a_hundred_is_held_out_in_words_but_others_are() -> None:
    held_out = {int(p.content) for p in some("spell", 2000, held_out=True)}
    assert min(held_out) >= 100
    assert any(n < 1000 for n in held_out)


def test_a_share_of_one_in_eight_is_held_out() -> None:
    drawn = [tiny_corpus.add(tiny_corpus.random.Random(i)) for i in range(4000)]
    assert 0.10 < sum(p.held_out for p in drawn) / len(drawn) < 0.15
