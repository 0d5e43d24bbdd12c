"""Reading ahead: the same items, never more than the bound, errors where they belong, and no thread left behind."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sft_training.prefetch import read_ahead

ROOT = Path(__file__).resolve().parents[2]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def settled(made: list[int]) -> int:
    """How many items were made, when no more are coming."""
    before = -1
    while before != len(made):
        before = len(made)
        time.sleep(0.05)
    return before


@pytest.mark.parametrize("bound", [1, 2, 7])
def test_the_items_are_the_same_and_at_most_the_bound_is_made_ahead(bound: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    taken = []
    for item in read_ahead(items(), bound):
        taken.append(item)
        if item in (0, 9):
            assert settled(made) == item + 1 + bound
    assert taken == made == list(range(20))
    assert not threads()


def test_the_items_are_made_while_the_caller_works_and_by_another_thread() -> None:
    makers = set()

    def items() -> Iterator[float]:
        for _ in range(2):
            makers.add(threading.current_thread().name)
            yield time.monotonic()

    ahead = read_ahead(items(), 1)
    next(ahead)
    time.sleep(0.1)
    left = time.monotonic()
    assert next(ahead) < left
    assert threading.current_thread().name not in makers


def test_an_error_comes_with_its_message_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("b.jsonl, line 3 is not a tokenised sample")

    taken: list[int] = []
    with pytest.raises(ValueError, match=r"^b\.jsonl, line 3 is not a tokenised sample$"):
        taken.extend(read_ahead(items(), 5))
    assert taken == [1, 2]
    assert not threads()


def test_a_caller_that_stops_early_or_fails_leaves_no_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    ahead = read_ahead(endless(), 3)
    next(ahead)
    assert threads()
    ahead.close()
    assert not threads()

    def fail() -> None:
        for _ in read_ahead(endless(), 3):
            raise KeyError("of the caller")

    with pytest.raises(KeyError):
        fail()
    assert not threads()


def test_a_program_that_ends_in_the_middle_of_reading_ends_at_once_and_quietly() -> None:
    # kept by a module, the iteration is closed when other modules are gone already
    keep = "import builtins, itertools, sft_training.prefetch as p; builtins.ahead = p.read_ahead(itertools.count(), 3); "
    ending = [sys.executable, "-c", keep + "print(next(builtins.ahead))"]
    done = subprocess.run(ending, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
