"""Why: the yardstick of the bundled model: what an autoregressive model of its shape, data and cost can do.

How: ``bash scripts/study_warm_up.sh runs/tiny left_to_right`` trains one, through the entry point of everything else; then
``python scripts/eval_ar_twin.py --model runs/tiny/warm_up_study/left_to_right/sft/final``. Any folder trained with
``loss.name=next_token`` will do, such as ``runs/tiny/warm_up/final``. The weights are answered with as a `transformers`
Llama, greedily, with that library's cache, on the problems of ``scripts/eval_tiny.py``.
Prints a table and one JSON line last.
"""

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.tiny_corpus import HELD_OUT_SEED, TASKS, fresh_prompts
from dllm_var import load_pretrained
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.text.chat import decode_text, render_prompt
from dllm_var.text.special_tokens import SpecialTokens
from evaluation.arguments import new_file, whole

# Our tensor names → those of transformers' Llama, which rotates by halves too.
LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head", "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm", "q_proj": "self_attn.q_proj", "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj", "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


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


def answer(llama: LlamaForCausalLM, tokenizer: Any, special: SpecialTokens, prompts: list[str]) -> list[str | None]:
    """Greedy answers; None where no stop token came within 256 tokens."""
    made = continuations(llama, special, [render_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts])
    return [decode_text(tokenizer, row[:-1]) if row[-1] in special.stop else None for row in made]


@torch.inference_mode()
def continuations(llama: LlamaForCausalLM, special: SpecialTokens, ids: list[list[int]]) -> list[list[int]]:
    """What the model writes behind prompts, up to and with the first stop token, at most 256 tokens."""
    width = max(map(len, ids))
    padded = torch.tensor([[special.pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    made = llama.generate(padded, attention_mask=mask, max_new_tokens=256, do_sample=False)[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in special.stop), len(row)) for row in made]
    return [row[: end + 1] for row, end in zip(made, ends, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a checkpoint trained with loss.name=next_token")
    parser.add_argument("--prompts", type=whole(1), default=500, help="held-out problems per task")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--output", type=new_file, help="also write the JSON line to this file")
    args = parser.parse_args()
    try:
        asked = {task: fresh_prompts(task, HELD_OUT_SEED + args.seed, args.prompts) for task in TASKS}
        pretrained = load_pretrained(args.model)
    except ValueError as error:
        parser.error(str(error))
    tokenizer, special = pretrained.tokenizer, pretrained.special
    llama = as_llama(pretrained.model, special)
    table, exact = Table("task", "exact match"), {}
    for task, problems in asked.items():
        answers: list[str | None] = []
        for i in range(0, len(problems), 50):
            answers += answer(llama, tokenizer, special, [p.instruction for p in problems[i : i + 50]])
        exact[task] = sum(a == p.output for a, p in zip(answers, problems, strict=True)) / len(problems)
        table.add_row(task, f"{exact[task]:.3f}")
    mean = sum(exact.values()) / len(exact)
    table.add_section()
    table.add_row("mean", f"{mean:.3f}")
    Console().print(table)
    line = json.dumps(
        {
            "model": args.model,
            "prompts_per_task": args.prompts,
            "seed": args.seed,
            "macro_exact": round(mean, 4),
            "tasks": exact,
        }
    )
    print(line)
    if args.output is not None:
        args.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
