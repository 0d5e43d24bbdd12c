"""What stands around a sample: tails, and views that are exactly what block decoding would see."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var import Pretrained
from dllm_var.diffusion.decoding_view import DecodingView, Piece, sees
from dllm_var.diffusion.packing import Packer
from dllm_var.model.kv_store import KVStore

MASK = 15


def made(view: DecodingView, key: str, prompt: int = 3, answer: int = 20, epoch: int = 0) -> Piece:
    ids = np.arange(prompt + answer) % 13
    return view.apply(key, epoch, ids, np.arange(len(ids)) >= prompt, seed=1, mask_id=MASK)


def test_without_shares_a_sample_is_left_as_it_is() -> None:
    for number in range(20):
        piece = made(DecodingView(), f"s{number}")
        assert np.array_equal(piece.ids, np.arange(23) % 13)
        assert piece.response.sum() == 20


def test_tails_are_masks_that_carry_no_loss_and_have_every_length_up_to_the_longest() -> None:
    view = DecodingView(tail_share=1.0, tail_max=4)
    tails = []
    for number in range(200):
        piece = made(view, f"s{number}")
        tails.append(len(piece) - 23)
        assert (piece.ids[23:] == MASK).all()
        assert not piece.response[23:].any()
        assert np.array_equal(piece.ids[:23], np.arange(23) % 13)
    assert set(tails) == {0, 1, 2, 3, 4}


def test_the_share_of_samples_with_a_view_or_a_tail_is_the_configured_one() -> None:
    view = DecodingView(tail_share=0.5, tail_max=1000, block_share=0.3, block_lengths=(4,))
    pieces = [made(view, f"s{number}") for number in range(1500)]
    tails = sum(len(piece) > 23 + 4 for piece in pieces) / 1500
    views = sum(piece.response.sum() <= 4 for piece in pieces) / 1500
    assert abs(views - 0.3) < 0.05
    assert abs(tails - 0.7 * 0.5) < 0.05


@given(st.integers(0, 12), st.integers(1, 70), st.sampled_from([1, 4, 16, 64]), st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_a_block_view_is_exactly_a_decode_state(prompt: int, answer: int, block: int, number: int) -> None:
    piece = made(DecodingView(block_share=1.0, block_lengths=(block,)), f"s{number}", prompt, answer)
    trained = np.flatnonzero(piece.response)
    first = int(trained[0])
    # the trained block starts a whole number of blocks after the prompt, everything before it is visible and clean
    assert (first - prompt) % block == 0
    assert np.array_equal(piece.ids[:first], (np.arange(prompt + answer) % 13)[:first])
    # it is trained up to the end of the block or of the answer, and masks fill it up to the block's end; nothing follows
    assert len(piece) == first + block
    assert len(trained) == min(block, prompt + answer - first)
    assert (piece.ids[trained[-1] + 1 :] == MASK).all()
    assert np.array_equal(trained, np.arange(first, first + len(trained)))


def test_every_block_of_an_answer_is_shown_sooner_or_later() -> None:
    view = DecodingView(block_share=1.0, block_lengths=(8,))
    starts = {int(np.flatnonzero(made(view, f"s{number}").response)[0]) for number in range(200)}
    assert starts == {3, 11, 19}


def test_a_sample_without_a_response_is_never_cut() -> None:
    ids = np.arange(9)
    piece = DecodingView(block_share=1.0).apply("s", 0, ids, np.zeros(9, bool), seed=1, mask_id=MASK)
    assert np.array_equal(piece.ids, ids)


def test_a_view_depends_on_seed_epoch_and_key_and_on_nothing_else() -> None:
    view = DecodingView(tail_share=1.0, tail_max=10_000)
    assert np.array_equal(made(view, "a").noise, made(view, "a").noise)
    assert len({len(piece) for piece in (made(view, "a"), made(view, "a", epoch=1), made(view, "b"))}) == 3


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"tail_share": 1.5}, "tail_share=1.5"),
        ({"block_share": -0.1}, "block_share=-0.1"),
        ({"first_look_share": 1.5}, "first_look_share=1.5"),
        ({"tail_share": 0.5}, "tail_max=0 with tail_share=0.5"),
        ({"block_share": 0.5, "block_lengths": ()}, "block_lengths="),
        ({"block_share": 0.5, "block_lengths": (0,)}, "block_lengths="),
    ],
)
def test_impossible_shares_and_lengths_are_refused_by_name(bad: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DecodingView(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("every_block", [True, False])
def test_of_several_answers_one_is_shown_with_what_came_before_it_and_nothing_behind_it(every_block: bool) -> None:
    ids = np.arange(30)  # answers are 5…9 and 16…24
    response = (ids >= 5) & (ids < 10) | (ids >= 16) & (ids < 25)
    view, ends = DecodingView(block_share=1.0, block_lengths=(4,), every_block=every_block), set()
    for number in range(30):
        piece = view.apply(f"s{number}", 0, ids, response, seed=1, mask_id=-1)
        trained = piece.ids[piece.response].tolist()
        first, end = (5, 10) if trained[0] < 10 else (16, 25)
        ends.add(end)
        assert piece.ids.max() < end
        assert (trained[0] - first) % 4 == 0  # blocks are counted from where this answer begins
        assert trained == list(range(first, end) if every_block else range(trained[0], min(trained[0] + 4, end)))
    assert ends == {10, 25}


def every(prompt: int, answer: int, block: int, key: str = "s") -> Piece:
    return made(DecodingView(block_share=1.0, block_lengths=(block,), every_block=True), key, prompt, answer)


@given(st.integers(0, 12), st.integers(1, 70), st.sampled_from([1, 4, 16, 64]))
@settings(max_examples=150, deadline=None)
def test_all_block_views_in_one_piece_are_the_single_ones(prompt: int, answer: int, block: int) -> None:
    piece = every(prompt, answer, block)
    assert piece.stage is not None
    assert piece.positions is not None
    blocks = -(-answer // block)
    assert len(piece) == prompt + (blocks - 1) * block + blocks * block
    whole = np.arange(prompt + answer) % 13
    for number in range(blocks):
        copy = piece.stage == 2 * number + 1
        clean = sees(np.array(2 * number + 1), piece.stage) & ~copy
        start = prompt + number * block
        assert np.array_equal(piece.ids[clean], whole[:start])  # it looks back at all that precedes it, and at nothing else
        assert np.array_equal(piece.positions[clean], np.arange(start))
        assert np.array_equal(piece.positions[copy], np.arange(start, start + block))
        trained = copy & piece.response
        assert np.array_equal(piece.ids[trained], whole[start : start + block])
        assert (piece.ids[copy & ~piece.response] == MASK).all()  # behind the answer
    assert piece.response.sum() == answer


def test_what_is_finished_sees_the_next_block_being_decided_as_in_decoding() -> None:
    stage = every(3, 10, 4).stage
    assert stage is not None
    prompt, first, second = (sees(np.array(of), stage) for of in (0, 2, 4))
    assert set(stage[prompt]) == {0, 1}
    assert set(stage[first]) == {0, 2, 3}
    assert set(stage[second]) == {0, 2, 4, 5}


def test_a_piece_with_every_block_that_is_longer_than_a_row_shows_one_block() -> None:
    view = DecodingView(block_share=1.0, block_lengths=(4,), every_block=True)
    ids = np.arange(23) % 13
    pieces = [view.apply("s", 0, ids, ids >= 0, seed=1, mask_id=MASK, longest=n) for n in (44, 43)]
    assert [piece.stage is None for piece in pieces] == [False, True]
    assert pieces[1].response.sum() <= 4


@pytest.mark.parametrize(
    "shares", [{"tail_share": 1.0, "tail_max": 6}, {"block_share": 1.0}, {"block_share": 1.0, "every_block": True}]
)
def test_what_stands_behind_an_answer_is_eos_that_is_always_masked_where_that_is_asked_for(shares: dict[str, Any]) -> None:
    eos, ids = 14, np.arange(23) % 13
    compared = 0
    for number in range(40):
        plain, labelled = (
            DecodingView(block_lengths=(8,), tail_eos=asked, **shares).apply(
                f"s{number}", 0, ids, np.arange(23) >= 3, seed=1, mask_id=MASK, eos_id=eos
            )
            for asked in (False, True)
        )
        behind = plain.ids == MASK
        compared += int(behind.sum())
        assert (labelled.ids[behind] == eos).all()
        assert labelled.response[behind].all()
        assert (labelled.noise[behind] == 0.0).all()  # below every level: masked whatever is drawn
        for name in ("ids", "response", "noise"):
            assert np.array_equal(getattr(plain, name)[~behind], getattr(labelled, name)[~behind])
    assert compared > 20


@pytest.mark.parametrize("every_block", [True, False])
def test_the_asked_share_of_blocks_is_masked_whole_and_the_others_as_without_it(every_block: bool) -> None:
    ids, prompt, block = np.arange(67) % 13, 3, 8

    def piece(number: int, share: float) -> Any:
        view = DecodingView(block_share=1.0, block_lengths=(block,), every_block=every_block, first_look_share=share)
        return view.apply(f"s{number}", 0, ids, np.arange(67) >= prompt, seed=1, mask_id=MASK)

    looks = []
    for number in range(60):
        plain, some = piece(number, 0.0), piece(number, 0.6)
        for name in ("ids", "response"):
            assert np.array_equal(getattr(plain, name), getattr(some, name))
        before, after = (each.noise[each.response].reshape(-1, block) for each in (plain, some))
        for one, other in zip(before, after, strict=True):
            looks.append(bool((other == 0.0).all()))
            assert looks[-1] or np.array_equal(one, other)
    assert abs(np.mean(looks) - 0.6) < (0.07 if every_block else 0.15)
    assert {bool((piece(number, 1.0).noise[piece(number, 1.0).response] == 0.0).all()) for number in range(5)} == {True}


def test_a_filled_sample_is_a_row_of_its_own_whose_eos_is_masked_like_any_other_token() -> None:
    ids, eos = np.arange(2, 12), 1
    pieces = [
        DecodingView(fill=True).apply("s", epoch, ids, ids > 4, seed=1, mask_id=MASK, longest=400, eos_id=eos)
        for epoch in range(2)
    ]
    for piece in pieces:
        assert piece.ids.tolist() == ids.tolist() + [eos] * 390
        assert piece.response.tolist() == [False] * 3 + [True] * 397
        assert abs((piece.noise < 0.3).mean() - 0.3) < 0.08
    assert not np.array_equal(pieces[0].noise, pieces[1].noise)
    packer = Packer(length=400, pad_id=eos)
    rows = [row for piece in pieces for row in packer.add(piece)] + packer.flush()
    assert [[length for _, _, length, _ in row.pieces] for row in rows] == [[400], [400]]


def test_a_sample_longer_than_a_row_is_not_filled() -> None:
    piece = DecodingView(fill=True).apply("s", 0, np.arange(9), np.arange(9) > 3, seed=1, mask_id=MASK, longest=8, eos_id=1)
    assert len(piece) == 9  # the packer counts it as dropped


@pytest.mark.parametrize("share", [{"tail_share": 0.5, "tail_max": 4}, {"block_share": 0.5}])
def test_filling_leaves_no_room_for_tails_and_block_views(share: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"fill=true with tail_share=.*Set both shares to 0"):
        DecodingView(fill=True, **share)


def test_no_token_that_is_asked_for_can_be_looked_up(recorded64: Pretrained) -> None:
    piece = every(5, 30, 8)
    assert piece.stage is not None
    assert piece.positions is not None
    mask = torch.from_numpy(sees(piece.stage[:, None], piece.stage[None]))[None]
    positions = torch.from_numpy(piece.positions)[None]

    def logits(ids: np.ndarray) -> torch.Tensor:
        with torch.inference_mode():
            out = recorded64.model(torch.from_numpy(ids)[None], positions=positions, query_mask=mask)
        assert isinstance(out.logits, torch.Tensor)
        return out.logits[0]

    before = logits(np.where(piece.response, 270, piece.ids))
    for number in range(3):  # other tokens in the clean copy of a block and behind change nothing in its trained copy
        ids = np.where(piece.response, 270, piece.ids)
        ids[(piece.stage % 2 == 0) & (piece.stage >= 2 * number + 2)] = 77
        after, copy = logits(ids), piece.stage == 2 * number + 1
        assert torch.equal(after[copy], before[copy])
        assert not torch.equal(after[piece.stage == 2 * number + 3], before[piece.stage == 2 * number + 3])


def test_a_trained_copy_gets_the_very_logits_of_block_decoding(recorded64: Pretrained) -> None:
    """With all of a block masked: those of the first look at it, from keys and values stored by the published rule."""
    prompt, block = 5, 8
    piece = every(prompt, 3 * block, block)
    assert piece.stage is not None
    assert piece.positions is not None
    noisy = np.where(piece.response, 270, piece.ids)
    with torch.inference_mode():
        mask = torch.from_numpy(sees(piece.stage[:, None], piece.stage[None]))[None]
        out = recorded64.model(
            torch.from_numpy(noisy)[None], positions=torch.from_numpy(piece.positions)[None], query_mask=mask
        )
        trained = [out.logits[0, piece.stage == 2 * number + 1] for number in range(3)]
        kv = KVStore(recorded64.model.config, 1, 64, block, recorded64.model.dtype, "cpu")
        whole = np.arange(prompt + 3 * block) % 13
        stored = 0
        for number in range(3):
            start = prompt + number * block
            ids = np.concatenate([whole[stored:start], np.full(block, 270)])
            at = torch.arange(stored, start + block)[None]
            seen = recorded64.model(
                torch.from_numpy(ids)[None], positions=at, kv=kv, slots=at.where(at < start, -1), step=number
            ).logits[0, -block:]
            assert torch.allclose(seen, trained[number], atol=1e-10)
            stored = start
