"""Diffusion language models that decide themselves how long their answer is.

Start with ``model = load_pretrained("tiny")`` and ``generate(model, ["Write 1,024 in words."])[0].text``.
"""

import dllm_var.quiet  # noqa: F401 (before anything imports transformers)
from dllm_var.decoding.config import GenerationConfig
from dllm_var.decoding.results import Event, Generation
from dllm_var.generation import generate, stream
from dllm_var.pretrained import Pretrained, load_pretrained

__all__ = ["Event", "Generation", "GenerationConfig", "Pretrained", "generate", "load_pretrained", "stream"]
