"""The output is finished or it is not there, and what was appended counts exactly once, wherever the work was stopped."""

import fcntl
import json
import os
import sys
from pathlib import Path

import pytest

from dllm_var.text.part_file import PartFile

LINES = [b"one\n", b"two\n", b"three\n", b"four\n"]


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def write(path, settings="s"):
    """Writes LINES, going on where an earlier call was stopped; a finished output is left alone."""
    output = PartFile(path, settings)
    if output.finished():
        return
    try:
        state = output.open() or {"done": 0}
        for done in range(state["done"], len(LINES)):
            output.append(LINES[done], {"done": done + 1})
        output.finish({"lines": len(LINES)})
    finally:
        output.close()


def kill_at(monkeypatch, number):
    """The number-th durable operation (sync, rename, removal) is not carried out any more, nor is anything after it."""
    seen = 0
    originals = {"fsync": os.fsync, "replace": os.replace}
    unlink = Path.unlink

    def step(original):
        def stepped(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen > number:
                raise Killed
            return original(*args, **kwargs)

        return stepped

    for name, original in originals.items():
        monkeypatch.setattr(os, name, step(original))
    monkeypatch.setattr(Path, "unlink", step(unlink))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_output_has_a_summary_and_no_leftovers(tmp_path):
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(LINES)
    assert names(tmp_path) == ["out", "out.summary.json"]


def test_stopped_at_any_durable_operation_it_ends_the_same(tmp_path, monkeypatch):
    kills = 0
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        with monkeypatch.context() as patched:
            kill_at(patched, number)
            try:
                write(folder / "out")
            except Killed:
                kills += 1
                assert not (folder / "out").exists() or (folder / "out").read_bytes() == b"".join(LINES)
        write(folder / "out")
        assert (folder / "out").read_bytes() == b"".join(LINES)
        assert PartFile(folder / "out", "s").finished()
        assert [name for name in names(folder) if not name.endswith(".tmp")] == ["out", "out.summary.json"]
        if kills <= number:
            break
    assert kills > 3 * len(LINES), "every append syncs twice and renames once, so there is this much to be stopped at"


def test_the_note_never_counts_bytes_that_are_not_on_the_disk_yet(tmp_path, monkeypatch):
    synced, notes, sync, replace = {}, [], os.fsync, os.replace

    def noted_sync(descriptor):
        sync(descriptor)
        seen = os.fstat(descriptor)
        synced[seen.st_ino] = seen.st_size

    def checked_replace(source, target):
        if str(target).endswith(".progress.json"):
            part = target.with_name("out.part").stat()
            notes.append((json.loads(Path(source).read_text())["part_bytes"], synced[part.st_ino]))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", checked_replace)
    write(tmp_path / "out")
    assert [counted for counted, _ in notes] == [4, 8, 14, 19]
    assert all(counted <= on_disk for counted, on_disk in notes)


def test_an_older_output_stays_whole_until_the_new_one_replaces_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    for number in range(100):
        out.unlink(missing_ok=True)
        write(out, "old")
        older = out.read_bytes()
        with monkeypatch.context() as patched:
            patched.setattr(sys.modules[__name__], "LINES", [b"ONE\n", b"TWO\n", b"THREE\n", b"FOUR\n"])
            with monkeypatch.context() as killer:
                kill_at(killer, number)
                try:
                    write(out, "new")
                    finished = True
                except Killed:
                    finished = False
            assert out.read_bytes() in (older, older.upper())
            write(out, "new")
            assert out.read_bytes() == older.upper()
        if finished:
            break
    assert finished


def test_bytes_beyond_the_last_safe_point_do_not_count(tmp_path):
    output = PartFile(tmp_path / "out", "s")
    output.open()
    output.append(LINES[0], {"done": 1})
    output.close()
    with open(output.part, "ab") as part:
        part.write(b"tw")  # the kill came in the middle of the next write
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(LINES)


@pytest.mark.parametrize("progress", ["", "{", "[]", '{"settings": "s"}'])
def test_a_damaged_progress_file_means_starting_over(tmp_path, progress):
    (tmp_path / "out.part").write_bytes(b"something\n")
    (tmp_path / "out.progress.json").write_text(progress)
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(LINES)


def test_a_part_shorter_than_its_note_means_starting_over(tmp_path):
    output = PartFile(tmp_path / "out", "s")
    output.open()
    output.append(LINES[0], {"done": 1})
    output.close()
    output.part.write_bytes(b"o")
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(LINES)


def test_work_under_other_settings_is_not_continued(tmp_path):
    output = PartFile(tmp_path / "out", "other")
    output.open()
    output.append(b"of other settings\n", {"done": 1})
    output.close()
    write(tmp_path / "out", "s")
    assert (tmp_path / "out").read_bytes() == b"".join(LINES)


def test_two_runs_cannot_write_one_output(tmp_path):
    first, second = PartFile(tmp_path / "out", "s"), PartFile(tmp_path / "out", "s")
    first.open()
    with pytest.raises(ValueError, match="another run is writing"):
        second.open()
    second.close()
    first.close()


def test_a_run_that_ends_between_opening_and_locking_keeps_its_output(tmp_path, monkeypatch):
    def lock(file, how):
        monkeypatch.undo()
        part.rename(tmp_path / "out")  # as the other run does at its end
        flock(file, how)

    part, flock = tmp_path / "out.part", fcntl.flock
    part.write_bytes(b"whole\n")
    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(ValueError, match="another run has just finished"):
        PartFile(tmp_path / "out", "s").open()
    assert (tmp_path / "out").read_bytes() == b"whole\n"


def test_a_file_that_is_not_ours_is_never_overwritten(tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ValueError, match="not an output of this script"):
        write(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_an_output_that_was_changed_afterwards_is_not_taken_for_finished(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out").write_bytes(b"one\n")
    assert not PartFile(tmp_path / "out", "s").finished()
