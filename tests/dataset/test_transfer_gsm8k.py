"""GSM8K's lines become instruction lines that `transfer_text2token` reads."""

import importlib.util
import json
from pathlib import Path

import pytest

from dllm_var.text.instructions import parse_line

SCRIPT = Path(__file__).resolve().parents[2] / "dataset" / "gsm8k_to_instructions.py"
spec = importlib.util.spec_from_file_location("gsm8k_to_instructions", SCRIPT)
gsm8k = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gsm8k)

PROBLEM = {"question": "Ann has 3 bags of 4 nuts. How many nuts?", "answer": "3*4 = <<3*4=12>>12 nuts.\n#### 12"}


def convert(tmp_path, *lines, options=()):
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command = [
        "--input_file",
        str(tmp_path / "train.jsonl"),
        "--output_file",
        str(tmp_path / "out" / "gsm8k.jsonl"),
        *options,
    ]
    return gsm8k.main(command), tmp_path / "out" / "gsm8k.jsonl"


def test_question_and_answer_become_instruction_and_output(tmp_path):
    code, out = convert(tmp_path, json.dumps(PROBLEM), "", json.dumps(PROBLEM | {"question": "Wie viele Nüsse\u2028?"}))
    first, second = (parse_line(line) for line in out.read_bytes().split(b"\n")[:-1])
    assert code == 0
    assert (first.instruction, first.input, first.output) == (PROBLEM["question"], "", PROBLEM["answer"])
    assert second.instruction == "Wie viele Nüsse\u2028?"


def test_calculator_marks_can_be_left_out(tmp_path):
    _, out = convert(tmp_path, json.dumps(PROBLEM), options=["--drop_calculator"])
    assert parse_line(out.read_bytes()).output == "3*4 = 12 nuts.\n#### 12"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ('{"question": "q"}', "'answer' is missing"),
        ('{"question": 4, "answer": "a"}', "'question' is missing, empty or not text"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, capsys, line, complaint):
    code, out = convert(tmp_path, json.dumps(PROBLEM), line)
    said = capsys.readouterr().err
    assert code == 1
    assert "train.jsonl:2: " in said
    assert complaint in said
    assert not out.exists()


def test_a_missing_file_and_an_overwritten_one_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gsm8k.main(["--input_file", str(tmp_path / "no.jsonl"), "--output_file", str(tmp_path / "out.jsonl")])
    (tmp_path / "train.jsonl").write_text(json.dumps(PROBLEM))
    with pytest.raises(SystemExit, match="2"):
        gsm8k.main(["--input_file", str(tmp_path / "train.jsonl"), "--output_file", str(tmp_path / "train.jsonl")])
    assert capsys.readouterr().err.count("error: ") == 2
