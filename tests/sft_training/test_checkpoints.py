"""Checkpoint folders: whole or not used, rotated only behind a newer one, and every fault told by file."""

import json
from pathlib import Path

import pytest

from sft_training.checkpoints import (
    MANIFEST_FILE,
    POSITION_FILE,
    STATE_FILE,
    checkpoints_in,
    choose,
    complete,
    faults,
    newest_checkpoint,
    staging,
)


def write(run: Path, step: int, keep: int | None = None) -> Path:
    """A finished checkpoint with the files of two ranks, one of them in a folder, as DeepSpeed writes them."""
    folder = staging(run, step) / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    for name in (POSITION_FILE, STATE_FILE, "model.safetensors", "rng_state_1.pth", "global_step/rank_1_optim.pt"):
        (folder / name).write_bytes(bytes([step]) * 1000)
    return complete(run, step, keep)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "missing": (Path.unlink, "is missing"),
    "short": (lambda file: file.write_bytes(file.read_bytes()[:-7]), "has 993 bytes instead of 1000"),
    "flipped bit": (flip_a_bit, r"has other contents than were written \(SHA-256 differs\)"),
}


def test_a_finished_checkpoint_is_whole_and_its_manifest_covers_every_file(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    assert folder == tmp_path / "checkpoint-2"
    assert faults(folder) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    listed = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(listed) | {MANIFEST_FILE} == there
    (folder / "notes.txt").write_text("a file more is nobody's fault", encoding="utf-8")
    assert faults(folder) == []


@pytest.mark.parametrize("name", ["model.safetensors", "rng_state_1.pth", "global_step/rank_1_optim.pt", STATE_FILE])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    before, damaged = write(tmp_path, 2), write(tmp_path, 10)
    hurt, said = DAMAGE[damage]
    hurt(damaged / name)
    assert newest_checkpoint(tmp_path) == before
    assert caplog.messages[0].startswith(f"{damaged} is damaged and is not used: {name} ")
    caplog.clear()
    with pytest.raises(ValueError, match=f"choose auto, never, or the folder of a complete checkpoint .{name} {said}"):
        choose(tmp_path, str(damaged))


def test_a_manifest_that_cannot_be_read_is_a_fault_too(tmp_path: Path) -> None:
    folder = write(tmp_path, 2)
    for broken in ('{"step": 2, "fil', '{"step": 2, "filex": {}}', '{"files": {"a": {"bytes": 1}}}', '{"files": []}', "[]"):
        (folder / MANIFEST_FILE).write_text(broken, encoding="utf-8")
        assert len(faults(folder)) == 1
        assert faults(folder)[0].startswith("manifest.json cannot be read")


def test_a_checkpoint_without_a_manifest_cannot_be_verified_and_does_not_count(tmp_path: Path) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 4)
    (newer / MANIFEST_FILE).unlink()
    assert faults(newer) == ["manifest.json is missing"]
    assert choose(tmp_path, "auto") == older


def test_when_nothing_is_whole_the_run_stops_and_never_starts_anew_by_itself(tmp_path: Path) -> None:
    for step in (2, 4):
        (write(tmp_path, step) / "model.safetensors").unlink()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"checkpoint-4: model\.safetensors is missing; checkpoint-2: .* resume=never"):
            choose(tmp_path, "auto")
    assert choose(tmp_path, "never") is None
    assert choose(tmp_path / "elsewhere", "auto") is None


def test_old_checkpoints_go_only_behind_a_newer_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4, 10):
        write(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-4"]
    torn = staging(tmp_path, 12) / "checkpoint-12"
    torn.mkdir(parents=True)
    with monkeypatch.context() as patch:  # the machine goes down before the new name is given
        patch.setattr("sft_training.checkpoints.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            complete(tmp_path, 12, keep=1)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-4"]
    with monkeypatch.context() as patch:  # or while an old one is being deleted
        patch.setattr("sft_training.checkpoints.shutil.rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 14, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-14", "checkpoint-10"]
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-14"
