"""The one decode loop. Every method is a choice of four policies; none has a loop of its own.

    length.before → kv.plan → selector.extend → length.extend → forward
    → score → select → length.adjust → apply → observe → length.after

Called by `dllm_var.engine` and by exported checkpoints (`decode`). Policies see a `StepView`, return an `Action`, and
touch neither the model nor each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from dllm_var.decoding.compose import Policies, compose
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.dllm_cache import FeatureExecutor
from dllm_var.decoding.executor import Executor
from dllm_var.decoding.proposal import Proposer
from dllm_var.decoding.results import Event, Generation, events, generation
from dllm_var.decoding.state import LIVE, DecodeState
from dllm_var.model.config import warn_beyond_context
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.special_tokens import SpecialTokens

ADAPTABLE = ("block_length", "threshold", "factor", "gamma")


class DecodeLoop:
    """Rows on their way from prompts to answers.

    Args:
        model: the network, in evaluation mode.
        special: mask, EOS and stop tokens of the model.
        config: how to decode.
        prompts: token ids, of any lengths; an empty prompt is allowed.
        requests: a number for each prompt, its name in events and its key for random draws; default 0, 1, ….
        policies: other policies than those of `compose` (research, tests).
        room: how many rows may be decoded at a time (`admit`); default those given here.
        capacity: canvas positions of the longest possible row; default as many as the rows given here need.

    Raises:
        ValueError: a prompt with ids that the model does not have.
    """

    def __init__(
        self,
        model: LLaDAModelLM,
        special: SpecialTokens,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]] = (),
        requests: Sequence[int] | None = None,
        policies: Policies | None = None,
        *,
        room: int | None = None,
        capacity: int | None = None,
    ) -> None:
        self.model, self.special, self.config = model, special, config
        self.policies = compose(config, special, model.config) if policies is None else policies
        self._scratch = self.policies.scratch(config)
        self.room, self.capacity = len(prompts) if room is None else room, capacity
        self.state = DecodeState.begin([], [], special.mask, 0, capacity)
        self._executor: Executor | None = None
        self.admit(prompts, range(len(prompts)) if requests is None else requests)

    def admit(self, prompts: Sequence[Sequence[int]], requests: Sequence[int], limits: Sequence[int] | None = None) -> None:
        """Take further prompts in, behind the rows that are live; between two steps.

        Args:
            limits: the longest answer of each, where it is not that of the configuration.

        Raises:
            ValueError: as for the class; or a number that a live row has.
        """
        if not prompts and self._executor is not None:
            return
        check_requests([*self.state.request.tolist(), *requests], self.state.rows + len(prompts))
        check_prompts(prompts, requests, self.model)
        room = [self.config.response_limit] * len(prompts) if limits is None else limits
        for ids, longest in zip(prompts, room, strict=True):
            warn_beyond_context(self.model.config, len(ids) + longest)
        fresh = DecodeState.begin(prompts, requests, self.special.mask, room, self.capacity)
        if self._executor is None or not (self.state.rows or self._executor.joinable):
            self._executor = None  # its keys and values go before others come
            self._executor = self._build(fresh)
        else:
            self._executor.admit(fresh.rows)
        if self.state.rows:
            self.state.extend(fresh)
        else:
            self.state = fresh

    def _build(self, state: DecodeState) -> Executor:
        config, model = self.config, self.model
        proposer = Proposer.build(config, self.special, self.policies.measures)
        if config.cache == "dllm":
            return FeatureExecutor(model, state, proposer, config.seed, config.kp, config.kr, config.rou)
        return Executor(model, state, proposer, config.seed, self._scratch, max(self.room, state.rows))

    def adapt(self, config: GenerationConfig) -> None:
        """Decode by these options from the next forward on.

        Raises:
            ValueError: another option than those of `ADAPTABLE` differs, or blocks that cannot change.
        """
        mine = self.config
        for option in (field.name for field in fields(config) if getattr(config, field.name) != getattr(mine, field.name)):
            value = getattr(config, option)
            if option not in ADAPTABLE:
                raise ValueError(f"{option}={value!r} cannot change while answers are decoded, only {', '.join(ADAPTABLE)}.")
            if option == "block_length" and (mine.canvas != "growing" or mine.rule == "klass" or value > mine.block_length):
                raise ValueError(
                    f"block_length={value} cannot take the place of {mine.block_length}: blocks of a growing canvas may "
                    "become shorter, and without kl_threshold only."
                )
        self.policies = compose(config, self.special, self.model.config)
        self.executor.proposer = Proposer.build(config, self.special, self.policies.measures)

    @property
    def executor(self) -> Executor:
        """What calls the model."""
        assert self._executor is not None
        return self._executor

    @property
    def joinable(self) -> bool:
        """Whether `admit` is possible beside live rows, and a step of some of them."""
        return self.executor.joinable

    def columns(self) -> Tensor:
        """Int64 [B]: the most columns of each row's next forward, by its KV policy; opens the next block where one is full.

        An elastic canvas grows as its forwards come, so for it these are those of the last forward.
        """
        if self.config.canvas != "elastic":
            self.policies.length.before(self.state)
        return self.policies.kv.columns(self.state)

    @torch.inference_mode()
    def step(self, chosen: Tensor | None = None, ending: Mapping[int, int] | None = None) -> list[Event]:
        """One forward of live rows and what follows from it: one event per row. Finished rows leave the batch.

        Args:
            chosen: int64 indices of the rows that take part, none of them or all before their first forward; default all.
            ending: request → stop reason: rows for which this is the last forward. All that is masked in the window, up to
                a stop token, is decided by it, as well as the model can.
        """
        if chosen is None and self.joinable and self.state.notes and not bool(self.state.forwards.all()):
            chosen = torch.arange(self.state.rows)  # none of them has notes yet, whatever those before them had
        state = self.state if chosen is None else self.state.some(chosen)
        state.last = torch.tensor([(ending or {}).get(request, LIVE) for request in state.request.tolist()])
        use = self.policies
        use.length.before(state)
        plan = use.length.extend(use.selector.extend(use.kv.plan(state), state), state)
        view = self.executor(plan, state, chosen)
        action = use.selector.select(view, use.scorer(view))
        assert bool((action.commit.any(1) | ~view.eligible.any(1)).all()), "every row with an eligible mask makes progress"
        assert not bool((action.commit & ~view.eligible).any()), "only eligible columns are committed"
        action = use.length.adjust(action, view)
        forced = torch.zeros_like(state.last, dtype=torch.bool)
        if bool(state.last.any()):
            chose, action = action, action.filling(view, state.last != LIVE, self.special.stop)
            forced = (action.commit & ~chose.commit).any(1)
            if chose.remask is not None:  # and none of it is taken back in these rows
                forced |= chose.remask.any(1) & (state.last != LIVE)
        action.apply(view)
        state.count_forward(self.executor.computed)
        use.selector.observe(view, action)
        use.kv.observe(view, action)
        use.length.after(state)
        for reason in set(state.last.tolist()) - {LIVE}:
            state.finish((state.last == reason) & (forced | (state.stop == LIVE)), reason)
        made = events(state, view, action, self.special, use.length.revocable)
        if chosen is not None:
            self.state.put(chosen, state)
        self._retire()
        return made

    def end(self, reasons: Mapping[int, int]) -> list[Generation]:
        """End live rows at once (request → stop reason), with the answers that they have so far, in their order."""
        rows = {request: row for row, request in enumerate(self.state.request.tolist())}
        for request, reason in reasons.items():
            self.state.finish(torch.arange(self.state.rows) == rows[request], reason)
        answers = [generation(self.state, rows[request], self.special) for request in reasons]
        self._retire()
        return answers

    def __iter__(self) -> Iterator[Event]:
        """All events until every row is done."""
        while self.state.rows:
            yield from self.step()

    def _retire(self) -> None:
        """Forget finished rows; the last live ones take their places, so that few keys and values are moved."""
        live = (self.state.stop == LIVE).nonzero()[:, 0]
        if len(live) < self.state.rows:
            order = torch.arange(len(live))
            order[self.state.stop[: len(live)] != LIVE] = live[live >= len(live)]
            self.executor.keep(order)
            self.state.keep(order)


def decode(
    model: LLaDAModelLM,
    special: SpecialTokens,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[int] | None = None,
) -> list[Generation]:
    """The answers to token-id prompts, in their order; see `DecodeLoop` for the arguments."""
    order = list(range(len(prompts)) if requests is None else requests)
    loop = DecodeLoop(model, special, config, prompts, order)
    results = {event.request: event.result for event in loop if event.result is not None}
    return [results[request] for request in order]


def check_requests(requests: Sequence[int], prompts: int) -> None:
    """Raises ValueError unless there is a number of its own for each of the prompts."""
    whole = all(isinstance(r, int) and -(2**63) <= r < 2**63 for r in requests)
    if not whole or len(requests) != prompts or len(set(requests)) != prompts:
        raise ValueError(f"requests={list(requests)} must be {prompts} different numbers of 64 bits, one for each prompt.")


def check_prompts(prompts: Sequence[Sequence[int]], requests: Sequence[int], model: LLaDAModelLM) -> None:
    """Raises ValueError for a prompt (by its number) with ids that the model does not have."""
    vocabulary = model.config.embedding_rows
    for number, ids in zip(requests, prompts, strict=True):
        odd = next((i for i in ids if not 0 <= i < vocabulary), None)
        if odd is not None:
            raise ValueError(f"prompt {number} holds the id {odd}, but the model has the ids 0..{vocabulary - 1}.")
