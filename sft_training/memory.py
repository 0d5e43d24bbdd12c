"""How much memory a training run takes on one GPU: formulas from the model's shape; no model is built.

Called by ``scripts/plan_memory.py``. Checked against the peaks that PyTorch's profiler counts on a CPU
(``tests/sft_training/test_memory.py``); DeepSpeed's part and everything about GPUs is derived, not measured.

Three moments can be the largest: the loss (forward done, all kept activations alive), the backward of the last block, and
the optimizer step. Each is the sum of what is alive then.

Legend: T tokens of a micro-batch, M masked ones, D width, K key/value width, F inner width of the MLP, V vocabulary rows,
P parameters, N processes; sizes in bytes.

Kept for the backward, per token and block (`_block`), as ``dllm_var/model/llada.py`` makes autograd keep it. s is the size
of a number in the matrix products, h that in the stream (residual connections) and in the embedding:

* each of the two norms: its input in float32 (4 D; under bfloat16 weights that is a copy), and the normalised input, which
  the gradient of the norm's weight needs (h D)
* the inputs of q, k, v and of the two inner maps of the MLP: one tensor each (s D). Under autocast each map casts its own
  copy: 3 s D and 2 s D
* q, k, v and the attention's result (4 s D; keys and values are repeated for all heads), and one float32 per head
* the MLP: gate, its SiLU, the other half, and their product (4 s F)

With recomputation only a block's input stays (h D), and one block's worth comes and goes in the backward. FP8 (torchao)
keeps the inputs of its products in 16 bits, so it saves time and not memory; it only spares autocast's copies of weights.

Backward of a block, on top of what it kept (`_backward`): the gradient of its result (h D), three inner gradients of the MLP
of which one takes the place of what was already freed (2 s F), and the gradient of the largest matrix.

The loss (`_loss`): see there.
"""

from dataclasses import dataclass, replace
from typing import Any

from dllm_var.model.config import LLaDAConfig

GB = 1e9
RESERVE = 0.08  # share of a card that CUDA's context, kernels and fragmentation take (assumed, not measured)
MASKED = 0.9  # of the tokens carry loss at most: forward_process.t_max
CHUNK = 1024  # loss.chunk
LORA_TARGETS = 3  # q, k, v
SHORTEST = 512  # tokens of a row, and
MOST_GPUS = 1024  # that a suggestion goes to

Bytes = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What decides the memory of a run.

    Attributes:
        zero: 2 or 3, the DeepSpeed stage; 0 without DeepSpeed (float32 weights, every process holds everything).
        loss: chunked, or full: the head on every position and float32 cross-entropy, as in most training codes.
        lora: rank of the adapters on q, k and v over a frozen model; None: all weights are trained.
    """

    shape: LLaDAConfig
    precision: str = "bf16"
    gpus: int = 8
    max_length: int = 8192
    local_batch_size: int = 2
    zero: int = 2
    gradient_checkpointing: bool = True
    loss: str = "chunked"
    lora: int | None = None
    gpu_memory_gb: float = 80.0

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch (T)."""
        return self.local_batch_size * self.max_length

    @property
    def budget(self) -> float:
        """Bytes of a GPU that tensors may take."""
        return self.gpu_memory_gb * GB * (1 - RESERVE)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a number (see the module), parameters, and which of them are trained."""

    weight: int
    stream: int  # h; the embedding's dtype
    product: int  # s
    autocast: bool  # every map casts its input and its weight
    block: int  # parameters of a block
    parameters: int
    trained: int
    trained_weight: int


def estimate(run: Run) -> dict[str, Bytes]:
    """Bytes by part (weights, gradients, optimizer, activations, logits and loss, workspace) at each of three moments."""
    size = sizes(run)
    held = _held(run, size)
    block, boundary = run.tokens * _block(run, size), run.tokens * size.stream * run.shape.d_model
    last_norm = run.tokens * (4 + size.stream) * run.shape.d_model
    blocks = run.shape.n_layers
    if run.gradient_checkpointing:
        kept = blocks * boundary
        in_backward = (
            kept + block - (boundary if size.stream == 4 else 0)
        )  # in float32 the first norm keeps the input itself
    else:
        kept = in_backward = blocks * block
    copies = 2 * size.block if size.autocast and run.precision != "fp8" else 0  # autocast's, of a block
    nothing = {"activations": 0.0, "logits and loss": 0.0, "workspace": 0.0}
    gathered, recomputed = _gathered(run, size), 1 if run.gradient_checkpointing else blocks
    return {
        "loss": held
        | {"activations": kept + last_norm, "logits and loss": _loss(run, size), "workspace": blocks * copies + gathered},
        "backward": held
        | nothing
        | {"activations": in_backward, "workspace": recomputed * copies + _backward(run, size) + gathered},
        "step": held | nothing | {"workspace": 4 * size.trained / run.gpus if run.zero else 0.0},
    }


def peak(moments: dict[str, Bytes]) -> tuple[str, float]:
    """The largest moment and its bytes."""
    totals = {name: sum(parts.values()) for name, parts in moments.items()}
    largest = max(totals, key=lambda name: totals[name])
    return largest, totals[largest]


def fits(run: Run) -> bool:
    """Whether the largest moment leaves the reserve alone."""
    return peak(estimate(run))[1] <= run.budget


def first_too_large(run: Run) -> tuple[str, str]:
    """Of a run that does not fit: the first part, in the order of the table, that is too much, and the setting behind it."""
    moments, used = estimate(run), 0.0
    for part, amount in moments[peak(moments)[0]].items():  # noqa: B007 (it is used behind the loop)
        used += amount
        if used > run.budget:
            break
    if part in ("weights", "gradients", "optimizer"):
        return part, "gpus" if run.zero == 3 or (run.zero and part != "weights") else "zero"
    if part == "logits and loss" and run.loss == "full":
        return part, "loss"
    if not run.gradient_checkpointing:
        return part, "gradient_checkpointing"
    return part, "local_batch_size" if run.local_batch_size > 1 else "max_length"


def suggest(run: Run) -> Run | None:
    """The nearest run that fits: one setting changed if that is enough, else several, the cheapest first."""
    steps = _milder(run)
    for name, values in steps:
        for value in values:
            if fits(changed := replace(run, **{name: value})):
                return changed
    changed = run
    for name, values in steps:
        for value in values:
            changed = replace(changed, **{name: value})
            if fits(changed):
                return changed
    return None


def _milder(run: Run) -> list[tuple[str, list[Any]]]:
    sharded = 2 if run.lora else 3  # adapters need a whole base
    return [
        ("loss", ["chunked"] if run.loss == "full" else []),
        ("gradient_checkpointing", [] if run.gradient_checkpointing else [True]),
        ("local_batch_size", _halved(run.local_batch_size, 1)),
        ("zero", list(range(max(run.zero, 1) + 1, sharded + 1))),
        ("gpus", [run.gpus << i for i in range(1, 11) if run.gpus << i <= MOST_GPUS]),
        ("max_length", _halved(run.max_length, SHORTEST)),
    ]


def _halved(value: int, least: int) -> list[int]:
    return [value >> i for i in range(1, 20) if value >> i >= least]


def sizes(run: Run) -> Sizes:
    """See `Sizes`. Adapters leave the rest of the model in the dtype in which it is stored, bfloat16."""
    d, k, f = widths(run.shape)
    matrices, embedding = 2 * d * d + 2 * d * k + 3 * d * f, run.shape.embedding_rows * d
    parameters = run.shape.n_layers * (matrices + 2 * d) + d + embedding * (1 if run.shape.weight_tying else 2)
    low = run.precision != "fp32"
    weight = 2 if low and (run.zero or run.lora) else 4
    trained = parameters if run.lora is None else run.shape.n_layers * run.lora * (4 * d + 2 * k)
    return Sizes(
        weight,
        weight,
        2 if low else 4,
        low and weight == 4,
        matrices,
        parameters,
        trained,
        weight if run.lora is None else 4,
    )


def widths(shape: LLaDAConfig) -> tuple[int, int, int]:
    """D, K and F."""
    return shape.d_model, shape.num_key_value_heads * shape.head_dim, shape.mlp_width


def _held(run: Run, size: Sizes) -> Bytes:
    """What stays from step to step. AdamW has two float32 numbers for each weight, DeepSpeed also a float32 master.

    ZeRO-2 shares gradients and optimizer out, ZeRO-3 the weights too; without it every process holds everything.
    """
    weights = size.weight * size.parameters
    if run.lora is not None:
        weights += size.trained_weight * size.trained
    return {
        "weights": weights / (run.gpus if run.zero == 3 else 1),
        "gradients": size.trained_weight * size.trained / (run.gpus if run.zero else 1),
        "optimizer": 12 * size.trained / run.gpus if run.zero else 8.0 * size.trained,
    }


def _block(run: Run, size: Sizes) -> float:
    """Bytes per token that a block keeps for its backward; the list stands at the top of the module.

    A frozen matrix needs no input and a frozen norm weight no normalised one, but torchao's layers keep theirs. An adapter
    keeps its float32 input and dropout's mask.
    """
    d, _, f = widths(run.shape)
    frozen, s = run.lora is not None, size.product
    keeps_inputs = not frozen or run.precision == "fp8"
    norms = 2 * (4 * d + (0 if frozen else size.stream * d) + 4)
    inputs = (5 if size.autocast else 2) * s * d if keeps_inputs else s * d
    attention = 4 * s * d + 4 * run.shape.n_heads
    mlp = (4 if keeps_inputs else 3) * s * f
    adapters = LORA_TARGETS * (4 + 1) * d if frozen else 0
    return norms + inputs + attention + mlp + adapters


def _backward(run: Run, size: Sizes) -> float:
    """Bytes of the gradients in flight while a block's MLP is differentiated; FP8 adds its casts of the widest operand."""
    d, _, f = widths(run.shape)
    matrix = d * f * (size.product + (size.weight if size.autocast else 0))
    flying = run.tokens * (size.stream * d + 2 * size.product * f) + matrix
    if run.precision == "fp8":
        flying += run.tokens * f * (2 * size.product + 1)  # scaled, clamped, cast: one after the other, each a tensor
    return flying


def _loss(run: Run, size: Sizes) -> float:
    """Bytes of the head and the cross-entropy, forward and backward.

    chunked (``dllm_var/diffusion/objective.py``, C positions at a time): the head's gradient in float32 (4 V D), masked
    hidden states and their gradient (2 h M D), and the larger of two moments: a chunk's logits, their float32 copy and
    log-softmax; or the log-softmax with its copy in the stream's dtype and a share of the head's gradient (h V D).
    full: logits of all tokens (s T V), float32 copies and log-softmax of the masked ones (8 M V), or in the backward three
    float32 tensors of theirs (12 M V).
    """
    d, v, s, h = run.shape.d_model, run.shape.embedding_rows, size.product, size.stream
    masked = MASKED * run.tokens
    if run.loss == "full":
        return max(s * run.tokens * v + 8 * masked * v, 12 * masked * v) + s * run.tokens * d
    chunk, copy = min(CHUNK, masked) * v, h if h == 2 else 0
    logits = (h + 4 + (4 if copy else 0)) * chunk
    return 4 * v * d + 2 * h * masked * d + max(logits, (4 + copy) * chunk + h * v * d)


def _gathered(run: Run, size: Sizes) -> float:
    """DeepSpeed's buffers: two buckets of D² gradients, and the gradient of the largest matrix. Under ZeRO-3 also the whole
    weights of two blocks and of the head; torchao's layers hold on to theirs until the backward, so without recomputation of
    all blocks.
    """
    d, v, blocks = run.shape.d_model, run.shape.embedding_rows, run.shape.n_layers
    if not run.zero:
        return 0.0
    buckets = size.weight * (2 * d * d + v * d)
    if run.zero == 2:
        return buckets
    whole = blocks if run.precision == "fp8" and not run.gradient_checkpointing else min(2, blocks)
    return buckets + size.weight * (whole * size.block + v * d)
