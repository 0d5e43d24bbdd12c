"""Whole runs on a small model: resuming, learning by heart, the three losses, and what a run leaves behind."""

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState

from dllm_var import GenerationConfig, generate, load_pretrained
from dllm_var.diffusion.packing import Row
from dllm_var.model.checkpoint import load_model
from dllm_var.text.chat import decode_text
from dllm_var.text.special_tokens import resolve
from sft_training import checkpoints, sft
from sft_training.build import build_model, build_stream
from sft_training.checkpoints import POSITION_FILE, newest_checkpoint
from sft_training.config import SftConfig
from sft_training.records import append_metrics, forget_metrics_after, read_metrics
from sft_training.sft import prepare, train
from sft_training.trainer import SftTrainer

Settings = Callable[..., SftConfig]
LENGTHS = [3 + (5 * i) % 19 for i in range(40)]


def metrics(config: SftConfig, key: str = "loss") -> dict[int, Any]:
    """A logged value by step."""
    return {line["step"]: line[key] for line in read_metrics(Path(config.output_dir)) if key in line}


class StopAt(TrainerCallback):
    """Ends a run at a step, without a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def weights(config: SftConfig) -> dict[str, torch.Tensor]:
    return load_model(Path(config.output_dir) / "final").state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(
    settings: Settings, write_samples: Any, optimizer: str
) -> None:
    files = write_samples(LENGTHS)
    options = (f"training.optimizer={optimizer}", "view.tail_share=0.5", "view.tail_max=8", "packing.attention=sample")
    whole = settings(files, *options, "training.save_steps=2", output="whole")
    train(whole)
    stopped = settings(files, *options, "training.save_steps=2", output="stopped")
    trainer, _ = prepare(stopped)
    trainer.add_callback(StopAt(5))  # one step after the last checkpoint: that step is done again
    trainer.train()
    resumed = settings(files, *options, "training.save_steps=2", output="stopped")
    checkpoint = newest_checkpoint(Path(resumed.output_dir))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-4"
    train(resumed)
    for key in ("loss", "grad_norm", "learning_rate", "tokens/masked"):
        assert metrics(resumed, key) == metrics(whole, key)
    assert sorted(metrics(resumed)) == [1, 2, 3, 4, 5, 6]
    assert equal(weights(whole), weights(resumed))


def test_all_processes_write_to_the_folder_of_the_first(
    settings: Settings, write_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(write_samples(LENGTHS), "training.max_steps=2", "training.save_steps=1")
    first = config.output_dir.replace("run", "first")  # whose clock read another second

    def broadcast(said: list[Any]) -> None:
        said[0] = first if said[0] == config.output_dir else said[0]

    monkeypatch.setattr(checkpoints, "broadcast_object_list", broadcast)
    train(config)
    assert {path.name for path in Path(first).iterdir()} >= {"checkpoint-2", "final", "run.json", "config.yaml"}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_goes_on_takes_the_rate_decay_and_betas_of_the_new_start(
    settings: Settings, write_samples: Any, optimizer: str
) -> None:
    files, run = write_samples(LENGTHS), ("training.save_steps=2", f"training.optimizer={optimizer}")
    run += ("training.schedule=constant", "training.warmup_steps=0")
    train(settings(files, *run, "training.max_steps=2", "training.learning_rate=1e-3"))
    other = ("training.max_steps=4", "training.learning_rate=1e-5", "training.weight_decay=0.5", "training.betas=[0.5,0.6]")
    config = settings(files, *run, *other)
    trainer = train(config)
    assert list(metrics(config, "learning_rate").values()) == [1e-3, 1e-3, 1e-5, 1e-5]
    assert trainer.optimizer is not None
    for group in trainer.optimizer.param_groups:
        assert group["weight_decay"] == (0.5 if group["params"][0].ndim == 2 else 0.0)
        assert group.get("betas", (0.5, 0.6)) == (0.5, 0.6)
    facts = json.loads((Path(config.output_dir) / "run.json").read_text(encoding="utf-8"))
    assert facts["lr_at_steps"]["100"] == 1e-5


@pytest.mark.parametrize("kinds", [("muon", "adamw"), ("adamw", "muon")])
def test_the_state_of_another_optimizer_is_refused_by_name(settings: Settings, write_samples: Any, kinds: Any) -> None:
    files = write_samples(LENGTHS)
    before, now = (
        ("training.max_steps=" + steps, f"training.optimizer={kind}") for steps, kind in zip("24", kinds, strict=True)
    )
    train(settings(files, *before, "training.save_steps=2"))
    with pytest.raises(ValueError, match=rf"training\.optimizer='{kinds[1]}' cannot take up what .*checkpoint-2 holds"):
        train(settings(files, *now))


def test_learning_a_few_samples_by_heart_makes_greedy_decoding_repeat_them_and_stop(
    settings: Settings, write_chat: Any, start_folder: Path
) -> None:
    pairs = [("a", "one"), ("b", "two and two"), ("c", "three"), ("d", "44 is four four"), ("e", "5"), ("f", "six!"),
             ("g", "seven up"), ("h", "at eight")]  # fmt: skip
    config = settings(
        write_chat(pairs), "packing.max_length=64", "packing.attention=sample", "view.tail_share=0.9", "view.tail_max=24",
        "training.local_batch_size=8", "training.grad_accum_steps=1", "training.max_steps=300", "training.warmup_steps=10",
        "training.learning_rate=1e-2", "training.optimizer=muon", "training.logging_steps=50", "training.weight_decay=0",
        "forward_process.t_max=1.0", "training.save_steps=1000",
    )  # fmt: skip
    train(config)
    losses = metrics(config)
    assert losses[300] < 0.1
    assert losses[300] < losses[50] / 4
    pretrained = load_pretrained(Path(config.output_dir) / "final")
    answers = generate(pretrained, [question for question, _ in pairs], GenerationConfig(max_gen_length=64, block_length=16))
    assert [answer.text for answer in answers] == [answer for _, answer in pairs]
    assert {answer.stop_reason for answer in answers} == {"eos"}


@pytest.mark.parametrize("loss", ["plain_mean", "token_sum_global", "elbo"])
def test_each_loss_is_the_one_that_its_formula_says(settings: Settings, write_samples: Any, loss: str) -> None:
    config = settings(write_samples(LENGTHS), f"loss.name={loss}", "training.max_steps=1", "training.learning_rate=0")
    trainer, _ = prepare(config)
    batches = [trainer.data_collator(rows) for rows in pairs_of_rows(trainer)]
    trainer.train()
    model = build_model(config).eval()
    terms, masked, responses = [], [], []
    for batch in batches:
        with torch.no_grad():
            logits = model(batch["noisy"], batch["real"]).logits[batch["masked"]]
        each = torch.nn.functional.cross_entropy(logits, batch["clean"][batch["masked"]], reduction="none")
        terms.append((each, batch["t"][batch["masked"]]))
        masked.append(len(each))
        responses.append(batch["counts"].response)
    expected = {
        "plain_mean": sum(each.mean() for each, _ in terms) / 2,
        "token_sum_global": sum(each.sum() for each, _ in terms) / sum(masked),
        "elbo": sum((each / t).sum() / n for (each, t), n in zip(terms, responses, strict=True)) / 2,
    }
    assert masked[0] != masked[1]
    assert metrics(config)[1] == pytest.approx(float(expected[loss]), abs=1e-5)


def pairs_of_rows(trainer: SftTrainer) -> list[list[Row]]:
    """The two micro-batches of the first step, read from a stream of their own."""
    special = resolve(trainer.tokenizer, trainer.model.config)
    rows = list(islice(build_stream(trainer.config, 288, special), 4))
    return [rows[:2], rows[2:]]


def test_rows_without_any_loss_position_give_0_and_never_nan(settings: Settings, tmp_path: Path) -> None:
    lines = [json.dumps({"id": f"p:{i}", "input_ids": [97] * 40, "prompt_length": 40}) for i in range(40)]
    lines.append(json.dumps({"input_ids": [97] * 39 + [256], "prompt_length": 39}))  # never reached
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for loss in ("plain_mean", "token_sum_global", "elbo"):
        config = settings(
            tmp_path / "prompts.jsonl", f"loss.name={loss}", "dataset.shuffle=false", "training.max_steps=2", output=loss
        )
        train(config)
        assert set(metrics(config).values()) == {0.0}
        assert set(metrics(config, "grad_norm").values()) == {0.0}


def test_a_run_leaves_everything_that_was_promised(settings: Settings, write_samples: Any) -> None:
    config = settings(
        write_samples([*LENGTHS, *[100] * 9]), "training.save_steps=3", "training.save_total_limit=1",
        "training.trace_rows=true", "training.schedule=wsd", "training.decay_steps=2", "model.final_dtype=bf16",
    )  # fmt: skip
    with pytest.warns(UserWarning, match="left out"):
        train(config)
    folder = Path(config.output_dir)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert facts["optimizer"] == ["AdamW"]
    assert facts["lr_at_steps"]["0"] == 0.0
    assert facts["tokens_per_step"] == 2 * 2 * 48
    assert (facts["world_size"], facts["autocast"], facts["weights"], facts["steps"]) == (1, "no", "float32", 6)
    assert facts["dropped_samples"] >= 1
    assert facts["special_tokens"] == {"mask": 270, "stop": [256, 257], "pad": 256}
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-6"]
    assert (folder / "checkpoint-6" / POSITION_FILE).is_file()
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert "max_length: 48" in (folder / "config.yaml").read_text(encoding="utf-8")
    rates = list(metrics(config, "learning_rate").values())
    assert rates == pytest.approx([0.0, 3e-3, 3e-3, 3e-3, 3e-3, 1.5e-3])
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    traced = [json.loads(line)["rows"] for line in (folder / "rows-rank0.jsonl").read_text().splitlines()]
    assert traced[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for name in ("checkpoint-6", "final"):
        opened = load_pretrained(folder / name)
        assert decode_text(opened.tokenizer, opened.prompt_ids("hi")).startswith("user\n\nhi")
    assert load_model(folder / "final").config.dtype == torch.bfloat16


def test_the_trainer_counts_tokens_and_loss_by_level(settings: Settings, write_samples: Any) -> None:
    config = settings(write_samples(LENGTHS), "training.max_steps=4")
    trainer, _ = prepare(config)
    batch = trainer.data_collator(pairs_of_rows(trainer)[0] + pairs_of_rows(trainer)[1])
    trainer.train()
    assert metrics(config, "tokens/response")[1] == batch["counts"].response
    assert metrics(config, "tokens/masked")[1] == batch["counts"].masked
    assert metrics(config, "tokens/eos")[1] == batch["counts"].eos
    names = ["ce/t_0.10-0.30", "ce/t_0.30-0.50", "ce/t_0.50-0.70", "ce/t_0.70-0.90"]
    found = [value for name in names for value in metrics(config, name).values()]
    assert len(found) >= 4
    assert all(2.0 < value < 9.0 for value in found)


def test_training_goes_on_from_a_checkpoint_folder_with_fresh_data(
    settings: Settings, write_samples: Any, chat_folder: Path
) -> None:
    config = settings(
        write_samples(LENGTHS), "model=tiny", f"model.path={chat_folder}", "model.config=null", "model.tokenizer=null",
        "training.max_steps=1", "training.learning_rate=0",
    )  # fmt: skip
    train(config)
    assert equal(weights(config), load_model(chat_folder, torch.float32).state_dict())


@pytest.mark.parametrize(("option", "passes"), [("dataset.epochs=2", 2.0), ("dataset.epochs=null", 3.0)])
def test_max_steps_follows_from_the_epochs_which_are_three_by_default(
    settings: Settings, write_samples: Any, option: str, passes: float
) -> None:
    config = settings(write_samples(LENGTHS), "training.max_steps=null", option)
    trainer = train(config)
    assert trainer.state.global_step == trainer.args.max_steps
    assert 6 * passes < trainer.state.global_step < 9 * passes
    assert metrics(config, "epoch")[trainer.state.global_step] == pytest.approx(passes, abs=0.1)


def test_recomputing_blocks_in_the_backward_changes_no_loss(settings: Settings, write_samples: Any) -> None:
    files = write_samples(LENGTHS)
    plain, saving = settings(files, output="a"), settings(files, "training.gradient_checkpointing=true", output="b")
    train(plain)
    train(saving)
    assert metrics(plain) == pytest.approx(metrics(saving), abs=1e-6)


def test_threads_compilation_recomputing_and_clipping_reach_what_they_are_for(
    settings: Settings, write_samples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, Any]] = []
    threads: list[int] = []
    monkeypatch.setattr(sft, "compile_network", lambda _model, **how: compiled.append(how))
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    options = ("gradient_checkpointing=true", "compile=true", "threads=3", "max_grad_norm=0.25")
    trainer, _ = prepare(settings(write_samples(LENGTHS), *(f"training.{option}" for option in options)))
    assert (compiled, threads, trainer.args.max_grad_norm) == ([{"dynamic": False}], [3], 0.25)
    assert trainer.model.model.gradient_checkpointing


def test_bf16_autocast_keeps_float32_weights_and_nearly_the_same_loss(settings: Settings, write_samples: Any) -> None:
    files = write_samples(LENGTHS)
    exact, fast = settings(files, output="a"), settings(files, "precision=bf16", output="b")
    train(exact)
    trainer = train(fast)
    assert trainer.model.dtype == torch.float32
    assert metrics(exact) == pytest.approx(metrics(fast), rel=2e-2)
    assert metrics(exact) != metrics(fast)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("model.tokenizer=nowhere",), "tokenizer 'nowhere' is not a folder"),
        (("model.config=nowhere",), "the checkpoint folder nowhere does not exist"),
        (("dataset.files=nowhere.jsonl",), r"dataset\.files: no file matches"),
        (("validation.files=nowhere.jsonl",), r"validation\.files: no file matches"),
        (
            ("dataset.epochs=1", "training.max_steps=99"),
            r"max_steps=99, but dataset\.epochs=1 gives \d steps: lower max_steps",
        ),
        (("resume=nowhere",), "resume='nowhere': choose auto, never, or the folder of a complete checkpoint"),
        (("training.expect_processes=2",), r"training\.expect_processes=2, but the launcher started 1 process"),
        (
            ("training.max_steps=null", "dataset.epochs=1", "training.local_batch_size=500"),
            "fewer than the 1000 of one optimizer",
        ),
    ],
)
def test_unusable_settings_end_before_a_model_is_built(
    settings: Settings, write_samples: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.setattr("sft_training.sft.build_model", lambda config: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match=said):
        prepare(settings(write_samples(LENGTHS), *options))


def test_an_incomplete_checkpoint_does_not_count(settings: Settings, write_samples: Any) -> None:
    config = settings(write_samples(LENGTHS), "training.save_steps=2")
    train(config)
    folder = Path(config.output_dir)
    assert newest_checkpoint(folder) == folder / "checkpoint-6"
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    assert newest_checkpoint(folder) == folder / "checkpoint-4"


def test_another_number_of_rows_in_a_step_cannot_take_up_a_run(settings: Settings, write_samples: Any) -> None:
    files = write_samples(LENGTHS)
    train(settings(files, "training.max_steps=2"))
    with pytest.raises(
        ValueError, match=r"took 8 rows for 2 steps, this run takes 6 a step: keep training\.local_batch_size"
    ):
        prepare(settings(files, "training.local_batch_size=3"))
    # the same number of rows, differently divided, is welcome
    assert prepare(settings(files, "training.local_batch_size=1", "training.grad_accum_steps=4"))[1] is not None


def test_a_metrics_line_cut_short_by_a_kill_does_not_stop_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    forget_metrics_after(tmp_path, 1)
    append_metrics(tmp_path, 2, {"loss": 1.4})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2.0, 1.4]
