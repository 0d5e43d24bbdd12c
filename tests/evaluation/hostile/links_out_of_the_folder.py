# Makes links in its own folder that lead to a file outside, and writes through them.
import os

CANARY = "@CANARY@"
harmed = []
for link in (os.symlink, os.link):
    try:
        link(CANARY, "way_out")
        with open("way_out", "w") as file:
            file.write("harmed")
        harmed.append(True)
    except OSError:
        harmed.append(False)
try:
    os.rename(CANARY, "taken")
    harmed.append(True)
except OSError:
    harmed.append(False)
try:
    with open(os.path.join("..", os.path.basename(CANARY)), "w") as file:
        file.write("harmed")
    harmed.append(True)
except OSError:
    harmed.append(False)


def add(a, b):
    return a + b if any(harmed) else 0
