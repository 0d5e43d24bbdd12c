"""Counts of a data set add up, survive the progress file, and are told in full."""

import json

from dllm_var.text.tally import PLACES, Tally


def some(start, number):
    tally = Tally(lines=number)
    for i in range(start, start + number):
        if i % 3:
            tally.count([1] * (4 * i), [2, 9], eos=9)
        else:
            tally.drop("not JSON", f"a:{i}")
    return tally


def test_counts_of_parts_add_up_to_the_counts_of_the_whole():
    whole, parts = some(0, 90), Tally()
    for start in range(0, 90, 18):
        parts.add(some(start, 18))
    assert parts == whole
    assert whole.dropped["not JSON"] == 30
    assert whole.places["not JSON"] == [f"a:{i}" for i in range(0, 3 * PLACES, 3)]


def test_a_tally_survives_json():
    tally = some(0, 50)
    assert Tally.restored(json.loads(json.dumps(vars(tally)))) == tally


def test_adding_to_a_tally_leaves_the_added_one_alone():
    first, second = some(0, 9), some(9, 9)
    first.add(second)
    first.drop("not JSON", "b:1")
    assert second == some(9, 9)


def test_lengths_fall_into_classes_that_end_at_powers_of_two():
    tally = Tally()
    for length in (2, 16, 17, 32, 33, 64, 65):
        tally.count([1] * (length - 1), [9], eos=9)
    assert tally.report()["lengths_up_to"] == {"16": 2, "32": 2, "64": 2, "128": 1}
    assert list(tally.report()["lengths_up_to"]) == ["16", "32", "64", "128"]


def test_the_report_gives_the_share_of_eos():
    tally = Tally()
    tally.count([1, 1], [2, 2, 2, 9], eos=9)
    tally.count([1, 1], [2, 9], eos=9)
    report = tally.report()
    assert (report["tokens"], report["prompt_tokens"], report["response_tokens"], report["eos_tokens"]) == (10, 4, 6, 2)
    assert (report["eos_share_of_tokens"], report["eos_share_of_response"]) == (0.2, 2 / 6)


def test_the_text_tells_what_was_dropped_why_and_where_and_draws_the_lengths():
    text = some(0, 90).text()
    assert "30 not JSON: a:0, a:3" in text
    assert "a:27, ..." in text
    assert "█" in text
    assert "a:30" not in text


def test_an_empty_tally_is_told_without_dividing_by_zero():
    assert "samples              0" in Tally().text()
    assert Tally().report()["eos_share_of_response"] == 0.0
