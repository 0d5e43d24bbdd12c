"""Which rows share a forward: equal widths, no starvation, bounded prompts."""

from hypothesis import given
from hypothesis import strategies as st

from dllm_var.engine.scheduler import TOLERANCE, alike, prompts, running

widths = st.lists(st.integers(1, 300), min_size=1, max_size=24)


def _padding(columns: list[int], chosen: list[int]) -> float:
    rectangle = len(chosen) * max(columns[i] for i in chosen)
    return 1 - sum(columns[i] for i in chosen) / rectangle


@given(widths, st.data())
def test_a_group_s_padding_stays_within_the_tolerance(columns: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(columns) - 1))
    chosen = alike(columns, first)
    assert chosen[0] == first
    assert len(set(chosen)) == len(chosen)
    assert _padding(columns, chosen) <= TOLERANCE + 1e-12


@given(widths)
def test_rows_of_one_width_go_together(columns: list[int]) -> None:
    same = [32] * len(columns)
    assert running(same, [0] * len(same), [False] * len(same)) == list(range(len(same)))


def test_the_larger_group_goes_first_and_the_smaller_one_is_not_forgotten() -> None:
    columns, waited = [32, 32, 32, 64], [0, 0, 0, 0]
    turns = []
    for _ in range(8):
        chosen = running(columns, waited, [False] * 4)
        turns.append(len(chosen))
        waited = [0 if i in chosen else turns_ + 1 for i, turns_ in enumerate(waited)]
    assert turns[0] == 3
    assert 1 in turns[:4]


def test_a_row_whose_time_runs_out_goes_before_all_others() -> None:
    assert running([32, 32, 32, 64], [5, 5, 5, 0], [False, False, False, True]) == [3]


@given(widths, st.integers(1, 2000))
def test_prompts_are_bounded_and_the_oldest_is_among_them(columns: list[int], limit: int) -> None:
    chosen = prompts(columns, limit)
    assert 0 in chosen
    assert len(chosen) == 1 or max(columns[i] for i in chosen) * len(chosen) <= limit
