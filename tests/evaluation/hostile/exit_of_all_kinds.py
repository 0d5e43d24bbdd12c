# Leaves the module by SystemExit and the interpreter by an exit handler.
import atexit
import os
import sys

atexit.register(os._exit, 0)
print("passed")
sys.exit(0)
