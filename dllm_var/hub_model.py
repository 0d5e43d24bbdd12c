"""The model class of an exported folder: the network, and the `generate` that dLLM-Var publishes.

`dllm_var.export` writes this file as ``modeling_llada.py`` beside the weights, together with every module it imports, so
that transformers opens the folder where this package is not installed. Inside the package call `dllm_var.generate`.

Legend: B rows, T prompt tokens with padding, L tokens of the longest answer.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.loop import decode
from dllm_var.model.llada import LLaDAModelLM as Network
from dllm_var.text.special_tokens import SpecialTokens


class LLaDAModelLM(Network):  # type: ignore[no-untyped-call]
    """A LLaDA-family mask predictor that decides the length of its answers itself (arXiv 2510.24605)."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_gen_length: int = 1024,
        block_length: int = 64,
        threshold: float = 0.9,
        eos_token_id: int | Iterable[int] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Answers to a batch of prompts; every row is decoded as if it were alone.

        Args:
            input_ids: int64 [B, T], the prompts.
            attention_mask: [B, T]; 0 marks padding, on the left or on the right. None: all of it is prompt.
            max_gen_length: the longest answer in tokens.
            block_length: positions decoded together.
            threshold: every token whose probability is above it is committed, and the likeliest if there is none.
            eos_token_id: the ids that end an answer; default: the config's `eos_token_id` and `eot_token_id`.
            pad_token_id: fills up shorter answers; default: the config's.
            options: further options of `GenerationConfig`: temperature, seed, cfg_scale, cache, early_stop.

        Returns:
            int64 [B, L]: the answers alone, each up to (not including) its first stop token, padded on the right.

        Raises:
            ValueError: an option that is unknown or out of range, a mask with holes.
        """
        known = {field.name for field in fields(GenerationConfig)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ValueError(f"generate does not know {', '.join(unknown)}: it decodes by {', '.join(sorted(known))}.")
        config = GenerationConfig(max_gen_length=max_gen_length, block_length=block_length, threshold=threshold, **options)
        results = decode(self, self._special_tokens(eos_token_id), config, _prompts(input_ids, attention_mask))
        longest = max((len(result.tokens) for result in results), default=0)
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        answers = torch.full((len(results), longest), pad, dtype=torch.int64)
        for row, result in zip(answers, results, strict=True):
            row[: len(result.tokens)] = torch.tensor(result.tokens, dtype=torch.int64)
        return answers.to(input_ids.device)

    def _special_tokens(self, stop: int | Iterable[int] | None) -> SpecialTokens:
        config = self.config
        eot, known = getattr(config, "eot_token_id", None), getattr(config, "known_tokens", None)
        special = SpecialTokens(
            mask=config.mask_token_id, eos=config.eos_token_id, pad=config.pad_token_id, eot=eot, known=known
        )
        return special if stop is None else replace(special, stop=tuple({stop} if isinstance(stop, int) else set(stop)))


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The rows' tokens without padding."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be [rows, tokens], got the shape {tuple(input_ids.shape)}.")
    if attention_mask is None:
        return [list(row) for row in input_ids.tolist()]
    if attention_mask.shape != input_ids.shape:
        shapes = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError(f"attention_mask {shapes[0]} must have the shape of input_ids {shapes[1]}.")
    prompts = []
    for number, (ids, real) in enumerate(zip(input_ids.tolist(), attention_mask.bool().tolist(), strict=True)):
        first, kept = (real.index(True), sum(real)) if any(real) else (0, 0)
        if not all(real[first : first + kept]) or not kept:
            what = "padding in the middle of the prompt" if kept else "no prompt token at all"
            raise ValueError(f"attention_mask has {what} in row {number}: padding belongs on the left or on the right.")
        prompts.append(ids[first : first + kept])
    return prompts
