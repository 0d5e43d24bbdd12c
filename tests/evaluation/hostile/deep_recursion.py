# Recurses until the stack is gone.
import sys

sys.setrecursionlimit(10**9)


def add(a, b):
    return add(a, repr([b]) and b)
