"""The rows of a batch: blocks, commits, and what happens to them when masks are inserted or rows leave."""

import pytest
import torch

from dllm_var.decoding.state import DecodeState

MASK = 11


def _state(prompts: list[list[int]], room: int = 6) -> DecodeState:
    return DecodeState.begin(prompts, range(len(prompts)), MASK, room)


def _commit(state: DecodeState, row: int, position: int, token: int) -> None:
    state.commit(torch.tensor([row]), torch.tensor([position]), torch.tensor([token]), torch.tensor([0.5]))


def test_a_fresh_row_is_its_prompt_and_room_for_the_answer() -> None:
    state = _state([[1, 2, MASK], [4]])
    assert state.tokens.tolist()[0][:3] == [1, 2, MASK]
    assert state.masked.tolist()[0] == [False] * 3 + [True] * 6  # a mask id in a prompt is no masked position
    assert state.limit.tolist() == [9, 7]
    assert not bool(state.window().any())


def test_blocks_follow_each_other_and_the_last_one_may_be_short() -> None:
    state = _state([[1, 2], [1, 2, 3]], room=5)
    both = torch.tensor([True, True])
    state.open_block(both, 3)
    assert (state.block_start.tolist(), state.block_end.tolist()) == ([2, 3], [5, 6])
    state.open_block(torch.tensor([True, False]), 3)
    assert (state.block_start.tolist(), state.block_end.tolist()) == ([5, 3], [7, 6])
    assert (state.block_index.tolist(), state.end.tolist()) == ([1, 0], [7, 6])
    state.open_block(torch.tensor([False, True]), 3, bound=torch.tensor([9, 7]))
    assert (state.block_start.tolist(), state.block_end.tolist()) == ([5, 6], [7, 7])


def test_settled_and_stopped_count_positions_of_the_response_only() -> None:
    state = _state([[1, 9, 1]], room=4)
    assert (int(state.settled()), int(state.stopped([9]))) == (3, 7)
    _commit(state, 0, 5, 9)
    assert (int(state.settled()), int(state.stopped([9, 10]))) == (3, 5)
    assert int(state.stopped([])) == 7


def test_a_token_taken_back_leaves_no_trace() -> None:
    state = _state([[1]])
    before = {name: value.clone() for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
    _commit(state, 0, 3, 7)
    assert not bool(state.masked[0, 3])
    state.remask(torch.tensor([0]), torch.tensor([3]))
    for name in ("tokens", "masked", "step", "block"):
        assert torch.equal(getattr(state, name), before[name])


def test_an_insertion_moves_what_lies_behind_it_and_nothing_else() -> None:
    state = _state([[1, 2], [3]], room=8)
    state.end = torch.tensor([6, 5])  # room for the insertion
    for row, position, token in ((0, 2, 4), (0, 4, 5), (1, 2, 6)):
        _commit(state, row, position, token)
    state.notes["mine"] = torch.arange(20).view(2, 10)
    state.notes["per_row"] = torch.tensor([1.0, 2.0])
    state.insert(torch.tensor([3, -1]), torch.tensor([2, 3]))
    assert state.tokens[0].tolist() == [1, 2, 4, MASK, MASK, MASK, 5, MASK, MASK, MASK]
    assert state.masked[0].tolist() == [False, False, False, True, True, True, False, True, True, True]
    assert state.step[0].tolist() == [-1, -1, 0, -1, -1, -1, 0, -1, -1, -1]
    assert state.tokens[1].tolist() == [3, MASK, 6] + [MASK] * 7
    assert (state.end.tolist(), state.limit.tolist()) == ([8, 5], [10, 9])
    assert state.notes["mine"].tolist() == [[0, 1, 2, 3, 3, 3, 4, 5, 6, 7], list(range(10, 20))]
    assert state.notes["per_row"].tolist() == [1.0, 2.0]


def test_every_row_is_widened_by_its_own_count() -> None:
    state = _state([[1], [1, 1]], room=8)
    state.end = torch.tensor([3, 4])
    for row, position in ((0, 2), (1, 3)):
        _commit(state, row, position, 7)
    state.insert(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert [(state.tokens[row] == 7).nonzero().tolist() for row in range(2)] == [[[3]], [[6]]]
    assert state.end.tolist() == [4, 7]


def test_an_insertion_beyond_the_limit_is_an_error() -> None:
    state = _state([[1], [1, 1]], room=4)
    state.end = state.limit - 1
    with pytest.raises(AssertionError, match="room"):
        state.insert(torch.tensor([2, -1]), torch.tensor([2, 0]))


def test_appended_tokens_are_part_of_the_canvas_and_nobody_decided_them() -> None:
    state = _state([[1], [1, 1]], room=4)
    state.end = torch.tensor([3, 4])
    state.append(7, torch.tensor([2, 0]))
    assert state.tokens.tolist() == [[1, MASK, MASK, 7, 7, MASK], [1, 1, MASK, MASK, MASK, MASK]]
    assert state.masked[0].tolist() == [False, True, True, False, False, True]
    assert (state.end.tolist(), state.step.max().item()) == ([5, 4], -1)


def test_positions_taken_off_the_end_are_as_if_they_had_never_been() -> None:
    state = _state([[1], [1, 1]], room=4)
    before = {name: value.clone() for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
    state.append(7, torch.tensor([2, 1]))
    state.drop(torch.tensor([2, 1]))
    for name, value in before.items():
        assert torch.equal(getattr(state, name), value), name


def test_rows_that_stay_keep_everything_they_had() -> None:
    state = _state([[1], [2, 2], [3, 3, 3]])
    state.notes["mine"] = torch.tensor([10, 20, 30])
    _commit(state, 2, 4, 8)
    state.keep(torch.tensor([2, 0]))
    assert state.rows == 2
    assert state.request.tolist() == [2, 0]
    assert state.prompt.tolist() == [3, 1]
    assert int(state.tokens[0, 4]) == 8
    assert state.notes["mine"].tolist() == [30, 10]
