# Stops itself, so that no signal but SIGKILL and SIGCONT reaches it.
import os
import signal

os.kill(os.getpid(), signal.SIGSTOP)
