"""From messages to token ids and back: the chat template for inference, the training renderer, streamed decoding.

Called by the demo and the engine (`render_prompt`, `StreamDecoder`), by ``dataset/transfer_text2token.py``
(`render_sample`), and by whoever saves a tokenizer (`CHAT_TEMPLATE`).

Control tokens are put down as ids, one by one; everything a person wrote is encoded with the tokenizer's special parsing
off. So ``<|mdm_mask|>`` or ``<|eot_id|>`` inside a message is a row of ordinary characters, whoever typed it. Text and
token borders are those of LLaDA's published template (GSAI-ML/LLaDA-8B-Instruct).
"""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from dllm_var.text.special_tokens import BOS, EOS, EOT, HEADER, HEADER_END, SPECIAL_TOKEN_NAMES, control_ids, required_id

__all__ = ["CHAT_TEMPLATE", "ROLES", "SPECIAL_TOKEN_NAMES", "TEMPLATES", "Message", "StreamDecoder"]
__all__ += ["decode_text", "encode_text", "render_prompt", "render_sample"]

Message = dict[str, str]
ROLES = ("system", "user", "assistant")
TEMPLATES = ("chat", "plain")

# What a tokenizer saved by us carries as chat_template.jinja: the same text as `render_prompt`. Like the published one it
# always ends with an assistant header, whatever add_generation_prompt says.
CHAT_TEMPLATE = (
    "{{- bos_token -}}\n"
    "{%- for message in messages -%}\n"
    f"{{{{- '{HEADER}' ~ message['role'] ~ '{HEADER_END}\\n\\n' -}}}}\n"
    f"{{{{- message['content'] | trim ~ '{EOT}' -}}}}\n"
    "{%- endfor -%}\n"
    f"{{{{- '{HEADER}assistant{HEADER_END}\\n\\n' -}}}}\n"
)

_REPLACEMENT = "\ufffd"  # what bytes that are not (yet) a character decode to


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text: nothing added, and no control token however the text is worded.

    Raises:
        ValueError: the text is no valid Unicode, or the tokenizer would make a control token of it all the same.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: {text[: error.start].lstrip()[-20:]!r} is followed by half of a "
            "surrogate pair, or by a byte that is no text."
        ) from error
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    forbidden = control_ids(tokenizer)
    if not forbidden.isdisjoint(ids):
        culprit = next(token_id for token_id in ids if token_id in forbidden)
        raise ValueError(
            f"this tokenizer turns plain text into the control token {tokenizer.convert_ids_to_tokens(culprit)} ({culprit}) "
            "even with special parsing off. Mark that token as special in tokenizer.json, or use another tokenizer."
        )
    return ids


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of ids, control tokens dropped. Bytes that form no character become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, continue_final_message: bool = False
) -> list[int]:
    """Ids of a conversation that waits for an answer, closed by an assistant header.

    For ordinary text the same ids as the published template gives through the tokenizer: role and content are stripped
    and encoded together with the two line ends before them, because a byte-level tokenizer may join those.

    Args:
        continue_final_message: the last message is how the answer begins. It stays open, its end is not stripped, and it is
            encoded apart from what precedes it, as the answers that a model is trained on are.

    Raises:
        ValueError: no message, a message without a known role or text content, a last message to continue that is not the
            assistant's, or a tokenizer that lacks a chat token.
    """
    _check(messages)
    if continue_final_message and messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message is the {messages[-1]['role']}'s: only an assistant's can be continued.")
    start, end, eot = (required_id(tokenizer, name) for name in (HEADER, HEADER_END, EOT))
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer names no BOS token, which a chat prompt opens with: set bos_token to {BOS}.")
    ids = [int(tokenizer.bos_token_id)]
    for message in messages[:-1] if continue_final_message else messages:
        ids += [start, *encode_text(tokenizer, message["role"]), end]
        ids += [*encode_text(tokenizer, "\n\n" + message["content"].strip()), eot]
    begun = encode_text(tokenizer, messages[-1]["content"].lstrip()) if continue_final_message else []
    return [*ids, start, *encode_text(tokenizer, "assistant"), end, *encode_text(tokenizer, "\n\n"), *begun]


def render_sample(
    tokenizer: PreTrainedTokenizerBase, prompt_messages: Sequence[Message], response: str, template: str
) -> tuple[list[int], list[int]]:
    """Prompt ids and response ids of one training sample, tokenised apart, so that their border is exact.

    ``chat``: the prompt is `render_prompt`'s, which is what the model will see; the response is the stripped answer, eot,
    EOS. ``plain``: the prompt is the contents one after the other, the response the answer as it is and EOS.

    Raises:
        ValueError: unknown template, empty response, bad messages, or a tokenizer that lacks a token the template needs.
    """
    if template not in TEMPLATES:
        raise ValueError(f"template={template!r} is unknown: choose one of {', '.join(TEMPLATES)}.")
    if not response.strip():
        raise ValueError("the response is empty: a sample must have something to learn.")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer names no EOS token, which every response ends with: set eos_token to {EOS}.")
    eos = int(tokenizer.eos_token_id)
    if template == "chat":
        ending = [required_id(tokenizer, EOT), eos]
        return render_prompt(tokenizer, prompt_messages), [*encode_text(tokenizer, response.strip()), *ending]
    _check(prompt_messages)
    prompt = "".join(message["content"] for message in prompt_messages)
    return encode_text(tokenizer, prompt), [*encode_text(tokenizer, response), eos]


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise ValueError("there is no message to render: give at least one, such as {'role': 'user', 'content': '...'}.")
    for number, message in enumerate(messages, start=1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number} has role {role!r}: choose one of {', '.join(ROLES)}.")
        if not isinstance(content, str):
            raise ValueError(f"message {number} has content of type {type(content).__name__}: it must be text.")


class StreamDecoder:
    """Decodes ids that arrive a few at a time, holding back bytes that are not a whole character yet.

    What `push` and the final `finish` return, joined, is `decode_text` of all ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._decode: Callable[[Sequence[int]], str] = lambda ids: decode_text(tokenizer, ids)
        self._ids: list[int] = []  # the last settled stretch (for tokenizers that look back) and all that came since
        self._settled = 0  # how many of them are settled
        self._shown = 0  # how many characters of their text were returned

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be empty."""
        self._ids.extend(ids)
        text = self._decode(self._ids)
        # An unfinished character at the end decodes to exactly one replacement character; only that one may still change.
        whole = not text.endswith(_REPLACEMENT)
        fresh = text[self._shown : len(text) if whole else len(text) - 1]
        self._shown += len(fresh)
        if whole:
            del self._ids[: self._settled]
            self._settled = len(self._ids)
            self._shown = len(self._decode(self._ids))
        return fresh

    def finish(self) -> str:
        """What is still held back, as it stands. The decoder is then ready for another text."""
        rest = self._decode(self._ids)[self._shown :]
        self._ids, self._settled, self._shown = [], 0, 0
        return rest
