"""The README is true: its commands work, its paths exist, its tree is complete.

Every command of a ``bash`` block stands in `COMMANDS` with the way it is checked: run for real on tiny settings, or, where
that would take too long or needs what CI has not got, looked at without running it. A command without an entry fails.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

TOP_LEVEL = set(
    """README.md CONTRIBUTING.md LICENSE pyproject.toml constraints.txt install.sh demo_dLLM-var.py configs dllm_var
    sft_training evaluation dataset scripts tests .ci .gitignore""".split()
)


def blocks(language: str) -> list[str]:
    """The fenced blocks of that language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """The commands of all bash blocks, one a line, continued lines joined."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


@dataclass(frozen=True)
class Run:
    """Run it in a folder that looks like a clone; ``more`` is appended to make it quick, ``dry`` asks a
    launcher for the command and the settings it would start with."""

    more: str = ""
    dry: bool = False
    creates: str | None = None
    prints: str = ""

    def __call__(self, command: str, clone: Path) -> None:
        line = re.sub(r"\bpython\b", shlex.quote(sys.executable), f"{command} {self.more}", count=1)
        done = run(["bash", "-ec", line], clone, DRY_RUN=str(int(self.dry)))
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        assert self.prints in done.stdout
        if self.creates:
            assert (clone / self.creates).exists()


@dataclass(frozen=True)
class Options:
    """Too long, or not possible in CI: the script's own --help must know every option of the command."""

    why: str

    def __call__(self, command: str, clone: Path) -> None:
        _, script, *arguments = shlex.split(command)
        described = run([sys.executable, script, "--help"], clone)
        assert described.returncode == 0, described.stderr
        for option in (argument for argument in arguments if argument.startswith("--")):
            assert re.search(rf"{option}\b", described.stdout), f"{script} has no {option}"


@dataclass(frozen=True)
class Script:
    """Too long, or would start this very test: the script parses, and what it calls exists."""

    why: str

    def __call__(self, command: str, clone: Path) -> None:
        script = ROOT / shlex.split(command)[1]
        checked = run(["bash", "-n", str(script)], clone)
        assert checked.returncode == 0, checked.stderr
        text = re.sub(r"^\s*#.*$", "", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
        called = re.findall(r"(?:^|[\s\"/])((?:\w+/)?[\w-]+\.(?:py|sh))\b", text, flags=re.MULTILINE)
        assert called, f"{script.name} calls nothing that lies in this repository"
        for path in called:
            assert (ROOT / path).exists(), f"{script.name} calls {path}, which does not exist"


@dataclass(frozen=True)
class Composes:
    """Too long, or not possible in CI: every setting of the command is one, and they go together."""

    why: str

    def __call__(self, command: str, clone: Path) -> None:
        _, settings = command.split("eval.py")
        (clone / "compose.py").write_text(
            "import sys\nfrom evaluation.settings import compose_settings\ncompose_settings(sys.argv[1:])\n"
        )
        done = run([sys.executable, "compose.py", *settings.split(), "dataset.path=my_benchmarks"], clone)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Nothing:
    """Nothing to run: the reason is the check."""

    why: str

    def __call__(self, command: str, clone: Path) -> None:
        assert command == "source .venv/bin/activate"


TINY_RUN = "training.max_steps=2 training.local_batch_size=1 training.grad_accum_steps=1 packing.max_length=128"

COMMANDS: dict[str, Callable[[str, Path], None]] = {
    "bash scripts/demo.sh": Script("installs; run by hand on a fresh clone"),
    "bash scripts/test.sh": Script("runs this very test"),
    "source .venv/bin/activate": Nothing("the tests already run inside an environment"),
    'python demo_dLLM-var.py --prompt "Write 4072 in words." --plain': Run(prints="seventy"),
    'echo "Spell out the number 6152." | python demo_dLLM-var.py --plain --max_gen_length 256 --block_length 32 '
    "--threshold 0.9": Run(prints="one hundred fifty-two"),
    "python demo_dLLM-var.py --model maomaocun/dLLM-Var": Options("16 GB from the network, and a GPU"),
    "bash scripts/train_tiny.sh": Script("takes hours"),
    "bash scripts/study.sh": Script("takes a night; a test runs it with a stand-in for the training"),
    "python scripts/eval_tiny.py": Run("--prompts 2 --tasks spell --settings 'block 32'", prints="{"),
    "python dataset/transfer_text2token.py --input_dir my_texts --output_file runs/my_texts.jsonl "
    "--tokenizer_model tiny": Run(creates="runs/my_texts.jsonl"),
    "python dataset/inspect_rows.py dataset.files=runs/my_texts.jsonl": Run(prints="thirty"),
    "python sft_training/sft.py dataset.files=runs/my_texts.jsonl training.max_steps=200 output_dir=runs/my_model": Run(
        TINY_RUN, creates="runs/my_model/final/model.safetensors"
    ),
    'python demo_dLLM-var.py --model runs/my_model/final --prompt "Write 31 in words." --plain': Run(prints="thirty"),
    "bash sft_training/run_cpu.sh dataset.files=runs/my_texts.jsonl training.max_steps=200 output_dir=runs/my_model_2": Run(
        dry=True, prints="--num_processes 2"
    ),
    "python scripts/fault_drill.py": Options("minutes; its --quick form is a test of its own"),
    "python sft_training/sft.py adapter=lora dataset.files=runs/my_texts.jsonl training.max_steps=200 "
    "output_dir=runs/my_adapter": Run(TINY_RUN, creates="runs/my_adapter/final/adapter_model.safetensors"),
    'python demo_dLLM-var.py --model runs/my_adapter/final --prompt "Write 31 in words." --plain': Run(prints="thirty"),
    "python scripts/export.py --model runs/my_adapter/final --output runs/my_export": Run(
        creates="runs/my_export/model.safetensors"
    ),
    "DRY_RUN=1 bash sft_training/run_gpus_fp8.sh": Run(dry=True, prints="--num_processes 8"),
    "python dataset/transfer_text2token.py --input_dir my_texts --output_file runs/llada_texts.jsonl "
    "--tokenizer_model LLaDA-8B-Base": Options("the 8B model's tokenizer is not here"),
    "bash sft_training/run_gpus_fp8.sh dataset.files=runs/llada_texts.jsonl output_dir=runs/llada": Run(
        dry=True, prints="max_length: 8192"
    ),
    "bash sft_training/run_gpus_bf16.sh adapter=lora dataset.files=runs/llada_texts.jsonl output_dir=runs/llada_lora": Run(
        dry=True, prints="kind: lora"
    ),
    "SHARD=zero2 bash sft_training/run_cpu.sh dataset.files=runs/my_texts.jsonl training.max_steps=200 "
    "output_dir=runs/my_zero2": Run(dry=True, prints="stage"),
    "python sft_training/sft.py precision=fp8 dataset.files=runs/my_texts.jsonl training.max_steps=200 "
    "output_dir=runs/my_fp8": Run(TINY_RUN, creates="runs/my_fp8/final/model.safetensors"),
    "python scripts/plan_memory.py model=llada-8b precision=fp8 gpus=8 max_length=8192": Run(prints='"fits"'),
    "python scripts/benchmark_training.py": Options("ten minutes; a test derives its committed numbers again"),
    "python -m dllm_var.decoding": Run(prints="block_commit"),
    "python scripts/compare_decoding.py": Options("ten minutes; a test derives its committed numbers again"),
    "python scripts/benchmark.py": Options("an hour; its counts and bars are tested"),
    "python scripts/soak.py": Options("minutes; a short run is a test of its own"),
    "python scripts/count_tokens.py --tokenizer tiny --output runs/token_freq.json my_texts/*.jsonl": Run(
        creates="runs/token_freq.json"
    ),
    "python evaluation/eval.py limit=20": Run(
        "limit=1 output_dir=outputs/eval/tiny", creates="outputs/eval/tiny/results.json"
    ),
    "python evaluation/eval.py dataset.name=gsm8k dataset.path=my_benchmarks limit=2 generation.max_gen_length=32": Run(
        "output_dir=outputs/eval/gsm8k", prints="flexible"
    ),
    "python evaluation/eval.py limit=1 generation=vanilla generation.gen_length=32 generation.block_length=16 "
    "generation.threshold=0.9 cache=prefix": Run("output_dir=outputs/eval/fixed", prints="vanilla, prefix"),
    "accelerate launch --num_machines 1 --num_processes 4 evaluation/eval.py dataset.name=gsm8k model=llada-inst "
    "generation=vanilla generation.steps=256 generation.gen_length=256 generation.block_length=32": Composes(
        "16 GB from the network; tests/evaluation runs this line with the bundled model"
    ),
    "CONFIRM_RUN_UNSAFE_CODE=true PRETRAINED_PATH=maomaocun/dLLM-Var bash evaluation/run_batch.sh --dry-run": Run(
        prints="dataset.name=mmlu_pro"
    ),
    "python evaluation/report.py outputs/eval/*": Run(prints="tiny, vanilla, prefix"),
    "python evaluation/length_calibration.py": Run("--prompts 1 --systems EOS-led --budgets 32", prints="right_length"),
    "python scripts/replay_golden.py --golden tests/golden/decode": Run("--method dllm_var --method wino_orig"),
}


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    environment |= {"PYTHON": sys.executable} | variables
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, text=True, capture_output=True, timeout=600
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to the repository's own entries, so that what a command writes lands beside them, not in them."""
    folder = tmp_path_factory.mktemp("clone")
    for name in TOP_LEVEL:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    (folder / "my_texts").mkdir()
    (example,) = blocks("json")
    (folder / "my_texts" / "numbers.jsonl").write_text(example * 40, encoding="utf-8")
    (folder / "my_benchmarks" / "gsm8k").mkdir(parents=True)
    sums = [json.dumps({"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}) for n in range(8)]
    for part in ("train", "test"):
        (folder / "my_benchmarks" / "gsm8k" / f"{part}.jsonl").write_text("\n".join(sums) + "\n", encoding="utf-8")
    return folder


def repository_files() -> list[Path]:
    """Every file of the repository, tracked or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def tree() -> dict[str, str]:
    """Path → sentence, from the README's tree; two more spaces at the front are one level deeper."""
    (text,) = blocks("text")
    found: dict[str, str] = {}
    parents: list[str] = []
    for line in text.splitlines():
        matched = re.fullmatch(r"((?:  )*)(\S+)\s{2,}(\S.*)", line)
        assert matched, f"not a line of a tree: {line!r}"
        depth = len(matched[1]) // 2
        parents[depth:] = [matched[2].rstrip("/")]
        found["/".join(parents)] = matched[3]
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_says_how_it_is_checked(command: str) -> None:
    assert command in COMMANDS, "add it to COMMANDS in tests/test_readme.py"


def test_no_check_is_left_of_a_command_that_the_readme_no_longer_has() -> None:
    assert set(COMMANDS) <= set(commands())


@pytest.mark.timeout(1800)
def test_the_commands_of_the_readme_work_in_the_order_given(clone: Path) -> None:
    for command in commands():
        COMMANDS[command](command, clone)


def test_the_python_of_the_readme_runs(clone: Path) -> None:
    for text in blocks("python"):
        done = run([sys.executable, "-c", text], clone)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_every_path_of_the_tree_exists_and_has_a_sentence() -> None:
    for path, sentence in tree().items():
        assert (ROOT / path).exists(), f"{path} is in the README's tree, but not here"
        assert len(sentence.split()) >= 3, f"{path}: {sentence!r} says nothing"


def test_every_program_outside_the_tests_stands_in_the_tree() -> None:
    programs = [path for path in repository_files() if path.suffix in {".py", ".sh"} and path.parts[0] != "tests"]
    missing = [str(path) for path in programs if path.name != "__init__.py" and str(path) not in tree()]
    assert not missing, f"add to the tree of the README: {missing}"


def test_nothing_lies_at_the_top_that_the_layout_does_not_know() -> None:
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {Path(name).parts[0] for name in tracked.split("\0") if name} <= TOP_LEVEL


def test_every_link_to_a_file_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), f"the README links to {link}"


def test_the_reading_order_has_at_most_seven_files() -> None:
    (order,) = re.findall(r"^Read in this order:(.*?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    files = re.findall(r"\]\(([^)]+)\)", order)
    assert 1 <= len(files) <= 7
    for file in files:
        assert ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))), f"{file} does not say what it is for"
