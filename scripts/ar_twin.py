"""Why: the yardstick of the bundled model: an autoregressive model of the same shape, data, steps and optimizer.

How: ``python scripts/ar_twin.py --run runs/tiny`` after ``scripts/train_tiny.sh`` (it reads that run's data and settings);
stopped, it goes on from its last checkpoint. The network is ours under a causal mask, trained on next tokens; it is
answered with as a `transformers` Llama of the same weights, greedily, with that library's cache. Prints a table and one
JSON line last. Steps, rows and tokens per step equal the run's, so the two have cost the same forward and backward passes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root / "dataset")]
from tiny_corpus import TASKS, fresh_prompts  # noqa: E402

from dllm_var.diffusion.decoding_view import DecodingView  # noqa: E402
from dllm_var.diffusion.objective import masked_cross_entropy  # noqa: E402
from dllm_var.diffusion.packing import Packer, Row  # noqa: E402
from dllm_var.model.checkpoint import load_config  # noqa: E402
from dllm_var.model.llada import LLaDAModelLM  # noqa: E402
from dllm_var.text.chat import decode_text, render_prompt  # noqa: E402
from dllm_var.text.special_tokens import SpecialTokens, resolve  # noqa: E402
from dllm_var.text.tokenizer import load_tokenizer  # noqa: E402
from sft_training.build import compile_network  # noqa: E402
from sft_training.data import RowStream  # noqa: E402
from sft_training.optimizer import build_optimizer  # noqa: E402
from sft_training.samples import SampleFiles, find_files  # noqa: E402

HELD_OUT_SEED = 20_000  # the problems of scripts/eval_tiny.py
# Our tensor names → those of transformers' Llama, which rotates by halves too.
LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head", "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


def next_token_batch(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, L], real [B, L], the positions that predict a response token [B, L], and those tokens [M]."""
    ids, real, response = (
        torch.from_numpy(np.stack([getattr(row, name) for row in rows])) for name in ("ids", "real", "response")
    )
    predicts = torch.zeros_like(response)
    predicts[:, :-1] = response[:, 1:]  # a response never opens a row: its prompt stands before it
    return ids, real, predicts, ids[:, 1:][predicts[:, :-1]]


def train(run: Path, folder: Path, steps: int, settings: dict[str, Any], special: SpecialTokens) -> LLaDAModelLM:
    """Train on next tokens with the settings of the run."""
    t, length = settings["training"], settings["packing"]["max_length"]
    config = load_config(run / "start")
    torch.manual_seed(t["seed"])
    model = LLaDAModelLM(config).float()
    optimizer = build_optimizer(
        model, t["optimizer"], lr=t["learning_rate"], weight_decay=t["weight_decay"], betas=tuple(t["betas"])
    )
    samples = SampleFiles(
        find_files("run", str(run / "train.jsonl")), vocabulary=config.embedding_rows, mask_id=special.mask
    )
    packer = Packer(length, "whole", special.pad)
    stream = RowStream(samples, DecodingView(), packer, seed=t["seed"], shuffle_seed=settings["dataset"]["shuffle_seed"])
    done, seconds, state = 0, 0.0, folder / "checkpoint.pt"
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        stream.restore(json.loads(saved["data"]))
        done, seconds = saved["step"], saved["seconds"]
    compile_network(model)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[None]
    warmup, decay, rows = t["warmup_steps"], t["decay_steps"], iter(stream)
    started, last = time.time() - seconds, done
    for step in tqdm(range(done, steps), initial=done, total=steps, unit="step"):
        rate = t["learning_rate"] * min(step / warmup, 1.0, (steps - step) / decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, real, predicts, targets = next_token_batch([next(rows) for _ in range(t["local_batch_size"])])
        weight = torch.full((len(targets),), 1.0 / len(targets))
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
            loss = model(
                ids, attention_mask=real, query_mask=causal.expand(len(ids), -1, -1), logits_for=predicts,
                project=lambda hidden, head, y=targets, w=weight: masked_cross_entropy(hidden, head, y, w)[0],
            ).logits  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            last = step + 1
            tqdm.write(f"step {last} loss {loss.item():.4f}")
            data = json.dumps(stream.state(last * t["local_batch_size"]))
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": data, "step": last}
            torch.save({**saved, "seconds": time.time() - started}, folder / "checkpoint.tmp")
            (folder / "checkpoint.tmp").replace(state)
    return model


def as_llama(model: LLaDAModelLM, special: SpecialTokens) -> LlamaForCausalLM:
    """The same weights as a Llama, whose greedy decoding has the library's own cache."""
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.embedding_rows, hidden_size=c.d_model, intermediate_size=c.mlp_width, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.num_key_value_heads, rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=False,
            max_position_embeddings=c.max_sequence_length, bos_token_id=special.bos, eos_token_id=list(special.stop),
            pad_token_id=special.pad,
        )
    )  # fmt: skip
    renamed = {}
    for name, value in model.state_dict().items():
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = value
    llama.load_state_dict(renamed)
    return llama.eval()


@torch.inference_mode()
def answer(llama: LlamaForCausalLM, tokenizer: Any, special: SpecialTokens, prompts: list[str]) -> list[str | None]:
    """Greedy answers; None where no stop token came within 256 tokens."""
    ids = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    width = max(map(len, ids))
    padded = torch.tensor([[special.pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    made = llama.generate(padded, attention_mask=mask, max_new_tokens=256, do_sample=False)[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in special.stop), None) for row in made]
    return [None if end is None else decode_text(tokenizer, row[:end]) for row, end in zip(made, ends, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of scripts/train_tiny.sh")
    parser.add_argument("--steps", type=int, help="default: as many as the run")
    parser.add_argument("--prompts", type=int, default=500, help="held-out problems per task")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = yaml.safe_load((args.run / "sft" / "config.yaml").read_text(encoding="utf-8"))
    steps = args.steps or settings["training"]["max_steps"]
    folder = args.run / f"ar_twin_{steps}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(args.run / "start")
    special = resolve(tokenizer, load_config(args.run / "start"))
    llama = as_llama(train(args.run, folder, steps, settings, special), special)
    table, exact = Table("task", "exact match"), {}
    for task in TASKS:
        problems = fresh_prompts(task, HELD_OUT_SEED, args.prompts)
        answers: list[str | None] = []
        for i in range(0, len(problems), 50):
            answers += answer(llama, tokenizer, special, [p.instruction for p in problems[i : i + 50]])
        exact[task] = sum(a == p.output for a, p in zip(answers, problems, strict=True)) / len(problems)
        table.add_row(task, f"{exact[task]:.3f}")
    mean = sum(exact.values()) / len(exact)
    table.add_section()
    table.add_row("mean", f"{mean:.3f}")
    Console().print(table)
    line = json.dumps({"steps": steps, "prompts_per_task": args.prompts, "macro_exact": round(mean, 4), "tasks": exact})
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
