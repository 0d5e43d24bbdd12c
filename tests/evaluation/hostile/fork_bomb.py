# Starts processes until none can be started; stops at 200 by itself in case nothing holds it back.
import os
import time

children = 0
for _ in range(200):
    try:
        pid = os.fork()
    except OSError:
        continue
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    children += 1


def add(a, b):
    return a + b if children else 0
