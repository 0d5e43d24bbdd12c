"""Which live rows share the next forward.

Called by `dllm_var.engine.engine`. A forward is a rectangle, so its rows should have about as many columns: rows that refine
a block, rows that commit one while they look at the next, and prompts are run apart. Which of them come next is decided by
waiting alone, so none is forgotten; rows that reach the same phase while they wait then go on together.
"""

from collections.abc import Sequence

TOLERANCE = 0.05  # of a forward's columns, the most that may be padding


def alike(columns: Sequence[int], first: int) -> list[int]:
    """The indices whose columns fit into a rectangle as wide as those of `first` or a little wider, nearest first.

    The padding of the rectangle that they make stays within `TOLERANCE`.
    """
    chosen, most, total = [first], columns[first], columns[first]
    others = sorted((i for i in range(len(columns)) if i != first), key=lambda i: (abs(columns[i] - columns[first]), i))
    for i in others:
        width = max(most, columns[i])
        if (len(chosen) + 1) * width * (1 - TOLERANCE) > total + columns[i]:
            break
        chosen, most, total = [*chosen, i], width, total + columns[i]
    return chosen


def running(columns: Sequence[int], waited: Sequence[int], due: Sequence[bool]) -> list[int]:
    """The group of rows that has waited longest in all, a row that is due counting for all others.

    Args:
        columns: what each row would compute. waited: forwards since its last one. due: whether its time is running out.

    Returns:
        Indices, ascending.
    """
    weight = [1 + turns + (sum(waited) + len(waited)) * urgent for turns, urgent in zip(waited, due, strict=True)]
    groups = [alike(columns, first) for first in {size: i for i, size in enumerate(columns)}.values()]
    return sorted(max(groups, key=lambda group: sum(weight[i] for i in group)))


def prompts(columns: Sequence[int], limit: int) -> list[int]:
    """The oldest prompt and others of about its length, as many as `limit` columns allow; always at least one.

    Args:
        columns: of each prompt and its first block, the oldest first.
    """
    group = alike(columns, 0)
    while len(group) > 1 and max(columns[i] for i in group) * len(group) > limit:
        group.pop()
    return sorted(group)
