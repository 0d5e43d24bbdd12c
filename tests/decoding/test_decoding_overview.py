"""``python -m dllm_var.decoding``: everything on offer is printed, and fits a terminal."""

import subprocess
import sys

import pytest

from dllm_var.decoding.__main__ import main
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.methods import CACHES, COLUMNS, MATRIX, METHODS, SAMPLING


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    main()
    return capsys.readouterr().out.splitlines()


def test_it_fits_a_hundred_columns(lines: list[str]) -> None:
    assert max(map(len, lines)) <= 100
    assert not any(line != line.rstrip() for line in lines)


def _beside(lines: list[str], name: str) -> str:
    """What stands beside the first line that opens with a name, up to the next name."""
    start = next(i for i, line in enumerate(lines) if line.split(" ")[0] == name)
    rest = (i for i in range(start + 1, len(lines)) if lines[i][:1] != " ")
    return " ".join(" ".join(lines[start : next(rest)]).split())


def test_every_method_stands_there_with_its_paper_options_and_caches(lines: list[str]) -> None:
    groups = {name: _beside(lines, name) for name in ("…canvas", "…order", "…sampling")}
    for name, method in METHODS.items():
        said = _beside(lines, name)
        assert method.summary in said
        assert method.paper.split(",")[0] in said
        said += "".join(text for group, text in groups.items() if group in said.split())
        for option, default in {**method.options, **SAMPLING}.items():
            assert f" {option}={default}" in said, (name, option)
        for cache in said.split("caches: ")[1].split("…")[0].split(", "):
            assert GenerationConfig(method=name, cache=cache.split()[0]).cache == cache.split()[0]


def test_every_cache_stands_there_with_its_options(lines: list[str]) -> None:
    below = lines[lines.index("CACHES") :]
    for name, cache in CACHES.items():
        for option, default in cache.options.items():
            assert f"{option}={default}" in _beside(below, name)


def test_the_matrix_is_printed_with_a_note_for_every_number(lines: list[str]) -> None:
    below = lines[next(i for i, line in enumerate(lines) if line.startswith("WHICH GO TOGETHER")) :]
    assert tuple(below[2].split()) == COLUMNS
    notes = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in below if line.strip()[:1].isdigit()}
    for policy, row in MATRIX.items():
        cells = next(line for line in below if line.startswith(policy)).replace("no ", "no").split()[1:]
        for cell, column in zip(cells, COLUMNS, strict=True):
            pair = row[column]
            assert (cell == "yes") == (pair.verdict == "sound")
            assert cell.startswith("no") == (pair.verdict == "refused")
            assert cell == "yes" or pair.note.startswith(notes[cell.removeprefix("no")])


def test_as_a_program_it_takes_no_arguments_and_may_be_piped_into_head() -> None:
    program = [sys.executable, "-m", "dllm_var.decoding"]
    wrong = subprocess.run([*program, "extra"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "unrecognized arguments: extra" in wrong.stderr
    # A pipe whose reader is gone before anything is written.
    running = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None
    running.stdout.close()
    assert running.stderr is not None
    assert running.stderr.read() == ""
    running.wait()
