"""What stands around a sample: tails, and views that are exactly what block decoding would see."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var.diffusion.decoding_view import DecodingView, Piece

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
        ({"tail_share": 0.5}, "tail_max=0 with tail_share=0.5"),
        ({"block_share": 0.5, "block_lengths": ()}, "block_lengths="),
        ({"block_share": 0.5, "block_lengths": (0,)}, "block_lengths="),
    ],
)
def test_impossible_shares_and_lengths_are_refused_by_name(bad: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        DecodingView(**bad)  # type: ignore[arg-type]
