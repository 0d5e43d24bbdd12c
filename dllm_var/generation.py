"""Prompts in, answers out: text on top of the decode loop.

`generate` and `stream` are the public calls (`dllm_var.generate`, `dllm_var.stream`); the demo and `evaluation/` use them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.loop import DecodeLoop, check_requests, decode
from dllm_var.decoding.results import Event, Generation
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
        batch_size: prompts decoded together; default all of them.

    Raises:
        ValueError: a prompt that cannot be rendered, is too long, or holds ids that the model does not have; a bad batch
            size.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more, or None for all prompts at once.")
    requests = range(len(prompts)) if requests is None else requests
    check_requests(requests, len(prompts))
    ids = _prompt_ids(model, prompts)
    size = batch_size or max(1, len(prompts))
    answers: list[Generation] = []
    for start in range(0, len(prompts), size):
        at = slice(start, start + size)
        answers += decode(model.model, model.special, config or GenerationConfig(), ids[at], requests[at])
    return [_with_text(model.tokenizer, answer) for answer in answers]


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
    ids = _prompt_ids(model, prompts)
    for event in DecodeLoop(model.model, model.special, config or GenerationConfig(), ids, requests):
        yield event_with_text(model, event)


def _prompt_ids(model: Pretrained, prompts: Sequence[Prompt]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise ValueError("prompts is one text: give a list, generate(model, [text]), even for a single prompt.")
    return [model.prompt_ids(prompt) for prompt in prompts]


def _with_text(tokenizer: PreTrainedTokenizerBase | None, answer: Generation) -> Generation:
    return answer if tokenizer is None else replace(answer, text=decode_text(tokenizer, answer.tokens))


def event_with_text(model: Pretrained, event: Event) -> Event:
    """The event with its settled and provisional text; as it is where there is no tokenizer."""
    tokenizer, mask = model.tokenizer, model.special.mask
    if tokenizer is None:
        return event
    text = decode_text(tokenizer, event.response[: event.settled]).rstrip("\ufffd")  # of a character that is not all there
    runs = groupby(event.response[event.settled : event.length], key=lambda token: token == mask)
    rest = [MASK_SIGN * len(list(run)) if masked else decode_text(tokenizer, list(run)) for masked, run in runs]
    result = None if event.result is None else _with_text(tokenizer, event.result)
    return replace(event, text=text, provisional="".join(rest), result=result)
