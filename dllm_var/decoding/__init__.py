"""Decoding: one loop, composed of small policies (see `dllm_var.decoding.loop`)."""
