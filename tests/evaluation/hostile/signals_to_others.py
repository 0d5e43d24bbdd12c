# Sends SIGUSR1 to the caller, its own parent and its process group, and asks the kernel to send it on its behalf.
import ctypes
import fcntl
import os
import signal

CALLER = int("@CALLER@")
sent = []


def attempt(send):
    try:
        sent.append(send() != -1)
    except OSError:
        sent.append(False)


def by_owner(target):
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, target)
    fcntl.fcntl(reading, 10, signal.SIGUSR1)  # F_SETSIG
    fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)
    os.write(writing, b"x")


libc = ctypes.CDLL(None)
for target in (CALLER, os.getppid()):
    attempt(lambda target=target: os.kill(target, signal.SIGUSR1))
    attempt(lambda target=target: by_owner(target))
    attempt(lambda target=target: libc.syscall(200, target, signal.SIGUSR1))  # tkill
    attempt(lambda target=target: libc.sigqueue(target, signal.SIGUSR1, None))
attempt(lambda: os.killpg(0, signal.SIGUSR1))


def add(a, b):
    return a + b if any(sent) else 0
