"""Properties of every decoding: it ends, rows do not know of each other, and what is counted is true."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_var import Generation, GenerationConfig, Pretrained, generate
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.text.special_tokens import SpecialTokens

CONFIGS = [
    GenerationConfig(block_length=4, max_gen_length=14, threshold=0.6),
    GenerationConfig(block_length=4, max_gen_length=14, threshold=0.6, early_stop=False, cache="none"),
    GenerationConfig(block_length=5, max_gen_length=12, threshold=0.5, temperature=0.8, seed=3),
    GenerationConfig(block_length=6, max_gen_length=12, threshold=0.7, cfg_scale=0.5),
    GenerationConfig(method="vanilla", gen_length=10, block_length=4, steps=7),
    GenerationConfig(method="vanilla", gen_length=10, block_length=4, threshold=0.5, early_stop=True),
    GenerationConfig(method="vanilla", gen_length=9, steps=6, remasking="random", confidence_eos_eot_inf=True),
    GenerationConfig(method="vanilla", gen_length=9, steps=6, cfg_scale=1.0, temperature=0.5, logits_eos_inf=True),
]

bytes_of_text = st.lists(st.integers(97, 122), min_size=1, max_size=12).map(lambda ids: [258, 259, *ids, 257, 260])


def _same(one: Generation, other: Generation) -> bool:
    """Equal in all but the last digits of confidences."""
    names = ("tokens", "raw", "stop_reason", "forwards", "positions", "steps", "blocks")
    return all(getattr(one, n) == getattr(other, n) for n in names) and one.confidence == pytest.approx(other.confidence)


@settings(max_examples=6, deadline=None)
@given(prompts=st.lists(bytes_of_text, min_size=2, max_size=4), data=st.data())
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_row_of_a_batch_equals_that_prompt_decoded_alone(
    config: GenerationConfig, prompts: list[list[int]], data: st.DataObject, recorded64: Pretrained
) -> None:
    order = data.draw(st.permutations(range(len(prompts))))
    together = generate(recorded64, [prompts[i] for i in order], config, requests=order)
    for i, answer in zip(order, together, strict=True):
        assert _same(answer, generate(recorded64, [prompts[i]], config, requests=[i])[0])


@settings(max_examples=25, deadline=None)
@given(prompt=bytes_of_text, block=st.integers(1, 9), room=st.integers(1, 13), threshold=st.floats(0, 1.2))
def test_every_answer_is_bounded_free_of_masks_and_has_true_counts(
    prompt: list[int], block: int, room: int, threshold: float, recorded: Pretrained
) -> None:
    config = GenerationConfig(block_length=block, max_gen_length=room, threshold=threshold, early_stop=False)
    answer = generate(recorded, [prompt], config)[0]
    special, size = recorded.special, len(answer.raw)
    assert special.mask not in answer.raw
    assert not set(answer.tokens) & set(special.stop)
    assert (answer.stop_reason == "length") == (answer.tokens == answer.raw)
    if answer.stop_reason == "length":
        assert size == room
    assert size == room or size % block == 0
    assert sorted(set(answer.steps)) == list(range(answer.forwards))  # every forward fixed at least one token
    assert answer.blocks == [i // block for i in range(size)]
    assert answer.positions == _positions(answer, len(prompt), block, room)


def _positions(answer: Generation, prompt: int, block: int, room: int) -> int:
    """Prefill, refinements and commits, counted by the phases of the published algorithm."""
    sizes = [min(block, room - start) for start in range(0, len(answer.raw), block)]
    forwards = [len({s for s, b in zip(answer.steps, answer.blocks, strict=True) if b == k}) for k in range(len(sizes))]
    first = [prompt, *sizes]  # what is stored in the forward that takes the first look at a block
    return sum(n * size for n, size in zip(forwards, sizes, strict=True)) + sum(first[: len(sizes)])


def test_a_model_that_loves_the_mask_still_ends_and_never_writes_it(rule_model: Any, says: Any, special: Any) -> None:
    for config in (
        GenerationConfig(block_length=4, max_gen_length=10),
        GenerationConfig(method="vanilla", gen_length=10, block_length=4, steps=5),
        GenerationConfig(block_length=4, max_gen_length=10, temperature=2.0),
    ):
        model = rule_model(says({}, default=(special.mask, 500.0)))
        answer = decode(model, special, config, [[1, 2]])[0]
        assert special.mask not in answer.raw
        assert answer.forwards <= 10


def test_a_threshold_above_one_fixes_one_token_per_forward(recorded: Pretrained) -> None:
    config = GenerationConfig(block_length=5, max_gen_length=13, threshold=1.5, early_stop=False)
    answer = generate(recorded, [[258, 259, 97, 257, 260]], config)[0]
    assert sorted(answer.steps) == list(range(len(answer.raw)))


def test_a_threshold_of_zero_fixes_a_block_per_forward(recorded: Pretrained) -> None:
    special = SpecialTokens(mask=270, eos=256, pad=256, stop=())
    config = GenerationConfig(block_length=5, max_gen_length=13, threshold=0)
    answer = decode(recorded.model, special, config, [[258, 259, 97, 257, 260]])[0]
    assert (answer.forwards, answer.steps) == (3, [0] * 5 + [1] * 5 + [2] * 3)


def test_blocks_of_one_position_write_from_left_to_right(recorded: Pretrained) -> None:
    answer = generate(recorded, [[258, 259, 97, 98, 257, 260]], GenerationConfig(block_length=1, max_gen_length=9))[0]
    assert answer.steps == list(range(len(answer.raw)))


def test_a_single_token_can_be_asked_for(recorded: Pretrained) -> None:
    prompt = [258, 259, 97, 257, 260]
    for config in (GenerationConfig(max_gen_length=1), GenerationConfig(method="vanilla", gen_length=1, block_length=8)):
        answer = generate(recorded, [prompt], config)[0]
        assert (len(answer.raw), answer.forwards) == (1, 1)


def test_an_empty_prompt_is_decoded(recorded: Pretrained) -> None:
    alone, beside = generate(recorded, [[], [258, 259, 97, 257, 260]], GenerationConfig(block_length=4, max_gen_length=8))
    assert alone.raw == generate(recorded, [[]], GenerationConfig(block_length=4, max_gen_length=8))[0].raw
    assert beside.raw


def test_the_text_does_not_depend_on_how_long_it_might_have_become(recorded: Pretrained) -> None:
    prompts = [[258, 259, *text, 257, 260] for text in (b"rev abc", b"add 7 8", b"seq 3 6", b"rep xy 3")]
    for early_stop in (True, False):
        short, long = (
            generate(recorded, prompts, GenerationConfig(block_length=8, max_gen_length=n, early_stop=early_stop))
            for n in (32, 200)
        )
        for one, other in zip(short, long, strict=True):
            assert one.raw[:32] == other.raw[:32]
            assert one.stop_reason == "length" or _same(one, other)


@pytest.mark.parametrize("method", ["dllm_var", "vanilla"])
def test_an_early_stop_gives_the_same_text_with_no_more_forwards(method: str, recorded: Pretrained) -> None:
    prompts = [[258, 259, *b"add %d %d" % (i, 3 * i), 257, 260] for i in range(2, 10)]
    room = {"max_gen_length": 48} if method == "dllm_var" else {"gen_length": 48}
    early, full = (
        generate(recorded, prompts, GenerationConfig(method=method, block_length=16, threshold=0.7, early_stop=e, **room))
        for e in (True, False)
    )
    assert [a.tokens for a in early] == [a.tokens for a in full]
    assert [a.stop_reason for a in early] == [a.stop_reason for a in full]
    assert all(a.forwards <= b.forwards for a, b in zip(early, full, strict=True))
    assert "eos" in [a.stop_reason for a in early]


def test_an_early_stop_saves_the_forwards_behind_the_stop_token(rule_model: Any, says: Any, special: Any) -> None:
    rule = says({2: (3, 50.0), 3: (special.eos, 50.0)}, default=(1, 1.0))
    configs = [GenerationConfig(block_length=8, max_gen_length=16, early_stop=early) for early in (True, False)]
    early, full = (decode(rule_model(rule), special, config, [[1, 2]])[0] for config in configs)
    assert (early.forwards, full.forwards) == (1, 7)
    assert early.tokens == full.tokens == [3]
    assert early.raw == [3] + [special.eos] * 7  # what was left open is EOS, fixed in no forward
    assert early.steps == [0, 0] + [-1] * 6


def test_a_stop_token_with_a_mask_before_it_does_not_stop_yet(rule_model: Any, says: Any, special: Any) -> None:
    # Position 4 wants EOS at once, position 2 is unsure and comes last.
    model = rule_model(says({2: (3, 1.0), 3: (4, 50.0), 4: (special.eos, 50.0), 5: (5, 50.0)}))
    answer = decode(model, special, GenerationConfig(block_length=4, max_gen_length=8), [[1, 2]])[0]
    assert (answer.tokens, answer.stop_reason, answer.forwards) == ([3, 4], "eos", 2)


def test_both_stop_tokens_stop_and_the_first_of_them_counts(rule_model: Any, says: Any, special: Any) -> None:
    model = rule_model(says({2: (special.eot, 9.0), 3: (special.eos, 50.0)}, default=(1, 50.0)))
    config = GenerationConfig(block_length=4, max_gen_length=12, early_stop=False)
    answer = decode(model, special, config, [[1, 2]])[0]
    assert (answer.tokens, answer.raw, answer.stop_reason) == ([], [9, 10, 1, 1], "eos")


def test_stop_and_mask_ids_inside_a_prompt_mean_nothing(rule_model: Any, says: Any, special: Any) -> None:
    prompt = [special.eos, special.mask, special.eot, 1]
    for config in (
        GenerationConfig(block_length=2, max_gen_length=4),
        GenerationConfig(method="vanilla", gen_length=4, early_stop=True),
    ):
        model = rule_model(says({}, default=(3, 5.0)))
        answer = decode(model, special, config, [prompt])[0]
        assert (answer.tokens, answer.stop_reason) == ([3, 3, 3, 3], "length")
        assert all(call.ids[0, :4].tolist() == prompt for call in model.calls if call.positions[0, 0] == 0)


def test_every_stored_entry_is_computed_exactly_once_with_the_next_block_in_sight(
    rule_model: Any, says: Any, special: Any
) -> None:
    model = rule_model(says({9: (special.eos, 9.0)}, default=(1, 0.5)))
    prompts = [[1, 2], [1, 2, 3, 4], [5]]
    loop = DecodeLoop(model, special, GenerationConfig(block_length=3, max_gen_length=10, early_stop=False), prompts)
    written: dict[tuple[int, int], int] = {}
    while loop.state.rows:
        requests, lengths = loop.state.request.tolist(), loop.state.prompt.tolist()
        loop.step()
        call = model.calls[-1]
        for row, request in enumerate(requests):
            real = torch.ones_like(call.slots[row], dtype=torch.bool) if call.real is None else call.real[row]
            slots, positions = call.slots[row][real].tolist(), call.positions[row][real].tolist()
            stored = [p for p, slot in zip(positions, slots, strict=True) if slot >= 0]
            assert [slot for slot in slots if slot >= 0] == stored  # a slot is the position in the row itself
            for position in stored:
                assert (request, position) not in written
                written[request, position] = call.step
            if stored:
                # What is stored has no masks left (but those of a prompt) and sees the masks that follow it.
                assert call.ids[row][len(stored)] == special.mask
                assert special.mask not in call.ids[row][: len(stored)][torch.tensor(stored) >= lengths[row]].tolist()
    # All but the last block was stored: those with position 9 are 8..10, 7..9 and 7..9.
    assert [sorted(p for r, p in written if r == row) for row in range(3)] == [list(range(n)) for n in (8, 7, 7)]


def test_rows_that_are_done_leave_the_batch(rule_model: Any, says: Any, special: Any) -> None:
    model = rule_model(says({4: (special.eos, 9.0)}, default=(1, 9.0)))
    loop = DecodeLoop(model, special, GenerationConfig(block_length=2, max_gen_length=8, threshold=2), [[1, 2], [1] * 5])
    sizes = []
    while loop.state.rows:
        loop.step()
        sizes.append(len(model.calls[-1].ids))
    assert sizes == [2] * 3 + [1] * 5
    assert loop.executor.store is not None
    assert loop.executor.store.rows == 0


def test_recomputing_everything_within_one_block_is_plain_threshold_decoding(recorded: Pretrained) -> None:
    prompts = [[258, 259, *text, 257, 260] for text in (b"rev abc", b"add 7 8", b"rep xy 3")]
    ours = GenerationConfig(block_length=16, max_gen_length=16, threshold=0.7, cache="none", early_stop=False)
    fixed = GenerationConfig(method="vanilla", gen_length=16, threshold=0.7)
    for one, other in zip(generate(recorded, prompts, ours), generate(recorded, prompts, fixed), strict=True):
        assert _same(one, other)


def test_the_first_block_is_the_same_with_and_without_a_cache_up_to_its_first_forward(recorded: Pretrained) -> None:
    prompts = [[258, 259, *text, 257, 260] for text in (b"rev abc", b"add 7 8", b"rep xy 3")]
    cached, plain = (
        generate(recorded, prompts, GenerationConfig(block_length=8, max_gen_length=8, cache=cache, early_stop=False))
        for cache in ("block_commit", "none")
    )
    for one, other in zip(cached, plain, strict=True):
        first = [i for i, step in enumerate(one.steps) if step == 0]
        assert first == [i for i, step in enumerate(other.steps) if step == 0]
        assert [one.raw[i] for i in first] == [other.raw[i] for i in first]
        assert one.positions < other.positions


def test_guidance_of_zero_is_no_guidance_and_more_of_it_changes_the_answer(recorded: Pretrained) -> None:
    prompt = [[258, 259, *b"rev abcd", 257, 260]]
    answers = [
        generate(recorded, prompt, GenerationConfig(block_length=8, max_gen_length=16, cfg_scale=w, early_stop=False))[0]
        for w in (0.0, 0.0, 3.0)
    ]
    assert _same(answers[0], answers[1])
    assert answers[2].confidence != pytest.approx(answers[0].confidence)


def test_guidance_computes_twice_the_positions(recorded: Pretrained) -> None:
    prompt = [[258, 259, *b"rev abcd", 257, 260]]
    one, two = (
        generate(recorded, prompt, GenerationConfig(method="vanilla", gen_length=6, cfg_scale=w))[0] for w in (0.0, 0.1)
    )
    assert (two.forwards, two.positions) == (one.forwards, 2 * one.positions)


def test_sampling_repeats_with_its_seed_and_differs_with_another(recorded: Pretrained) -> None:
    prompts = [[258, 259, *b"say", 257, 260]] * 2

    def sample(seed: int, **more: Any) -> list[list[int]]:
        config = GenerationConfig(block_length=8, max_gen_length=24, temperature=1.5, seed=seed, early_stop=False)
        return [answer.raw for answer in generate(recorded, prompts, config, **more)]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1)[0] != sample(1)[1]  # two requests for the same prompt
    assert sample(1, requests=[5, 1])[1] == sample(1)[1]  # request 1 again, in other company


def test_without_a_temperature_the_seed_does_not_matter(recorded: Pretrained) -> None:
    prompt = [[258, 259, *b"say", 257, 260]]
    one, other = (generate(recorded, prompt, GenerationConfig(block_length=8, max_gen_length=16, seed=s))[0] for s in (1, 2))
    assert _same(one, other)


def test_random_remasking_takes_the_likeliest_tokens_in_a_random_order(recorded: Pretrained) -> None:
    prompt = [[258, 259, *b"say", 257, 260]]
    orders = [
        generate(recorded, prompt, GenerationConfig(method="vanilla", gen_length=12, remasking="random", seed=s))[0].steps
        for s in (1, 1, 2)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0]) == list(range(12))


def test_a_banned_eos_never_appears_at_any_temperature(rule_model: Any, says: Any, special: Any) -> None:
    for temperature in (0.0, 1.0):
        model = rule_model(says({}, default=(special.eos, 30.0)))
        config = GenerationConfig(method="vanilla", gen_length=6, logits_eos_inf=True, temperature=temperature)
        assert special.eos not in decode(model, special, config, [[1]])[0].raw


def test_eos_and_eot_can_be_decided_last(rule_model: Any, says: Any, special: Any) -> None:
    rule = says({2: (special.eot, 50.0), 4: (special.eos, 50.0)}, default=(3, 5.0))
    config = GenerationConfig(method="vanilla", gen_length=5, confidence_eos_eot_inf=True)
    answer = decode(rule_model(rule), special, config, [[1]])[0]
    assert answer.raw == [3, 9, 3, 10, 3]
    assert answer.steps == [0, 3, 1, 4, 2]


def test_uniform_logits_are_decided_from_left_to_right(rule_model: Any, special: Any) -> None:
    model = rule_model(lambda ids, positions: torch.zeros(*ids.shape, 12))
    answer = decode(model, special, GenerationConfig(block_length=3, max_gen_length=6), [[1]])[0]
    assert (answer.raw, answer.steps) == ([0] * 6, list(range(6)))


def test_a_bf16_model_decodes_with_float32_confidences(recorded: Pretrained) -> None:
    model = deepcopy(recorded.model).to(torch.bfloat16)
    config = GenerationConfig(block_length=8, max_gen_length=16, early_stop=False)
    answer = decode(model, recorded.special, config, [[258, 259, *b"rev abc", 257, 260]])[0]
    fine = [c for c in answer.confidence if c != torch.tensor(c, dtype=torch.bfloat16).item()]
    assert fine
    assert recorded.special.mask not in answer.raw


def test_logits_that_are_not_numbers_are_reported(rule_model: Any, special: Any) -> None:
    model = rule_model(lambda ids, positions: torch.full((*ids.shape, 12), float("nan")))
    with pytest.raises(ValueError, match=r"not numbers.*forward 1"):
        decode(model, special, GenerationConfig(block_length=2, max_gen_length=4), [[1]])


@pytest.mark.parametrize("options", [{"max_gen_length": 80}, {"method": "vanilla", "gen_length": 80}])
def test_an_answer_may_go_beyond_the_context_of_the_model_which_is_told(
    options: dict[str, Any], rule_model: Any, says: Any, special: Any
) -> None:
    model, prompts = rule_model(says({}, default=(1, 9.0))), [[1] * 3, [1] * 70]
    with pytest.warns(UserWarning, match=r"beyond the 64 positions that max_sequence_length in .*config\.json names"):
        answers = decode(model, special, GenerationConfig(block_length=8, **options), prompts)
    assert [len(answer.raw) for answer in answers] == [80, 80]
    assert {answer.stop_reason for answer in answers} == {"length"}


def test_within_the_context_nothing_is_told(
    rule_model: Any, says: Any, special: Any, recwarn: pytest.WarningsRecorder
) -> None:
    decode(rule_model(says({}, default=(1, 9.0))), special, GenerationConfig(block_length=4, max_gen_length=60), [[1] * 4])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("options", "prompts", "said"),
    [
        ({}, [[1], [1, 12]], "prompt 1 holds the id 12.*0..11"),
        ({}, [[-1]], "prompt 0 holds the id -1"),
    ],
)
def test_prompts_that_the_model_cannot_take_are_refused(
    options: dict[str, Any], prompts: list[list[int]], said: str, rule_model: Any, says: Any, special: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        decode(rule_model(says({})), special, GenerationConfig(**options), prompts)


@pytest.mark.parametrize("requests", [[0], [1, 1], [1, 2, 3]])
def test_every_prompt_needs_a_request_number_of_its_own(
    requests: list[int], rule_model: Any, says: Any, special: Any
) -> None:
    with pytest.raises(ValueError, match="2 different numbers"):
        decode(rule_model(says({})), special, GenerationConfig(), [[1], [2]], requests)


def test_no_prompts_are_no_answers(recorded: Pretrained) -> None:
    assert generate(recorded, []) == []
