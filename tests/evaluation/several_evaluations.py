"""Started by test_eval.py on two processes: several evaluations one after the other, so that the start is paid once.

The argument is a JSON file: a list of command lines of ``evaluation/eval.py``.
"""

import json
import sys
from pathlib import Path

from evaluation.eval import run
from evaluation.settings import compose_settings
from evaluation.team import part


def main() -> None:
    for arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run(compose_settings(arguments))
    part()


if __name__ == "__main__":
    main()
