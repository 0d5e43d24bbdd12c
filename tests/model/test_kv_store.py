"""The key/value store on its own: columns, stamps, what is visible to whom, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_var.model.kv_store import CLEARED_AT_ONCE, KVRows, KVStore
from dllm_var.model.llada import LLaDAModelLM


@pytest.fixture
def make_store(make_model: Callable[..., LLaDAModelLM]) -> Callable[..., KVStore]:
    config = make_model(n_layers=1).config

    def build(rows: int = 2, capacity: int = 6, scratch: int = 2, dtype: torch.dtype = torch.float32) -> KVStore:
        return KVStore(config, rows, capacity, scratch, dtype, "cpu")

    return build


def _write(
    kv: KVStore | KVRows, slots: list[list[int]], marks: list[list[float]], step: int = 0, real: Any = None
) -> list[Any]:
    """Write keys that are all equal to their mark; return per row the marks that a query sees, in column order."""
    mark, buffer = torch.tensor(marks), (kv.store if isinstance(kv, KVRows) else kv).keys[0]
    key = mark[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])
    at = kv.place(torch.tensor(slots), None if real is None else torch.tensor(real), step)
    keys, values = kv.exchange(0, key, -key, at)
    assert torch.equal(values, -keys)
    seen = keys[:, 0, :, 0]
    visible = torch.ones(seen.shape, dtype=torch.bool) if at.visible is None else at.visible
    return [row[see].tolist() for row, see in zip(seen, visible, strict=True)]


def test_a_call_sees_what_is_stored_and_its_own_tokens(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    assert _write(kv, [[0, 1], [0, 1]], [[1, 2], [3, 4]]) == [[1, 2], [3, 4]]
    assert _write(kv, [[2, 3], [2, 3]], [[5, 6], [7, 8]], step=1) == [[1, 2, 5, 6], [3, 4, 7, 8]]
    assert kv.stamp.tolist() == [[0, 0, 1, 1, -1, -1]] * 2


def test_passing_tokens_are_seen_once_and_forgotten(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    assert _write(kv, [[0, -1], [0, -1]], [[1, 90], [2, 91]]) == [[1, 90], [2, 91]]
    assert _write(kv, [[-1], [-1]], [[92], [93]]) == [[1, 92], [2, 93]]
    assert _write(kv, [[1], [1]], [[5], [6]]) == [[1, 5], [2, 6]]
    assert kv.stamp[:, 2:].eq(-1).all()


def test_a_slot_that_is_written_again_is_replaced(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    _write(kv, [[0, 1, 2], [0, 1, 2]], [[1, 2, 3], [4, 5, 6]])
    assert _write(kv, [[1], [1]], [[20], [50]], step=7) == [[1, 20, 3], [4, 50, 6]]
    assert kv.stamp.tolist() == [[0, 7, 0, -1, -1, -1]] * 2


def test_rows_may_store_at_different_places(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    _write(kv, [[0, 1, 2, 3], [0, 1, -1, -1]], [[1, 2, 3, 4], [5, 6, 90, 91]])
    # Row 0 appends one and shows one; row 1 stores out of order. Columns behind a row's own last slot stay invisible.
    assert _write(kv, [[4, -1], [3, 2]], [[7, 92], [8, 9]]) == [[1, 2, 3, 4, 7, 92], [5, 6, 9, 8]]
    assert kv.stamp.ge(0).tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]


def test_padding_is_neither_stored_nor_seen(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    real = [[True, True, True], [False, True, True]]
    assert _write(kv, [[0, 1, 2], [0, 1, 2]], [[1, 2, 3], [99, 5, 6]], real=real) == [[1, 2, 3], [5, 6]]
    assert kv.stamp[1].tolist() == [-1, 0, 0, -1, -1, -1]
    # Padding may carry any slot, also one that another token of the row has.
    assert _write(kv, [[3, 4], [3, 3]], [[7, 8], [99, 9]], real=[[True, True], [False, True]])[1] == [5, 6, 9]


def test_all_padding_and_full_rows_live_side_by_side(make_store: Callable[..., KVStore]) -> None:
    kv = make_store()
    assert _write(kv, [[0, -1], [0, -1]], [[1, 2], [99, 99]], real=[[True, True], [False, False]]) == [[1, 2], []]


def test_scratch_room_is_counted_behind_the_last_filled_slot(make_store: Callable[..., KVStore]) -> None:
    kv = make_store(rows=1, capacity=3, scratch=2)
    assert _write(kv, [[0, 1, 2, -1, -1]], [[1, 2, 3, 90, 91]]) == [[1, 2, 3, 90, 91]]


def test_kept_rows_keep_their_entries_in_the_new_order(make_store: Callable[..., KVStore]) -> None:
    kv = make_store(rows=3)
    _write(kv, [[0], [1], [2]], [[1], [2], [3]], step=4)
    size = kv.nbytes()
    kv.keep(torch.tensor([2, 0]))
    assert kv.rows == 2
    assert kv.stamp[:, :3].tolist() == [[-1, -1, 4], [4, -1, -1]]
    assert _write(kv, [[3], [3]], [[30], [10]]) == [[3, 30], [1, 10]]
    assert kv.nbytes() == size  # nothing is allocated again


def test_rows_that_join_find_empty_slots_and_room_is_bounded(make_store: Callable[..., KVStore]) -> None:
    kv = make_store(rows=3)
    _write(kv, [[0], [1], [2]], [[1], [2], [3]])
    kv.keep(torch.tensor([1]))
    kv.admit(2)
    assert kv.stamp[1:].eq(-1).all()
    assert _write(kv, [[0], [0], [0]], [[9], [8], [7]]) == [[9, 2], [8], [7]]
    with pytest.raises(ValueError, match="holds 3 rows and has room for 3, not for 1 more"):
        kv.admit(1)


def test_a_call_of_some_rows_reads_and_writes_those_alone(make_store: Callable[..., KVStore]) -> None:
    kv = make_store(rows=3)
    _write(kv, [[0], [1], [2]], [[1], [2], [3]])
    assert _write(kv.some(torch.tensor([2, 0])), [[3], [-1]], [[30], [90]]) == [[3, 30], [1, 90]]
    assert _write(kv, [[4], [4], [4]], [[5], [6], [7]]) == [[1, 5], [2, 6], [3, 30, 7]]
    with pytest.raises(ValueError, match="slots has 1 rows, the key/value store holds 2"):
        kv.some(torch.tensor([2, 0])).place(torch.tensor([[0]]), None, 0)


def test_a_store_of_another_dtype_answers_in_the_dtype_of_the_call(make_store: Callable[..., KVStore]) -> None:
    kv = make_store(dtype=torch.bfloat16)
    key = torch.full((2, kv.keys[0].shape[1], 1, kv.keys[0].shape[3]), 1.0)
    for slots in (torch.tensor([[0], [0]]), torch.tensor([[1], [2]])):
        keys, _ = kv.exchange(0, key, key, kv.place(slots, None, 0))
        assert keys.dtype == torch.float32
    assert kv.nbytes() == 2 * 2 * key.shape[1] * (6 + 2 + 1) * key.shape[3] * 2


@pytest.mark.parametrize(
    ("slots", "step", "message"),
    [
        ([[0, 1]], 0, "slots has 1 rows, the key/value store holds 2"),
        ([[0, 6], [0, 1]], 0, r"slots must lie in −1\.\.5, got 0\.\.6"),
        ([[0, -2], [0, 1]], 0, r"slots must lie in −1\.\.5, got -2\.\.1"),
        ([[0, 1], [3, 3]], 0, "same slot"),
        ([[-1, -1, -1], [0, 1, 2]], 0, "3 passing tokens in one call, .*scratch=2"),
        ([[0, 1], [0, 1]], -1, "step=-1"),
    ],
)
def test_bad_slots_are_named_and_leave_the_store_as_it_was(
    make_store: Callable[..., KVStore], slots: list[list[int]], step: int, message: str
) -> None:
    kv = make_store()
    with pytest.raises(ValueError, match=message):
        kv.place(torch.tensor(slots), None, step)
    assert kv.stamp.eq(-1).all()


def test_row_by_row_equals_together_when_decoding_ragged_rows(make_model: Callable[..., LLaDAModelLM]) -> None:
    """Two rows with prompts of 2 and 4 tokens: prefill with two masks, then a block each at its own positions."""
    model = make_model()
    prompts, mask_id = [[3, 1], [5, 9, 2, 7]], 39

    def two_calls(rows: list[list[int]]) -> Tensor:
        kv = KVStore(model.config, len(rows), 8, 2, torch.float32, "cpu")
        width = max(map(len, rows)) + 2
        ids = torch.tensor([row + [mask_id] * 2 + [0] * (width - len(row) - 2) for row in rows])
        real = torch.tensor([[1] * (len(row) + 2) + [0] * (width - len(row) - 2) for row in rows])
        slots = torch.tensor([[i if i < len(row) else -1 for i in range(width)] for row in rows])
        model(ids, attention_mask=real, kv=kv, slots=slots)
        at = torch.tensor([[len(row), len(row) + 1] for row in rows])
        logits = model(torch.full((len(rows), 2), mask_id), positions=at, kv=kv, slots=torch.full_like(at, -1)).logits
        assert logits is not None
        return logits

    together = two_calls(prompts)
    for row, prompt in enumerate(prompts):
        assert torch.allclose(together[row], two_calls([prompt])[0], atol=1e-5)


def test_what_no_query_sees_is_finite_whatever_the_memory_held(
    make_store: Callable[..., KVStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention multiplies hidden values by 0, and 0 × NaN is NaN."""
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
    kv = make_store(capacity=3 * CLEARED_AT_ONCE)
    for step, last in enumerate([9, CLEARED_AT_ONCE, CLEARED_AT_ONCE + 3, 3 * CLEARED_AT_ONCE - 1]):
        at = kv.place(torch.tensor([[last], [2]]), None, step)
        key = torch.ones(2, kv.keys[0].shape[1], 1, kv.keys[0].shape[3])
        seen = kv.exchange(0, key, -key, at)
        assert all(shown.shape[2] == last + 1 and bool(shown.isfinite().all()) for shown in seen)
    assert kv.keys[0][:, :, -1].isnan().all()  # the column for padding, which is never read
