"""Small models and the golden tensors, shared by the tests of `dllm_var.model`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dllm_var.model.checkpoint import load_model
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return GOLDEN / "tiny_llada"


@pytest.fixture(scope="session")
def golden_fields(golden_folder: Path) -> dict[str, Any]:
    return json.loads((golden_folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "logits.safetensors")


@pytest.fixture(scope="session")
def golden_model(golden_folder: Path) -> LLaDAModelLM:
    return load_model(golden_folder)


@pytest.fixture
def make_model(golden_fields: dict[str, Any]) -> Callable[..., LLaDAModelLM]:
    """Build a model of two layers, 32 wide, with random weights; keyword arguments change config fields."""

    def build(seed: int = 0, **changes: Any) -> LLaDAModelLM:
        fields = {**golden_fields, "n_layers": 2, "d_model": 32, "mlp_hidden_size": 48, "vocab_size": 40}
        fields |= {"embedding_size": 40, "mask_token_id": 39, "eos_token_id": 38, "pad_token_id": 38, **changes}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LLaDAModelLM(LLaDAConfig(**fields)).eval()
            for name, value in model.named_parameters():
                if name.endswith(("norm.weight", "ln_f.weight")):
                    torch.nn.init.normal_(value, mean=1.0, std=0.2)  # ones would hide a wrong use of the norm weights
            return model

    return build


@pytest.fixture(autouse=True)
def _without_gradients(request: pytest.FixtureRequest) -> Any:
    """Inference is the rule here; a test that takes gradients opens them itself."""
    with torch.no_grad():
        yield
