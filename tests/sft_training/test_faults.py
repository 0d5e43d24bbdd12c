"""Runs that are killed, stopped, run out of disk or meet a loss that is not finite: nothing that was saved is lost.

The processes that die come from a server that has imported everything once, since importing takes longer than training.
"""

import errno
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainerControl, TrainerState

from dllm_var.model.checkpoint import load_model
from sft_training import guard, records, trainer
from sft_training.checkpoints import RunStopped, checkpoints_in, faults
from sft_training.config import SftConfig
from sft_training.records import append_metrics, read_metrics
from sft_training.sft import prepare, train

Settings = Callable[..., SftConfig]
LENGTHS = [3 + (5 * i) % 19 for i in range(60)]
ZERO2 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero2.json"
SAME = ("loss", "grad_norm", "learning_rate", "tokens/masked", "epoch", "data/skipped_steps")
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["sft_training.sft", "torch.utils.tensorboard", "deepspeed"])


def lines(config: SftConfig) -> dict[int, dict[str, Any]]:
    """What was logged of each step."""
    return {
        line["step"]: {key: line[key] for key in SAME if key in line}
        for line in read_metrics(Path(config.output_dir))
        if "learning_rate" in line
    }


def weights(config: SftConfig) -> dict[str, torch.Tensor]:
    return load_model(Path(config.output_dir) / "final").state_dict()


def assert_same(ours: SftConfig, theirs: SftConfig) -> None:
    assert lines(ours) == lines(theirs)
    a, b = weights(ours), weights(theirs)
    assert all(torch.equal(a[name], b[name]) for name in b)


def left_over(config: SftConfig) -> list[Path]:
    return list(Path(config.output_dir).glob("partial-*"))


def run(config: SftConfig, fault: str | None, environment: dict[str, str], output: Path) -> None:
    """What a process of its own does: train, with a fault of the given kind."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    records.draw_curve = lambda folder: None
    torch.save, save = (slowed(torch.save) if fault == "slow" else torch.save), torch.save
    if fault == "disk":
        torch.save = lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    if fault == "nan":
        poison({2})
    try:
        train(config)
        output.write_text("finished")
    except RunStopped as stopped:
        output.write_text(str(stopped))
    finally:
        torch.save = save


def slowed(save: Callable[..., None]) -> Callable[..., None]:
    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.3)
        save(*arguments, **options)

    return slow


def poison(calls: set[int], value: float = float("nan")) -> Callable[..., Any]:
    """Make the loss of some micro-batches not finite; returns the real loss."""
    real, count = trainer.masked_cross_entropy, iter(range(1, 10**6))

    def loss(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        total, each = real(*arguments)
        return (total * value, each * value) if next(count) in calls else (total, each)

    trainer.masked_cross_entropy = loss
    return real


def start(config: SftConfig, output: Path, *on_ranks: str | None, zero: bool = False) -> list[BaseProcess]:
    """Start a run on as many processes as there are faults given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank, fault in enumerate(on_ranks):
        group = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(on_ranks)), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }  # fmt: skip
        group |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ZERO2)} if zero else {}
        environment = group if len(on_ranks) > 1 else {}
        given = config, fault, environment, output.with_suffix(f".{rank}")
        process = PROCESSES.Process(target=run, args=given, daemon=True)  # none outlives a test that fails
        process.start()
        started.append(process)
    return started


def finish(config: SftConfig, output: Path, *on_ranks: str | None, zero: bool = False) -> list[str]:
    """Run to the end; what each process said last."""
    for process in start(config, output, *on_ranks, zero=zero):
        process.join(200)
        assert process.exitcode == 0
    return [output.with_suffix(f".{rank}").read_text() for rank in range(len(on_ranks))]


def wait_for(seen: Callable[[], object], processes: list[BaseProcess]) -> None:
    """Until something is seen from outside."""
    until = time.monotonic() + 200
    while not seen():
        assert time.monotonic() < until
        assert all(process.is_alive() for process in processes)
        time.sleep(0.01)


def kill_when(seen: Callable[[], object], processes: list[BaseProcess]) -> None:
    """SIGKILL to all processes as soon as something is seen from outside."""
    wait_for(seen, processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def logged(config: SftConfig, step: int) -> Callable[[], bool]:
    return lambda: any(line["step"] >= step for line in read_metrics(Path(config.output_dir)))


@pytest.fixture
def twins(settings: Settings, write_samples: Any) -> Callable[..., tuple[SftConfig, SftConfig]]:
    """The same settings for a run that is let alone and for one that is not."""

    def build(*options: str) -> tuple[SftConfig, SftConfig]:
        files = write_samples(LENGTHS)
        given = ("training.save_steps=2", *options)
        return settings(files, *given, output="alone"), settings(files, *given, output="troubled")

    return build


@pytest.fixture(autouse=True)
def _no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "draw_curve", lambda folder: None)  # it takes longer than everything else


@pytest.fixture
def restore_loss() -> Iterator[None]:
    real = trainer.masked_cross_entropy
    yield
    trainer.masked_cross_entropy = real


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action()


def train_with(config: SftConfig, monkeypatch: pytest.MonkeyPatch, *callbacks: TrainerCallback) -> None:
    """`train`, with callbacks of the test."""

    def prepared(given: SftConfig) -> Any:
        made = prepare(given)
        for callback in callbacks:
            made[0].add_callback(callback)
        return made

    with monkeypatch.context() as patch:
        patch.setattr("sft_training.sft.prepare", prepared)
        train(config)


def test_a_run_killed_at_a_step_and_while_it_saves_goes_on_with_the_same_bits(
    twins: Callable[..., tuple[SftConfig, SftConfig]],
    chat_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    alone, troubled = twins(
        "model=tiny", f"model.path={chat_folder}", "model.config=null", "model.tokenizer=null", "adapter=lora",
        "adapter.dropout=0.3", "training.logging_steps=3",
    )  # fmt: skip
    train(alone)
    step = int.from_bytes(os.urandom(1)) % 4 + 1  # a line of step 3 or 4 may be a checkpoint's
    kill_when(logged(troubled, step), start(troubled, tmp_path / "said", None))
    partial = Path(troubled.output_dir) / "partial-checkpoint-6"
    kill_when(lambda: any(partial.rglob("model*.safetensors")) or any(partial.rglob("adapter*")),
              start(troubled, tmp_path / "said", "slow"))  # fmt: skip
    assert left_over(troubled) == [partial]
    assert [path.name for path in checkpoints_in(Path(troubled.output_dir))] == ["checkpoint-4", "checkpoint-2"]
    train(troubled)
    assert f"{partial} is what an interrupted writing (or deleting) left; it is removed." in caplog.messages
    assert sorted(lines(alone)) == [2, 3, 4, 6]
    assert lines(troubled) == lines(alone), f"killed after step {step}"
    for name in ("adapter_model.safetensors",):
        ours, theirs = ((Path(config.output_dir) / "final" / name).read_bytes() for config in (troubled, alone))
        assert ours == theirs


def test_a_loss_that_is_no_number_stops_the_run_and_names_rows_and_samples(
    twins: Callable[..., tuple[SftConfig, SftConfig]], restore_loss: None
) -> None:
    alone, troubled = twins()
    train(alone)
    real = poison({6})  # the second micro-batch of step 3
    with pytest.raises(RunStopped) as stopped:
        train(troubled)
    said = str(stopped.value)
    assert said.startswith("the loss of step 3 is nan on rows 10, 11 with the samples train:")
    assert "the newest checkpoint is" in said
    assert "checkpoint-2. Look at these samples" in said
    assert [path.name for path in checkpoints_in(Path(troubled.output_dir))] == ["checkpoint-2"]
    assert sorted(lines(troubled)) == [1, 2]
    trainer.masked_cross_entropy = real  # the fault passes: the run is whole again
    train(troubled)
    assert_same(troubled, alone)


def test_a_skipped_step_moves_no_weight_and_no_optimizer_state_and_is_counted(
    twins: Callable[..., tuple[SftConfig, SftConfig]], restore_loss: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, troubled = twins("training.on_nan=skip", "training.weight_decay=0.5")
    train(alone)
    seen: list[dict[str, Any]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
            optimizer = others["optimizer"].state_dict()["state"]
            now = [value.clone() for value in others["model"].parameters()]
            seen.append({"weights": now, "steps": {float(entry["step"]) for entry in optimizer.values()}})

    poison({5, 6}, float("inf"))
    train_with(troubled, monkeypatch, Look())
    assert all(torch.equal(a, b) for a, b in zip(seen[1]["weights"], seen[2]["weights"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[2]["weights"], seen[3]["weights"], strict=True))
    assert [look["steps"] for look in seen] == [{1.0}, {2.0}, {2.0}, {3.0}, {4.0}, {5.0}]
    ours, theirs = lines(troubled), lines(alone)
    assert "loss" not in ours[3]
    assert [ours[step]["data/skipped_steps"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert ours[3]["tokens/masked"] == 0
    assert [ours[step]["learning_rate"] for step in ours] == [theirs[step]["learning_rate"] for step in theirs]
    assert json.loads((Path(troubled.output_dir) / "run.json").read_text(encoding="utf-8"))["skipped_steps"] == 1
    assert "NaN" not in (Path(troubled.output_dir) / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_log_line_over_a_skipped_step_is_the_mean_of_the_others_and_too_many_in_a_row_end_the_run(
    twins: Callable[..., tuple[SftConfig, SftConfig]], restore_loss: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, troubled = twins("training.on_nan=skip", "training.learning_rate=0", "training.save_steps=6")
    troubled.training.logging_steps = 3
    train(alone)
    real = poison({5})  # half of step 3
    monkeypatch.setattr(guard, "IN_A_ROW", 2)
    train(troubled)
    each = lines(alone)
    assert lines(troubled)[3]["loss"] == pytest.approx((each[1]["loss"] + each[2]["loss"]) / 2, rel=1e-6)
    assert lines(troubled)[3]["tokens/masked"] == each[1]["tokens/masked"] + each[2]["tokens/masked"]
    assert lines(troubled)[6]["loss"] == pytest.approx(sum(each[step]["loss"] for step in (4, 5, 6)) / 3, rel=1e-6)

    trainer.masked_cross_entropy = real
    poison({4, 5, 6})  # steps 2 and 3: with a checkpoint, and so perhaps a new start, between them
    troubled.training.save_steps, troubled.resume = 2, "never"
    with monkeypatch.context() as patch:
        patch.setattr(StopAt, "step", 2)
        train_with(troubled, patch, StopAt())
    troubled.resume = "auto"
    trainer.masked_cross_entropy = real
    poison({1})
    with pytest.raises(RunStopped, match=r"the loss of step 3 is nan .*, as in the 1 steps before it\. .*checkpoint-2"):
        train(troubled)


class StopAt(TrainerCallback):
    """Ends a run at a step."""

    step = 0

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **others: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(("room", "file"), [(100_000, "weights"), (200_000, "optimizer")])
def test_a_full_disk_while_saving_ends_with_a_sentence_and_loses_nothing(
    twins: Callable[..., tuple[SftConfig, SftConfig]], monkeypatch: pytest.MonkeyPatch, room: int, file: str
) -> None:
    _, troubled = twins("training.max_steps=4")
    with largest_file(resource.RLIM_INFINITY):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        limit = At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard)))
        with pytest.raises(RunStopped) as stopped:
            train_with(troubled, monkeypatch, limit)
    said = str(stopped.value)
    assert said.startswith(f"checkpoint-4 could not be written to {troubled.output_dir} (")
    assert "checkpoint-2. Make room" in said
    assert left_over(troubled) == []
    kept = Path(troubled.output_dir) / "checkpoint-2"
    assert faults(kept) == []
    needed = int(said.split("takes about ")[1].split(" bytes")[0].replace(",", ""))
    there = sum((kept / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert needed == pytest.approx(there, rel=0.1)
    assert [line["step"] for line in read_metrics(Path(troubled.output_dir))][:4] == [1, 2, 3, 4]
    if file == "optimizer":
        assert "(fewer bytes were taken than given, as by a full disk)" in said
        train(troubled)
        assert sorted(lines(troubled)) == [1, 2, 3, 4]


def test_a_full_disk_that_a_library_tells_in_words_alone_ends_with_a_sentence_too(
    twins: Callable[..., tuple[SftConfig, SftConfig]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, troubled = twins("training.max_steps=4")

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as the tokenizer's writer does

    limit = At(3, lambda: monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full))
    with pytest.raises(RunStopped, match=r"checkpoint-4 could not be written to .* \(No space left on device"):
        train_with(troubled, monkeypatch, limit)
    assert left_over(troubled) == []
    monkeypatch.undo()
    train(troubled)
    assert sorted(lines(troubled)) == [1, 2, 3, 4]


def test_a_metric_line_that_finds_no_room_leaves_the_file_as_it_was(
    twins: Callable[..., tuple[SftConfig, SftConfig]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    append_metrics(tmp_path, 1, {"loss": 2.0})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with largest_file(len(before) + 10), pytest.raises(OSError, match="File too large"):
        append_metrics(tmp_path, 2, {"loss": 1.5})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    _, troubled = twins("training.max_steps=3")
    with monkeypatch.context() as patch:
        late = At(3, lambda: patch.setattr("sft_training.records.append_metrics", full))
        with pytest.raises(
            RunStopped, match=r"metrics\.jsonl could not be written to .* \(No space left on device\): [\d,]+ b"
        ):
            train_with(troubled, patch, late)
    assert sorted(lines(troubled)) == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint_and_a_sentence(
    twins: Callable[..., tuple[SftConfig, SftConfig]], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    alone, troubled = twins("training.max_steps=4")
    before = signal.getsignal(number)
    twice = At(3, lambda: [signal.raise_signal(number), signal.raise_signal(number)])  # the launcher passes it on too
    with pytest.raises(RunStopped, match=rf"{number.name}: the run stopped after step 3 of 4 and is saved as checkpoint-3;"):
        train_with(troubled, monkeypatch, twice)
    assert signal.getsignal(number) == before
    assert not (Path(troubled.output_dir) / "final").exists()
    assert faults(Path(troubled.output_dir) / "checkpoint-3") == []
    if number == signal.SIGTERM:
        train(alone)
        train(troubled)
        assert_same(troubled, alone)


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_two_processes_are_killed_skip_and_stop_together_and_go_on_with_the_same_losses(
    twins: Callable[..., tuple[SftConfig, SftConfig]], tmp_path: Path, settings: Settings, write_samples: Any
) -> None:
    alone, troubled = twins("training.expect_processes=2", "training.grad_accum_steps=1")
    said = tmp_path / "said"
    assert finish(alone, said, None, None) == ["finished"] * 2

    kill_when(logged(troubled, 3), start(troubled, said, None, None))
    partial = Path(troubled.output_dir) / "partial-checkpoint-4"
    kill_when(lambda: any(partial.rglob("model.safetensors")), start(troubled, said, "slow", "slow"))
    assert checkpoints_in(Path(troubled.output_dir))[0].name == "checkpoint-2"
    # the second process has no room for its part of checkpoint-4
    full = finish(troubled, said, None, "disk")
    assert "checkpoint-4 could not be written to" in full[0]
    assert "another process could not" in full[0]
    assert "No space left on device" in full[1]
    assert left_over(troubled) == []
    # a signal reaches one of them only, while both save
    processes = start(troubled, said, "slow", "slow")
    wait_for(partial.exists, processes)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(200)
    ended = [said.with_suffix(f".{rank}").read_text().split(":")[:2] for rank in (0, 1)]
    assert [by for by, _ in ended] == ["a signal to another process", "SIGTERM"]
    assert all("the run stopped after step 5 of 6 and is saved as checkpoint-5" in what for _, what in ended)
    newest = Path(troubled.output_dir) / "checkpoint-5"
    (newest / "rng_state_1.pth").unlink()  # the second process wrote it
    assert faults(newest) == ["rng_state_1.pth is missing"]
    assert finish(troubled, said, None, None) == ["finished"] * 2
    ours, theirs = lines(troubled), lines(alone)
    assert ours.keys() == theirs.keys()
    for step in theirs:
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-6)
        assert ours[step]["tokens/masked"] == theirs[step]["tokens/masked"]

    # one process alone meets a loss that is not finite
    troubled.resume, troubled.training.on_nan = "never", "skip"
    assert finish(troubled, said, None, "nan") == ["finished"] * 2
    assert [line["data/skipped_steps"] for line in lines(troubled).values()] == [0, 1, 1, 1, 1, 1]
    # and with DeepSpeed, which leaves the step out by itself
    assert finish(troubled, said, None, "nan", zero=True) == ["finished"] * 2
    assert json.loads((Path(troubled.output_dir) / "run.json").read_text(encoding="utf-8"))["sharding"] == "zero2"
    assert [line["data/skipped_steps"] for line in lines(troubled).values()] == [0, 1, 1, 1, 1, 1]
    assert [line["learning_rate"] for line in lines(troubled).values()] == [
        line["learning_rate"] for line in theirs.values()
    ]
    troubled.training.on_nan = "stop"
    stopped = finish(troubled, said, None, "nan")
    assert stopped[0] == stopped[1]
    assert "the loss of step 2 is nan on rows 6, 7 with the samples" in stopped[0]
