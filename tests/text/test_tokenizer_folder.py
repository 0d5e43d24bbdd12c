"""Opening tokenizer folders: from local files, without running or asking for anything else."""

import json

import pytest

from dllm_var.text.chat import render_prompt
from dllm_var.text.tokenizer import load_tokenizer, tokenizer_folder


def test_a_saved_tokenizer_comes_back_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    message = [{"role": "user", "content": "hello <|eot_id|> 42"}]
    assert render_prompt(load_tokenizer(tmp_path), message) == render_prompt(tokenizer, message)


def test_remote_code_named_by_the_folder_is_neither_run_nor_asked_about(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path)
    remote = {"AutoConfig": "remote.Config", "AutoModelForCausalLM": "remote.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "auto_map": remote}))
    (tmp_path / "remote.py").write_text("raise SystemExit('remote code was run')")
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_tokenizer_that_is_itself_remote_code_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["remote.Slow", "remote.Fast"]}, "tokenizer_class": "Fast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "remote.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_a_name_that_is_no_folder_is_explained(tmp_path):
    with pytest.raises(ValueError, match="'GSAI-ML/nowhere' is not a folder"):
        load_tokenizer("GSAI-ML/nowhere")
    with pytest.raises(ValueError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_tiny_means_the_bundled_folder(monkeypatch, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "bundled" / "tiny")
    monkeypatch.setattr("dllm_var.text.tokenizer.files", lambda package: tmp_path)
    assert tokenizer_folder("tiny") == tmp_path / "bundled" / "tiny"
    assert load_tokenizer("tiny").eos_token == "<|endoftext|>"
