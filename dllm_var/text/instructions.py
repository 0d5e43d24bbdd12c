"""One line of an instruction file (``instruction``, ``input``, ``output``) → checked record → chat messages.

Called by ``dataset/transfer_text2token.py`` for each line, and by ``sft_training/samples.py``. What is wrong with a line is
told as a short reason, which is what gets counted, and a sentence, which is what a person reads.
"""

import json
from dataclasses import dataclass
from typing import Any

from dllm_var.text.chat import Message

FIELDS = ("instruction", "input", "output")
LIST = " Of a JSON list make a line per object: jq -c '.[]' LIST.json > LINES.jsonl"


@dataclass(frozen=True)
class Instruction:
    """One sample as text. Absent and null fields of the file are empty strings; `output` never is.

    Attributes:
        unused: names of further fields of the line, which nothing reads.
    """

    instruction: str
    input: str
    output: str
    unused: tuple[str, ...] = ()


class BadLine(ValueError):
    """A line that is no instruction record.

    Attributes:
        reason: one of a few short phrases, the same for every line with this fault.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def parse_line(raw: bytes) -> Instruction:
    """The record in one line of a JSON Lines file.

    Raises:
        BadLine: the line is not UTF-8, not JSON, not an object; a field is not text; there is no output.
    """
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        sentence = f"byte {error.start + 1} of the line is not UTF-8: save the file in that encoding."
        raise BadLine("not UTF-8", sentence) from error
    except (ValueError, RecursionError) as error:
        sentence = f"the line is not valid JSON ({error}).{LIST if raw.lstrip()[:1] == b'[' else ''}"
        raise BadLine("not JSON", sentence) from error
    return check_record(record)


def check_record(record: Any) -> Instruction:
    """The record in what JSON, or a row of a table, gave.

    Raises:
        BadLine: it is not an object; a field is not text; there is no output.
    """
    if not isinstance(record, dict):
        more = LIST if isinstance(record, list) else ""
        raise BadLine(
            "not an object", f"the line holds {_kind(record)}, not an object with instruction, input, output.{more}"
        )
    if "output" not in record:
        raise BadLine("no output field", f"the field 'output' is missing (the line has {', '.join(record) or 'no fields'}).")
    instruction, extra, output = (_text(record, name) for name in FIELDS)
    if not output.strip():
        raise BadLine("empty response", "the field 'output' is empty, so there is nothing to learn.")
    unused = (name.encode("utf-8", "replace").decode() for name in record if name not in FIELDS)
    return Instruction(instruction, extra, output, tuple(unused))


def to_messages(record: Instruction, template: str) -> list[Message]:
    """The prompt of a record: one user message.

    ``chat`` sets the input below the instruction, an empty line between; ``plain`` joins the two as they are, which is
    the reference's text.
    """
    if template == "plain":
        return [{"role": "user", "content": record.instruction + record.input}]
    parts = (record.instruction.strip(), record.input.strip())
    return [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadLine("field not text", f"the field {name!r} holds {_kind(value)}; it must be text or null.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        sentence = f"the field {name!r} holds half of a surrogate pair at character {error.start + 1}."
        raise BadLine("not Unicode", sentence) from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "true or false"), ((int, float), "a number"), (str, "text"), (list, "a list"), (dict, "an object"))
    return next(words for kind, words in kinds if isinstance(value, kind))
