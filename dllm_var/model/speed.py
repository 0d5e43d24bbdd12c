"""Cheaper forwards of a loaded model: int8 weights, compiled kernels, and which number format suits which machine.

Called by `dllm_var.load_pretrained`. What each of them gives was measured with ``scripts/benchmark.py``; the figures stand
in ``evaluation/results/benchmark.json`` under ``formats``.
"""

import torch

from dllm_var.model.llada import LLaDAModelLM

# Kind of device → format of the weights where the user does not choose; None: as stored. On the CPU of benchmark.json
# (which computes with bfloat16 natively) both take the same time; on older ones bfloat16 is several times slower.
FASTEST: dict[str, torch.dtype | None] = {"cpu": torch.float32, "cuda": None}


def quantize_int8(model: LLaDAModelLM) -> None:
    """Keep the matrices of the blocks as int8 with a scale for each row, in place; all else stays as it is.

    A forward then reads a quarter (of float32) or half (of bfloat16) as many bytes of weights; activations stay as they are.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8=True needs torchao: pip install torchao, or leave int8 out.") from error
    quantize_(model.model.transformer["blocks"], Int8WeightOnlyConfig())


def compile_network(model: LLaDAModelLM, backend: str = "inductor") -> None:
    """Compile the network as one graph, in place: the first answers take minutes instead of seconds."""
    model.model.compile(dynamic=True, backend=backend)
