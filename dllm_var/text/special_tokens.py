"""Which token ids have a meaning of their own: mask, EOS, end of turn, padding. Resolved once, never written as numbers.

Called when a checkpoint is opened (`dllm_var.load_pretrained`, the SFT entry point) and by `dllm_var.text.chat`, which
asks here which ids text must never produce. The names are those of the published LLaDA tokenizer; which ids they have
is the tokenizer's and the config's business, and where the two disagree nothing is guessed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm_var.model.config import LLaDAConfig

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
MASK = "<|mdm_mask|>"
HEADER = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
EOT = "<|eot_id|>"

# Every control token in use, in the order in which a tokenizer of ours numbers them.
SPECIAL_TOKEN_NAMES = (BOS, EOS, MASK, HEADER, HEADER_END, EOT)

_EOS_AND_EOT = (-1,)  # default of SpecialTokens.stop: not a possible stop set, and unlike () never a meant one


@dataclass(frozen=True)
class SpecialTokens:
    """The control tokens of one model. Built by `resolve`, or directly for a checkpoint that has no tokenizer.

    Attributes:
        mask: the absorbing token.
        eos: end of a response.
        pad: filler of unequal rows; often the same id as `eos`.
        eot: end of a turn, None for a vocabulary without one.
        bos: what a chat prompt opens with, None for a vocabulary without one.
        stop: the stop set, ids that end a response; left out it is {eos, eot}, sorted.
        known: ids from here on are rows of the embedding that no token has, and are never decoded; None: there are none.

    Raises:
        ValueError: an id is negative or no integer, or the mask is also EOS, eot, padding or a stop token.
    """

    mask: int
    eos: int
    pad: int
    eot: int | None = None
    bos: int | None = None
    stop: tuple[int, ...] = _EOS_AND_EOT
    known: int | None = None

    def __post_init__(self) -> None:
        if self.stop == _EOS_AND_EOT:
            object.__setattr__(self, "stop", tuple(sorted({self.eos} if self.eot is None else {self.eos, self.eot})))
        for name in ("mask", "eos", "pad", "eot", "bos"):
            value = getattr(self, name)
            if value is None and name in ("eot", "bos"):
                continue
            if not _is_id(value):
                raise ValueError(f"special token {name}={value!r} must be a token id, a whole number from 0.")
            if name != "mask" and value == self.mask:
                raise ValueError(f"special tokens mask and {name} are both {value}: a mask must be a token of its own.")
        if self.mask in self.stop or not all(_is_id(stop) for stop in self.stop):
            raise ValueError(f"stop={self.stop!r} must hold token ids, and not the mask ({self.mask}).")


def resolve(tokenizer: PreTrainedTokenizerBase, config: LLaDAConfig) -> SpecialTokens:
    """The control tokens that tokenizer and config agree on.

    The mask comes from the config (the published tokenizer names none), EOS and padding from both, eot and BOS from the
    tokenizer.

    Raises:
        ValueError: tokenizer and config name different ids, neither names one, a token is not exactly one id, an id lies
            outside the embedding, or one of them is a token that ordinary text can contain.
    """
    mask = _agreed("mask", (tokenizer.mask_token_id, single_id(tokenizer, MASK)), tokenizer, config)
    eos = _agreed("eos", (tokenizer.eos_token_id,), tokenizer, config)
    known = 1 + max(eos, *tokenizer.get_vocab().values())
    special = SpecialTokens(
        mask=mask,
        eos=eos,
        pad=_agreed("pad", (tokenizer.pad_token_id,), tokenizer, config),
        eot=single_id(tokenizer, EOT),
        bos=tokenizer.bos_token_id,
        known=known if known < config.embedding_rows else None,
    )
    for name in ("mask", "eos", "pad", "eot", "bos"):
        value = getattr(special, name)
        if value is None:
            continue
        if value >= config.embedding_rows:
            raise ValueError(
                f"special token {name}={value} lies outside the {config.embedding_rows} embedding rows of the config: "
                "tokenizer and checkpoint do not belong together."
            )
        token = tokenizer.convert_ids_to_tokens(value)
        if token is not None and value not in control_ids(tokenizer):
            raise ValueError(
                f"special token {name}={value} is the ordinary token {token!r} of the tokenizer, so a plain text could hold "
                f"it. Correct {name}_token_id in config.json, or mark that token as special in tokenizer.json."
            )
    return special


def single_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The one id of a control token, or None when the vocabulary does not have it.

    Raises:
        ValueError: the vocabulary has the name, but writing it does not give that one id.
    """
    return _single_id(tokenizer, len(tokenizer), name)


@lru_cache(maxsize=64)
def _single_id(tokenizer: PreTrainedTokenizerBase, _size: int, name: str) -> int | None:
    found = _looked_up(tokenizer, name)
    if found is None:
        return None
    ids = tokenizer(name, add_special_tokens=False, split_special_tokens=False, verbose=False)["input_ids"]
    if ids != [found]:
        raise ValueError(
            f"token {name} does not resolve to one id: the vocabulary has it as {found}, but the tokenizer writes it as "
            f"{ids}. Mark it as a special token in tokenizer.json (the Instruct tokenizer of LLaDA does)."
        )
    return found


def required_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Like `single_id`, for a token that there must be.

    Raises:
        ValueError: the vocabulary lacks the token or does not write it as one id.
    """
    found = single_id(tokenizer, name)
    if found is None:
        raise ValueError(
            f"token {name} does not resolve to one id: the tokenizer does not have it. Use a tokenizer with LLaDA's chat "
            "tokens (LLaDA-8B-Instruct's, or the bundled one), or the template 'plain'."
        )
    return found


def control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that text must never become: every token marked special, and every name this package gives a meaning."""
    return _control_ids(tokenizer, len(tokenizer), tuple(tokenizer.all_special_ids))


@lru_cache(maxsize=8)
def _control_ids(tokenizer: PreTrainedTokenizerBase, _size: int, named: tuple[int, ...]) -> frozenset[int]:
    # Size and named ids are in the key because both can be changed on a tokenizer that is in use.
    marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ours = {found for name in SPECIAL_TOKEN_NAMES if (found := _looked_up(tokenizer, name)) is not None}
    return frozenset(named) | marked | ours


def _looked_up(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The vocabulary's id of a name; None when it is absent (some tokenizers then answer with their unknown token)."""
    found = tokenizer.convert_tokens_to_ids(name)
    return found if isinstance(found, int) and tokenizer.convert_ids_to_tokens(found) == name else None


def _agreed(name: str, from_tokenizer: Iterable[int | None], tokenizer: PreTrainedTokenizerBase, config: LLaDAConfig) -> int:
    """The id that the config and the tokenizer's answers (None: says nothing) have in common."""
    option = f"{name}_token_id"
    value: Any = getattr(config, option, None)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if value is not None and not _is_id(value):
        raise ValueError(f"{option}={value!r} of config.json is not one token id (eot is read from the tokenizer).")
    for other in from_tokenizer:
        if other is not None and value is not None and other != value:
            token = tokenizer.convert_ids_to_tokens(other)
            raise ValueError(
                f"tokenizer and config.json disagree about the {name} token: the tokenizer says {other} ({token}), "
                f"config.json says {option}={value}. Either they belong to different checkpoints or one was edited: "
                "correct the wrong one."
            )
        value = other if value is None else value
    if value is None:
        raise ValueError(f"no {name} token: neither the tokenizer nor {option} of config.json names one. Set {option}.")
    return int(value)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
