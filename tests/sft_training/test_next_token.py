"""loss.name=next_token: an autoregressive warm-up that sees only what precedes."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dllm_var.model.checkpoint import load_config
from dllm_var.text.special_tokens import resolve
from sft_training.build import build_collate, build_model, build_stream, open_tokenizer
from sft_training.config import SftConfig
from sft_training.records import read_metrics
from sft_training.sft import train

NO_VIEW = ("loss.name=next_token", "view.tail_share=0", "view.tail_max=0")


def a_batch(config: SftConfig) -> dict[str, Any]:
    tokenizer, special = open_tokenizer(config)
    stream = build_stream(config, 288, resolve(tokenizer, load_config(Path(str(config.model.config)))))
    return build_collate(config, special)(list(islice(stream, 4)))


def test_every_response_token_is_predicted_from_the_position_before_it(
    settings: Callable[..., SftConfig], write_samples: Callable[..., Path]
) -> None:
    batch = a_batch(settings(write_samples([9, 4, 17, 12, 8, 15, 21, 6, 9, 30]), *NO_VIEW))
    ids, predicts = batch["noisy"], batch["masked"]
    assert not bool((ids == 270).any()), "nothing is masked"
    rows, places = predicts.nonzero(as_tuple=True)
    assert torch.equal(batch["clean"][predicts], ids[rows, places + 1])
    assert len(rows) == batch["counts"].response == batch["counts"].masked
    assert batch["counts"].eos == int(torch.isin(ids[rows, places + 1], torch.tensor([256, 257])).sum())


def test_the_logged_loss_is_the_causal_cross_entropy(
    settings: Callable[..., SftConfig], write_samples: Callable[..., Path]
) -> None:
    files = write_samples([9, 4, 17, 12, 8, 15, 21, 6, 9, 30])
    config = settings(files, *NO_VIEW, "training.local_batch_size=4", "training.grad_accum_steps=1", "training.max_steps=1")
    batch, model = a_batch(config), build_model(config)
    length = batch["noisy"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(4, -1, -1)
    logits = model(batch["noisy"], attention_mask=batch["real"], query_mask=causal).logits[batch["masked"]]
    expected = F.cross_entropy(logits, batch["clean"][batch["masked"]]).item()
    train(config)
    (line,) = [line for line in read_metrics(Path(config.output_dir)) if "loss" in line]
    found = line["loss"]
    assert not any(name.startswith("ce/t_") for name in line), "there is no mask level"
    assert found == pytest.approx(expected, rel=1e-4)
