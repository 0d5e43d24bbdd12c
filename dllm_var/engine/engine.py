"""The engine: many requests on one model, in as few and as full forwards as their phases allow.

Called by `dllm_var.generation` (so by the demo and `evaluation/` too) and by whoever serves a model. It owns the queue, the
lanes (one `DecodeLoop` per way of decoding) and the ends of requests that the loop knows nothing of: stop strings, budgets,
deadlines, cancellation. It runs in the thread that calls `step`; clocks and threads are the caller's.
"""

import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dllm_var.decoding.compose import compose
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.loop import DecodeLoop, check_prompts, check_requests
from dllm_var.decoding.results import Event, Generation
from dllm_var.decoding.state import CANCELLED, DEADLINE, FORWARDS, STOP_REASONS, STOP_STRING
from dllm_var.engine import scheduler
from dllm_var.pretrained import Pretrained, Prompt
from dllm_var.text.chat import StreamDecoder, decode_text

LAST_NUMBER = 2**62  # of those from which the engine goes on counting
PREFILL_COLUMNS = 2048  # of prompts in one forward: it holds the running rows up no longer than this takes


@dataclass
class Request:
    """A request from `Engine.submit` to its end.

    Attributes:
        number: its name in events, and its key for random draws. ids: the prompt. config: how to decode.
        stop: strings that end it. forwards: how many it may have. deadline: when it must be done, on the engine's clock.
        waited: forwards of the engine since its last one.
    """

    number: int
    ids: list[int]
    config: GenerationConfig
    stop: tuple[str, ...]
    forwards: int | None
    deadline: float | None
    decoder: StreamDecoder | None = None
    text: str = ""
    seen: int = 0  # tokens that the decoder has had
    waited: int = 0


@dataclass
class Lane:
    """Requests that are decoded in the same way.

    Attributes:
        loop: their rows. requests: those that are live, by number. nbytes: of its keys and values.
        seconds: what a forward has taken lately.
    """

    loop: DecodeLoop
    nbytes: int
    requests: dict[int, Request] = field(default_factory=dict)
    seconds: float = 0.0
    prefilled: bool = False  # whether its last forward was of prompts


class Engine:
    """Requests in, events out.

    Args:
        model: see `dllm_var.load_pretrained`.
        max_rows: the most requests of one way of decoding that are live at a time.
        max_length: the longest canvas, prompt included; default the model's `max_sequence_length`.
        memory: bytes for keys and values; default what `max_rows` rows of one way of decoding take at a time.
        queue_size: how many requests may wait.
        prefill_columns: the most columns of prompts in one forward (one prompt always fits).
        load: live rows → options (``threshold``, ``factor``, ``gamma``, a shorter ``block_length``) that replace those of
            the requests for the next forward. Then an answer depends on what else is running; without it, it never does.
        clock: seconds, for deadlines.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        model: Pretrained,
        *,
        max_rows: int = 16,
        max_length: int | None = None,
        memory: int | None = None,
        queue_size: int = 1024,
        prefill_columns: int = PREFILL_COLUMNS,
        load: Callable[[int], Mapping[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_length = model.model.config.max_sequence_length if max_length is None else max_length
        for name, value in {
            "max_rows": max_rows, "queue_size": queue_size, "prefill_columns": prefill_columns,
            "max_length": self.max_length,
        }.items():  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        self.model, self.max_rows, self.memory, self.queue_size = model, max_rows, memory, queue_size
        self.prefill_columns, self.load, self.clock = prefill_columns, load, clock
        self.waiting: deque[Request] = deque()
        self.lanes: dict[GenerationConfig, Lane] = {}
        self._numbers: set[int] = set()
        self._bytes: dict[GenerationConfig, int] = {}  # of a row, by way of decoding; the model can go these ways
        self._next = 0
        self._late: list[Event] = []  # ended, but not told yet
        self.forwards = self.columns = self.padding = 0

    @property
    def live(self) -> int:
        """Requests that are being decoded."""
        return sum(len(lane.requests) for lane in self.lanes.values())

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._numbers and not self._late

    def submit(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        stop: Sequence[str] = (),
        forwards: int | None = None,
        seconds: float | None = None,
        request: int | None = None,
    ) -> int:
        """Queue a request; returns its number.

        Args:
            prompt: a question, a list of messages, or token ids.
            config: how to decode; default `GenerationConfig()`.
            stop: strings that end the answer; its text is cut before the first of them.
            forwards: at most this many; the last one decides all that is masked in the block up to a stop token. (DAEDAL has
                no block as long as it looks for the length of its canvas.)
            seconds: from now. Shortly before they are over the answer is ended in the same way.
            request: a number for it that no request in the engine has; default the next free one.

        Raises:
            queue.Full: `queue_size` requests wait already: try again later.
            ValueError: a prompt that cannot be rendered or does not fit, or an option out of range.
        """
        config = GenerationConfig() if config is None else config
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop={stop!r} must be a list of texts that are not empty.")
        if stop and self.model.tokenizer is None:
            raise ValueError("stop needs a model with a tokenizer: leave it out.")
        if forwards is not None and (not isinstance(forwards, int) or forwards < 1):
            raise ValueError(f"forwards={forwards} must be a whole number above 0, or left out.")
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"seconds={seconds} must be a number above 0, or left out.")
        ids, number = self.model.prompt_ids(prompt), self._next if request is None else request
        check_requests([number], 1)
        check_prompts([ids], [number], self.model.model)
        row = len(ids) + config.response_limit
        if row > self.max_length:
            raise ValueError(
                f"the prompt and the longest answer take {row} positions, above max_length={self.max_length}: raise it, or "
                "lower max_gen_length or gen_length."
            )
        if len(self.waiting) >= self.queue_size:
            raise queue.Full(f"{self.queue_size} requests are waiting already: try again later.")
        if number in self._numbers:
            raise ValueError(f"request={number} is in the engine already: give another number.")
        needed = self._row_bytes(_way(config, self.max_length))
        if self.memory is not None and needed > self.memory:
            raise ValueError(f"memory={self.memory} bytes cannot hold a request of {needed}: raise it, or lower max_length.")
        self._numbers.add(number)
        self._next = max(self._next, number + 1) if number < LAST_NUMBER else self._next
        while self._next in self._numbers:
            self._next += 1
        deadline = None if seconds is None else self.clock() + seconds
        decoder = StreamDecoder(self.model.tokenizer) if stop and self.model.tokenizer is not None else None
        self.waiting.append(Request(number, ids, config, tuple(stop), forwards, deadline, decoder))
        return number

    def cancel(self, number: int) -> Generation:
        """End a request now; returns what it has so far.

        Raises:
            ValueError: no such request is in the engine.
        """
        for lane in self.lanes.values():
            if number in lane.requests:
                answer = lane.loop.end({number: CANCELLED})[0]
                return self._finish(lane.requests.pop(number), answer)
        for request in self.waiting:
            if request.number == number:
                self.waiting.remove(request)
                return self._finish(request, _nothing(CANCELLED))
        raise ValueError(f"request {number} is not in the engine: it was never submitted, or is done.")

    def step(self) -> list[Event]:
        """Admit what fits, then one forward of one group of rows: an event for each of them, and for what ended unseen."""
        self._late += self._expire()  # kept, should what follows fail
        self._admit()
        lane = max(self.lanes.values(), key=self._urgency, default=None)
        if lane is None or not lane.requests:
            return self._told()
        loop, rows = lane.loop, [lane.requests[number] for number in lane.loop.state.request.tolist()]
        if self.load is not None:
            options = replace(loop.config, **self.load(self.live))
            loop.adapt(options)
        chosen = self._choose(lane, rows)
        for request in (r for other in self.lanes.values() for r in other.requests.values()):
            request.waited += 1
        for i in chosen:
            rows[i].waited = 0
        spent = loop.state.forwards.tolist()
        ending = {rows[i].number: reason for i in chosen if (reason := self._last(rows[i], spent[i]))}
        before, started = (loop.executor.columns, loop.executor.padding), self.clock()
        events = loop.step(None if len(chosen) == len(rows) else torch.tensor(chosen), ending)
        lane.seconds = self.clock() - started
        self.forwards += 1
        self.columns += loop.executor.columns - before[0]
        self.padding += loop.executor.padding - before[1]
        return self._told() + [self._watch(lane, event) for event in events]

    def run(self) -> dict[int, Generation]:
        """Step until nothing is left; the answers by number."""
        return {event.request: event.result for event in self if event.result is not None}

    def __iter__(self) -> Iterator[Event]:
        """All events until nothing is left."""
        while not self.idle:
            yield from self.step()

    def _told(self) -> list[Event]:
        """The ends that were not told yet, once."""
        told, self._late = self._late, []
        return told

    def _choose(self, lane: Lane, rows: list[Request]) -> list[int]:
        """Indices of the rows that take part in the lane's next forward."""
        loop, state = lane.loop, lane.loop.state
        if not loop.joinable:
            return list(range(len(rows)))
        columns, begun = loop.columns().tolist(), state.forwards.tolist()
        fresh = sorted((i for i in range(len(rows)) if not begun[i]), key=lambda i: -rows[i].waited)
        others = [i for i in range(len(rows)) if begun[i]]
        lane.prefilled = bool(fresh) and not (lane.prefilled and others)
        if lane.prefilled:
            return sorted(fresh[i] for i in scheduler.prompts([columns[i] for i in fresh], self.prefill_columns))
        due = [self._due(rows[i], self._margin()) for i in others]
        return [others[i] for i in scheduler.running([columns[i] for i in others], [rows[i].waited for i in others], due)]

    def _urgency(self, lane: Lane) -> tuple[bool, int]:
        """The lane to serve next has the most of it: a request whose time is running out, then turns waited in all."""
        requests = lane.requests.values()
        return any(self._due(r, self._margin()) for r in requests), sum(1 + r.waited for r in requests)

    def _margin(self) -> float:
        """Seconds before a deadline at which an answer is ended: another forward, of any lane, may come in between."""
        return 2 * max(lane.seconds for lane in self.lanes.values())

    def _due(self, request: Request, margin: float) -> bool:
        return request.deadline is not None and self.clock() + margin >= request.deadline

    def _last(self, request: Request, spent: int) -> int:
        """Why the request's next forward is its last one; 0 where it is not."""
        if request.forwards is not None and spent + 1 >= request.forwards:
            return FORWARDS
        return DEADLINE if self._due(request, self._margin()) else 0

    def _expire(self) -> list[Event]:
        """End what waits in the queue beyond its deadline."""
        late = [request for request in self.waiting if self._due(request, 0.0)]
        for request in late:
            self.waiting.remove(request)
        return [_event(request.number, self._finish(request, _nothing(DEADLINE))) for request in late]

    def _admit(self) -> None:
        """Move requests from the queue into lanes, first come first served, as far as rows and memory allow."""
        while self.waiting:
            request = self.waiting[0]
            lane = self._lane(request.config)
            if lane is None or len(lane.requests) >= lane.loop.room or (lane.requests and not lane.loop.joinable):
                return
            batch = [self.waiting.popleft()]
            while (  # those that follow and go the same way join together
                self.waiting
                and len(lane.requests) + len(batch) < lane.loop.room
                and _way(self.waiting[0].config, self.max_length) == _way(request.config, self.max_length)
            ):
                batch.append(self.waiting.popleft())
            try:
                lane.loop.admit([r.ids for r in batch], [r.number for r in batch], [r.config.response_limit for r in batch])
            except Exception:  # of memory, for one: nobody is lost
                self.waiting.extendleft(reversed(batch))
                raise
            lane.requests |= {r.number: r for r in batch}

    def _lane(self, config: GenerationConfig) -> Lane | None:
        """The lane of a way of decoding, opened if there is memory for it; None if there is not."""
        way = _way(config, self.max_length)
        if way in self.lanes:
            return self.lanes[way]
        each, room = self._row_bytes(way), self.max_rows
        for other in [key for key, lane in self.lanes.items() if not lane.requests]:
            del self.lanes[other]
        if self.memory is None and self.lanes:
            return None
        if self.memory is not None and each:
            room = min(room, (self.memory - sum(lane.nbytes for lane in self.lanes.values())) // each)
        if room < 1:
            return None
        loop = DecodeLoop(self.model.model, self.model.special, way, room=room, capacity=self.max_length)
        self.lanes[way] = Lane(loop, room * each)
        return self.lanes[way]

    def _row_bytes(self, way: GenerationConfig) -> int:
        """Bytes of keys, values and kept features of one row.

        Raises:
            ValueError: the model cannot be decoded that way.
        """
        if way not in self._bytes:
            shape = self.model.model.config
            scratch = compose(way, self.model.special, shape).scratch(way)
            cells = self.max_length + scratch + 1 if scratch is not None else self.max_length * (way.cache == "dllm")
            kept = 2 * shape.num_key_value_heads * shape.head_dim + (2 * shape.d_model if way.cache == "dllm" else 0)
            each = self.model.model.dtype.itemsize * (2 if way.cfg_scale else 1)
            self._bytes[way] = int(shape.n_layers * cells * kept * each)
        return self._bytes[way]

    def _watch(self, lane: Lane, event: Event) -> Event:
        """Look for stop strings in what is settled; finish what is done."""
        request = lane.requests[event.request]
        if request.decoder is not None and event.result is None:
            request.text += request.decoder.push(event.response[request.seen : event.settled])
            request.seen = max(request.seen, event.settled)
            if any(stop in request.text for stop in request.stop):
                event = replace(event, result=lane.loop.end({event.request: STOP_STRING})[0])
        if event.result is not None:
            event = replace(event, result=self._finish(lane.requests.pop(event.request), event.result))
        return event

    def _finish(self, request: Request, answer: Generation) -> Generation:
        """The answer with its text, cut before the first stop string."""
        self._numbers.discard(request.number)
        if self.model.tokenizer is None:
            return answer
        text = decode_text(self.model.tokenizer, answer.tokens)
        at = min((found for stop in request.stop if (found := text.find(stop)) >= 0), default=None)
        if at is None:
            return replace(answer, text=text)
        return replace(answer, text=text[:at], stop_reason=STOP_REASONS[STOP_STRING])


def _way(config: GenerationConfig, longest: int) -> GenerationConfig:
    """The configuration that all requests of a lane share: what each row has for itself is taken out."""
    own: dict[str, Any] = {}
    if config.canvas == "growing":
        own["max_gen_length"] = longest
    if not config.temperature and "random" not in (config.remasking, config.unmask_strategy):
        own["seed"] = 0  # nobody draws
    return replace(config, **own)


def _nothing(reason: int) -> Generation:
    """The answer of a request that never had a forward."""
    return Generation([], [], STOP_REASONS[reason], 0, 0, [], [], [])


def _event(number: int, answer: Generation) -> Event:
    return Event(number, -1, (), (), (), [], 0, 0, result=answer)
