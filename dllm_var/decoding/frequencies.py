"""How often each token occurs in a corpus: what PC-Sampler measures information against (arXiv 2508.13021).

A frequency file is JSON, ``{"num_token": N, "p_baseline_dict": {"id": n}}``, the published format, whose counts may also
be called ``counts``; those of several corpora add up. Written by ``scripts/count_tokens.py``, read by
`dllm_var.decoding.compose`.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE_NAME = "token_freq.json"
KEY = "p_baseline_dict"


def read_frequencies(file: str | Path, vocabulary: int) -> Tensor:
    """Relative frequencies float64 [V] of the ids; one that never occurs counts as having occurred once.

    Raises:
        ValueError: see `check_frequency_file`; or it counts an id that the model does not have.
    """
    total, counts = check_frequency_file(file)
    strange = max(counts, default=0)
    if strange >= vocabulary:
        raise ValueError(f"frequency_file={str(file)!r} counts the id {strange}, but the model has 0..{vocabulary - 1}.")
    frequencies = torch.full((vocabulary,), 1.0 / total, dtype=torch.float64)
    if counts:
        frequencies[torch.tensor(list(counts))] = torch.tensor([n / total for n in counts.values()], dtype=torch.float64)
    return frequencies


def check_frequency_file(file: str | Path) -> tuple[int, dict[int, int]]:
    """The number of tokens and the counts by id of a frequency file.

    Raises:
        ValueError: no such file, or not in the format above.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        total = int(content["num_token"])
        counted = content["counts"] if "counts" in content else content[KEY]
        counts = {int(token): int(n) for token, n in counted.items()}
    except OSError as error:
        raise ValueError(
            f"frequency_file={str(file)!r} cannot be read ({error.strerror}): give a file of token counts."
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(
            f'frequency_file={str(file)!r} is not of the form {{"num_token": N, "p_baseline_dict": {{"id": n}}}}: '
            "make one with scripts/count_tokens.py."
        ) from error
    if total < 1 or min(counts.values(), default=1) < 1 or min(counts, default=0) < 0 or sum(counts.values()) > total:
        raise ValueError(
            f"frequency_file={str(file)!r}: every count must be at least 1, every id at least 0, and num_token at least the "
            "sum of the counts. Make one with scripts/count_tokens.py."
        )
    return total, counts


def write_frequencies(file: str | Path, counts: Mapping[int, int]) -> int:
    """Write counts by id as a frequency file; returns the number of tokens."""
    total = sum(counts.values())
    text = json.dumps({"num_token": total, KEY: {str(token): counts[token] for token in sorted(counts)}})
    partial = Path(f"{file}.part")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)
    return total
