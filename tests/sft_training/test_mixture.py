"""Sources mixed by weight: shares, completeness, and rows that do not depend on stops, ranks or reading ahead."""

import json
import random
import time
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from dllm_var.diffusion.corruption import ForwardProcess
from dllm_var.diffusion.decoding_view import DecodingView
from dllm_var.diffusion.packing import Packer, Row
from sft_training.data import Collate, RowStream
from sft_training.mixture import Mixture, Source
from sft_training.samples import Sample

MASK = 270
VIEW = DecodingView(tail_share=0.5, tail_max=3, block_share=0.3, block_lengths=(2, 4))
SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


class Listed(list[Sample]):
    """Samples that are already there."""

    def fingerprint(self) -> list[list[Any]]:
        return [["list", len(self), sum(len(sample.ids) for sample in self)]]


def listed(number: int, size: int, longest: int = 12) -> Listed:
    draws = random.Random(number)
    lengths = [draws.randint(1, longest) for _ in range(size)]
    return Listed(Sample(f"s:{i}", np.arange(n) + 1, np.arange(n) >= n // 2) for i, n in enumerate(lengths))


def mixture(sizes: list[int], weights: list[float] | None = None, *, seed: int = 1, shuffle: int | None = 3) -> Mixture:
    weights = weights or [1.0 + i for i in range(len(sizes))]
    parts = zip(sizes, weights, strict=True)
    return Mixture([Source(f"n{i}", listed(i, n), w) for i, (n, w) in enumerate(parts)], seed=seed, shuffle_seed=shuffle)


def stream(sizes: list[int], mode: str = "whole", **more: Any) -> RowStream:
    length = more.pop("length", 14)
    packer = Packer(length, mode, open_rows=2)
    return RowStream(mixture(sizes), VIEW, packer, seed=1, mask_id=MASK, **more)


def same(a: list[Row], b: list[Row]) -> bool:
    names = ("ids", "response", "real", "noise", "level")
    return len(a) == len(b) and all(
        (x.index, x.pieces) == (y.index, y.pieces) and all(np.array_equal(getattr(x, n), getattr(y, n)) for n in names)
        for x, y in zip(a, b, strict=True)
    )


@examples(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 99), shuffle=st.sampled_from([None, 5]))
def test_every_source_goes_through_its_samples_in_whole_epochs(sizes: list[int], seed: int, shuffle: int | None) -> None:
    mixed = mixture(sizes, seed=seed, shuffle=shuffle)
    taken = [0] * len(sizes)
    seen: list[list[tuple[int, str]]] = [[] for _ in sizes]
    for number in range(6 * len(mixed)):
        which = mixed.draw(number)
        sample, epoch = mixed.sample(which, taken[which])
        assert len(sizes) == 1 or sample.key.startswith(f"n{which}/")
        seen[which].append((epoch, sample.key))
        taken[which] += 1
    for samples, size in zip(seen, sizes, strict=True):
        assert [epoch for epoch, _ in samples] == [i // size for i in range(len(samples))]
        assert len(set(samples)) == len(samples)  # none twice within an epoch, so that every whole epoch has all
    if len(sizes) > 1 and sizes[0] > 4 and shuffle is not None:
        assert not np.array_equal(mixed.order(0, 0), mixed.order(0, 1))


@examples(max_examples=12, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20.0), min_size=2, max_size=5),
    scale=st.sampled_from([1.0, 1e-3, 1e6]),
    seed=st.integers(0, 10**6),
)
def test_every_share_converges_to_its_weight(weights: list[float], scale: float, seed: int) -> None:
    mixed = mixture([3] * len(weights), [weight * scale for weight in weights], seed=seed)
    number = 3000
    counts = np.bincount([mixed.draw(i) for i in range(number)], minlength=len(weights))
    for count, weight in zip(counts, weights, strict=True):
        share = weight / sum(weights)
        assert abs(count / number - share) < 6 * np.sqrt(share * (1 - share) / number) + 1e-3


def test_a_draw_depends_on_its_number_and_the_seed_alone() -> None:
    forwards = [mixture([3, 3]).draw(i) for i in range(200)]
    again = mixture([9, 2])
    assert [again.draw(i) for i in reversed(range(200))] == forwards[::-1]
    assert [mixture([3, 3], seed=2).draw(i) for i in range(200)] != forwards
    even = mixture([3, 3], [1.0, 1.0])
    drawn = np.array([even.draw(i) for i in range(400)])
    assert 0.4 < np.mean(drawn[1:] == drawn[:-1]) < 0.6  # one draw says nothing of the next


@examples(max_examples=20, deadline=None)
@given(
    sizes=SIZES, mode=st.sampled_from(["whole", "split"]), group=st.integers(1, 4), stop=st.integers(0, 30),
    ahead=st.integers(0, 3), epochs=st.sampled_from([None, 3]),
)  # fmt: skip
def test_a_mixture_taken_up_at_any_row_goes_on_with_the_same_rows(
    sizes: list[int], mode: str, group: int, stop: int, ahead: int, epochs: int | None
) -> None:
    options: dict[str, Any] = {"rows_per_step": group, "epochs": epochs}
    whole = list(islice(stream(sizes, mode, **options), 40))
    going = stream(sizes, mode, **options, ahead=ahead)
    first = list(islice(going, stop))
    state = json.loads(json.dumps(going.state(len(first))))
    draws = sum(len(going.mixture.sources[i].samples) * place["epoch"] + place["cursor"] for i, place in
                enumerate(state["sources"].values()))  # fmt: skip
    assert state["draws"] == draws
    again = stream(sizes, mode, **options, ahead=ahead)
    again.restore(state)
    if stop % group == 0:  # a checkpoint stands between two steps
        assert same(first + list(islice(again, 40 - stop)), whole)
    else:
        rest = list(islice(again, 4))[: len(whole) - len(first)]  # other rows make whole steps then, at the end
        assert same(rest, whole[len(first) : len(first) + len(rest)])


@pytest.mark.parametrize("sizes", [[20], [20, 7, 1]])
def test_a_state_survives_a_chain_of_stops(sizes: list[int]) -> None:
    whole, found, state = list(islice(stream(sizes), 30)), [], None
    for start in range(0, 30, 3):
        part = stream(sizes, rows_per_step=3, ahead=2)
        if state is not None:
            part.restore(json.loads(state))
        found += list(islice(part, 3))
        state = json.dumps(part.state(start + 3))
    assert same(found, whole)


def test_sources_in_another_order_cannot_take_up_a_run() -> None:
    run = stream([5, 5])
    list(islice(run, 3))
    other = stream([5, 5])
    other.mixture = Mixture(other.mixture.sources[::-1], seed=1, shuffle_seed=3)
    with pytest.raises(ValueError, match="the saved run had other samples of the data"):
        other.restore(json.loads(json.dumps(run.state(3))))


@pytest.mark.parametrize("change", ["weights", "names", "samples"])
def test_another_mixture_cannot_take_up_a_run(change: str) -> None:
    state = stream([5, 6]).state(0)
    parts = [Source("n0", listed(0, 5), 1.0), Source("n1", listed(1, 6), 2.0)]
    if change == "weights":
        parts[1] = Source("n1", listed(1, 6), 3.0)
    elif change == "names":
        parts[1] = Source("other", listed(1, 6), 2.0)
    else:
        parts[1] = Source("n1", listed(2, 6), 2.0)
    other = RowStream(Mixture(parts, seed=1, shuffle_seed=3), VIEW, Packer(14, open_rows=2), seed=1, mask_id=MASK)
    with pytest.raises(ValueError, match=r"had other (samples|settings) of the data.*resume=never"):
        other.restore(state)


@examples(max_examples=12, deadline=None)
@given(ranks=st.integers(1, 4), batch=st.integers(1, 3), ahead=st.integers(0, 2), sizes=SIZES, epochs=st.integers(3, 5))
def test_ranks_get_disjoint_rows_of_a_mixture_whose_union_is_everything(
    ranks: int, batch: int, ahead: int, sizes: list[int], epochs: int
) -> None:
    options: dict[str, Any] = {"rows_per_step": ranks * batch, "ahead": ahead, "epochs": epochs}
    parts = [
        list(IterableDatasetShard(stream(sizes, **options), batch_size=batch, num_processes=ranks, process_index=rank))
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    everyone = sorted((row for part in parts for row in part), key=lambda row: row.index)
    whole = stream(sizes, epochs=epochs)
    assert same(everyone, list(islice(whole, len(everyone))))
    alone = stream(sizes, **options)
    assert len(list(alone)) == len(everyone)
    assert len(everyone) + alone.left_over == len(list(stream(sizes, epochs=epochs)))
    assert alone.left_over < ranks * batch


def test_the_passes_of_a_mixture_end_after_as_many_draws_as_all_sources_have_samples() -> None:
    rows = list(stream([9, 4, 2], epochs=4, length=24))
    starts = [key for row in rows for key, _, _, start in row.pieces if start == 0]
    assert len(starts) == 4 * 15


def test_a_stream_inside_a_worker_of_a_data_loader_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", object())  # what a worker process finds
    with pytest.raises(ValueError, match=r"the same in every worker of a DataLoader.*use num_workers=0"):
        next(iter(DataLoader(stream([5]), batch_size=None)))


def test_samples_that_are_left_out_are_counted_by_source_up_to_the_row_that_is_asked_for() -> None:
    made = stream([12, 5], length=8, ahead=2, epochs=4)
    with pytest.warns(UserWarning, match=r"sample n\d/s:\d+ has \d+ tokens"):
        rows = list(made)
    sources = made.sources(len(rows))
    for source, found in zip(made.mixture.sources, sources.values(), strict=True):
        long = [len(sample.ids) > 8 for sample in source.samples]
        order = np.concatenate([made.mixture.order(made.mixture.names.index(source.name), epoch) for epoch in range(20)])
        taken = round(found["passes"] * len(long))
        assert found["dropped"] == sum(long[i] for i in order[:taken]) > 0
    early = made.sources(len(rows) - 1)
    assert sum(source["passes"] for source in early.values()) <= sum(source["passes"] for source in sources.values())
    metrics = made.metrics(len(rows))
    assert metrics["data/dropped_samples"] == sum(source["dropped"] for source in sources.values())
    assert metrics["data/passes_n1"] == sources["n1"]["passes"]
    assert sources["n1"]["share"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("sizes", [[6], [6, 3]])
def test_data_of_which_nothing_fits_a_row_ends_in_a_sentence_and_not_in_an_endless_search(sizes: list[int]) -> None:
    long = Sample("s", np.arange(20), np.arange(20) > 5)
    mixed = Mixture([Source(f"n{i}", Listed([long] * n)) for i, n in enumerate(sizes)], seed=1, shuffle_seed=3)
    made = RowStream(mixed, DecodingView(), Packer(14), seed=1, mask_id=MASK, ahead=1)
    said = pytest.raises(ValueError, match=r"no sample has at most packing\.max_length=14 tokens")
    with pytest.warns(UserWarning, match="left out"), said:
        next(iter(made))


def test_reading_ahead_makes_the_rows_of_no_more_steps_than_asked_for() -> None:
    made, rows = stream([40], rows_per_step=3, ahead=2), []
    pack = made._rows

    def noted() -> Any:
        for item in pack():
            rows.append(item)
            yield item

    made._rows = noted  # type: ignore[method-assign]
    for taken, _ in enumerate(islice(made, 13), start=1):
        if taken in (1, 13):
            wanted, before = 3 * (-(-taken // 3) + 2), -1  # the step in work, and two more
            while before != len(rows) or before < wanted:
                before = len(rows)
                time.sleep(0.05)
            assert len(rows) == wanted


@pytest.mark.parametrize("next_token", [False, True])
def test_tokens_are_counted_for_the_source_they_come_from(next_token: bool) -> None:
    bare = [Sample(f"b:{i}", np.arange(3) + 1, np.ones(3, bool)) for i in range(9)]  # the answer is all there is
    parts = [Source("a", listed(0, 12), 2.0), Source("b", Listed(bare), 2.0), Source("c", listed(2, 5), 1.0)]
    made = RowStream(Mixture(parts, seed=1, shuffle_seed=3), DecodingView(), Packer(24), seed=1, mask_id=MASK)
    rows = list(islice(made, 12))
    collate = Collate(ForwardProcess(), seed=1, mask_id=MASK, stop=(1,), next_token=next_token, sources=made.mixture.names)
    batch = collate(rows)
    counts = batch["counts"]
    total = np.array(counts.by_source).sum(0)
    assert total.tolist() == [counts.prompt, counts.response, counts.masked, counts.eos]
    for number, name in enumerate(made.mixture.names):
        response = sum(
            int(row.response[first : first + n].sum())
            for row in rows
            for key, first, n, _ in row.pieces
            if key.startswith(f"{name}/")
        )
        assert counts.by_source[number][1] == response > 0
    if next_token:  # the first token of a sample is asked for in the sample before it
        assert counts.by_source[1][2] == counts.by_source[1][1] - sum(row.pieces[0][0].startswith("b/") for row in rows)
    asked = batch["source"][batch["masked"]]
    assert np.bincount(asked).tolist() == [masked for _, _, masked, _ in counts.by_source]
    assert Collate(ForwardProcess(), seed=1, mask_id=MASK, stop=(1,), sources=("one",))(rows)["source"] is None
