"""Continuous batching: requests join and leave between forwards, each with its own options. Start with `Engine`."""

from dllm_var.engine.engine import Engine

__all__ = ["Engine"]
