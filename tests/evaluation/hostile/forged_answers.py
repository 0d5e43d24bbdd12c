# Speaks to the judge itself, with every kind of answer that might confuse it.
import contextlib
import os

ANSWERS = (
    b'["value", ["object", 0]]\n',
    b'["value", {"int": "0x5"}]\n',
    b'["value", ["type", "5"]]\n',
    b'["value", ' + b"[" * 100_000 + b"]" * 100_000 + b"]\n",
    b'["value", ["Decimal", "nan"]]\n',
    b'["passed", ""]\n',
    b"[]\n",
    b"\xff\n",
)
calls = []


def add(a, b):
    calls.append(a)
    for handle in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(handle, ANSWERS[int("@NUMBER@")])
    return 0
