"""Properties of the network's one forward, most of them against a slow and obvious second implementation."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from torch import Tensor

from dllm_var.model.kv_store import KVStore
from dllm_var.model.llada import LLaDAModelLM, RMSNorm

MakeModel = Callable[..., LLaDAModelLM]
IDS = torch.tensor([[3, 1, 39, 39, 7, 39, 20], [5, 5, 39, 2, 39, 11, 30]])  # [2, 7]
PAD = 38


def _logits(model: LLaDAModelLM, ids: Tensor, **more: Any) -> Tensor:
    logits = model(ids, **more).logits
    assert logits is not None
    return logits


def _obvious_logits(model: LLaDAModelLM, ids: list[int], positions: list[int]) -> tuple[Tensor, list[Tensor]]:
    """One row in float64, one head and one pair of coordinates at a time; also the head-mean attention of each layer."""
    config, weights = model.config, {k.removeprefix("model.transformer."): v.double() for k, v in model.state_dict().items()}
    n, d = len(ids), config.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def turn(x: Tensor) -> Tensor:
        out = x.clone()
        for row, position in enumerate(positions):
            for j in range(d // 2):
                angle = position * config.rope_theta ** (-2 * j / d)
                a, b = x[row, j], x[row, j + d // 2]
                out[row, j] = a * math.cos(angle) - b * math.sin(angle)
                out[row, j + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    h, means = weights["wte.weight"][ids], []
    for layer in range(config.n_layers):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        a = norm(h, f"blocks.{layer}.attn_norm")
        q, k, v = (a @ w[f"{part}_proj.weight"].T for part in "qkv")
        heads, shares = [], []
        for head in range(config.n_heads):
            source = head // (config.n_heads // config.num_key_value_heads)
            mine, its = slice(head * d, head * d + d), slice(source * d, source * d + d)
            share = (turn(q[:, mine]) @ turn(k[:, its]).T / math.sqrt(d)).softmax(-1)
            shares.append(share)
            heads.append(share @ v[:, its])
        means.append(torch.stack(shares).mean(0))
        h = h + torch.cat(heads, dim=-1) @ w["attn_out.weight"].T
        m = norm(h, f"blocks.{layer}.ff_norm")
        h = h + (F.silu(m @ w["ff_proj.weight"].T) * (m @ w["up_proj.weight"].T)) @ w["ff_out.weight"].T
    head_matrix = weights["wte.weight" if config.weight_tying else "ff_out.weight"]
    assert h.shape[0] == n
    return norm(h, "ln_f") @ head_matrix.T, means


@pytest.mark.parametrize("kv_heads", [4, 2, 1, None])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_attention_equal_an_obvious_implementation(
    make_model: MakeModel, kv_heads: int | None, tied: bool
) -> None:
    model = make_model(n_kv_heads=kv_heads, weight_tying=tied)
    positions = [0, 1, 2, 9, 10, 400, 401]
    out = model(IDS[:1], positions=torch.tensor([positions]), output_attentions=True)
    logits, means = _obvious_logits(model, IDS[0].tolist(), positions)
    assert torch.allclose(out.logits[0].double(), logits, atol=2e-5)
    assert len(out.attentions) == 2
    for ours, theirs in zip(out.attentions, means, strict=True):
        assert torch.allclose(ours[0].double(), theirs, atol=1e-6)


def test_null_kv_heads_under_multi_query_attention_mean_one(make_model: MakeModel) -> None:
    model = make_model(n_kv_heads=None, multi_query_attention=True)
    logits, _ = _obvious_logits(model, IDS[0].tolist(), list(range(7)))
    assert model.config.num_key_value_heads == 1
    assert torch.allclose(_logits(model, IDS[:1])[0].double(), logits, atol=2e-5)


def test_asking_for_attention_does_not_change_the_logits(make_model: MakeModel) -> None:
    model = make_model(n_kv_heads=2)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    with_map = model(IDS, attention_mask=mask, output_attentions=True)
    assert torch.allclose(with_map.logits, _logits(model, IDS, attention_mask=mask), atol=1e-5)
    assert all(bool((a[1, :, :2] == 0).all()) for a in with_map.attentions)  # nothing is looked for in padding
    assert all(torch.allclose(a.sum(-1), torch.ones(2, 7)) for a in with_map.attentions)


def test_attention_map_covers_stored_keys(make_model: MakeModel) -> None:
    model = make_model()
    kv = KVStore(model.config, 2, 7, 0, torch.float32, "cpu")
    everything = torch.arange(7).expand(2, 7)
    whole = model(IDS, kv=kv, slots=everything, output_attentions=True)
    part = model(IDS[:, 2:4], positions=everything[:, 2:4], kv=kv, slots=everything[:, 2:4], output_attentions=True)
    for seen, rows in zip(part.attentions, whole.attentions, strict=True):
        assert seen.shape == (2, 2, 7)
        assert torch.allclose(seen, rows[:, 2:4], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stored", [False, True])
def test_padding_changes_nothing_for_real_tokens(make_model: MakeModel, side: str, stored: bool) -> None:
    model = make_model()
    for pad in (1, 4):
        filler = torch.full((1, pad), PAD)
        short = IDS[1:, : 7 - pad]
        padded = torch.cat((filler, short) if side == "left" else (short, filler), dim=1)
        mask = torch.cat((torch.zeros(1, pad), torch.ones(1, 7 - pad)), dim=1) if side == "left" else None
        mask = torch.cat((torch.ones(1, 7 - pad), torch.zeros(1, pad)), dim=1) if mask is None else mask
        batch, masks = torch.cat((IDS[:1], padded)), torch.cat((torch.ones(1, 7), mask))
        more: dict[str, Any] = {}
        if stored:
            more = {"kv": KVStore(model.config, 2, 7, 0, torch.float32, "cpu"), "slots": torch.arange(7).expand(2, 7)}
        logits = _logits(model, batch, attention_mask=masks, **more)
        assert torch.allclose(logits[0], _logits(model, IDS[:1])[0], atol=1e-5)
        assert torch.allclose(logits[1][mask[0].bool()], _logits(model, short)[0], atol=1e-5)
        if stored:
            assert torch.equal(more["kv"].stamp >= 0, masks.bool())


def test_a_mask_with_a_store_hides_padding_of_a_later_call_too(make_model: MakeModel) -> None:
    model = make_model()
    prompt, block = IDS[1:, :3], IDS[1:, 3:5]
    kv = KVStore(model.config, 2, 7, 2, torch.float32, "cpu")
    prompts = torch.cat((IDS[:1, :5], torch.cat((prompt, torch.full((1, 2), PAD)), dim=1)))
    model(prompts, attention_mask=torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]), kv=kv, slots=torch.arange(5).expand(2, 5))
    at = torch.tensor([[5, 6], [3, 4]])
    logits = _logits(model, torch.cat((IDS[:1, 5:], block)), positions=at, kv=kv, slots=torch.full((2, 2), -1))

    solo = KVStore(model.config, 1, 5, 0, torch.float32, "cpu")
    model(prompt, kv=solo, slots=torch.tensor([[0, 1, 2]]))
    alone = _logits(model, block, positions=at[1:], kv=solo, slots=at[1:])
    assert torch.allclose(logits[1:], alone, atol=1e-5)


def test_a_row_of_pure_padding_gives_no_nan_and_leaves_its_neighbour_alone(make_model: MakeModel) -> None:
    model = make_model()
    mask = torch.tensor([[1] * 7, [0] * 7])
    kv = KVStore(model.config, 2, 7, 0, torch.float32, "cpu")
    for more in ({}, {"output_attentions": True}, {"kv": kv, "slots": torch.arange(7).expand(2, 7)}):
        logits = _logits(model, IDS, attention_mask=mask, **more)
        assert bool(logits.isfinite().all())
        assert torch.allclose(logits[0], _logits(model, IDS[:1])[0], atol=1e-5)


def test_query_mask_hides_keys_from_single_queries(make_model: MakeModel) -> None:
    model = make_model()
    allowed = torch.ones(1, 7, 7, dtype=torch.bool)
    allowed[:, :5, 5:] = False  # the first five do not see the last two, which see everything
    logits = _logits(model, IDS[:1], query_mask=allowed)
    assert torch.allclose(logits[0, :5], _logits(model, IDS[:1, :5])[0], atol=1e-5)
    assert not torch.allclose(logits[0, 5:], _logits(model, IDS[:1])[0, 5:], atol=1e-3)  # they see keys that have changed


@pytest.mark.parametrize("tied", [False, True])
def test_head_on_wanted_rows_equals_a_slice_of_the_full_logits(make_model: MakeModel, tied: bool) -> None:
    model = make_model(weight_tying=tied)
    wanted = IDS == 39
    full, part = _logits(model, IDS), _logits(model, IDS, logits_for=wanted)
    assert part.shape == (int(wanted.sum()), 40)
    assert torch.allclose(part, full[wanted], atol=1e-6)
    assert _logits(model, IDS, logits_for=torch.zeros_like(wanted)).shape == (0, 40)


def test_the_head_computes_no_row_that_was_not_asked_for(make_model: MakeModel) -> None:
    model, seen = make_model(), []
    model.get_output_embeddings().register_forward_hook(lambda module, given, result: seen.append(given[0].shape))
    model(IDS, logits_for=IDS == 39)
    assert seen == [(5, 32)]


def test_project_receives_the_wanted_rows_and_the_head_weight(make_model: MakeModel) -> None:
    model = make_model()
    wanted = IDS == 39
    doubled = _logits(model, IDS, logits_for=wanted, project=lambda hidden, weight: 2 * F.linear(hidden, weight))
    assert torch.allclose(doubled, 2 * _logits(model, IDS, logits_for=wanted), atol=1e-6)


def test_positions_move_nothing_when_all_are_shifted(make_model: MakeModel) -> None:
    model = make_model()
    shifted = torch.arange(7)[None] + 100
    assert torch.allclose(_logits(model, IDS), _logits(model, IDS, positions=shifted), atol=1e-4)
    stretched = torch.arange(7)[None] * 3
    assert not torch.allclose(_logits(model, IDS), _logits(model, IDS, positions=stretched), atol=1e-2)


def test_attention_is_bidirectional(make_model: MakeModel) -> None:
    model = make_model()
    changed = IDS.clone()
    changed[:, -1] = 4
    assert bool((_logits(model, IDS)[:, 0] != _logits(model, changed)[:, 0]).any())


def test_norm_casts_back_before_it_multiplies_by_the_weight() -> None:
    norm = RMSNorm(64, 1e-5).to(torch.bfloat16)
    x, weight = torch.randn(8, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    norm.weight.copy_(weight)
    wide = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.to(torch.bfloat16) * weight)
    assert not torch.equal(norm(x), (wide * weight.float()).to(torch.bfloat16))


def test_bf16_stays_near_fp32_with_and_without_a_store(make_model: MakeModel) -> None:
    model = make_model()
    exact = _logits(model, IDS)
    half = make_model().to(torch.bfloat16)
    kv = KVStore(half.config, 2, 7, 0, torch.bfloat16, "cpu")
    for more in ({}, {"kv": kv, "slots": torch.arange(7).expand(2, 7)}):
        logits = _logits(half, IDS, **more)
        assert logits.dtype == torch.bfloat16
        assert float((logits.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_autocast_keeps_the_rotation_exact(make_model: MakeModel) -> None:
    model = make_model()
    far = torch.arange(7)[None] + 3000  # bf16 cannot tell these positions apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = _logits(model, IDS, positions=far)
    exact = _logits(model, IDS, positions=far)
    assert float((logits.float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_equal_gradients(make_model: MakeModel, reentrant: bool) -> None:
    grads, calls = [], []
    for checkpointed in (False, True):
        model = make_model().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        count = [0]
        model.model.transformer["blocks"][0].q_proj.register_forward_hook(lambda *_, c=count: c.__setitem__(0, c[0] + 1))
        with torch.enable_grad():
            F.cross_entropy(_logits(model, IDS).flatten(0, 1), IDS.flatten()).backward()
        grads.append({name: value.grad for name, value in model.named_parameters()})
        calls.append(count[0])
    assert calls == [1, 2]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert all(bool(grad.any()) for grad in grads[0].values())


def test_compiled_network_equals_the_plain_one(make_model: MakeModel) -> None:
    model = make_model(n_layers=1, n_kv_heads=2)
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    kv = [KVStore(model.config, 2, 9, 2, torch.float32, "cpu") for _ in range(2)]
    tail = torch.tensor([[7, 8], [7, 8]])

    def three_ways(kv: KVStore) -> list[Tensor]:
        return [
            _logits(model, IDS, attention_mask=mask),
            _logits(model, IDS, attention_mask=mask, kv=kv, slots=torch.arange(7).expand(2, 7)),
            _logits(model, IDS[:, :2], positions=tail, kv=kv, slots=torch.full((2, 2), -1)),
        ]

    plain = three_ways(kv[0])
    model.model = torch.compile(model.model, backend="aot_eager")
    for ours, theirs in zip(three_ways(kv[1]), plain, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_offloaded_weights_reach_the_head(make_model: MakeModel) -> None:
    model = make_model()
    expected = _logits(model, IDS)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.model.head_weight.is_meta  # only a call through the module brings it back
    assert torch.equal(_logits(model, IDS), expected)


def test_no_global_torch_state_is_touched(make_model: MakeModel) -> None:
    def state() -> tuple[Any, ...]:
        backends = torch.backends.cuda
        flags = (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled())
        rest = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled())
        return *flags, *rest, torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state().sum()

    model = make_model()
    before = state()
    kv = KVStore(model.config, 2, 7, 0, torch.float32, "cpu")
    model(IDS, kv=kv, slots=torch.arange(7).expand(2, 7), output_attentions=True)
    assert state() == before


def test_initial_weights_shrink_where_blocks_write_to_the_stream(make_model: MakeModel) -> None:
    blocks = make_model(n_layers=8, d_model=128, mlp_hidden_size=256).model.transformer["blocks"]
    for layer in (0, 7):
        assert float(blocks[layer].q_proj.weight.std()) == pytest.approx(128**-0.5, rel=0.05)
        assert float(blocks[layer].attn_out.weight.std()) == pytest.approx((2 * 128 * (layer + 1)) ** -0.5, rel=0.05)
        assert float(blocks[layer].ff_out.weight.std()) == pytest.approx((2 * 256 * (layer + 1)) ** -0.5, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, "input_ids must be"),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask \(2, 8\) must have the shape of input_ids \(2, 7\)"),
        ({"positions": torch.arange(7)}, r"positions \(7,\) must have the shape"),
        ({"positions": torch.zeros(2, 6, dtype=torch.long)}, "positions"),
        ({"logits_for": torch.tensor([0, 1])}, "logits_for"),
        ({"logits_for": torch.ones(2, 7, dtype=torch.long)}, "logits_for must be bool"),
        ({"slots": torch.arange(7).expand(2, 7)}, "kv and slots belong together"),
        ({"query_mask": torch.ones(2, 7, 8)}, r"query_mask .* must be .* \(2, 7, 7\)"),
        ({"position_ids": torch.arange(7)[None]}, "position_ids is not supported .*called positions"),
        ({"past_key_values": ()}, "past_key_values is not supported .*KVStore"),
        ({"labels": IDS}, "labels is not supported"),
        ({"use_cache": True}, "use_cache is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"qery_mask": torch.ones(1)}, "qery_mask is not supported"),
    ],
)
def test_bad_arguments_are_named(make_model: MakeModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model()(**{"input_ids": IDS, **arguments})


def test_arguments_of_libraries_that_ask_for_nothing_are_accepted(make_model: MakeModel) -> None:
    model = make_model()
    more = {"use_cache": False, "return_dict": True, "output_hidden_states": None, "labels": None}
    assert torch.equal(_logits(model, IDS, **more), _logits(model, IDS))


def test_a_store_refuses_to_be_trained_through(make_model: MakeModel) -> None:
    model = make_model().train()
    kv = KVStore(model.config, 2, 7, 0, torch.float32, "cpu")
    with torch.enable_grad(), pytest.raises(ValueError, match="kv is for inference"):
        model(IDS, kv=kv, slots=torch.arange(7).expand(2, 7))
    with torch.enable_grad():
        model.eval()(IDS, kv=kv, slots=torch.arange(7).expand(2, 7))
    assert not any(buffer.requires_grad for buffer in (*kv.keys, *kv.values))
