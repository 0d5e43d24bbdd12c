"""Turns GSM8K's ``{"question", "answer"}`` lines into instruction lines, which transfer_text2token.py reads.

    python dataset/gsm8k_to_instructions.py --input_file train.jsonl --output_file instructions/gsm8k_train.jsonl

The answer keeps its last line ``#### N``. Its calculator marks (``<<48/2=24>>``) stay too, as the few-shot prompts of
the benchmark have them; --drop_calculator removes them.

Exit code: 0 done, 1 bad data, 2 bad arguments.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

CALCULATOR = re.compile(r"<<[^<>]*>>")


def convert_line(line: str, drop_calculator: bool) -> dict[str, str | None]:
    """One instruction record.

    Raises:
        ValueError: the line is not an object with the texts ``question`` and ``answer``.
    """
    try:
        problem = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the line is not valid JSON ({error}).") from error
    if not isinstance(problem, dict):
        raise ValueError("the line is not an object with question and answer.")
    for name in ("question", "answer"):
        if not isinstance(problem.get(name), str) or not problem[name].strip():
            raise ValueError(f"the field {name!r} is missing, empty or not text.")
        problem[name].encode("utf-8")
    answer = CALCULATOR.sub("", problem["answer"]) if drop_calculator else problem["answer"]
    return {"instruction": problem["question"], "input": None, "output": answer}


def convert_file(source: Path, target: Path, drop_calculator: bool) -> int:
    """Writes the records of a file, all or nothing, and returns their number.

    Raises:
        ValueError: a bad line, named with the file and its number, or a file without any line.
    """
    records = []
    for number, raw in enumerate(source.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            records.append(convert_line(raw.decode("utf-8-sig"), drop_calculator))
        except ValueError as error:
            raise ValueError(f"{source}:{number}: {error}") from error
    if not records:
        raise ValueError(f"{source} holds no problem.")
    target.parent.mkdir(parents=True, exist_ok=True)
    passing = target.with_name(target.name + ".tmp")
    passing.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(passing, target)
    return len(records)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_file", type=Path, required=True, help="GSM8K's train.jsonl or test.jsonl")
    parser.add_argument("--output_file", type=Path, required=True, help="the instruction file to write")
    parser.add_argument("--drop_calculator", action="store_true", help="leave out the <<...>> calculator marks")
    args = parser.parse_args(argv)
    if not args.input_file.is_file():
        parser.exit(2, f"error: --input_file {str(args.input_file)!r} is not a file\n")
    if args.output_file.exists() and args.output_file.samefile(args.input_file):
        parser.exit(2, "error: --output_file is the --input_file, which would be overwritten: name another\n")
    try:
        number = convert_file(args.input_file, args.output_file, args.drop_calculator)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{number:,} problems in {args.output_file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
