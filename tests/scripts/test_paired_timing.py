"""Ratios of wall time: what is run, in which order, and when a difference counts."""

from paired_timing import Ratio, interleave, ratio


def test_arms_run_in_turn_forwards_and_backwards_and_the_first_round_does_not_count() -> None:
    ran: list[str] = []
    seconds = interleave({name: lambda name=name: ran.append(name) for name in "ab"}, 3)
    assert "".join(ran) == "ba" + "ab" + "ba" + "ab"
    assert [len(times) for times in seconds.values()] == [3, 3]


def test_a_ratio_is_taken_within_rounds_so_a_slow_round_does_not_bend_it() -> None:
    found = ratio([2.0, 20.0, 2.0, 200.0, 2.0], [1.0, 10.0, 1.0, 100.0, 1.0])
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_one_odd_round_moves_neither_the_ratio_nor_its_interval() -> None:
    found = ratio([2.0] * 9 + [80.0], [1.0] * 10)
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


def test_a_difference_whose_interval_holds_1_is_not_stated() -> None:
    assert str(ratio([0.9, 1.2, 0.8, 1.3, 1.0], [1.0] * 5)) == "unclear"
    assert str(Ratio(1.5, 1.4, 1.6)) == "1.50 [1.40, 1.60]"
