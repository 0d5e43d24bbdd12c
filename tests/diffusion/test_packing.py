"""Packing: nothing is lost, nothing is cut that must not be, and an interrupted packer packs the same rows."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.diffusion.decoding_view import Piece
from dllm_var.diffusion.packing import Packer, Row

PAD = 14


def piece(number: int, length: int) -> Piece:
    """A piece whose tokens tell where they come from: sample * 1000 + position."""
    ids = np.arange(length) + 1000 * number
    noise = np.linspace(0, 0.9, length, dtype=np.float32)
    return Piece(f"s{number}", 0, ids, np.arange(length) % 2 == 0, noise, level=number / 1000)


def pack(packer: Packer, lengths: Sequence[int]) -> list[Row]:
    rows = [row for number, length in enumerate(lengths) for row in packer.add(piece(number, length))]
    return rows + packer.flush()


def tokens(rows: Sequence[Row]) -> list[int]:
    return sorted(int(token) for row in rows for token in row.ids[row.real])


lengths_strategy = st.lists(st.integers(1, 40), max_size=60)


@given(lengths_strategy, st.integers(2, 30))
@settings(max_examples=100, deadline=None)
def test_split_keeps_every_token_of_every_sample_exactly_once(lengths: list[int], length: int) -> None:
    rows = pack(Packer(length, "split", PAD), lengths)
    assert tokens(rows) == sorted(1000 * i + j for i, n in enumerate(lengths) for j in range(n))


@given(lengths_strategy)
@settings(max_examples=50, deadline=None)
def test_split_rows_are_full_but_for_the_last(lengths: list[int]) -> None:
    rows = pack(Packer(16, "split", PAD), lengths)
    assert all(row.real.all() for row in rows[:-1])
    assert [token for row in rows for token in row.ids[row.real]] == [
        1000 * i + j for i, n in enumerate(lengths) for j in range(n)
    ]


@given(lengths_strategy, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_whole_never_cuts_a_sample_and_counts_those_that_do_not_fit(lengths: list[int], open_rows: int) -> None:
    packer = Packer(24, "whole", PAD, open_rows)
    rows = pack(packer, lengths)
    fitting = [(i, n) for i, n in enumerate(lengths) if n <= 24]
    assert packer.dropped == len(lengths) - len(fitting)
    assert tokens(rows) == sorted(1000 * i + j for i, n in fitting for j in range(n))
    for row in rows:
        for key, start, size, inside in row.pieces:
            number = int(key[1:])
            assert (inside, size) == (0, lengths[number])
            assert row.ids[start : start + size].tolist() == [1000 * number + j for j in range(size)]


@given(lengths_strategy, st.sampled_from(["split", "whole"]), st.integers(0, 60))
@settings(max_examples=80, deadline=None)
def test_a_restored_packer_gives_the_same_rows(lengths: list[int], mode: str, at: int) -> None:
    at = min(at, len(lengths))
    packer = Packer(20, mode, PAD, 3)
    for number, length in enumerate(lengths[:at]):
        packer.add(piece(number, length))
    restored = Packer(20, mode, PAD, 3)
    restored.restore(json.loads(json.dumps(packer.state())))
    frozen, before = packer.snapshot(), json.dumps(packer.state())
    for number, length in enumerate(lengths[at:], start=at):
        ours, theirs = packer.add(piece(number, length)), restored.add(piece(number, length))
        assert_same(ours, theirs)
    assert_same(packer.flush(), restored.flush())
    assert packer.dropped == restored.dropped
    assert json.dumps(frozen.state()) == before  # going on left the snapshot alone


def assert_same(ours: list[Row], theirs: list[Row]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.index, a.pieces) == (b.index, b.pieces)
        for name in ("ids", "response", "real", "noise", "level"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype
            assert np.array_equal(x, y), name


def test_each_token_keeps_its_noise_its_level_and_whether_it_is_trained() -> None:
    rows = pack(Packer(10, "split", PAD), [7, 7, 7])
    for row in rows:
        for position in np.flatnonzero(row.real):
            number, inside = divmod(int(row.ids[position]), 1000)
            source = piece(number, 7)
            assert row.noise[position] == source.noise[inside]
            assert row.level[position] == np.float32(source.level)
            assert row.response[position] == source.response[inside]


def test_padding_is_never_real_never_trained_and_holds_the_padding_token() -> None:
    (row,) = pack(Packer(10, "whole", PAD), [6])
    assert row.real.tolist() == [True] * 6 + [False] * 4
    assert (row.ids[6:] == PAD).all()
    assert not row.response[6:].any()


def test_whole_puts_a_piece_into_the_fullest_row_that_holds_it() -> None:
    rows = pack(Packer(10, "whole", PAD, open_rows=3), [4, 7, 8, 3, 2])
    assert {tuple(key for key, *_ in row.pieces) for row in rows} == {("s0",), ("s1", "s3"), ("s2", "s4")}


@given(lengths_strategy, st.sampled_from(["whole", "split"]))
@settings(max_examples=30, deadline=None)
def test_every_position_knows_its_sample_and_padding_has_none(lengths: list[int], mode: str) -> None:
    for row in pack(Packer(24, mode, PAD), lengths):
        assert (row.sample >= 0).tolist() == row.real.tolist()
        for number, (key, first, length, _) in enumerate(row.pieces):
            assert set(row.sample[first : first + length].tolist()) == {number}
            assert {int(token) // 1000 for token in row.ids[row.sample == number]} == {int(key[1:])}


def test_rows_are_numbered_in_the_order_in_which_they_are_finished() -> None:
    rows = pack(Packer(12, "whole", PAD, open_rows=2), [5, 9, 3, 8, 8, 2, 11, 4, 4] * 5)
    assert [row.index for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize(
    ("bad", "named"),
    [({"mode": "best"}, "packing='best'"), ({"length": 1}, "max_length=1"), ({"open_rows": 0}, "open_rows=0")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(bad: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Packer(**{"length": 16, **bad})  # type: ignore[arg-type]
