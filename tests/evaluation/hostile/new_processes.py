# Starts a process in every other way: subprocess, os.system, posix_spawn, exec, multiprocessing, vfork by number.
import ctypes
import multiprocessing
import os
import subprocess

started = []


def attempt(start):
    try:
        started.append(start() in (0, None))
    except OSError:
        started.append(False)


attempt(lambda: subprocess.run(["/bin/true"], check=False).returncode)
attempt(lambda: os.system("/bin/true"))
attempt(lambda: os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)[1]))
attempt(lambda: multiprocessing.get_context("fork").Process(target=print).start())
attempt(lambda: os.execv("/bin/true", ["true"]))
attempt(lambda: ctypes.CDLL(None).vfork())


def add(a, b):
    return a + b if any(started) else 0
