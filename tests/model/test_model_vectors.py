"""Conformance vectors: a model of 21 tensors whose weights are a formula, and its logits by three ways of calling it."""

import torch
from torch import Tensor

from dllm_var.model.config import LLaDAConfig
from dllm_var.model.kv_store import KVStore
from dllm_var.model.llada import LLaDAModelLM

TOLERANCE = 5e-6

FULL = """
-1.294019 -2.313492 -2.294513 -1.245599  0.362424  1.807767  2.441660  1.979570  0.628913 -1.004042 -2.186315 -2.387221 -1.516579  0.034807  1.570570  2.401353
-1.105593 -1.204409 -0.762604  0.021510  0.795969  1.213142  1.085775  0.471037 -0.355134 -1.021897 -1.229963 -0.885937 -0.144243  0.662198  1.171399  1.154796
-1.084692 -2.084689 -2.148936 -1.248593  0.212203  1.577748  2.235092  1.889174  0.695266 -0.810725 -1.952807 -2.218336 -1.488125 -0.089941  1.348614  2.181819
-0.529070 -1.816000 -2.287785 -1.732656 -0.399793  1.112524  2.125465  2.184352  1.262752 -0.225656 -1.612775 -2.275970 -1.917555 -0.698410  0.834229  1.992409
-0.723171 -1.905766 -2.232922 -1.557791 -0.183417  1.273287  2.158453  2.074758  1.059770 -0.430915 -1.728176 -2.249714 -1.761427 -0.482491  1.013020  2.053818
-0.801389 -2.047989 -2.375312 -1.636433 -0.163011  1.383581  2.309127  2.198180  1.100539 -0.491098 -1.862298 -2.397571 -1.856650 -0.482339  1.108480  2.201736
"""  # noqa: E501 (a row is a position)
APPENDED = """
-1.042955  0.220404  1.384830  1.927650  1.605209  0.562241 -0.733099 -1.699374 -1.902854 -1.252203 -0.039478  1.190968  1.886826  1.735748  0.805548 -0.486237
 0.736104  1.013359  0.835750  0.282999 -0.396781 -0.898459 -0.996847 -0.647782 -0.007949  0.635453  0.993620  0.905782  0.411368 -0.267696 -0.826600 -1.014470
"""  # noqa: E501
REPLACED = """
-0.498910 -0.203015  0.184008  0.488435  0.573619  0.401324  0.048887 -0.325494 -0.553771 -0.533478 -0.273723  0.108897  0.442636  0.577691  0.453438  0.125651
-1.003897 -1.802941 -1.792702 -0.977776  0.276043  1.405955  1.904778  1.548607  0.497316 -0.777205 -1.702863 -1.864160 -1.188695  0.020338  1.220242  1.872417
"""  # noqa: E501


def _table(text: str) -> Tensor:
    return torch.tensor([[float(x) for x in line.split()] for line in text.strip().splitlines()])[None]


def _vector_model() -> LLaDAModelLM:
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=8, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=12, vocab_size=16, embedding_size=16,
            mask_token_id=15, eos_token_id=14, pad_token_id=14, rope=True, rope_theta=500000.0, rms_norm_eps=1e-5,
            weight_tying=False, max_sequence_length=64, block_type="llama", layer_norm_type="rms", activation_type="silu",
        )
    ).eval()  # fmt: skip
    for n, (_, weight) in enumerate(sorted(model.state_dict().items())):
        wave = torch.sin(0.7 * torch.arange(weight.numel(), dtype=torch.float64) + 1.3 * n + 0.1)
        value = 1 + 0.1 * wave if weight.dim() == 1 else 0.5 * wave
        weight.copy_(value.view_as(weight))
    return model


def _store(model: LLaDAModelLM, capacity: int, scratch: int = 0) -> KVStore:
    return KVStore(model.config, 1, capacity, scratch, torch.float32, "cpu")


def _close(ours: Tensor | None, theirs: str) -> bool:
    assert ours is not None
    return bool((ours - _table(theirs)).abs().max() < TOLERANCE)


def test_there_are_21_tensors_in_the_order_that_the_formula_counts() -> None:
    names = sorted(_vector_model().state_dict())
    assert len(names) == 21
    assert names[0] == "model.transformer.blocks.0.attn_norm.weight"
    assert names[18:] == [f"model.transformer.{part}.weight" for part in ("ff_out", "ln_f", "wte")]


def test_full_forward_matches_the_vector() -> None:
    assert _close(_vector_model()(torch.tensor([[3, 1, 15, 15, 7, 15]])).logits, FULL)


def test_appending_to_a_cropped_cache_matches_the_vector() -> None:
    model, kv = _vector_model(), None
    tail = torch.tensor([[2, 3]])
    # Cropping is the same whether the last two were stored and are written again, or never stored.
    for slots in ([[0, 1, 2, 3]], [[0, 1, -1, -1]]):
        kv = _store(model, 4, scratch=2)
        model(torch.tensor([[3, 1, 15, 15]]), kv=kv, slots=torch.tensor(slots))
        assert _close(model(torch.tensor([[9, 15]]), positions=tail, kv=kv, slots=tail).logits, APPENDED)


def test_replacing_positions_in_a_full_cache_matches_the_vector() -> None:
    model = _vector_model()
    kv = _store(model, 6)
    model(torch.tensor([[3, 1, 15, 15, 15, 15]]), kv=kv, slots=torch.arange(6)[None])
    middle = torch.tensor([[2, 3]])
    assert _close(model(torch.tensor([[9, 15]]), positions=middle, kv=kv, slots=middle).logits, REPLACED)
