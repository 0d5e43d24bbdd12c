# Writes to standard error without end.
import sys

while True:
    sys.stderr.write("passed\n" * 10_000)
