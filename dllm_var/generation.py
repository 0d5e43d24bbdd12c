"""Prompts in, answers out: text on top of the engine.

`generate` and `stream` are the public calls (`dllm_var.generate`, `dllm_var.stream`); the demo and `evaluation/` use them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.loop import check_requests
from dllm_var.decoding.results import Event, Generation
from dllm_var.engine import Engine
from dllm_var.pretrained import Pretrained, Prompt
from dllm_var.text.chat import decode_text

MASK_SIGN = "░"


def generate(
    model: Pretrained,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    requests: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> list[Generation]:
    """Answer prompts; the answers come in their order.

    Args:
        model: see `dllm_var.load_pretrained`.
        prompts: any number, of any lengths: questions, lists of messages, or lists of token ids. An answer does not
            depend on the other prompts.
        config: how to decode; default `GenerationConfig()`.
        requests: a number for each prompt, the key of its random draws; default 0, 1, ….
        batch_size: prompts decoded together, the next one joining where one is done; default all of them.

    Raises:
        ValueError: a prompt that cannot be rendered, or holds ids that the model does not have; a bad batch size.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more, or None for all prompts at once.")
    requests = range(len(prompts)) if requests is None else requests
    check_requests(requests, len(prompts))
    answers = _engine(model, prompts, config or GenerationConfig(), requests, batch_size).run()
    return [answers[request] for request in requests]


def stream(
    model: Pretrained,
    prompts: Sequence[Prompt],
    config: GenerationConfig | None = None,
    *,
    requests: Sequence[int] | None = None,
) -> Iterator[Event]:
    """What `generate` does, as it happens: one event per row and forward, with its settled and provisional text.

    Settled text is final; provisional text follows it, with a sign for each mask.
    Takes the arguments of `generate` and raises what it raises.
    """
    requests = range(len(prompts)) if requests is None else requests
    check_requests(requests, len(prompts))
    for event in _engine(model, prompts, config or GenerationConfig(), requests, None):
        yield event_with_text(model, event)


def _engine(
    model: Pretrained, prompts: Sequence[Prompt], config: GenerationConfig, requests: Sequence[int], rows: int | None
) -> Engine:
    """An engine with the prompts in its queue and a store no larger than they need."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list, generate(model, [text]), even for a single prompt.")
    ids = [model.prompt_ids(prompt) for prompt in prompts]
    longest = max(map(len, ids), default=0) + config.response_limit
    some = max(1, len(prompts))
    engine = Engine(model, max_rows=min(some, rows or some), max_length=longest, queue_size=some)
    for prompt, request in zip(ids, requests, strict=True):
        engine.submit(prompt, config, request=request)
    return engine


def event_with_text(model: Pretrained, event: Event) -> Event:
    """The event with its settled and provisional text; as it is where there is no tokenizer."""
    tokenizer, mask = model.tokenizer, model.special.mask
    if tokenizer is None:
        return event
    text = decode_text(tokenizer, event.response[: event.settled]).rstrip("\ufffd")  # of a character that is not all there
    runs = groupby(event.response[event.settled : event.length], key=lambda token: token == mask)
    rest = [MASK_SIGN * len(list(run)) if masked else decode_text(tokenizer, list(run)) for masked, run in runs]
    return replace(event, text=text, provisional="".join(rest))
