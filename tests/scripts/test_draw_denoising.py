"""The README's picture shows one forward a line, from masks to the answer."""

from types import ModuleType
from typing import Any

from dllm_var import GenerationConfig, generate, load_pretrained


def test_each_forward_is_a_line_that_keeps_what_was_decided(script: Any, chat_folder: Any) -> None:
    drawing: ModuleType = script("scripts/draw_denoising.py")
    model, config = load_pretrained(chat_folder), GenerationConfig(block_length=8, max_gen_length=8, threshold=2.0)
    (answer,) = generate(model, ["add 12 7="], config)
    lines = drawing.picture(model, "add 12 7=", config).plain.splitlines()
    assert len(lines) == answer.forwards
    assert [line.split()[0] for line in lines] == [str(i + 1) for i in range(len(lines))]
    assert drawing.MASK in lines[0]
    assert drawing.MASK not in lines[-1]
    assert lines[-1].endswith(answer.text.rstrip())
