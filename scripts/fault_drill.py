"""Why: what a training run survives is only known after doing it: killed, damaged, out of disk, fed with broken data.

How: ``python scripts/fault_drill.py`` (``--quick``: each fault once). Trains a tiny new model through sft_training/sft.py in
processes of their own, once undisturbed and then once per fault, injects the fault from outside (the loss that is not finite
excepted), starts the same command again where the run ended, and compares. Prints a table and, as the last line, JSON. "Data
lost" counts the steps whose logged figures differ from the undisturbed run's or are missing, and the checkpoints that were
whole when it started again and are not, or had to be made again, in the end. Exit code 1 when anything was lost or a run
did not end as it should.
"""

import argparse
import json
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from rich.console import Console
from rich.table import Table

from dllm_var.text.chat import render_sample
from dllm_var.text.tokenizer import load_tokenizer
from sft_training.checkpoints import MANIFEST_FILE, checkpoints_in, faults
from sft_training.records import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "dllm_var" / "bundled" / "tiny"
STEPS, EVERY = 8, 2  # optimizer steps of a run, and between two checkpoints
COMPARED = ("loss", "grad_norm", "learning_rate", "tokens/masked", "data/skipped_steps")
PATIENCE = 600  # seconds until a run counts as hung

# Importing takes longer than training, so one server imports everything once and the runs are forked from it.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["sft_training.sft", "torch.utils.tensorboard", "deepspeed"])


def run_sft(arguments: list[str], out: Connection, environment: dict[str, str], nan_at: int) -> None:
    """What a process does: sft_training/sft.py, with its output in a pipe and, if asked, one loss that is not finite."""
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    os.environ.update(environment)
    from sft_training import records, trainer

    records.draw_curve = lambda folder: None  # it takes longer than everything else
    if nan_at:
        real, calls = trainer.masked_cross_entropy, iter(range(1, 10**6))
        trainer.masked_cross_entropy = lambda *given: tuple(
            part * (float("nan") if broken else 1.0) for broken in [next(calls) == nan_at] for part in real(*given)
        )
    sys.argv = ["sft.py", *arguments]
    runpy.run_path(str(ROOT / "sft_training" / "sft.py"), run_name="__main__")


def write_down(pipe: Connection, file: Path) -> None:
    """What a process says, into a file; a process whose own files are limited could not write it all."""
    with pipe, file.open("ab") as log:
        while said := os.read(pipe.fileno(), 1 << 16):
            log.write(said)


@dataclass
class Run:
    """One run folder with its own copy of the data, and the processes that are at work in it."""

    folder: Path
    start: Path
    data: Path
    ranks: int = 1
    options: tuple[str, ...] = ()
    processes: list[BaseProcess] = field(default_factory=list)
    scribes: list[Thread] = field(default_factory=list)

    @property
    def said(self) -> str:
        """Everything that its processes said."""
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in sorted(self.folder.glob("said-*")))

    def go(self, nan_at: int = 0) -> None:
        """Start (again): always the same command."""
        self.folder.mkdir(exist_ok=True)
        arguments = [
            "model=scratch", f"model.config={self.start}", f"model.tokenizer={self.start}", f"dataset.files={self.data}",
            f"output_dir={self.folder}", "packing.max_length=48", f"training.local_batch_size={4 // self.ranks}",
            "training.grad_accum_steps=1", "training.warmup_steps=1", "training.learning_rate=3e-3", "training.device=cpu",
            f"training.max_steps={STEPS}", f"training.save_steps={EVERY}", "precision=fp32", *self.options,
        ]  # fmt: skip
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.processes = []
        for rank in range(self.ranks):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks), "MASTER_PORT": port}
            environment = {**group, "MASTER_ADDR": "127.0.0.1"} if self.ranks > 1 else {}
            heard, out = PROCESSES.Pipe(duplex=False)
            self.processes.append(PROCESSES.Process(target=run_sft, args=(arguments, out, environment, nan_at), daemon=True))
            self.processes[-1].start()
            out.close()
            self.scribes.append(Thread(target=write_down, args=(heard, self.folder / f"said-{rank}.log")))
            self.scribes[-1].start()

    def wait(self, seen: Callable[[], object] = lambda: False) -> None:
        """Until something is seen, or the run has ended."""
        until = time.monotonic() + PATIENCE
        while not seen() and any(process.is_alive() for process in self.processes):
            if time.monotonic() > until:
                self.kill()
                raise SystemExit(f"fault_drill.py: the run in {self.folder} hangs. It said:\n{self.said[-2000:]}")
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        for process in self.processes:
            process.kill()
            process.join()

    def end(self) -> bool:
        """Wait for the end; whether it was the end of a whole run."""
        self.wait()
        for ended in (*self.processes, *self.scribes):
            ended.join()
        return all(process.exitcode == 0 for process in self.processes) and (self.folder / "final").is_dir()

    def reached(self, step: int) -> Callable[[], bool]:
        """A question: is this step logged?"""
        return lambda: any(line["step"] >= step for line in read_metrics(self.folder))

    def figures(self) -> dict[int, list[float | None]]:
        """What is compared of each step."""
        lines = [line for line in read_metrics(self.folder) if "learning_rate" in line]
        return {line["step"]: [line.get(key) for key in COMPARED] for line in lines}

    def whole(self) -> set[tuple[str, int]]:
        """Its whole checkpoints, by name and inode: one that had to be written again is another."""
        return {(path.name, path.stat().st_ino) for path in checkpoints_in(self.folder) if not faults(path)}


Fault = Callable[[Run, random.Random], str]  # injects a fault into a new run; returns what the run must say about it


def kill_at_a_step(run: Run, draw: random.Random) -> str:
    run.go()
    run.wait(run.reached(draw.randrange(1, STEPS)))
    run.kill()
    return ""


def kill_while_it_saves(run: Run, draw: random.Random) -> str:
    partial = run.folder / f"partial-checkpoint-{EVERY * draw.randrange(2, STEPS // EVERY)}"
    run.go()
    run.wait(partial.exists)
    run.kill()
    return f"{partial} is what an interrupted writing (or deleting) left"


def damage(hurt: Callable[[Path], object]) -> Fault:
    def inject(run: Run, draw: random.Random) -> str:
        run.go()
        run.wait(run.reached(2 * EVERY + 1))
        run.kill()
        newest = checkpoints_in(run.folder)[0]
        files = sorted(path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
        hurt(draw.choice(files))
        return f"{newest} is damaged and is not used"

    return inject


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def fill_the_disk(room: Callable[[Run], int], sentence: str, after: int = EVERY + 1) -> Fault:
    """No file of the process can grow beyond some size, from some step on: to the process, a disk without room."""

    def inject(run: Run, draw: random.Random) -> str:
        run.go()
        run.wait(run.reached(after))
        for process in run.processes:
            resource.prlimit(process.pid or 0, resource.RLIMIT_FSIZE, (room(run), resource.RLIM_INFINITY))
        run.end()
        return sentence

    return inject


def break_a_line(run: Run, draw: random.Random) -> str:
    content = run.data.read_bytes()
    cut = content.index(b"\n", 3 * len(content) // 4) + 20
    run.data.write_bytes(content[:cut] + b"\x00" + content[cut + 1 :])
    run.go()
    run.end()
    run.data.write_bytes(content)
    return f"{run.data}, line "


def delete_the_data(run: Run, draw: random.Random) -> str:
    content = run.data.read_bytes()
    run.go()
    run.wait(run.reached(1))
    run.data.unlink()
    run.end()
    run.data.write_bytes(content)
    return f"{run.data} was deleted"


def spoil_a_loss(run: Run, draw: random.Random) -> str:
    step = draw.randrange(EVERY + 1, STEPS)
    run.go(nan_at=step)
    run.end()
    return "" if "training.on_nan=skip" in run.options else f"the loss of step {step} is nan on rows "


def ask_it_to_stop(run: Run, draw: random.Random) -> str:
    run.go()
    run.wait(run.reached(draw.randrange(1, STEPS - 2)))
    for process in run.processes[:1]:
        os.kill(process.pid or 0, signal.SIGTERM)
    run.end()
    return "SIGTERM: the run stopped after step"


# Fault → how it is injected, how often in a full drill, processes, settings.
DRILLS: dict[str, tuple[Fault, int, int, tuple[str, ...]]] = {
    "SIGKILL at a step": (kill_at_a_step, 5, 1, ()),
    "SIGKILL while saving": (kill_while_it_saves, 4, 1, ()),
    "SIGKILL of two processes": (kill_at_a_step, 2, 2, ()),
    "SIGTERM": (ask_it_to_stop, 2, 1, ()),
    "bit flipped in a checkpoint": (damage(flip_a_bit), 4, 1, ()),
    "file of a checkpoint cut short": (damage(cut_short), 3, 1, ()),
    "file of a checkpoint missing": (damage(Path.unlink), 3, 1, ()),
    "disk full at a checkpoint": (fill_the_disk(lambda run: 100_000, " takes about "), 2, 1, ()),
    "disk full at a metric line": (
        fill_the_disk(lambda run: (run.folder / METRICS_FILE).stat().st_size + 10, " could not be written to ", after=4),
        2, 1, ("training.save_steps=3",),  # so it comes after a checkpoint, and well before the next
    ),
    "malformed line": (break_a_line, 2, 1, ()),
    "data file vanishes": (delete_the_data, 2, 1, ("dataset.prefetch_steps=1",)),
    "loss not finite, stop": (spoil_a_loss, 2, 1, ()),
    "loss not finite, skip": (spoil_a_loss, 2, 1, ("training.on_nan=skip",)),
}  # fmt: skip


def prepare(folder: Path) -> tuple[Path, Path]:
    """A start folder (the bundled tokenizer, a config of 45,000 weights) and tokenised data."""
    start, data = folder / "start", folder / "data.jsonl"
    start.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(BUNDLED / name, start / name)
    shape = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    shape |= {"d_model": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 2, "mlp_hidden_size": 32, "dtype": "float32"}
    (start / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    tokenizer, lines = load_tokenizer(start), []
    for number in range(48):  # all are read within the steps of a run
        question = [{"role": "user", "content": f"{number} + {number % 7}"}]
        prompt, response = render_sample(tokenizer, question, str(number + number % 7), "chat")
        lines.append(json.dumps({"id": f"sum:{number}", "input_ids": prompt + response, "prompt_length": len(prompt)}))
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return start, data


def lost_steps(run: Run, alone: dict[int, list[float | None]]) -> int:
    """Steps that are missing or have other figures than in the undisturbed run; two processes may differ in rounding.

    After a step that was left out on request the figures are others, and only have to be there.
    """
    ours = run.figures()
    left_out = min((step for step, figures in ours.items() if figures[0] is None), default=STEPS + 1)

    def same(a: float | None, b: float | None) -> bool:
        return a == b if run.ranks == 1 or a is None or b is None else abs(a - b) <= 1e-6 * abs(b)

    def kept(step: int) -> bool:
        if step not in ours or step >= left_out:
            return step in ours
        return all(same(a, b) for a, b in zip(ours[step], alone[step], strict=True))

    return sum(not kept(step) for step in alone)


def drill(inject: Fault, run: Run, alone: dict[int, list[float | None]], draw: random.Random) -> tuple[int, str]:
    """Inject one fault and start again: what was lost, and what is wrong (nothing when all went as it should)."""
    sentence = inject(run, draw)
    before = run.whole()
    if not (run.folder / "final").exists():
        run.go()
    finished = run.end()
    lost = lost_steps(run, alone) + len(before - run.whole())
    if not finished:
        return lost, "did not finish"
    if sentence not in run.said:
        return lost, f"did not say {sentence!r}"
    return lost, "lost something" if lost else ""


def drills(times: int | None, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Every fault, as often as it is injected (or ``times``), with what became of it."""
    start, data = prepare(folder)
    undisturbed: dict[tuple[int, tuple[str, ...]], dict[int, list[float | None]]] = {}
    for name, (inject, often, ranks, options) in DRILLS.items():
        kind = ranks, tuple(option for option in options if "save_steps" in option)
        if kind not in undisturbed:
            alone = Run(folder / f"alone-{len(undisturbed)}", start, data, *kind)
            alone.go()
            if not alone.end():
                raise SystemExit(f"fault_drill.py: the undisturbed run fails:\n{alone.said[-3000:]}")
            undisturbed[kind] = alone.figures()
        result: dict[str, Any] = {"fault": name, "injected": times or often, "lost": 0, "wrong": [], "said": []}
        for number in range(times or often):
            own = folder / f"{name.replace(',', '').replace(' ', '-')}-{number}"
            run = Run(own, start, shutil.copy(data, own.with_suffix(".jsonl")), ranks, options)
            lost, wrong = drill(inject, run, undisturbed[kind], random.Random(f"{seed} {name} {number}"))
            result["lost"] += lost
            if wrong:
                result["wrong"].append(wrong)
                result["said"].append(run.said[-2000:])
        yield result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="inject every fault once")
    parser.add_argument("--seed", type=int, default=0, help="of the steps and files that are hit (default 0)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fault-drill-") as scratch:
        for result in drills(1 if args.quick else None, args.seed, Path(scratch)):
            results.append(result)
            print(f"{result['fault']}: {'; '.join(result['wrong']) or 'nothing lost'}", *result["said"], file=sys.stderr)
    show(results)
    lost, failed = sum(result["lost"] for result in results), [result["fault"] for result in results if result["wrong"]]
    counts = [{key: result[key] for key in ("fault", "injected", "lost", "wrong")} for result in results]
    print(json.dumps({"faults": counts, "lost": lost, "failed": failed, "seconds": round(time.monotonic() - began, 1)}))
    raise SystemExit(1 if lost or failed else 0)


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("fault", "injected", "data lost", "verdict")
    for result in results:
        verdict = "; ".join(result["wrong"]) or "nothing lost"
        table.add_row(result["fault"], str(result["injected"]), str(result["lost"]), verdict)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
