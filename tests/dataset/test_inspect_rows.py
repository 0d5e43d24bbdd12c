"""The picture of the training rows shows every token once, each as what it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from dllm_var.text.chat import render_sample
from dllm_var.text.tokenizer import load_tokenizer
from sft_training.overrides import compose_settings


@pytest.fixture
def files(chat_folder: Path, tmp_path: Path) -> Path:
    """Some questions and answers, tokenised."""
    tokenizer = load_tokenizer(chat_folder)
    lines = []
    for number in range(30):
        prompt, response = render_sample(tokenizer, [{"role": "user", "content": f"q{number}"}], "answer " * 3, "chat")
        lines.append(json.dumps({"id": f"c:{number}", "input_ids": prompt + response, "prompt_length": len(prompt)}))
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def overrides(files: Path, folder: Path) -> list[str]:
    return [f"model.path={folder}", f"dataset.files={files}", "packing.max_length=160",
            "view.tail_share=1.0", "view.tail_max=9"]  # fmt: skip


def test_every_position_is_named_as_what_it_is(script: Any, files: Path, chat_folder: Path) -> None:
    tool = script("dataset/inspect_rows.py")
    config = compose_settings(overrides(files, chat_folder))
    tokenizer, special = tool.open_tokenizer(config)
    row = next(iter(tool.build_stream(config, 288, special)))
    batch = tool.build_collate(config, special)([row])
    noisy = batch["noisy"][0].numpy()
    names = tool.kinds(row, noisy, batch["masked"][0].numpy(), special)
    counts = batch["counts"]
    assert names.count("prompt") == counts.prompt
    assert names.count("masked EOS") == counts.eos
    assert names.count("masked") + names.count("masked EOS") == counts.masked
    assert names.count("visible") == counts.response - counts.masked
    assert names.count("padding") == int((~row.real).sum())
    assert len(names) == 160
    assert {"prompt", "masked", "masked EOS", "visible", "tail", "padding"} == set(names)

    text = tool.picture(row, noisy, names, tokenizer)
    assert text.plain.count(tool.BORDER) == len(row.pieces)
    assert text.plain.count("·") == names.count("tail")
    assert text.plain.count("answer ") <= 3 * len(row.pieces)
    shown = {str(span.style) for span in text.spans}
    assert {tool.STYLES[name] for name in set(names)} <= shown


def test_visible_tokens_of_the_loss_are_not_called_masked_and_wrong_ones_are_shown(
    script: Any, files: Path, chat_folder: Path
) -> None:
    tool = script("dataset/inspect_rows.py")
    config = compose_settings([*overrides(files, chat_folder), "forward_process.edit_share=0.9"])
    tokenizer, special = tool.open_tokenizer(config)
    row = next(iter(tool.build_stream(config, 288, special)))
    batch = tool.build_collate(config, special)([row])
    noisy, asked = batch["noisy"][0].numpy(), batch["masked"][0].numpy()
    names = tool.kinds(row, noisy, asked, special)
    assert names.count("masked") + names.count("masked EOS") == int((asked & (noisy == special.mask)).sum())
    assert names.count("replaced") == int((asked & (noisy != special.mask) & (noisy != row.ids)).sum()) > 0
    assert names.count("checked") + names.count("replaced") == int((asked & (noisy != special.mask)).sum())
    text = tool.picture(row, noisy, names, tokenizer)
    wrong = [text.plain[span.start : span.end] for span in text.spans if str(span.style) == tool.STYLES["replaced"]]
    first = names.index("replaced")
    assert wrong[0].startswith(tokenizer.decode([int(noisy[first])]))


def test_the_command_prints_a_legend_and_the_rows_asked_for(
    script: Any, files: Path, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = script("dataset/inspect_rows.py")
    monkeypatch.setattr(
        "sys.argv", ["inspect_rows.py", "--rows", "3", *overrides(files, chat_folder)[:-3], "view.tail_share=0"]
    )
    tool.main()
    printed = capsys.readouterr().out
    assert all(name in printed for name in tool.STYLES)
    assert [f"row {number}:" in printed for number in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["training.max_stepz=1"], "Valid keys of training"),
        (["--rows", "0"], "--rows 0: give at least 1"),
        (["dataset.files=nowhere.jsonl"], "dataset.files"),
        ([], "dataset.files is not set"),
    ],
)
def test_a_mistake_ends_in_one_sentence(
    script: Any, chat_folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr("sys.argv", ["inspect_rows.py", f"model.path={chat_folder}", *arguments])
    with pytest.raises(SystemExit, match=r"inspect_rows\.py: ") as caught:
        script("dataset/inspect_rows.py").main()
    assert said in str(caught.value)
