"""Matrix products in FP8: `apply_fp8` swaps the linear layers inside the blocks, before the Trainer is built.

Called by ``sft.py`` (``precision=fp8``). accelerate and DeepSpeed only ever see bf16. Their own routes are not used: under
the Trainer accelerate's ``mixed_precision: fp8`` stops with an error or is overruled by ``bf16``, and with DeepSpeed it
takes Transformer Engine's default recipe whatever was configured.

* ``torchao``: scales are found anew for every tensor (`tensorwise`) or every row (`rowwise`, and `rowwise_with_gw_hp`, which
  keeps the weights' gradient in bf16). On a CPU both the real products and the emulated ones run.
* ``te``: Transformer Engine with ``Float8CurrentScaling``, which is `tensorwise`. Delayed scaling is not offered: to resume
  exactly one would have to save its history of maxima, and recomputed blocks would see other scales than the first time.
  Everything up to its kernels has been run, with a stand-in; the kernels themselves, and all of FP8 on a GPU, have not.

A layer keeps its weight, so names, dtypes and checkpoints stay those of the plain model. Weights are float32 under autocast,
or bfloat16 where the optimizer keeps float32 masters (DeepSpeed): both are cast to FP8 for each product. FP8 is for training
steps only: in evaluation mode the layers compute as the exported model will.
"""

import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import MethodType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM

if TYPE_CHECKING:
    from sft_training.config import Fp8Section, SftConfig

RECIPES = {"torchao": ("tensorwise", "rowwise", "rowwise_with_gw_hp"), "te": ("tensorwise",)}
INSTALL = {
    "torchao": ("torchao.float8", "pip install -c constraints.txt -e '.[train]'"),
    "te": ("transformer_engine.pytorch", "pip install --no-build-isolation -c constraints.txt -e '.[te]'"),
}
# The seven matrices of a block by their full path, since the head is called ff_out as well.
COVERED = re.compile(r"model\.transformer\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)")
MULTIPLE = 16  # the kernels want every side of a product to be a multiple of this


def check_fp8_settings(config: "SftConfig") -> None:
    """The rules between ``precision.fp8`` and the other settings.

    Raises:
        ValueError: naming option, value and fix.
    """
    fp8, training, length = config.precision.fp8, config.training, config.packing.max_length
    if fp8.backend is None:
        return
    if fp8.backend not in RECIPES:
        raise ValueError(f"precision.fp8.backend={fp8.backend!r}: choose one of {', '.join(RECIPES)}, or null for no FP8.")
    if fp8.recipe not in RECIPES[fp8.backend]:
        valid = ", ".join(RECIPES[fp8.backend])
        raise ValueError(f"precision.fp8.recipe={fp8.recipe!r}: with backend={fp8.backend} choose one of {valid}.")
    if config.precision.dtype != "bf16":
        raise ValueError(
            f"precision.dtype={config.precision.dtype!r} with FP8: what is not FP8 runs in bf16, so set "
            "precision.dtype=bf16 (precision=fp8 does)."
        )
    if fp8.backend == "te" and fp8.emulate:
        raise ValueError("precision.fp8.emulate=true: only backend=torchao can emulate, te needs the GPU.")
    if fp8.backend == "te" and training.compile:
        raise ValueError("training.compile=true with precision.fp8.backend=te has not been tried: take backend=torchao.")
    if config.adapter.kind == "qlora" or (config.adapter.kind != "none" and fp8.backend == "te"):
        raise ValueError(
            f"adapter.kind={config.adapter.kind!r} with precision.fp8.backend={fp8.backend}: only adapter=lora goes with "
            "FP8, and only with backend=torchao. Otherwise take precision=bf16."
        )
    if training.local_batch_size * length % MULTIPLE:
        raise ValueError(
            f"packing.max_length={length} with training.local_batch_size={training.local_batch_size}: FP8 products need a "
            f"micro-batch of a multiple of {MULTIPLE} tokens, take max_length={length + -length % MULTIPLE}."
        )


def check_fp8(fp8: "Fp8Section", shape: LLaDAConfig, on_cpu: bool) -> None:
    """Whether this machine and this model can do what is asked, before any weight is read.

    Raises:
        ValueError: the backend is not installed, the GPU has no FP8, or a layer's sides do not fit the kernels.
    """
    if fp8.backend is None:
        return
    if fp8.backend == "te" and on_cpu:
        raise ValueError("precision.fp8.backend=te needs an NVIDIA GPU: on a CPU take precision.fp8.backend=torchao.")
    if on_cpu:
        warnings.warn("FP8 on a CPU is for testing: it gives FP8's losses, but is slower than float32.", stacklevel=2)
    elif not fp8.emulate:
        needed = (8, 9) if fp8.recipe == "tensorwise" else (9, 0)
        found = torch.cuda.get_device_capability()
        if found < needed:
            raise ValueError(
                f"precision.fp8.recipe={fp8.recipe} needs a GPU of compute capability {needed[0]}.{needed[1]} (H100, say), "
                f"this {torch.cuda.get_device_name()} has {found[0]}.{found[1]}: train with precision=bf16."
            )
    _load(fp8.backend)
    with torch.device("meta"):
        covered_layers(LLaDAModelLM(shape))


def apply_fp8(model: LLaDAModelLM, backend: str, recipe: str, emulate: bool = False) -> None:
    """Let the matrices inside the blocks compute in FP8, in place.

    Embedding, head, norms and the products of the attention stay as they are. What was done is noted in
    ``model.fp8_report``: backend, recipe, emulate, and the full paths of the layers.

    Args:
        model: without adapters. They may come on top; torchao's frozen layers then compute their weights' gradient in vain.
        backend, recipe: see `RECIPES`.
        emulate: torchao only: round to FP8, but multiply in float32.

    Raises:
        ValueError: the backend is not installed, or a layer's sides do not fit the kernels.
    """
    paths = covered_layers(model)
    library = _load(backend)
    convert = _to_torchao if backend == "torchao" else _to_te
    convert(model, library, paths, recipe, emulate)
    model.fp8_report = {"backend": backend, "recipe": recipe, "emulate": emulate, "layers": paths}


def covered_layers(model: LLaDAModelLM) -> list[str]:
    """Full paths of the layers that compute in FP8, in the model's order.

    Raises:
        ValueError: a side of one of them is no multiple of 16.
    """
    found = {name: layer for name, layer in model.named_modules() if COVERED.fullmatch(name)}
    for name, layer in found.items():
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            raise ValueError(
                f"precision=fp8: {name} maps {layer.in_features} to {layer.out_features}, but FP8 products need multiples "
                f"of {MULTIPLE}. Train this model with precision=bf16."
            )
    return list(found)


def _load(backend: str) -> ModuleType:
    module, command = INSTALL[backend]
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # an incomplete installation raises any of these
        raise ValueError(
            f"precision.fp8.backend={backend} needs {module}, which does not load ({error}): {command}"
        ) from error


def _to_torchao(model: nn.Module, library: ModuleType, paths: list[str], recipe: str, emulate: bool) -> None:
    config = replace(library.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    library.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, path: path in paths)
    for path in paths:
        layer = model.get_submodule(path)
        layer.forward = MethodType(_torchao_forward, layer)


def _torchao_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    if not layer.training:
        return F.linear(x, layer.weight)
    if torch.is_autocast_enabled(x.device.type):  # torchao itself only asks for the GPU's
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return type(layer).forward(layer, x)


def _to_te(model: nn.Module, library: ModuleType, paths: list[str], recipe: str, emulate: bool) -> None:
    assert recipe == "tensorwise"
    assert not emulate
    scaling = importlib.import_module("transformer_engine.common.recipe").Float8CurrentScaling()
    for path in paths:
        plain = model.get_submodule(path)
        layer = library.Linear(
            plain.in_features, plain.out_features, bias=False, params_dtype=plain.weight.dtype, device="meta"
        )
        layer.weight = plain.weight
        layer.train(plain.training)
        layer.forward = MethodType(_te_forward(library.autocast, scaling), layer)
        # This scaling has no state, but the layer saves an empty one and misses it when it is loaded.
        layer.register_state_dict_post_hook(_forget_extra_state)
        layer.register_load_state_dict_post_hook(_want_no_extra_state)
        model.set_submodule(path, layer)


def _te_forward(context: Callable[..., Any], scaling: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        with context(enabled=layer.training, recipe=scaling):
            return type(layer).forward(layer, x)

    return forward


def _forget_extra_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict.pop(f"{prefix}_extra_state", None)


def _want_no_extra_state(module: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith("._extra_state")]
