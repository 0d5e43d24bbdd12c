"""The one decode loop. Every method is a choice of four policies; none has a loop of its own.

    length.before → kv.plan → selector.extend → length.extend → forward
    → score → select → length.adjust → apply → observe → length.after

Called by `dllm_var.generation` and by exported checkpoints (`decode`). Policies see a `StepView`, return an `Action`, and
touch neither the model nor each other.
"""

from collections.abc import Iterator, Sequence

import torch

from dllm_var.decoding.compose import Policies, compose
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.dllm_cache import FeatureExecutor
from dllm_var.decoding.executor import Executor
from dllm_var.decoding.proposal import Proposer
from dllm_var.decoding.results import Event, Generation, events
from dllm_var.decoding.state import LIVE, DecodeState
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.special_tokens import SpecialTokens


class DecodeLoop:
    """A batch of prompts on their way to answers.

    Args:
        model: the network, in evaluation mode.
        special: mask, EOS and stop tokens of the model.
        config: how to decode.
        prompts: token ids, of any lengths; an empty prompt is allowed.
        requests: a number for each prompt, its name in events and its key for random draws; default 0, 1, ….
        policies: other policies than those of `compose` (research, tests).

    Raises:
        ValueError: a prompt with ids that the model does not have, or too long for the model.
    """

    def __init__(
        self,
        model: LLaDAModelLM,
        special: SpecialTokens,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[int] | None = None,
        policies: Policies | None = None,
    ) -> None:
        requests = range(len(prompts)) if requests is None else requests
        check_requests(requests, len(prompts))
        _check_prompts(prompts, model, config)
        self.special = special
        self.policies = compose(config, special, model.config) if policies is None else policies
        context = model.config.max_sequence_length
        self.state = DecodeState.begin(prompts, requests, special.mask, config.response_limit, context)
        proposer = Proposer.build(config, special, self.policies.measures)
        self.executor: Executor
        if config.cache == "dllm":
            self.executor = FeatureExecutor(model, self.state, proposer, config.seed, config.kp, config.kr, config.rou)
        else:
            scratch = self.policies.kv.scratch
            if scratch is not None:
                scratch += self.policies.selector.scratch(config.block_length)
            self.executor = Executor(model, self.state, proposer, config.seed, scratch)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One forward of all live rows and what follows from it: one event per row. Finished rows leave the batch."""
        use, state = self.policies, self.state
        use.length.before(state)
        plan = use.length.extend(use.selector.extend(use.kv.plan(state), state), state)
        view = self.executor(plan, state)
        action = use.selector.select(view, use.scorer(view))
        assert bool((action.commit.any(1) | ~view.eligible.any(1)).all()), "every row with an eligible mask makes progress"
        assert not bool((action.commit & ~view.eligible).any()), "only eligible columns are committed"
        action = use.length.adjust(action, view)
        action.apply(view)
        state.count_forward(self.executor.computed)
        use.selector.observe(view, action)
        use.kv.observe(view, action)
        use.length.after(state)
        made = events(state, view, action, self.special)
        self._retire()
        return made

    def __iter__(self) -> Iterator[Event]:
        """All events until every row is done."""
        while self.state.rows:
            yield from self.step()

    def _retire(self) -> None:
        live = (self.state.stop == LIVE).nonzero()[:, 0]
        if len(live) < self.state.rows:
            self.executor.keep(live)
            self.state.keep(live)


def decode(
    model: LLaDAModelLM,
    special: SpecialTokens,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[int] | None = None,
) -> list[Generation]:
    """The answers to token-id prompts, in their order; see `DecodeLoop` for the arguments."""
    loop = DecodeLoop(model, special, config, prompts, requests)
    order = loop.state.request.tolist()
    results = {event.request: event.result for event in loop if event.result is not None}
    return [results[request] for request in order]


def check_requests(requests: Sequence[int], prompts: int) -> None:
    """Raises ValueError unless there is a number of its own for each of the prompts."""
    if len(requests) != prompts or len(set(requests)) != prompts:
        raise ValueError(f"requests={list(requests)} must be {prompts} different numbers, one for each prompt.")


def _check_prompts(prompts: Sequence[Sequence[int]], model: LLaDAModelLM, config: GenerationConfig) -> None:
    vocabulary, context = model.config.embedding_rows, model.config.max_sequence_length
    fixed = config.canvas == "fixed"
    for number, ids in enumerate(prompts):
        odd = next((i for i in ids if not 0 <= i < vocabulary), None)
        if odd is not None:
            raise ValueError(f"prompt {number} holds the id {odd}, but the model has the ids 0..{vocabulary - 1}.")
        needed = len(ids) + (config.gen_length if fixed else 1)
        if needed > context:
            what = f"with gen_length={config.gen_length} it needs" if fixed else "an answer of one token needs"
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens: {what} {needed} positions, but the model's context is {context}. "
                f"Shorten the prompt{' or lower gen_length' if fixed else ''}."
            )
