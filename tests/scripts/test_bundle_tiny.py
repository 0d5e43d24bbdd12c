"""The bundled model's folder is made from a run's own records."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from dataset.tiny_corpus import TASKS
from dllm_var import load_pretrained
from dllm_var.model.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]


def finished_run(folder: Path) -> Path:
    """A run folder as scripts/train_tiny.sh leaves it, with the bundled weights."""
    model = load_pretrained("tiny")
    assert model.tokenizer is not None
    save_model(model.model, folder / "sft" / "final")
    model.tokenizer.save_pretrained(folder / "sft" / "final")
    (folder / "sft" / "metrics.jsonl").write_text('{"step": 70, "loss": 0.25, "seconds": 3600}\n', encoding="utf-8")
    facts = {"parameters": 2_828_736, "samples": 1234, "max_steps": 70, "tokens_per_step": 3072, "threads": 2}
    (folder / "sft" / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    settings = {
        "packing": {"max_length": 256},
        "view": {"block_share": 0.4, "tail_share": 0.8, "every_block": True, "tail_eos": True},
    }
    settings |= {"forward_process": {"t_min": 0.6, "t_max": 1.0}, "loss": {}, "training": {}}
    settings["dataset"] = {"files": f"{folder}/last.jsonl"}
    (folder / "sft" / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for stage, steps, group, key, value in (
        ("blocks_4", 30, "forward_process", "t_min", 0.1),
        ("blocks_16", 20, "view", "block_share", 0.3),
        ("blocks_32", 10, "view", "tail_share", 0.7),
    ):
        (folder / stage).mkdir()
        (folder / stage / "run.json").write_text(json.dumps({"max_steps": steps, "tokens_per_step": 1000}), encoding="utf-8")
        (folder / stage / "metrics.jsonl").write_text(f'{{"step": {steps}, "seconds": 600}}\n', encoding="utf-8")
        other = settings | {group: settings[group] | {key: value}} | {"dataset": {"files": f"{folder}/more.jsonl"}}
        (folder / stage / "config.yaml").write_text(yaml.safe_dump(other), encoding="utf-8")
    score = {"exact": 0.875, "by_eos": 1.0, "right_length": 0.9, "tokens_per_forward": 5.5, "longest": 12}
    one = {"macro_exact": 0.875, "by_eos": 1.0, "tokens_per_forward": 5.5, "tasks": {"spell": score}}
    evaluation = {
        "model": str(folder / "sft"),
        "prompts_per_task": 500,
        "threshold": 0.9,
        "settings": {"block 32": one, "no cache": one},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    (folder / "warm_up").mkdir()
    (folder / "warm_up" / "run.json").write_text('{"max_steps": 1200}', encoding="utf-8")
    (folder / "warm_up" / "config.yaml").write_text(yaml.safe_dump({"dataset": {"files": f"{folder}/train.jsonl"}}))
    (folder / "warm_up" / "metrics.jsonl").write_text('{"step": 1200, "seconds": 1800}\n', encoding="utf-8")
    (folder / "text" / "train").mkdir(parents=True)
    (folder / "text" / "train" / "problems.jsonl").write_text('{"instruction": "Add 1", "input": "", "output": "3"}\n')
    for name, samples, turns in (("more", 99, ["add", "word", "word"]), ("last", 88, ["count"])):
        (folder / name).mkdir()
        (folder / name / "made.json").write_text(json.dumps({"samples": samples, "seed": 2, "turns": turns}))
    (folder / "text" / "made.json").write_text(json.dumps({"samples": 1234, "seed": 1, "turns": list(TASKS)}))
    (folder / "commits").write_text("abc1234\nabd5678\n", encoding="utf-8")
    return folder


def test_the_card_states_what_the_run_recorded_and_the_folder_opens(tmp_path: Path) -> None:
    run, output = finished_run(tmp_path / "run"), tmp_path / "bundle"
    command = [sys.executable, str(ROOT / "scripts" / "bundle_tiny.py"), "--run", str(run), "--output", str(output)]
    subprocess.run(command, check=True, timeout=120)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert "| spell | 0.875 | 0.875 | 1.000 | 5.5 | 12 |" in card
    words = card.replace("\n", " ")
    assert (
        "30 optimizer steps of the recipe below with `forward_process.t_min: 0.1`, "
        "20 optimizer steps of the recipe below with `view.block_share: 0.3`, "
        "10 optimizer steps of the recipe below with `view.tail_share: 0.7`, "
        "then 70 optimizer steps of 3,072" in words
    )
    assert "(275,040 in all masked steps" in words
    assert "2.0 hours" in words
    assert "at commit abc1234, abd5678. From random weights, 1,200 steps of next-token prediction" in card
    assert json.loads((output / "evaluation.json").read_text(encoding="utf-8"))["model"] == "tiny"
    assert json.loads((output / "token_freq.json").read_text(encoding="utf-8"))["num_token"] > 3
    assert (
        "1,234 samples for stage 1 (seed 1, the tasks in turn), then 99 samples for stages 2, 3 and 4 (seed 2, in turn add, "
        "word, word), then 88 samples for stage 5 (seed 2, in turn count), " in words
    )
    assert "40% are shown as block decoding meets them, all blocks of a sample at once" in card.replace("\n", " ")
    assert len(json.loads((output / "examples.json").read_text(encoding="utf-8"))) == 6
    assert load_pretrained(output).model.num_parameters() == 2_828_736
    limits, shipped = (
        (folder / "README.md").read_text(encoding="utf-8").partition("## Limits")[2]
        for folder in (output, ROOT / "dllm_var" / "bundled" / "tiny")
    )
    assert limits == shipped
    assert [line[:4] for line in limits.splitlines() if line[:3] in ("| 1", "| 2")] == ["| 1 ", "| 2 "]
