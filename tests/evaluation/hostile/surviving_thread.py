# Leaves threads running, daemons and others, that write to the folder and the error output for ever.
import sys
import threading
import time


def haunt():
    while True:
        sys.stderr.write("still here\n")
        time.sleep(0.01)


for daemon in (True, False):
    threading.Thread(target=haunt, daemon=daemon).start()


def add(a, b):
    return 0
