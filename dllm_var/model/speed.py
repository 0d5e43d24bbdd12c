"""Cheaper forwards: int8 weights, compiled kernels, and which number format suits which machine.

Called by `dllm_var.load_pretrained`, and by ``sft_training/sft.py`` for its `training.compile`. ``scripts/benchmark.py``
measures what each of them gives when decoding (``evaluation/results/benchmark.json``).
"""

import atexit
import os
import tempfile

import torch

from dllm_var.model.llada import LLaDAModelLM

# Kind of device → format of the weights where the user does not choose; None: as stored. On a CPU that computes with
# bfloat16 natively, 100 M weights take .57 of the time in it (benchmark.json), but it changes an answer now and then; on
# others it is several times slower. int8 and compiling gave nothing there.
FASTEST: dict[str, torch.dtype | None] = {"cpu": torch.float32, "cuda": None}


def quantize_int8(model: LLaDAModelLM) -> None:
    """Keep the matrices of the blocks as int8 with a scale for each row, in place; all else stays as it is.

    They then take a quarter of the bytes of float32, half of those of bfloat16; activations stay as they are.

    Raises:
        ValueError: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("int8=True needs torchao: pip install torchao, or leave int8 out.") from error
    quantize_(model.model.transformer["blocks"], Int8WeightOnlyConfig())


def compile_network(model: LLaDAModelLM, *, dynamic: bool, backend: str = "inductor") -> None:
    """Compile the network in place; names of weights stay as they are. The first forwards take minutes instead of seconds.

    The compiler's cache is new for every start unless the environment names one: a run that is killed while it compiles
    leaves half a library in it, at which every later run would fail. The shared default counts as none: importing torchao
    puts it there.

    Args:
        dynamic: whether shapes change from forward to forward, as in decoding; those of training do not.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        cache = tempfile.TemporaryDirectory(prefix="dllm-compiled-")
        atexit.register(cache.cleanup)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    model.model.compile(dynamic=dynamic, backend=backend)
