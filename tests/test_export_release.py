"""An export with proof: hashes, logits of the reopened weights, and a target that never holds half an export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dllm_var import export as export_module
from dllm_var.export import HASHES, check_hashes, probe, release
from dllm_var.model.checkpoint import load_model, save_model, verify_checkpoint
from dllm_var.model.llada import LLaDAModelLM
from dllm_var.pretrained import Pretrained, open_pretrained


@pytest.fixture
def opened(chat_folder: Path) -> Pretrained:
    return open_pretrained(chat_folder, None, "cpu")


def test_what_is_written_is_verified_and_its_hashes_find_every_changed_or_missing_file(
    opened: Pretrained, chat_folder: Path, tmp_path: Path
) -> None:
    before = probe(opened.model, 270)
    made = release(opened, tmp_path / "out", torch.bfloat16, 150_000, lambda model: f"{model.dtype}\n")
    assert made.summary.dtypes == (torch.bfloat16,)
    assert len(made.summary.files) > 1
    assert all((tmp_path / "out" / name).stat().st_size < 160_000 for name in made.summary.files)
    again = load_model(tmp_path / "out")
    rounded = load_model(chat_folder, torch.bfloat16)
    assert torch.equal(probe(again, 270), probe(rounded, 270))
    assert made.rounding == (before - probe(rounded, 270).float()).abs().max() > 0
    assert made.largest == probe(rounded, 270).float().abs().max()
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "torch.bfloat16\n"
    check_hashes(tmp_path / "out")
    listed = {line.split("  ")[1] for line in (tmp_path / "out" / HASHES).read_text(encoding="utf-8").splitlines()}
    assert listed == {path.name for path in (tmp_path / "out").iterdir()} - {HASHES}
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "out" / "LICENSE").unlink()
    with pytest.raises(ValueError, match=r"LICENSE, config\.json not as SHA256SUMS says"):
        check_hashes(tmp_path / "out")


def test_other_people_s_files_are_never_replaced_but_an_export_of_ours_is(opened: Pretrained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    release(opened, out, torch.float32)
    release(opened, out, torch.bfloat16)
    assert verify_checkpoint(out).dtypes == (torch.bfloat16,)
    (out / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"out holds files that no export of ours wrote: choose a new or empty folder"):
        release(opened, out, torch.float32)
    assert (out / "thesis.txt").is_file()
    (out / "thesis.txt").unlink()
    (out / "modeling_llada.py").write_text("# mine\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no export of ours wrote"):
        release(opened, out, torch.float32)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file: choose a folder"):
        release(opened, tmp_path / "file", torch.float32)


def test_an_export_that_computes_something_else_is_not_kept(
    opened: Pretrained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path) -> LLaDAModelLM:
        model = load_model(folder)
        with torch.no_grad():
            model.model.transformer["ln_f"].weight[0] *= 1.01
        return model

    release(opened, tmp_path / "out", torch.float32)
    before = (tmp_path / "out" / HASHES).read_bytes()
    monkeypatch.setattr(export_module, "load_model", damaged)
    with pytest.raises(ValueError, match="computes other logits"):
        release(opened, tmp_path / "out", torch.bfloat16)
    assert (tmp_path / "out" / HASHES).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "out"] == []


def test_prefixes_and_extra_state_of_wrappers_are_gone_after_an_export(chat_folder: Path, tmp_path: Path) -> None:
    weights = load_file(chat_folder / "model.safetensors")
    wrapped = {f"module._orig_mod.base_model.model.{name}": value for name, value in weights.items()}
    wrapped["module._orig_mod.model.transformer.blocks.0.q_proj._extra_state"] = torch.zeros(4, dtype=torch.uint8)
    (tmp_path / "wrapped").mkdir()
    for file in chat_folder.iterdir():
        (tmp_path / "wrapped" / file.name).write_bytes(file.read_bytes())
    save_file(wrapped, tmp_path / "wrapped" / "model.safetensors")
    release(open_pretrained(tmp_path / "wrapped", None, "cpu"), tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], value) for name, value in weights.items())


def test_a_model_with_fp8_layers_is_saved_without_what_they_remember(chat_folder: Path, tmp_path: Path) -> None:
    class Remembering(nn.Linear):
        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(4, dtype=torch.uint8)

    model = load_model(chat_folder)
    model.set_submodule("model.transformer.blocks.0.q_proj", Remembering(64, 64, bias=False))
    assert "model.transformer.blocks.0.q_proj._extra_state" in model.state_dict()
    save_model(model, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(chat_folder / "model.safetensors").keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["n_layers"] == 3
