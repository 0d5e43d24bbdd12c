"""What forwards cost, exactly: their shapes, and from these the operations, the bytes, and the time on other hardware.

Used by ``benchmark.py``. Nothing here looks at a clock.

Legend: a forward has ``rows`` × ``columns`` tokens, which see ``keys`` keys each, and gives logits for ``wanted`` of them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.kv_store import EMPTY, KVRows, KVStore
from dllm_var.model.llada import LLaDAModelLM

# NVIDIA's data sheet of the H100 SXM: bytes a second of its memory, dense bfloat16 operations a second.
H100_BANDWIDTH, H100_RATE = 3.35e12, 989e12


@dataclass(frozen=True)
class Shape:
    """Of one forward, see the legend."""

    rows: int
    columns: int
    keys: int
    wanted: int


@dataclass
class Record:
    """The forwards of a model, in order: their shapes, and their arguments where those were asked for."""

    shapes: list[Shape] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def recorded(model: LLaDAModelLM, calls: bool = False) -> Iterator[Record]:
    """Note every forward of the model; with `calls` keep what it was called with (on the CPU, for `Replay`)."""
    record = Record()

    def note(_: Any, positional: tuple[Any, ...], given: dict[str, Any], __: Any) -> None:
        assert not positional, "the decode loop names its arguments"
        ids, wanted = given["input_ids"], given["logits_for"]
        record.shapes.append(Shape(*ids.shape, _keys(given), int(wanted.sum())))
        if calls:
            record.calls.append({name: value for name, value in given.items() if name != "project"})

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()


def _keys(given: dict[str, Any]) -> int:
    """How many keys the attention of a call went over: what is stored up to the highest slot, and what passes."""
    kv, slots = given.get("kv"), given.get("slots")
    if kv is None or slots is None:
        return int(given["input_ids"].shape[1])
    stamp = kv.store.stamp[kv.chosen] if isinstance(kv, KVRows) else kv.stamp
    filled = (stamp != EMPTY).any(0).nonzero()
    mask = given["attention_mask"]
    passing = ((slots.cpu() == EMPTY) & (True if mask is None else mask.cpu().bool())).sum(1)
    return (int(filled[-1]) + 1 if len(filled) else 0) + int(passing.max())


class Replay:
    """The recorded forwards of a single answer again, and nothing else: the floor under its decoding.

    Args:
        record: of a decode of one row, with its calls.
    """

    def __init__(self, model: LLaDAModelLM, record: Record) -> None:
        self.model, self.calls = model, record.calls
        self.store = next((call["kv"] for call in record.calls if call["kv"] is not None), None)

    @torch.inference_mode()
    def __call__(self) -> None:
        if self.store is None:
            kv = None
        else:
            of = self.store.store if isinstance(self.store, KVRows) else self.store
            dtype, device = of.keys[0].dtype, of.keys[0].device
            kv = KVStore(self.model.config, 1, of.capacity, of.scratch, dtype, device)
        for call in self.calls:
            self.model(**(call | {"kv": kv}))


def fixed_canvas(prompt: int, gen_length: int, block_length: int) -> list[Shape]:
    """LLaDA's own sampler at one token per forward, in whole blocks: every forward is of the whole canvas."""
    assert gen_length % block_length == 0, "the schedule of a shorter last block is another"
    length = prompt + gen_length
    return [Shape(1, length, length, masks) for masks in [*range(block_length, 0, -1)] * (gen_length // block_length)]


def left_to_right(prompt: int, tokens: int) -> list[Shape]:
    """An autoregressive model with its cache: the prompt, then a forward for each token but the last."""
    return [Shape(1, prompt, prompt, 1), *(Shape(1, 1, prompt + i, 1) for i in range(1, tokens))]


def block_weights(config: LLaDAConfig) -> int:
    """Entries of the matrices of all blocks."""
    width, inner = config.d_model, config.num_key_value_heads * config.head_dim
    return int(config.n_layers * (2 * width * width + 2 * width * inner + 3 * width * config.mlp_width))


def flops(config: LLaDAConfig, shape: Shape) -> int:
    """Floating-point operations of the matrix products: 2·weights per token, 4·width per attention pair and layer."""
    tokens, width = shape.rows * shape.columns, config.d_model
    pairs = 4 * width * config.n_layers * tokens * shape.keys
    return int(2 * block_weights(config) * tokens + pairs + 2 * config.embedding_rows * width * shape.wanted)


def nbytes(config: LLaDAConfig, shape: Shape, itemsize: int) -> int:
    """Bytes that must come from memory: every weight once, every row's keys and values once."""
    head = config.embedding_rows * config.d_model if shape.wanted else 0
    kept = 2 * config.n_layers * config.num_key_value_heads * config.head_dim * shape.rows * shape.keys
    return int(itemsize * (block_weights(config) + head + kept))


def seconds_at_best(config: LLaDAConfig, shapes: Iterable[Shape], itemsize: int, rate: float, bandwidth: float) -> float:
    """What the forwards take on hardware that always reaches its operations or its bytes a second, whichever is slower."""
    return sum(max(flops(config, s) / rate, nbytes(config, s, itemsize) / bandwidth) for s in shapes)
