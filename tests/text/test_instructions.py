"""A line of an instruction file becomes a record, or a reason why it cannot."""

import json

import pytest

from dllm_var.text.instructions import BadLine, Instruction, parse_line, to_messages


def line(**fields):
    return json.dumps(fields).encode()


def test_nulls_and_absent_fields_are_empty():
    assert parse_line(line(instruction="q", input=None, output="a")) == Instruction("q", "", "a")
    assert parse_line(line(output="a")) == Instruction("", "", "a")
    assert parse_line(line(instruction=None, input="i", output="a", id=7)) == Instruction("", "i", "a", ("id",))


@pytest.mark.parametrize(
    ("raw", "reason", "sentence"),
    [
        (b'{"output": "a"', "not JSON", "not valid JSON"),
        (b"[" * 100_000, "not JSON", "not valid JSON"),
        (b'{"output": "\xff"}', "not UTF-8", "byte 13"),
        (b'["a"]', "not an object", "a list, not an object .* Of a JSON list make a line per object"),
        (b"[\n", "not JSON", "Of a JSON list make a line per object"),
        (b"null", "not an object", "null"),
        (b"3", "not an object", "a number"),
        (b'{"question": "q", "answer": "a"}', "no output field", "the line has question, answer"),
        (b'{"output": null}', "empty response", "'output' is empty"),
        (b'{"output": " \\n"}', "empty response", "'output' is empty"),
        (b'{"output": 42}', "field not text", "'output' holds a number"),
        (b'{"output": "a", "instruction": ["q"]}', "field not text", "'instruction' holds a list"),
        (b'{"output": "a", "input": true}', "field not text", "'input' holds true or false"),
        (b'{"output": "a\\ud83d"}', "not Unicode", "surrogate pair at character 2"),
    ],
)
def test_a_bad_line_has_a_reason_and_a_sentence(raw, reason, sentence):
    with pytest.raises(BadLine, match=sentence) as caught:
        parse_line(raw)
    assert caught.value.reason == reason


def test_plain_joins_instruction_and_input_as_they_are():
    assert to_messages(Instruction("Add: ", "1 2", "3"), "plain") == [{"role": "user", "content": "Add: 1 2"}]


def test_chat_sets_the_input_below_the_instruction():
    assert to_messages(Instruction("Add.\n", "1 2", "3"), "chat") == [{"role": "user", "content": "Add.\n\n1 2"}]
    assert to_messages(Instruction("Add 1 2.", "", "3"), "chat") == [{"role": "user", "content": "Add 1 2."}]
    assert to_messages(Instruction("", "1 2", "3"), "chat") == [{"role": "user", "content": "1 2"}]
