"""Reading ahead in the background, a bounded number of items.

Called by ``data.py``: the rows of the next steps are read and packed while the network computes.
"""

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item], bound: int) -> Iterator[Item]:
    """The same items in the same order, the next ``bound`` of them made by a thread while the caller works.

    An error of ``items`` reaches the caller where its item would have come. The thread ends with the iteration, also when
    the caller leaves it early: at most the item in work is finished first.
    """
    over = sys.is_finalizing  # bound here: when the program ends, modules go before their objects
    thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
    waiting: deque[Future[list[Item]]] = deque()
    try:
        for _ in range(bound):
            waiting.append(thread.submit(_next, items))
        while made := waiting.popleft().result():
            waiting.append(thread.submit(_next, items))
            yield made[0]
    finally:
        if not over():
            thread.shutdown(wait=True, cancel_futures=True)


def _next(items: Iterator[Item]) -> list[Item]:
    """The next item alone in a list; an empty list behind the last one."""
    return list(islice(items, 1))
