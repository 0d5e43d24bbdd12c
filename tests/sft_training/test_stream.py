"""The stream of rows: the same for every rank, cut up once, taken up anywhere, and corrupted by key alone."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard

from dllm_var.diffusion.decoding_view import sees
from dllm_var.diffusion.packing import Row
from dllm_var.text.special_tokens import SpecialTokens
from sft_training.build import build_collate, build_model, build_stream
from sft_training.config import SftConfig
from sft_training.data import RowStream

SPECIAL = SpecialTokens(mask=270, eos=256, pad=256, eot=257, bos=258)
LENGTHS = [3 + (7 * i) % 23 for i in range(60)]
EVERY_BLOCK = ("view.block_share=0.7", "view.every_block=true", "packing.attention=sample")
EVERYTHING = ("view.tail_share=0.5", "view.tail_max=6", "view.block_share=0.3")

FILLED = ("view.fill=true", "view.tail_share=0", "view.tail_max=0", "view.block_share=0")

Make = Callable[..., RowStream]


@pytest.fixture
def make(settings: Callable[..., SftConfig], write_samples: Callable[..., Path]) -> Make:
    files, composed = write_samples(LENGTHS), {}

    def build(*more: str) -> RowStream:
        if more not in composed:
            composed[more] = settings(files, *more)
        return build_stream(composed[more], 288, SPECIAL)

    return build


def same(a: Row, b: Row) -> bool:
    names = ("ids", "response", "real", "noise", "level", "positions", "stage")
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)
    return arrays and (a.index, a.pieces) == (b.index, b.pieces)


def keys(rows: list[Row]) -> list[str]:
    return [key for row in rows for key, *_ in row.pieces]


@pytest.mark.parametrize("mode", ["whole", "split"])
def test_an_epoch_holds_every_sample_once(make: Make, mode: str) -> None:
    stream = make("dataset.epochs=1", f"packing.mode={mode}", "training.local_batch_size=1", "training.grad_accum_steps=1")
    whole = [(key, start) for row in stream for key, _, _, start in row.pieces]
    assert sorted(key for key, start in whole if start == 0) == sorted(f"train:{i}" for i in range(1, 61))
    assert stream.left_over == 0


def test_epochs_come_in_different_orders_and_the_files_order_on_request(make: Make) -> None:
    shuffled, plain = make(), make("dataset.shuffle=false")
    orders = [shuffled.mixture.order(0, epoch) for epoch in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(60))
    assert not np.array_equal(*orders)
    assert plain.mixture.order(0, 3).tolist() == list(range(60))


def test_the_order_of_an_epoch_depends_on_the_shuffle_seed_plus_the_epoch(make: Make) -> None:
    five, seven = make("dataset.shuffle_seed=5").mixture, make("dataset.shuffle_seed=7").mixture
    assert np.array_equal(five.order(0, 2), seven.order(0, 0))


@pytest.mark.parametrize("own", [("packing.mode=whole",), ("packing.mode=split",), EVERY_BLOCK, FILLED])
def test_a_stream_taken_up_at_any_row_goes_on_with_the_same_rows(make: Make, own: tuple[str, ...]) -> None:
    options = (*EVERYTHING[:2], *(own if own is EVERY_BLOCK else (EVERYTHING[2], *own)))
    options = (*options, "training.local_batch_size=1", "training.grad_accum_steps=1")
    rows = list(islice(make(*options), 32))  # more than an epoch
    going = make(*options)
    for position, _ in enumerate(zip(range(24), going, strict=False)):
        state = json.loads(json.dumps(going.state(position)))
        again = make(*options)
        again.restore(state)
        for ours, theirs in zip(islice(again, 6), rows[position:], strict=False):
            assert same(ours, theirs), position
        if position:
            assert again.state(position + 2)["packer"]["rows"] <= position + 2


def test_filled_rows_hold_one_sample_each_and_its_eos_is_masked_now_and_then(make: Make, settings: Any) -> None:
    rows = list(islice(make(*FILLED), 30))
    assert all(len(row.pieces) == 1 and row.real.all() for row in rows)
    assert all((row.ids != SPECIAL.mask).all() for row in rows)  # what fills a row is EOS, a token like others
    assert all((row.ids[1:][~row.response[:-1] & row.response[1:]]).size == 1 for row in rows)  # one border, then response
    llada = settings("unused.jsonl", *FILLED, "forward_process.always_mask_eos=false", "forward_process.t_min=0.001")
    batch = build_collate(llada, SPECIAL)(rows)
    filled = (batch["clean"] == SPECIAL.eos) & torch.from_numpy(np.stack([row.response for row in rows]))
    share = float((batch["masked"] & filled).sum() / filled.sum())
    assert 0.2 < share < 0.8


def test_the_state_is_that_of_the_rows_consumed_and_not_of_those_read_ahead(make: Make) -> None:
    stream, rows = make(), list(islice(make(), 40))
    iterator = iter(stream)
    for _ in range(16):
        next(iterator)
    again = make()
    again.restore(stream.state(8))
    assert same(next(iter(again)), rows[8])


def test_a_state_that_was_let_go_is_an_error_and_not_a_guess(make: Make) -> None:
    stream = make()
    for _ in islice(stream, 60):
        pass
    with pytest.raises(ValueError, match="cannot tell its state after 4 rows"):
        stream.state(4)


@pytest.mark.parametrize(
    ("option", "named"),
    [("training.seed=1", "settings"), ("packing.max_length=64", "settings"), ("view.tail_share=0.9", "settings"),
     ("dataset.shuffle_seed=0", "settings")],
)  # fmt: skip
def test_other_settings_cannot_take_up_a_run(make: Make, option: str, named: str) -> None:
    state = make("view.tail_max=3").state(0)
    with pytest.raises(ValueError, match=f"had other {named} of the data.*resume=never"):
        make("view.tail_max=3", option).restore(state)


def test_other_files_cannot_take_up_a_run(make: Make, settings: Any, write_samples: Any) -> None:
    state = make().state(0)
    other = build_stream(settings(write_samples([5] * 60)), 288, SPECIAL)
    with pytest.raises(ValueError, match="had other samples of the data"):
        other.restore(state)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_get_disjoint_rows_whose_union_is_everything(make: Make, ranks: int) -> None:
    def rows_of(rank: int) -> list[Row]:
        stream = make("dataset.epochs=2", "training.local_batch_size=2", "training.grad_accum_steps=1")
        stream.rows_per_step = 2 * ranks  # what build_stream sets under that many processes
        return list(IterableDatasetShard(stream, batch_size=2, num_processes=ranks, process_index=rank))

    parts = [rows_of(rank) for rank in range(ranks)]
    indices = [[row.index for row in part] for part in parts]
    everyone = sorted(index for part in indices for index in part)
    assert everyone == list(range(len(everyone)))
    assert len({len(part) for part in parts}) == 1
    full = make("dataset.epochs=2", "training.local_batch_size=2", "training.grad_accum_steps=1")
    total = list(full)
    missing = len(total) + full.left_over - len(everyone)
    assert 0 <= missing < 2 * ranks
    assert sorted(keys([row for part in parts for row in part])) == sorted(keys(total[: len(everyone)]))


def test_a_finite_stream_ends_with_a_full_step_and_counts_the_rest(make: Make) -> None:
    all_rows = len(list(make("dataset.epochs=1", "training.local_batch_size=1", "training.grad_accum_steps=1")))
    stream = make("dataset.epochs=1", "training.local_batch_size=7", "training.grad_accum_steps=1")
    rows = len(list(stream))
    assert rows % 7 == 0
    assert rows + stream.left_over == all_rows
    assert stream.left_over > 0


def test_over_long_samples_are_counted_and_announced_once(settings: Any, write_samples: Any) -> None:
    stream = build_stream(settings(write_samples([10, 100, 10, 200, 10]), "dataset.epochs=2"), 288, SPECIAL)
    with pytest.warns(UserWarning, match=r"more than packing\.max_length=48: it is left out, as are all like it") as caught:
        found = list(stream._rows())
    assert len(caught) == 1
    assert found[-1][1].dropped == (4,)
    assert len(keys([row for row, _ in found])) == 6


def test_a_tail_is_shortened_where_the_row_ends_instead_of_losing_the_sample(settings: Any, write_samples: Any) -> None:
    options = ("view.tail_share=1.0", "view.tail_max=40", "dataset.epochs=1")
    stream = build_stream(settings(write_samples([40] * 12), *options), 288, SPECIAL)
    rows = list(stream._rows())
    assert rows[-1][1].dropped == (0,)
    assert len(keys([row for row, _ in rows])) == 12


def test_the_same_sample_gets_the_same_mask_in_any_batch_and_after_any_restart(make: Make, settings: Any) -> None:
    rows = list(islice(make(*EVERYTHING), 24))
    for per in ("row", "sample"):
        collate = build_collate(settings(Path("unused.jsonl"), *EVERYTHING, f"forward_process.t_per={per}"), SPECIAL)
        together = collate(rows)
        for name in ("noisy", "masked", "t"):
            singly = torch.cat([collate([row])[name] for row in rows])
            backwards = collate(rows[::-1])[name].flip(0)
            assert torch.equal(together[name], singly)
            assert torch.equal(together[name], backwards)


def test_t_is_one_per_row_or_one_per_sample(make: Make, settings: Any) -> None:
    rows = list(islice(make(), 24))
    for per in ("row", "sample"):
        collate = build_collate(settings(Path("unused.jsonl"), f"forward_process.t_per={per}"), SPECIAL)
        t = collate(rows)["t"]
        for row, levels in zip(rows, t, strict=True):
            runs = [levels[start : start + n] for _, start, n, _ in row.pieces]
            assert all(len(run.unique()) == 1 for run in runs)
            assert len({run[0].item() for run in runs}) == (1 if per == "row" else len(runs))
        assert len(t[:, 0].unique()) == len(rows)


def test_counts_tell_prompt_response_masked_and_eos_tokens(make: Make, settings: Any) -> None:
    rows = list(islice(make("view.tail_share=1.0", "view.tail_max=4"), 12))
    batch = build_collate(settings(Path("unused.jsonl")), SPECIAL)(rows)
    counts = batch["counts"]
    samples = len(keys(rows))
    assert counts.prompt == 5 * samples
    assert counts.response == sum(int(row.response.sum()) for row in rows)
    assert counts.masked == int(batch["masked"].sum())
    assert counts.eos == 2 * samples  # eot and EOS of every sample, always masked
    assert counts.samples == tuple(keys(rows))


def test_packed_split_rows_need_no_attention_mask_and_whole_rows_have_one(make: Make, settings: Any) -> None:
    for mode in ("split", "whole"):
        rows = list(islice(make(f"packing.mode={mode}"), 4))
        real = build_collate(settings(Path("unused.jsonl"), f"packing.mode={mode}"), SPECIAL)(rows)["real"]
        assert (real is None) == (mode == "split")


@pytest.mark.parametrize(
    "own",
    [EVERYTHING, ("loss.name=next_token", "view.tail_share=0", "view.tail_max=0", "view.block_share=0"), EVERY_BLOCK],
    ids=str,
)
def test_with_attention_per_sample_a_packed_row_says_of_each_sample_what_it_says_of_it_alone(
    settings: Callable[..., SftConfig], write_samples: Callable[..., Path], own: tuple[str, ...]
) -> None:
    config = settings(write_samples(LENGTHS), "packing.attention=sample", "packing.max_length=64", *own)
    rows = list(islice(build_stream(config, 288, SPECIAL), 3))
    batch = build_collate(config, SPECIAL)(rows)
    model = build_model(config).eval()
    assert max(len(row.pieces) for row in rows) > 1
    with torch.no_grad():
        packed = model(batch["noisy"], batch["real"], batch["positions"], query_mask=batch["sees"]).logits
        for number, row in enumerate(rows):
            for _, first, length, _ in row.pieces:
                at = slice(first, first + length)
                mask, positions = None, None
                if config.loss.name == "next_token":
                    mask = torch.ones(1, length, length, dtype=torch.bool).tril()
                if own is EVERY_BLOCK:
                    stage = row.stage[at]
                    mask = torch.from_numpy(sees(stage[:, None], stage[None]))[None]
                    positions = torch.from_numpy(row.positions[at] - first)[None]
                alone = model(batch["noisy"][number : number + 1, at], positions=positions, query_mask=mask).logits
                torch.testing.assert_close(packed[number, at], alone[0], atol=1e-4, rtol=1e-4)


def test_an_edit_share_adds_visible_tokens_to_the_loss_and_replaces_half_of_them(
    settings: Callable[..., SftConfig], write_samples: Callable[..., Path]
) -> None:
    files = write_samples(LENGTHS)
    plain, editing = settings(files), settings(files, "forward_process.edit_share=0.5")
    rows = list(islice(build_stream(plain, 288, SPECIAL), 24))
    without, batch = (build_collate(config, SPECIAL)(rows) for config in (plain, editing))
    added = batch["masked"] & ~without["masked"]
    assert bool((without["masked"] <= batch["masked"]).all())
    assert batch["counts"].masked == int(batch["masked"].sum()) > without["counts"].masked
    assert batch["counts"].eos == without["counts"].eos
    assert torch.equal(batch["clean"], without["clean"])
    wrong = batch["noisy"] != without["noisy"]
    assert bool((wrong <= added).all())
    assert 0.3 < wrong.sum() / added.sum() < 0.6
    assert not bool((batch["noisy"][added] == 270).any())
