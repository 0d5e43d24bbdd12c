"""What EOS-masked training on packed rows costs, against the other ways of training a masked diffusion model.

Why: the recipe of dLLM-Var (arXiv 2510.24605) is said to be cheap for three reasons: rows hold no padding, a token is
computed once (block diffusion, arXiv 2503.09573, computes a noisy and a clean copy), and the head runs on masked
positions only. Every arm trains on the same samples; costs are per trained token, a token of a response.

How: ``python scripts/benchmark_training.py`` (``--rounds 7 --length 1024 --output FILE``): about ten minutes. Exact columns
(positions, FLOPs, bytes of the loss) do not depend on the machine, seconds are paired ratios (``paired_timing.py``). The
last line is one JSON object.

Legend: B rows, L tokens of a row, M positions in the loss, D width, V vocabulary rows.
"""

import dllm_var.quiet  # noqa: F401  # isort: skip (before transformers)
import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from forward_counts import block_weights
from paired_timing import Ratio, interleave, matmul_rate, ratio
from peak_memory import peak_bytes
from plan_memory import LLADA_8B
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from dataset.tiny_corpus import TASKS, problems
from dllm_var import Pretrained, load_pretrained
from dllm_var.diffusion.corruption import corrupt, uniforms
from dllm_var.diffusion.decoding_view import DecodingView
from dllm_var.diffusion.objective import masked_cross_entropy
from dllm_var.diffusion.packing import Packer
from dllm_var.model.config import LLaDAConfig
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.chat import render_sample
from evaluation.arguments import new_file, whole
from sft_training.config import MOST_THREADS
from sft_training.overrides import compose_settings
from sft_training.sft import prepare

ROUNDS = 7
BLOCK = 32  # of the two-copy layout


@dataclass(frozen=True)
class Sample:
    """A tokenised sample."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Load:
    """What one arm computes on in one micro-batch: ids, positions and wanted [B, L], targets [M]; see-mask [B, L, L]."""

    ids: Tensor
    wanted: Tensor
    targets: Tensor
    real: Tensor | None = None
    positions: Tensor | None = None
    sees: Tensor | None = None
    full_logits: bool = False


def read_samples(pretrained: Pretrained, number: int) -> list[Sample]:
    """Samples of all tasks of the bundled corpus in turn."""
    tokenizer = pretrained.tokenizer
    assert tokenizer is not None
    sources = [problems(task, 1, held_out=False) for task in TASKS]
    drawn = [next(sources[i % len(sources)]) for i in range(number)]
    return [Sample(*render_sample(tokenizer, [{"role": "user", "content": p.instruction}], p.output, "chat")) for p in drawn]


def packed(pretrained: Pretrained, samples: Sequence[Sample], length: int, rows: int) -> list[Load]:
    """Our layout: many samples in a row, full attention, one copy, the head on masked positions."""
    special = pretrained.special
    packer = Packer(length=length, pad_id=special.pad)
    done = []
    for number, sample in enumerate(samples):
        ids = np.array(sample.prompt + sample.response)
        response = np.arange(len(ids)) >= len(sample.prompt)
        done += packer.add(DecodingView().apply(str(number), 0, ids, response, seed=0, mask_id=special.mask))
    done += packer.flush()
    loads = []
    for start in range(0, len(done), rows):
        part = done[start : start + rows]
        clean, response, noise, real = (
            torch.from_numpy(np.stack([getattr(row, name) for row in part])) for name in ("ids", "response", "noise", "real")
        )
        t = torch.tensor([[0.1 + 0.8 * float(uniforms(1, row.index, "t")[0])] for row in part])
        made = corrupt(clean, response, noise, t, mask_id=special.mask, stop=special.stop)
        loads.append(Load(made.noisy, made.masked, clean[made.masked], real))
    return loads


def with_full_logits(loads: Sequence[Load]) -> list[Load]:
    """The same with logits of all positions, as the public reference has it."""
    return [Load(**{**vars(load), "full_logits": True}) for load in loads]


def padded(pretrained: Pretrained, samples: Sequence[Sample], rows: int) -> list[Load]:
    """LLaDA's SFT layout (arXiv 2502.09992): a sample a row, filled up with EOS, which counts as response."""
    special, loads = pretrained.special, []
    for start in range(0, len(samples), rows):
        part = samples[start : start + rows]
        length = max(len(sample.prompt) + len(sample.response) for sample in part)
        clean = torch.full((len(part), length), special.eos)
        response = torch.ones(clean.shape, dtype=torch.bool)
        for row, sample in enumerate(part):
            ids = sample.prompt + sample.response
            clean[row, : len(ids)] = torch.tensor(ids)
            response[row, : len(sample.prompt)] = False
        noise = torch.from_numpy(uniforms(clean.numel(), start, "noise")).view(clean.shape)
        t = torch.from_numpy(uniforms(len(part), start, "t"))[:, None] * 0.999 + 0.001
        made = corrupt(clean, response, noise, t, mask_id=special.mask, stop=special.stop, always_mask_eos=False)
        loads.append(Load(made.noisy, made.masked, clean[made.masked]))
    return loads


def two_copies(loads: Sequence[Load], block: int = BLOCK) -> list[Load]:
    """Block diffusion's layout (arXiv 2503.09573): noisy blocks that see themselves and the clean blocks before them."""
    made = []
    for load in loads:
        rows, length = load.ids.shape
        clean = load.ids.clone()
        clean[load.wanted] = load.targets
        of = torch.arange(length) // block
        before, same = of[None, :] < of[:, None], of[None, :] == of[:, None]
        sees = torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), before | same], 1)])
        made.append(
            Load(
                ids=torch.cat([load.ids, clean], 1),
                wanted=torch.cat([load.wanted, torch.zeros_like(load.wanted)], 1),
                targets=load.targets,
                real=None if load.real is None else load.real.repeat(1, 2),
                positions=torch.arange(length).repeat(2)[None],
                sees=sees.expand(rows, -1, -1),
            )
        )
    return made


def loss_of(model: LLaDAModelLM, load: Load) -> Tensor:
    """Mean cross-entropy of the wanted positions."""

    def chunked(hidden: Tensor, head: Tensor) -> Tensor:
        weights = torch.full((len(load.targets),), 1.0 / max(len(load.targets), 1))
        return masked_cross_entropy(hidden, head, load.targets, weights)[0]

    ask = partial(model, load.ids, load.real, load.positions, query_mask=load.sees)
    if load.full_logits:
        return F.cross_entropy(ask().logits.float()[load.wanted], load.targets)
    return ask(logits_for=load.wanted, project=chunked).logits


def train_on(model: LLaDAModelLM, loads: Sequence[Load]) -> None:
    """Forward and backward of every micro-batch; the gradients are thrown away."""
    for load in loads:
        loss_of(model, load).backward()
    model.zero_grad(set_to_none=True)


def counted_flops(model: LLaDAModelLM, loads: Sequence[Load]) -> int:
    """Floating-point operations of the matrix products, counted as they run."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        train_on(model, loads)
    return counter.get_total_flops()


def analytic_flops(config: LLaDAConfig, loads: Sequence[Load], allowed_pairs_only: bool = False) -> int:
    """The same by formula: three times (forward, and twice that backward) 2·weights per position, 4·D per attention pair and
    layer, and 2·V·D per position that gets logits. Dense attention computes all pairs, an ideal kernel the allowed ones."""
    width, weights, total = config.d_model, block_weights(config), 0
    for load in loads:
        rows, length = load.ids.shape
        allowed = rows * length * length if load.sees is None else int(load.sees.sum())
        pairs = allowed if allowed_pairs_only else rows * length * length
        with_head = load.ids.numel() if load.full_logits else len(load.targets)
        total += 2 * weights * load.ids.numel() + 4 * width * config.n_layers * pairs
        total += 2 * config.embedding_rows * width * with_head
    return 3 * total


def at_llada_scale(length: int = 8192, block: int = BLOCK) -> float:
    """FLOPs of two copies over those of one at LLaDA-8B's shape, with an ideal attention kernel and half of a row masked."""
    width, layers, inner = LLADA_8B["d_model"], LLADA_8B["n_layers"], LLADA_8B["mlp_hidden_size"]
    linear, pairs = 2 * layers * (4 * width * width + 3 * width * inner), 4 * width * layers
    head = 2 * LLADA_8B["vocab_size"] * width * length // 2
    one = linear * length + pairs * length**2 + head
    return (2 * linear * length + pairs * (length**2 + length * block) + head) / one


def bytes_of_loss(chunk: int | None, positions: int, masked: int, width: int = 64) -> int:
    """Peak of allocated bytes in forward and backward of head and loss at LLaDA's vocabulary; chunk None: full logits."""
    hidden = torch.zeros(positions, width, requires_grad=True)
    head = torch.zeros(LLADA_8B["vocab_size"], width, requires_grad=True)
    targets = torch.zeros(masked, dtype=torch.long)

    def work() -> None:
        if chunk is None:
            F.cross_entropy((hidden @ head.T)[:masked], targets).backward()
        else:
            masked_cross_entropy(hidden[:masked], head, targets, chunk=chunk)[0].backward()

    return peak_bytes(work)


class StepTimes(TrainerCallback):
    """When each optimizer step of a run ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def trainer_overhead(steps: int, rounds: int) -> Ratio:
    """Seconds of a step in the Trainer (data, corruption, logging and all) over those of a bare loop on prepared batches."""
    above, below = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "samples.jsonl"
        pretrained = load_pretrained("tiny")
        lines = [{"input_ids": s.prompt + s.response, "prompt_length": len(s.prompt)} for s in read_samples(pretrained, 300)]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        for number in range(rounds):
            config = compose_settings(
                [
                    f"dataset.files={data}", "packing.max_length=256", "packing.attention=sample", "precision=fp32",
                    f"training.max_steps={steps}", "training.local_batch_size=8", "training.grad_accum_steps=1",
                    "training.save_steps=100000", "training.device=cpu", f"output_dir={folder}/{number}",
                ]
            )  # fmt: skip
            trainer, _ = prepare(config)
            times = StepTimes()
            trainer.add_callback(times)
            rows = iter(prepare(config)[0].stream)  # of another trainer: the stream of this one is not to move on
            batches = [trainer.data_collator(part) for part in batched(rows, 8, steps)]
            trainer.train()
            above.append((times.ends[-1] - times.ends[1]) / (steps - 2))
            below.append(bare_loop(trainer, batches))
    return ratio(above, below)


def batched(rows: Iterator[Any], size: int, number: int) -> Iterator[list[Any]]:
    """The first batches of a stream."""
    for _ in range(number):
        yield list(islice(rows, size))


def bare_loop(trainer: Any, batches: Sequence[dict[str, Any]]) -> float:
    """Seconds of a step that is forward, backward, clipping and optimizer, and nothing else."""
    model = trainer.network.train()
    optimizer = trainer.optimizer
    ends = []
    for batch in batches:
        masked = batch["masked"]
        load = Load(batch["noisy"], masked, batch["clean"][masked], batch["real"], None, batch["sees"])
        loss_of(model, load).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return (ends[-1] - ends[1]) / (len(ends) - 2)


@dataclass(frozen=True)
class Cost:
    """What an arm computes per trained token; exact."""

    positions: float
    flops: float
    flops_of_allowed_pairs: float
    flops_by_formula: float


def costs(model: LLaDAModelLM, arms: dict[str, list[Load]], tokens: int) -> dict[str, Cost]:
    """The exact columns."""
    return {
        name: Cost(
            positions=sum(load.ids.numel() for load in loads) / tokens,
            flops=counted_flops(model, loads) / tokens,
            flops_of_allowed_pairs=analytic_flops(model.config, loads, allowed_pairs_only=True) / tokens,
            flops_by_formula=analytic_flops(model.config, loads) / tokens,
        )
        for name, loads in arms.items()
    }


def build_arms(pretrained: Pretrained, samples: Sequence[Sample], length: int, rows: int) -> dict[str, list[Load]]:
    """Every layout over the same samples; ours comes first."""
    ours = packed(pretrained, samples, length, rows)
    return {
        "packed, one copy": ours,
        "full logits": with_full_logits(ours),
        "padded samples": padded(pretrained, samples, rows * max(1, length // 256)),
        "two copies": two_copies(ours),
    }


def show(console: Console, exact: dict[str, Cost], ratios: dict[str, Ratio], share: float) -> None:
    """The table of the arms."""
    ours = next(iter(exact.values()))
    table = Table(
        "arm", "positions", "FLOPs", "FLOPs ÷ ours", "ideal kernel ÷ ours", "seconds ÷ ours", title="per trained token"
    )
    for name, cost in exact.items():
        table.add_row(
            name, f"{cost.positions:.2f}", f"{cost.flops / 1e6:.1f} M", f"{cost.flops / ours.flops:.2f}",
            f"{cost.flops_of_allowed_pairs / ours.flops_of_allowed_pairs:.2f}", str(ratios.get(name, "1")),
        )  # fmt: skip
    console.print(table)
    console.print(f"share of this machine's matrix-product rate that ours reaches (MFU): {share:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=whole(1), default=96, help="samples that every arm trains on")
    parser.add_argument("--length", type=whole(1), default=1024, help="tokens of a packed row")
    parser.add_argument("--rows", type=whole(1), default=2, help="packed rows of a micro-batch")
    parser.add_argument("--rounds", type=whole(0), default=ROUNDS, help="timed rounds; 0: exact columns only")
    parser.add_argument("--threads", type=whole(1, MOST_THREADS), default=1)
    parser.add_argument("--output", type=new_file, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, pretrained = Console(width=125), load_pretrained("tiny")
    samples = read_samples(pretrained, args.samples)
    tokens = sum(len(sample.response) for sample in samples)
    arms = build_arms(pretrained, samples, args.length, args.rows)
    exact = costs(pretrained.model, arms, tokens)
    loss_bytes = {"positions": 2048, "masked": 1024, "chunk": 128}
    loss_bytes |= {"full": bytes_of_loss(None, 2048, 1024), "chunked": bytes_of_loss(128, 2048, 1024)}
    result: dict[str, Any] = {
        "torch": torch.__version__, "threads": args.threads, "cores": os.cpu_count(), "samples": args.samples,
        "length": args.length, "rows": args.rows, "trained_tokens": tokens,
        "per_trained_token": {name: asdict(cost) for name, cost in exact.items()}, "loss_bytes": loss_bytes,
        "two_copies_at_llada_scale": at_llada_scale(),
    }  # fmt: skip
    ratios: dict[str, Ratio] = {}
    if args.rounds:
        work = {name: partial(train_on, pretrained.model, loads) for name, loads in arms.items()}
        seconds = interleave(work, args.rounds)
        ours, *others = arms
        ratios = {name: ratio(seconds[name], seconds[ours]) for name in others}
        fastest = statistics.median(seconds[ours])
        share = exact[ours].flops * tokens / fastest / matmul_rate()
        show(console, exact, ratios, share)
        overhead = trainer_overhead(steps=12, rounds=args.rounds)
        console.print(
            f"a step in the Trainer ÷ a bare step: {overhead.median:.3f} [{overhead.low:.3f}, {overhead.high:.3f}]"
        )
        result |= {
            "rounds": args.rounds, "tokens_per_second": tokens / fastest, "mfu": share,
            "seconds_ratio": {name: asdict(value) for name, value in ratios.items()}, "trainer_overhead": asdict(overhead),
        }  # fmt: skip
    else:
        show(console, exact, ratios, float("nan"))
    console.print(f"two copies ÷ ours at LLaDA-8B's shape and rows of 8,192, by formula: {at_llada_scale():.2f}")
    full, chunked = loss_bytes["full"], loss_bytes["chunked"]
    console.print(
        f"peak of head and loss at LLaDA's vocabulary: {chunked / 1e6:.0f} MB chunked, {full / 1e6:.0f} MB full logits"
    )
    line = json.dumps(result)
    print(line)
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
