"""The engine: requests that come and go get the very answers that they would get alone."""

import gc
import queue
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_var import Generation, GenerationConfig, Pretrained, generate, load_pretrained, stream
from dllm_var.decoding.loop import DecodeLoop, decode
from dllm_var.decoding.state import DecodeState
from dllm_var.engine import Engine
from dllm_var.model.kv_store import KVStore
from dllm_var.text.chat import decode_text
from dllm_var.text.special_tokens import SpecialTokens
from tests.conftest import byte_tokenizer

CONFIG = GenerationConfig(block_length=8, max_gen_length=24, threshold=0.6)
WAYS = [
    {"block_length": 8, "max_gen_length": 24, "threshold": 0.6},
    {"block_length": 8, "max_gen_length": 16, "threshold": 0.6, "early_stop": False},
    {"block_length": 8, "max_gen_length": 24, "kl_threshold": 0.05, "threshold": 0.4},
    {
        "block_length": 8,
        "max_gen_length": 24,
        "kl_threshold": 1.0,
        "kl_history_length": 1,
        "kl_warmup": False,
        "threshold": 0.2,
        "unmask_strategy": "random",
        "seed": 5,
    },
    {"block_length": 8, "max_gen_length": 24, "wide_in_thres": 0.4},
    {"block_length": 4, "max_gen_length": 12, "temperature": 0.8, "seed": 5, "threshold": 0.5},
    {"block_length": 8, "max_gen_length": 24, "cache": "none", "threshold": 0.5},
    {"block_length": 8, "max_gen_length": 16, "threshold": 0.6, "cfg_scale": 0.5},
    {"method": "vanilla", "gen_length": 16, "block_length": 8, "threshold": 0.6, "cache": "prefix", "use_dual": True},
    {"method": "vanilla", "gen_length": 16, "block_length": 8, "threshold": 0.6, "cache": "dllm"},
    {"method": "vanilla", "gen_length": 16, "block_length": 8, "threshold": 0.6, "cache": "d2cache", "current_k": 8},
    {"method": "daedal", "initial_gen_length": 8, "max_gen_length": 24, "block_length": 8},
]


@pytest.fixture(scope="module")
def chat(chat_folder: Path) -> Pretrained:
    return load_pretrained(chat_folder)


@pytest.fixture(scope="module")
def talker(recorded: Pretrained) -> Pretrained:
    """The recorded checkpoint with stop tokens that it never says, so that answers are as long as they may be."""
    return Pretrained(recorded.model, byte_tokenizer(), SpecialTokens(mask=270, eos=268, pad=268, eot=269, bos=258))


def _prompt(draw: random.Random) -> list[int]:
    return [draw.randrange(97, 123) for _ in range(draw.choice([1, 3, 3, 9, 30]))]


def _alone(model: Pretrained, ids: list[int], config: GenerationConfig, number: int) -> Generation:
    return decode(model.model, model.special, config, [ids], [number])[0]


def _counts(answer: Generation) -> tuple[Any, ...]:
    return answer.raw, answer.tokens, answer.stop_reason, answer.forwards, answer.positions, answer.steps, answer.blocks


@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals_lengths_and_cancellations_change_no_token(recorded64: Pretrained, seed: int) -> None:
    draw = random.Random(seed)
    engine = Engine(recorded64, max_rows=5, max_length=64)
    expected, answers, cancelled, open_ = {}, {}, set(), []
    for _ in range(400):
        if len(expected) < 24 and draw.random() < 0.5:
            ids, config = _prompt(draw), GenerationConfig(block_length=8, max_gen_length=draw.randint(1, 30), threshold=0.6)
            number = engine.submit(ids, config)
            expected[number] = ids, config
            open_.append(number)
        if open_ and draw.random() < 0.05:
            number = open_.pop(draw.randrange(len(open_)))
            assert engine.cancel(number).stop_reason == "cancelled"
            cancelled.add(number)
        for event in engine.step():
            if event.result is not None:
                answers[event.request] = event.result
                open_.remove(event.request)
        if len(expected) == 24 and engine.idle:
            break
    assert len(expected) == 24
    assert cancelled
    assert set(answers) | cancelled == set(expected)
    assert not set(answers) & cancelled
    for number, answer in answers.items():
        assert _counts(answer) == _counts(_alone(recorded64, *expected[number], number))


def test_every_way_of_decoding_is_served_beside_the_others(recorded64: Pretrained) -> None:
    draw = random.Random(3)
    engine = Engine(recorded64, max_rows=3, max_length=64, memory=10**7)
    asked = {}
    for way in WAYS * 2:
        ids, config = _prompt(draw), GenerationConfig(**way)
        asked[engine.submit(ids, config)] = ids, config
    answers = engine.run()
    assert set(answers) == set(asked)
    for number, (ids, config) in asked.items():
        assert _counts(answers[number]) == _counts(_alone(recorded64, ids, config, number)), config


def test_requests_that_join_late_meet_notes_of_earlier_rows_and_keep_their_own(recorded64: Pretrained) -> None:
    config = GenerationConfig(block_length=8, max_gen_length=24, kl_threshold=0.05, threshold=0.4)
    engine = Engine(recorded64, max_rows=3, max_length=64)
    asked, answers = {}, {}
    for ids in ([97], [98, 99, 100], [101] * 9, [102, 103], [104]):
        asked[engine.submit(ids, config)] = ids
        for _ in range(3):
            answers |= {event.request: event.result for event in engine.step() if event.result}
    answers |= engine.run()
    for number, ids in asked.items():
        assert _counts(answers[number]) == _counts(_alone(recorded64, ids, config, number))


def test_hardly_any_column_is_padding(recorded: Pretrained) -> None:
    draw = random.Random(0)
    engine = Engine(recorded, max_rows=16, max_length=128)
    for _ in range(64):
        engine.submit(_prompt(draw), GenerationConfig(block_length=8, max_gen_length=draw.randint(1, 60), threshold=0.6))
    engine.run()
    assert engine.columns > 0
    assert engine.padding / engine.columns <= 0.05


def test_a_finished_row_frees_its_place_at_once(talker: Pretrained) -> None:
    engine = Engine(talker, max_rows=2, max_length=64)
    short, long, third = (
        engine.submit([97], GenerationConfig(block_length=8, max_gen_length=n, threshold=2, early_stop=False))
        for n in (1, 16, 16)
    )
    seen: dict[int, int] = {}
    while not engine.idle:
        live = {event.request for event in engine.step()}
        for number in live:
            seen.setdefault(number, engine.forwards)
        assert engine.live <= 2
    assert seen[third] < seen[long] + 16  # it did not wait for the long one
    assert short in seen


def test_first_come_first_served(recorded: Pretrained) -> None:
    engine = Engine(recorded, max_rows=1, max_length=64)
    numbers = [engine.submit([97 + i], CONFIG) for i in range(4)]
    assert list(engine.run()) == numbers


def test_memory_bounds_the_rows_and_is_given_back(talker: Pretrained) -> None:
    slow = GenerationConfig(block_length=8, max_gen_length=24, threshold=2, early_stop=False)
    probe = Engine(talker, max_rows=1, max_length=64)
    probe.submit([97], slow)
    probe.run()
    engine = Engine(talker, max_rows=16, max_length=64, memory=3 * next(iter(probe.lanes.values())).nbytes)
    assert engine.memory
    for i in range(8):
        engine.submit([97 + i], slow)
    most = 0
    while not engine.idle:
        engine.step()
        most = max(most, engine.live)
        stores = [lane.loop.executor.store for lane in engine.lanes.values()]
        assert sum(store.nbytes() for store in stores if store is not None) <= engine.memory
    assert most == 3
    assert all(not lane.requests and lane.loop.state.rows == 0 for lane in engine.lanes.values())
    with pytest.raises(ValueError, match="memory=10 bytes cannot hold a request"):
        Engine(talker, memory=10).submit([97], slow)


def test_ways_of_decoding_that_need_no_memory_and_much_of_it_follow_each_other(recorded: Pretrained) -> None:
    engine = Engine(recorded, max_rows=1, max_length=64)
    for own in ({"cache": "none"}, {}, {"block_length": 16}, {"cache": "none"}):
        engine.submit([97], GenerationConfig(**{"block_length": 8, "max_gen_length": 16, "threshold": 0.6, **own}))
    for _ in range(200):
        engine.step()
    assert engine.idle


def test_a_forward_budget_ends_with_a_full_block_and_says_so(talker: Pretrained) -> None:
    slow = GenerationConfig(block_length=8, max_gen_length=24, threshold=2, early_stop=False)
    engine = Engine(talker, max_length=64)
    number = engine.submit([97, 98], slow, forwards=3)
    answer = engine.run()[number]
    assert (answer.stop_reason, answer.forwards, len(answer.raw)) == ("forwards", 3, 8)
    assert answer.steps.count(2) == 6  # the last forward decided all that was left
    assert talker.special.mask not in answer.raw


def test_a_deadline_ends_an_answer_in_time_and_what_waits_too_long_is_told(talker: Pretrained) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 0.5  # every look takes half a second
        return now[0]

    slow = GenerationConfig(block_length=16, max_gen_length=48, threshold=2, early_stop=False)
    engine = Engine(talker, max_rows=1, max_length=64, clock=clock)
    first, second = engine.submit([97], slow, seconds=20), engine.submit([98], slow, seconds=3)
    answers = engine.run()
    assert answers[first].stop_reason == "deadline"
    assert 1 < answers[first].forwards < 20
    assert (answers[second].stop_reason, answers[second].forwards, answers[second].tokens) == ("deadline", 0, [])


def test_a_request_whose_time_runs_out_goes_before_the_crowd_of_another_way(
    talker: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, step = [0.0], DecodeLoop.step

    def slow_step(*given: Any) -> Any:
        now[0] += 1  # a second for every forward
        return step(*given)

    monkeypatch.setattr(DecodeLoop, "step", slow_step)
    crowd = GenerationConfig(block_length=8, max_gen_length=48, threshold=2, early_stop=False)
    urgent = GenerationConfig(method="vanilla", gen_length=8, block_length=8)
    engine = Engine(talker, max_rows=12, max_length=64, memory=10**8, clock=lambda: now[0])
    for _ in range(12):
        engine.submit([97], crowd)
    for _ in range(3):
        engine.step()
    late = now[0] + 4
    number = engine.submit([98], urgent, seconds=4)
    while True:
        found = [event.result for event in engine.step() if event.request == number and event.result]
        if found:
            break
    assert found[0].stop_reason == "deadline"
    assert talker.special.mask not in found[0].raw
    assert now[0] <= late


@pytest.mark.parametrize("cache", [{"cache": "none"}, {"cache": "prefix"}, {"cache": "d2cache", "current_k": 4}])
def test_the_last_forward_of_a_budget_decides_the_whole_block_whatever_the_cache(talker: Pretrained, cache: Any) -> None:
    slow = GenerationConfig(method="vanilla", gen_length=16, block_length=16, threshold=1.5, **cache)
    engine = Engine(talker, max_length=64)
    number = engine.submit([97, 98], slow, forwards=3)
    answer = engine.run()[number]
    assert (answer.stop_reason, answer.forwards) == ("forwards", 3)
    assert answer.steps.count(2) == 14


def test_a_budget_that_is_just_enough_forces_nothing_and_is_not_the_reason(talker: Pretrained) -> None:
    slow = GenerationConfig(method="vanilla", gen_length=4, block_length=4)
    engine = Engine(talker, max_length=64)
    number = engine.submit([97, 98], slow, forwards=4)
    assert engine.run()[number].stop_reason == "length"


@pytest.mark.parametrize(
    "way",
    [
        {"max_gen_length": 48, "threshold": 0.6},
        {"max_gen_length": 48, "kl_threshold": 0.05, "threshold": 0.4},
        {"method": "vanilla", "gen_length": 48, "threshold": 0.6, "stop_until_eos": True},
    ],
)
def test_an_answer_that_ends_itself_in_the_last_forward_of_its_budget_is_what_it_is_without_one(
    recorded64: Pretrained, way: dict[str, Any]
) -> None:
    config = GenerationConfig(block_length=16, **way)
    ended = 0
    for first in range(97, 123):
        prompt = [258, 259, first, 98, 257, 260]
        free = _alone(recorded64, prompt, config, 0)
        engine = Engine(recorded64, max_length=64)
        engine.submit(prompt, config, forwards=free.forwards)
        assert _counts(engine.run()[0]) == _counts(free)
        ended += free.stop_reason == "eos" and recorded64.special.eos in free.raw[len(free.tokens) + 1 :]
    assert ended  # some of them were not full yet


REVOCABLE = [
    {"method": "wino", "gen_length": 24, "block_length": 8, "wide_in_thres": 0.3},
    {"block_length": 8, "max_gen_length": 24, "wide_in_thres": 0.3},
    {"block_length": 8, "max_gen_length": 24, "enable_editing": True, "threshold": 0.5, "edit_threshold": 0.3},
]


@pytest.mark.parametrize("way", REVOCABLE, ids=["wino", "blocks of wino", "editing"])
def test_what_is_settled_is_never_taken_back(talker: Pretrained, way: dict[str, Any]) -> None:
    config, taken = GenerationConfig(**way), 0
    for text in (b"rev abcde", b"seq 1 9", b"dup ab", b"add 12 34", b"rep xy 3 times"):
        before: list[int] = []
        for event in stream(talker, [list(text)], config):
            taken += len(event.remasked) + len(event.replaced)
            assert event.response[: len(before)] == before
            before = event.response[: event.settled]
        assert event.result is not None
        assert before == event.result.tokens
    assert taken > 0


def test_a_stop_string_in_a_draft_ends_nothing(talker: Pretrained) -> None:
    config = GenerationConfig(block_length=16, max_gen_length=32, wide_in_thres=0.3)
    for text in (b"rev abcde", b"seq 1 9", b"dup ab", b"add 12 34", b"rep xy 3 times"):
        events = list(stream(talker, [list(text)], config))
        whole = events[-1].result
        assert whole is not None
        assert whole.text is not None
        drafts = {decode_text(talker.tokenizer, event.response[: event.length])[:3] for event in events}
        never = sorted(draft for draft in drafts if len(draft) == 3 and draft not in whole.text)
        engine = Engine(talker, max_length=128)
        number = engine.submit(list(text), config, stop=never)
        assert engine.run()[number].tokens == whole.tokens


def test_a_stop_string_ends_an_answer_before_it(talker: Pretrained) -> None:
    config = GenerationConfig(block_length=8, max_gen_length=24, threshold=2)
    whole = generate(talker, [list(b"seq 1 9")], config)[0]
    assert whole.text is not None
    stop = whole.text[6:8]
    engine = Engine(talker, max_length=128)
    number = engine.submit(list(b"seq 1 9"), config, stop=["never said", stop])
    answer = engine.run()[number]
    assert answer.stop_reason == "stop_string"
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.forwards < whole.forwards


def test_cancelling_gives_what_there_is_and_frees_the_row(talker: Pretrained) -> None:
    slow = GenerationConfig(block_length=8, max_gen_length=24, threshold=2, early_stop=False)
    engine = Engine(talker, max_rows=1, max_length=64)
    first, second = engine.submit([97], slow), engine.submit([98], slow)
    for _ in range(4):
        engine.step()
    assert engine.cancel(first).forwards == 4
    assert engine.cancel(second).forwards == 0  # it waited still
    assert engine.idle
    assert engine.step() == []
    with pytest.raises(ValueError, match="request 0 is not in the engine"):
        engine.cancel(first)


def test_a_request_that_never_had_a_forward_has_no_tokens_per_forward(talker: Pretrained) -> None:
    engine = Engine(talker, max_length=2048)
    assert engine.cancel(engine.submit([97])).tokens_per_forward == 0.0


def test_requests_that_do_not_fit_into_memory_are_still_there(recorded: Pretrained, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(recorded, max_length=64)
    engine.submit([96], CONFIG)
    engine.run()  # so that their lane is open already
    numbers = [engine.submit([97], CONFIG), engine.submit([98], CONFIG)]
    with monkeypatch.context() as patch:
        patch.setattr(DecodeState, "begin", lambda *given, **named: torch.empty(2**62))  # as without memory
        with pytest.raises(RuntimeError):
            engine.step()
    assert [request.number for request in engine.waiting] == numbers
    assert sorted(engine.run()) == numbers


def test_the_end_of_a_request_is_told_though_the_step_that_ended_it_failed(
    recorded: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    engine = Engine(recorded, max_length=64, clock=lambda: now[0])
    late, other = engine.submit([97], CONFIG, seconds=1), engine.submit([98], CONFIG)
    now[0] = 2.0
    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "admit", lambda *given: torch.empty(2**62))  # as without memory
        with pytest.raises(RuntimeError):
            engine.step()
    assert not engine.idle
    answers = engine.run()
    assert answers[late].stop_reason == "deadline"
    assert answers[other].stop_reason != "deadline"
    assert engine.idle


def test_a_lane_under_guidance_holds_its_memory_once_also_when_it_is_filled_again(
    talker: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    made = KVStore.__init__

    def count(store: KVStore, *given: Any, **named: Any) -> None:
        made(store, *given, **named)
        alive.append(sum(type(thing) is KVStore for thing in gc.get_objects()))

    monkeypatch.setattr(KVStore, "__init__", count)
    gc.collect()
    engine = Engine(talker, max_rows=2, max_length=64)
    for _ in range(3):
        engine.submit([97], GenerationConfig(block_length=8, max_gen_length=8, cfg_scale=0.5))
        engine.run()
    assert len(alive) >= 3
    assert set(alive) == {1}


def test_a_block_longer_than_any_answer_takes_no_memory(talker: Pretrained) -> None:
    sizes = set()
    for block in (64, 10**9):
        engine = Engine(talker, max_rows=1, max_length=64, memory=10**6)
        engine.submit([97], GenerationConfig(max_gen_length=16, block_length=block))
        assert len(engine.run()[0].raw) == 16
        (lane,) = engine.lanes.values()
        assert lane.loop.executor.store is not None
        sizes.add((lane.nbytes, lane.loop.executor.store.nbytes()))
    assert len(sizes) == 1


def test_a_first_forward_that_failed_is_made_again_also_under_guidance(
    talker: Pretrained, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GenerationConfig(
        method="vanilla", gen_length=16, block_length=8, threshold=0.6, cache="d2cache", current_k=8, cfg_scale=0.5
    )
    engine = Engine(talker, max_length=64)
    engine.submit([97, 98], config)
    with monkeypatch.context() as patch:
        patch.setattr(type(talker.model), "forward", lambda *given, **named: torch.empty(2**62))
        with pytest.raises(RuntimeError):
            engine.step()
    assert _counts(engine.run()[0]) == _counts(_alone(talker, [97, 98], config, 0))


def test_a_number_from_outside_leaves_numbers_for_the_others(recorded: Pretrained) -> None:
    engine = Engine(recorded, max_length=64)
    numbers = [engine.submit([97], CONFIG, request=request) for request in (2**63 - 1, 1, None, None)]
    assert numbers == [2**63 - 1, 1, 2, 3]


def test_the_queue_is_bounded(recorded: Pretrained) -> None:
    engine = Engine(recorded, queue_size=2)
    engine.submit([97], CONFIG)
    engine.submit([97], CONFIG)
    with pytest.raises(queue.Full, match="2 requests are waiting already"):
        engine.submit([97], CONFIG)


def test_a_load_rule_goes_with_rules_that_remember(recorded64: Pretrained) -> None:
    for way in ({"kl_threshold": 0.05, "threshold": 0.4}, {"wide_in_thres": 0.4}):
        config = GenerationConfig(block_length=8, max_gen_length=24, **way)
        asked = [[97], [98, 99, 100], [101] * 9]
        engine = Engine(recorded64, max_length=64, load=lambda live: {})
        numbers = [engine.submit(ids, config) for ids in asked]
        answers = engine.run()
        for number, ids in zip(numbers, asked, strict=True):
            assert _counts(answers[number]) == _counts(_alone(recorded64, ids, config, number))


@pytest.mark.parametrize(
    ("config", "change", "told"),
    [
        (CONFIG, {"block_length": 16}, "block_length=16 cannot take the place of 8"),
        (CONFIG, {"cache": "none"}, "cache='none' cannot change while answers are decoded, only block_length, threshold"),
        (
            GenerationConfig(block_length=8, max_gen_length=8, kl_threshold=0.1, threshold=0.5),
            {"block_length": 4}, "without kl_threshold only",
        ),
        (GenerationConfig(method="vanilla", gen_length=8), {"block_length": 4}, "blocks of a growing canvas may"),
    ],
)  # fmt: skip
def test_a_load_rule_that_cannot_work_says_why(
    recorded: Pretrained, config: GenerationConfig, change: dict[str, Any], told: str
) -> None:
    engine = Engine(recorded, max_length=64, load=lambda live: change)
    engine.submit([97], config)
    with pytest.raises(ValueError, match=told):
        engine.step()


def test_a_load_rule_changes_the_block_under_load_only(talker: Pretrained) -> None:
    config = GenerationConfig(block_length=8, max_gen_length=16, threshold=2, early_stop=False)
    engine = Engine(talker, max_length=64, load=lambda live: {"block_length": 4} if live > 1 else {})
    for ids in ([97], [98]):
        engine.submit(ids, config)
    crowded = engine.run()
    alone = engine.submit([99], config)
    assert [max(answer.blocks) for answer in crowded.values()] == [3, 3]
    assert max(engine.run()[alone].blocks) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_rows": 0}, "max_rows=0 must be 1 or more"),
        ({"queue_size": 0}, "queue_size=0 must be 1 or more"),
        ({"max_length": 0}, "max_length=0 must be 1 or more"),
    ],
)
def test_an_engine_that_could_not_work_is_refused(recorded: Pretrained, options: dict[str, int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Engine(recorded, **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop": "x"}, r"stop='x' must be a list of texts"),
        ({"stop": [""]}, r"stop=\[''\] must be a list"),
        ({"stop": None}, "stop=None must be a list"),
        ({"forwards": 0}, "forwards=0 must be a whole number above 0"),
        ({"forwards": 1.5}, r"forwards=1\.5 must be a whole number"),
        ({"seconds": -1.0}, r"seconds=-1\.0 must be a number above 0"),
        ({"seconds": float("nan")}, "seconds=nan must be a number above 0"),
        ({"request": 0.5}, r"requests=\[0\.5\] must be 1 different numbers"),
        ({"request": 0}, "request=0 is in the engine already"),
        ({"request": 2**63}, r"requests=\[9223372036854775808\] must be 1 different numbers of 64 bits"),
        ({"config": GenerationConfig(method="pc_sampler", gen_length=8)}, "debias=True needs the frequencies of tokens"),
        ({"prompt": [97] * 10**4}, "take 10024 positions, above max_length=64"),
        ({"prompt": [10**6]}, "prompt 1 holds the id 1000000"),
        ({"config": GenerationConfig(max_gen_length=100)}, r"take 101 positions, above max_length=64"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(chat: Pretrained, options: dict[str, Any], told: str) -> None:
    engine = Engine(chat, max_length=64)
    engine.submit([97], CONFIG)
    with pytest.raises(ValueError, match=told):
        engine.submit(options.pop("prompt", [97]), options.pop("config", CONFIG), **options)


def test_no_slot_is_lost_over_hundreds_of_requests(recorded: Pretrained) -> None:
    draw = random.Random(1)
    engine = Engine(recorded, max_rows=8, max_length=64)
    done = 0
    for _ in range(300):
        engine.submit(_prompt(draw), GenerationConfig(block_length=8, max_gen_length=draw.randint(1, 16), threshold=0.3))
        done += sum(event.result is not None for event in engine.step())
        if draw.random() < 0.1 and engine.live:
            engine.cancel(draw.choice([n for lane in engine.lanes.values() for n in lane.requests]))
            done += 1
    assert done + len(engine.run()) == 300
    (lane,) = engine.lanes.values()
    store = lane.loop.executor.store
    assert store is not None
    assert (store.rows, lane.loop.state.rows, engine.live, len(engine.waiting)) == (0, 0, 0, 0)
    assert torch.is_tensor(store.keys[0])
