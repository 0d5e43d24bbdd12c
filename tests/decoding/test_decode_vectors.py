"""Block decoding of a model whose weights are a formula, against published outputs of an independent implementation."""

import pytest
import torch

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.special_tokens import SpecialTokens

PROMPT = [5, 2, 9]


@pytest.fixture(scope="module")
def model() -> LLaDAModelLM:
    model = LLaDAModelLM(
        LLaDAConfig(
            d_model=8, n_heads=2, n_kv_heads=2, n_layers=2, mlp_hidden_size=12, vocab_size=16, embedding_size=16,
            mask_token_id=15, eos_token_id=14, pad_token_id=14, rope=True, rope_theta=500000.0, rms_norm_eps=1e-5,
            weight_tying=False, max_sequence_length=64, block_type="llama", layer_norm_type="rms", activation_type="silu",
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for n, (_, weight) in enumerate(sorted(model.state_dict().items())):
            j = torch.arange(weight.numel(), dtype=torch.float64)
            wave = torch.sin(0.7 * j**2 + 1.3 * n + 0.1).view_as(weight)
            weight.copy_(1 + 0.1 * wave if weight.dim() == 1 else 0.7 * wave)
    return model


def _decode(model: LLaDAModelLM, stop: tuple[int, ...], **options: object) -> Generation:
    special = SpecialTokens(mask=15, eos=14, pad=14, stop=stop)
    config = GenerationConfig(block_length=4, max_gen_length=16, threshold=0.3, early_stop=False, **options)
    return generate(Pretrained(model, None, special), [PROMPT], config)[0]


def test_decoding_stops_after_the_block_with_a_stop_token(model: LLaDAModelLM) -> None:
    answer = _decode(model, stop=(13,))
    assert answer.raw == [5, 5, 5, 4, 6, 13, 5, 5]
    assert answer.tokens == [5, 5, 5, 4, 6]
    assert (answer.stop_reason, answer.forwards) == ("eos", 6)


def test_decoding_without_stop_tokens_runs_to_its_limit(model: LLaDAModelLM) -> None:
    answer = _decode(model, stop=())
    assert answer.raw == answer.tokens == [5, 5, 5, 4, 6, 13, 5, 5, 1, 5, 4, 6, 4, 1, 1, 12]
    assert (answer.stop_reason, answer.forwards) == ("length", 14)


def test_the_first_confidences_are_the_published_ones(model: LLaDAModelLM) -> None:
    answer = _decode(model, stop=(13,))
    assert answer.steps[:4] == [0, 0, 0, 1]
    assert answer.confidence[:4] == pytest.approx([0.381815, 0.345763, 0.310188, 0.236821], abs=5e-6)
