"""dLLM-Cache: what is renewed when, against a slow executor that computes everything and keeps what the paper keeps."""

from copy import deepcopy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding import loop as loop_module
from dllm_var.decoding.dllm_cache import FeatureExecutor
from dllm_var.decoding.executor import Outcome, Projection
from dllm_var.decoding.kv_policies import Recompute
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.decoding.proposal import Proposer
from dllm_var.decoding.state import DecodeState
from dllm_var.decoding.step import Plan
from dllm_var.model.llada import rotate, rotation
from dllm_var.text.special_tokens import SpecialTokens

PROMPTS = [[258, 259, *text.encode(), 257, 260] for text in ("add 2 3", "say hello to the world", "x")]
NEVER = 10**6


def _config(cache: str = "dllm", **options: Any) -> GenerationConfig:
    return GenerationConfig(method="vanilla", cache=cache, **{"gen_length": 16, "block_length": 8, **options})


class Slow(FeatureExecutor):
    """Each row by itself: every layer computes every position from the stream, and takes over what is to be renewed."""

    def _forward(
        self, plan: Plan, state: DecodeState, ids: Tensor, positions: Tensor, project: Projection, kv: Any
    ) -> Outcome:
        self.computed = torch.zeros_like(state.forwards)
        hidden = []
        for row in range(len(ids)):
            b = row % state.rows
            end, prompt, step = int(state.end[b]), int(state.prompt[b]), int(state.forwards[b])
            hidden.append(self._row(row, ids[row : row + 1, :end], prompt, step)[plan.wanted[b, :end]])
        return project(torch.cat(hidden), self.model.model.head_weight), None

    def _row(self, row: int, ids: Tensor, prompt: int, step: int) -> Tensor:
        parts = self.model.model.transformer
        h, n = parts["wte"](ids), ids.shape[1]
        response = torch.arange(n) >= prompt
        for layer, block in enumerate(cast(nn.ModuleList, parts["blocks"])):
            keys, values, attended, fed = (kept[layer, row, :n] for kept in self.features)
            prompt_due, response_due = step % self.kp == 0 or layer == 0, step % self.kr == 0 or layer == 0
            renew = (~response & prompt_due) | (response & response_due)
            a = cast(Any, block).attn_norm(h)
            table = rotation(torch.arange(n)[None], self.model.config)
            q, k, v = (cast(Any, block)._modules[f"{x}_proj"](a).view(1, n, -1, 16).transpose(1, 2) for x in "qkv")
            q, k = rotate(q, table), rotate(k, table)
            share = int((n - prompt) * self.rou)
            if not response_due and share:
                new = v[0].transpose(0, 1)
                likeness = F.cosine_similarity(new.flatten(1), values.flatten(1), dim=1).tolist()
                order = sorted(range(prompt, n), key=likeness.__getitem__)
                renew[order[:share]] = True
                values[prompt:] = new[prompt:]
            keys[renew], values[renew] = k[0].transpose(0, 1)[renew], v[0].transpose(0, 1)[renew]
            o = F.scaled_dot_product_attention(q, keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
            attended[renew] = cast(Any, block).attn_out(o.transpose(1, 2).reshape(n, -1))[renew]
            y = h + attended
            fed[renew] = cast(Any, block).feed_forward(y)[0][renew]
            h = y + fed
        return parts["ln_f"](h[0])


def _same(one: Generation, other: Generation) -> bool:
    names = ("raw", "stop_reason", "forwards", "steps", "blocks")
    return all(getattr(one, n) == getattr(other, n) for n in names) and one.confidence == pytest.approx(other.confidence)


@pytest.mark.parametrize(
    "options",
    [
        {"kp": 6, "kr": 3, "rou": 0.25},
        {"kp": 3, "kr": 4, "rou": 0.5, "threshold": 0.6},
        {"kp": NEVER, "kr": NEVER, "rou": 0.1, "cfg_scale": 0.5},
        {"kp": 4, "kr": 2, "rou": 0.0},
        {"kp": 2, "kr": 5, "rou": 0.05, "gen_length": 13, "block_length": 5},  # a share of no position at all
    ],
    ids=["default", "threshold", "guidance", "no share", "empty share"],
)
def test_decoding_is_that_of_an_executor_that_computes_everything(
    options: dict[str, Any], recorded64: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(**options)
    fast = generate(recorded64, PROMPTS, config)
    monkeypatch.setattr(loop_module, "FeatureExecutor", Slow)
    slow = generate(recorded64, PROMPTS, config)
    assert all(_same(one, other) for one, other in zip(fast, slow, strict=True))


@pytest.mark.parametrize(
    "options",
    [{"kp": 1, "kr": 1, "rou": 0.0}, {"kp": 1, "kr": 4, "rou": 1.0}, {"kp": 1, "kr": 1, "rou": 0.5, "cfg_scale": 1.0}],
)
def test_renewing_everything_equals_keeping_nothing(options: dict[str, Any], recorded64: Pretrained) -> None:
    plain = _config("none", cfg_scale=options.get("cfg_scale", 0.0))
    for one, other in zip(
        generate(recorded64, PROMPTS, _config(**options)), generate(recorded64, PROMPTS, plain), strict=True
    ):
        assert _same(one, other)
        assert one.positions == other.positions


def test_keeping_features_changes_what_is_decided(recorded64: Pretrained) -> None:
    kept, plain = (generate(recorded64, PROMPTS, c) for c in (_config(kp=NEVER, kr=NEVER, rou=0.0), _config("none")))
    assert [answer.raw for answer in kept] != [answer.raw for answer in plain]


@pytest.mark.parametrize(
    "options",
    [
        {"kp": 4, "kr": 3, "rou": 0.25, "num_transfer_tokens": 2},
        {"kp": 5, "kr": 2, "rou": 0.3, "threshold": 0.5, "early_stop": True, "block_length": 5},
        {"kp": 5, "kr": 2, "rou": 0.3, "threshold": 0.5, "stop_until_eos": True, "cfg_scale": 0.5},
    ],
    ids=["quota", "threshold", "guidance"],
)
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(options: dict[str, Any], recorded64: Pretrained) -> None:
    together = generate(recorded64, PROMPTS, _config(**options))
    for i, prompt in enumerate(PROMPTS):
        alone = generate(recorded64, [prompt], _config(**options))[0]
        assert _same(together[i], alone)
        assert together[i].positions == alone.positions


def _executor(
    model: Pretrained, prompts: list[list[int]], kp: int, kr: int, rou: float
) -> tuple[FeatureExecutor, DecodeState]:
    state = DecodeState.begin(prompts, range(len(prompts)), model.special.mask, 12)
    state.end = state.limit
    state.open_block(torch.ones(len(prompts), dtype=torch.bool), 12)
    proposer = Proposer.build(_config(), model.special, {})
    return FeatureExecutor(model.model, state, proposer, 0, kp, kr, rou), state


def _look(executor: FeatureExecutor, state: DecodeState, forwards: list[int], decided: int) -> Tensor:
    """Confidences of the response after a forward in which each row is at the given one of its own."""
    state.forwards = torch.tensor(forwards)
    for row in range(state.rows):
        at = int(state.prompt[row]) + decided
        state.tokens[row, at] = 97 + decided
    with torch.inference_mode():
        return executor(Recompute().plan(state), state).confidence


def test_rows_that_are_at_different_forwards_are_renewed_by_their_own_count(recorded64: Pretrained) -> None:
    counts = [[0, 0, 0], [1, 2, 3], [2, 5, 4], [3, 6, 6]]  # prompt due at multiples of 3, response at multiples of 2
    executor, state = _executor(recorded64, PROMPTS, 3, 2, 0.25)
    together = [(_look(executor, state, forwards, i), executor.computed) for i, forwards in enumerate(counts)]
    for row, prompt in enumerate(PROMPTS):
        executor, state = _executor(recorded64, [prompt], 3, 2, 0.25)
        for i, forwards in enumerate(counts):
            alone = _look(executor, state, [forwards[row]], i)
            assert torch.allclose(together[i][0][row], alone[0], atol=1e-12)
            assert together[i][1][row] == executor.computed[0]


@torch.inference_mode()
def test_a_canvas_that_does_not_change_gives_the_same_again_whatever_is_renewed(recorded64: Pretrained) -> None:
    executor, state = _executor(recorded64, PROMPTS, 3, 2, 0.4)
    plan = Recompute().plan(state)
    looks = []
    for forward in range(5):
        state.forwards = torch.full_like(state.forwards, forward)
        looks.append(executor(plan, state).confidence)
    assert all(torch.allclose(look, looks[0], atol=1e-12) for look in looks)


def test_without_any_renewal_only_the_first_layer_follows_the_tokens(recorded64: Pretrained) -> None:
    executor, state = _executor(recorded64, PROMPTS, NEVER, NEVER, 0.0)
    _look(executor, state, [0, 0, 0], 0)
    before = [kept.clone() for kept in executor.features]
    _look(executor, state, [1, 1, 1], 1)
    for old, new in zip(before, executor.features, strict=True):
        assert not torch.equal(old[0], new[0])
        assert torch.equal(old[1:], new[1:])
    canvas = torch.tensor([len(prompt) + 12 for prompt in PROMPTS])
    assert torch.equal(executor.computed, -(-canvas // 3))


def test_only_what_is_renewed_passes_through_the_matrices_and_is_counted(recorded: Pretrained) -> None:
    executor, state = _executor(recorded, PROMPTS, 4, 3, 0.25)
    blocks = cast(nn.ModuleList, recorded.model.model.transformer["blocks"])
    passed: list[int] = []
    names = ("q_proj", "k_proj", "attn_out", "ff_proj", "ff_out")
    hooks = [
        cast(nn.Module, getattr(block, name)).register_forward_hook(lambda m, x, y: passed.append(x[0].shape[0]))
        for block in blocks
        for name in names
    ]
    prompt, layers = [len(p) for p in PROMPTS], len(blocks)
    try:
        for forward in range(9):
            passed.clear()
            _look(executor, state, [forward] * 3, forward)
            later = [p * (forward % 4 == 0) + (12 if forward % 3 == 0 else 3) for p in prompt]
            assert passed == [sum(prompt) + 36] * len(names) + [sum(later)] * len(names) * (layers - 1)
            cost = [p + 12 + (layers - 1) * rest for p, rest in zip(prompt, later, strict=True)]
            assert executor.computed.tolist() == [-(-c // layers) for c in cost]
    finally:
        for hook in hooks:
            hook.remove()


def test_grouped_heads_read_the_kept_keys_of_their_group(recorded64: Pretrained) -> None:
    """With two heads to each key, as in the network's own forward: renewing everything must still equal keeping nothing."""
    config = deepcopy(recorded64.model.config)
    config.n_kv_heads = 2
    torch.manual_seed(0)
    model = Pretrained(type(recorded64.model)(config).double().eval(), None, recorded64.special)
    assert config.num_key_value_heads == 2
    kept, plain = (generate(model, PROMPTS, c) for c in (_config(kp=1, kr=3, rou=1.0), _config("none")))
    assert all(_same(one, other) for one, other in zip(kept, plain, strict=True))


def test_equal_logits_are_decided_from_left_to_right_and_never_as_the_mask(recorded: Pretrained) -> None:
    model = deepcopy(recorded.model)
    nn.init.zeros_(cast(nn.Parameter, model.model.transformer["ln_f"].weight))
    special = SpecialTokens(mask=0, eos=256, pad=256, eot=257)  # among equals the lowest id would be the mask
    for size, block in ((10, 4), (1, 1)):
        config = _config(gen_length=size, block_length=block, kp=4, kr=3, rou=0.25, num_transfer_tokens=1)
        for answer in decode(model, special, config, [[5, 6], []]):
            assert (answer.raw, answer.steps) == ([1] * size, list(range(size)))


def test_features_of_finished_rows_are_given_back(recorded: Pretrained) -> None:
    config = _config(kp=5, kr=2, rou=0.3, threshold=0.5, early_stop=True, cfg_scale=0.5)
    loop = DecodeLoop(recorded.model, recorded.special, config, PROMPTS)
    rows = set()
    while loop.state.rows:
        rows.add(loop.state.rows)
        loop.step()
        assert isinstance(loop.executor, FeatureExecutor)
        assert {kept.shape[1] for kept in loop.executor.features} == {2 * loop.state.rows}
    assert len(rows) > 1
