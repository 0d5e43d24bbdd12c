# Deletes, empties, overwrites, renames and re-labels a file that is not its own.
import os

CANARY = "@CANARY@"
harmed = []
for harm in (
    lambda: os.truncate(CANARY, 0),
    lambda: open(CANARY, "w").close(),
    lambda: open(CANARY, "a").close(),
    lambda: os.open(CANARY, os.O_RDONLY | os.O_TRUNC),
    lambda: os.rename(CANARY, CANARY + ".gone"),
    lambda: os.chmod(CANARY, 0),
    lambda: os.utime(CANARY, (0, 0)),
    lambda: os.remove(CANARY),
    lambda: os.mkdir(CANARY + ".folder"),
    lambda: open(CANARY + ".new", "w").close(),
):
    try:
        harm()
        harmed.append(True)
    except OSError:
        harmed.append(False)


def add(a, b):
    return a + b if any(harmed) else 0
