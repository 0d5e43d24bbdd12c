"""Trains the bundled model's tokenizer: byte-level BPE with single digits and the control tokens of LLaDA.

Called by ``scripts/train_tiny.sh``. The folder it writes holds the tokenizer and a ``config.json`` with the model's
shape, which is all that a training from scratch starts from.

    python dataset/tiny_tokenizer.py --text runs/tiny/text/train/problems.jsonl --output_dir runs/tiny/start
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dllm_var.model.config import LLaDAConfig
from dllm_var.text.chat import CHAT_TEMPLATE, ROLES
from dllm_var.text.special_tokens import BOS, EOS, MASK, SPECIAL_TOKEN_NAMES

# So few that names and things fall into letters and syllables, which are copied soon; whole words take many times as long.
VOCABULARY = 448
SAMPLES = 40_000  # more of them change nothing: the corpus has few different words

# 2.8 M parameters. Rows of training are much shorter than max_sequence_length, which only says how far decoding may go.
SHAPE = {
    "d_model": 192, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 512, "mlp_ratio": 4,
    "vocab_size": VOCABULARY, "embedding_size": VOCABULARY, "max_sequence_length": 2048, "rope": True,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "weight_tying": False, "block_type": "llama",
    "layer_norm_type": "rms", "activation_type": "silu",
}  # fmt: skip


def texts(path: Path) -> Iterator[str]:
    """The texts to learn from: instructions and answers as they are, and what the chat template adds."""
    with open(path, encoding="utf-8") as lines:
        for line in islice(lines, SAMPLES):
            record = json.loads(line)
            yield record["instruction"]
            yield record["output"]
            yield from (*ROLES, "\n\n")


def train(path: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose first ids are the control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # A digit is a token of its own, with the space before it if there is one: numbers stay aligned, and cheap.
        [pre_tokenizers.Split(Regex(r" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKEN_NAMES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(path), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, mask_token=MASK)
    fast.add_special_tokens({"additional_special_tokens": [t for t in SPECIAL_TOKEN_NAMES if t not in (BOS, EOS, MASK)]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON Lines with instruction and output")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for tokenizer and config.json")
    args = parser.parse_args()
    try:
        tokenizer = train(args.text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--text {args.text} cannot be read as JSON Lines with instruction and output: {error!r}")
    if len(tokenizer) != VOCABULARY:
        raise SystemExit(
            f"{args.text} gave {len(tokenizer)} tokens instead of {VOCABULARY}: it is too small or too uniform."
        )
    tokenizer.save_pretrained(args.output_dir)
    config = LLaDAConfig(
        **SHAPE,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.save_pretrained(args.output_dir)
    print(f"{args.output_dir}: tokenizer with {len(tokenizer)} tokens, config.json of the model to train")


if __name__ == "__main__":
    main()
