"""A checkpoint is whole or not there: damage is named, a crash at any write leaves ``latest`` on a whole one."""

import os
import shutil
from pathlib import Path

import pytest

from kvds import durable_files
from kvds.checkpoint.folder import commit_checkpoint, latest_step, resumable_steps, saved_steps, unfinished_tag
from kvds.checkpoint.manifest import ChecksummedFile, FileEntry, folder_faults, read_manifest
from kvds.durable_files import remove_leftovers, write_durably
from kvds.errors import InputError

CONTENT = {"rank0.pt": b"a" * 5000, "rank1.pt": bytes(range(256)) * 9}


def write_aside(run: Path, step: int) -> dict[str, FileEntry]:
    """What the ranks write before the commit."""
    folder = run / "checkpoints" / unfinished_tag(step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    entries = {}
    for name, data in CONTENT.items():
        with (folder / name).open("wb") as plain:
            file = ChecksummedFile(plain)
            for start in range(0, len(data), 1000):
                file.write(data[start : start + 1000])
            file.write(memoryview(str(step).encode()))
            entries[name] = file.finish()
    return entries


def save(run: Path, *steps: int, keep: int = 0) -> None:
    for step in steps:
        commit_checkpoint(run, step, write_aside(run, step), keep=keep)


def whole_steps(run: Path) -> list[int]:
    return [step for step in resumable_steps(run) if not folder_faults(run / f"checkpoints/step-{step:06d}")]


def test_a_committed_checkpoint_is_whole_and_the_latest(tmp_path):
    save(tmp_path, 3, 6)
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000006"
    assert latest_step(tmp_path) == 6 and saved_steps(tmp_path) == [3, 6]
    assert resumable_steps(tmp_path) == [6, 3] == whole_steps(tmp_path)
    entries = read_manifest(tmp_path / "checkpoints/step-000006")
    assert {name: entry.bytes for name, entry in entries.items()} == {"rank0.pt": 5001, "rank1.pt": 2305}
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000003", "step-000006"]


DAMAGE = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "rank1.pt has 2304 bytes instead of 2305"),
    "longer": (lambda f: f.write_bytes(f.read_bytes() + b"x"), "rank1.pt has 2306 bytes instead of 2305"),
    "empty": (lambda f: f.write_bytes(b""), "rank1.pt has 0 bytes instead of 2305"),
    "one bit": (
        lambda f: f.write_bytes(bytes([f.read_bytes()[0] ^ 1]) + f.read_bytes()[1:]),
        "rank1.pt does not have the checksum that was written",
    ),
    "missing": (Path.unlink, "rank1.pt is missing"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "rank1.pt is not a plain file"),
    "a link": (lambda f: (f.rename(f.parent.parent / "away"), f.symlink_to("../away")), "rank1.pt is not a plain file"),
    "a stranger": (
        lambda f: f.with_name("zero_pp_rank_9_optim_states.pt").write_bytes(b"pickle"),
        "zero_pp_rank_9_optim_states.pt is not in manifest.json",
    ),
    "no manifest": (lambda f: f.with_name("manifest.json").unlink(), "manifest.json is missing"),
    "half a manifest": (
        lambda f: f.with_name("manifest.json").write_text(f.with_name("manifest.json").read_text()[:-9]),
        "manifest.json is damaged",
    ),
    "a manifest of another kind": (
        lambda f: f.with_name("manifest.json").write_text("[1]"),
        "manifest.json is damaged",
    ),
    "an empty manifest": (
        lambda f: f.with_name("manifest.json").write_text('{"files": {}}'),
        "manifest.json names no file",
    ),
    "a manifest that leaves its folder": (
        lambda f: f.with_name("manifest.json").write_text('{"files": {"../x": {"bytes": 1, "sha256": "0"}}}'),
        "manifest.json names '../x', which is no file of this checkpoint",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_whole(kind, tmp_path):
    save(tmp_path, 3, 6)
    damage, message = DAMAGE[kind]
    damage(tmp_path / "checkpoints/step-000006/rank1.pt")
    shares = [folder_faults(tmp_path / "checkpoints/step-000006", part=part, parts=2) for part in range(2)]
    assert [*shares[0], *shares[1]] and set(shares[0] + shares[1]) == {message}
    assert whole_steps(tmp_path) == [3]


@pytest.mark.parametrize("bit", range(0, 8 * 2305, 461))
def test_every_flipped_bit_is_noticed(bit, tmp_path):
    save(tmp_path, 6)
    file = tmp_path / "checkpoints/step-000006/rank1.pt"
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    assert folder_faults(file.parent) == ["rank1.pt does not have the checksum that was written"]


@pytest.mark.parametrize("name", ["../../x", "/etc", "step-000003/../../x", "..\\x", "step-000003/"])
def test_latest_cannot_name_another_folder(name, tmp_path):
    save(tmp_path, 3)
    (tmp_path / "checkpoints/latest").write_text(name)
    with pytest.raises(InputError, match=r"checkpoints/latest: names .*expected a folder step-NNNNNN .*--resume never"):
        resumable_steps(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"step-", b"step-00000", b"Step-000003", b"\x00" * 300])
def test_a_damaged_latest_is_told_and_the_newest_is_taken(content, tmp_path, caplog):
    save(tmp_path, 3, 6)
    (tmp_path / "checkpoints/latest").write_bytes(content)
    assert resumable_steps(tmp_path) == [6, 3]
    assert "latest: damaged" in caplog.text


def test_latest_decides_where_several_are_there(tmp_path):
    save(tmp_path, 3, 6, 9)
    (tmp_path / "checkpoints/latest").write_text("step-000006\n")
    assert resumable_steps(tmp_path) == [6, 3]
    shutil.rmtree(tmp_path / "checkpoints/step-000006")
    assert resumable_steps(tmp_path) == [3]
    (tmp_path / "checkpoints/latest").write_text("step-000001")
    with pytest.raises(InputError, match="names 'step-000001', which is not there.*there are step-000003, step-000009"):
        resumable_steps(tmp_path)


def test_old_checkpoints_leave_after_the_new_one_is_the_latest(tmp_path):
    save(tmp_path, 2, 4, keep=2)
    assert saved_steps(tmp_path) == [2, 4]
    save(tmp_path, 6, keep=2)
    assert saved_steps(tmp_path) == [4, 6]
    save(tmp_path, 5, keep=2)  # resumed from 4: step 6 is from before, and is written anew when it is reached
    assert saved_steps(tmp_path) == [4, 5, 6] and resumable_steps(tmp_path) == [5, 4]
    save(tmp_path, 6, keep=2)
    assert saved_steps(tmp_path) == [5, 6] == sorted(whole_steps(tmp_path))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000005", "step-000006"]


class Crash(BaseException):
    """The process is gone."""


def crash_after(monkeypatch, calls: int) -> None:
    """End at the ``calls``-th operation that changes the disk, before it happens."""
    left = [calls]

    def counted(module, name):
        original = getattr(module, name)

        def operation(*arguments, **keywords):
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, operation)

    for name in ("replace", "rename", "fsync"):
        counted(os, name)
    counted(shutil, "rmtree")


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_crash_between_any_two_writes_leaves_a_whole_latest(keep, tmp_path, monkeypatch):
    crashes = 0
    for calls in range(60):
        run = tmp_path / str(calls)
        save(run, 2, 4)
        entries = write_aside(run, 6)
        with monkeypatch.context() as patched:
            crash_after(patched, calls)
            try:
                commit_checkpoint(run, 6, entries, keep=keep)
                break
            except Crash:
                crashes += 1
        latest = latest_step(run)
        assert latest in (4, 6)
        assert whole_steps(run)[0] == latest, f"after {calls} operations"
        remove_leftovers(run / "checkpoints")
        assert all(name == "latest" or name.startswith("step-") and "." not in name for name in
                   os.listdir(run / "checkpoints"))  # fmt: skip
        save(run, 6, keep=keep)  # and the run goes on
        assert latest_step(run) == 6 and whole_steps(run)[0] == 6
    assert crashes >= 8 and calls == crashes


@pytest.mark.parametrize("keep", [0, 1])
def test_a_crash_while_a_checkpoint_is_written_anew_loses_nothing(keep, tmp_path, monkeypatch):
    """Resumed from 4 because 6 was damaged, and 6 is reached again: the folder of that name is replaced."""
    for calls in range(60):
        run = tmp_path / str(calls)
        save(run, 4, 6)
        (run / "checkpoints/step-000006/rank0.pt").write_bytes(b"damaged")
        entries = write_aside(run, 6)
        with monkeypatch.context() as patched:
            crash_after(patched, calls)
            try:
                commit_checkpoint(run, 6, entries, keep=keep)
                break
            except Crash:
                pass
        assert whole_steps(run)[0] in (4, 6), f"after {calls} operations"
    assert calls >= 8 and whole_steps(run)[0] == 6


@pytest.mark.parametrize("failing", range(12))
def test_a_full_disk_at_any_write_is_an_error_and_latest_stays(failing, tmp_path, monkeypatch):
    """``OSError`` from the n-th flush or rename of a commit: nothing that was whole is touched."""
    save(tmp_path, 2, 4)
    entries = write_aside(tmp_path, 6)
    left = [failing]

    def full(name):
        original = getattr(os, name)

        def operation(*arguments, **keywords):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(28, "No space left on device")
            return original(*arguments, **keywords)

        monkeypatch.setattr(durable_files.os, name, operation)

    full("fsync")
    full("replace")
    try:
        commit_checkpoint(tmp_path, 6, entries, keep=1)
    except OSError as error:
        assert error.errno == 28
        assert whole_steps(tmp_path)[0] == latest_step(tmp_path) and latest_step(tmp_path) in (4, 6)
    else:
        assert left[0] >= 0 and saved_steps(tmp_path) == [6]


def test_a_failed_write_is_remembered_and_the_rest_swallowed(tmp_path):
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    file = ChecksummedFile(Full())
    assert file.write(b"abc") == 3 and file.write(b"de") == 2
    with pytest.raises(OSError, match="No space left"):
        file.finish()


def test_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_durably(tmp_path / "latest", "old")
    monkeypatch.setattr(durable_files.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError):
        write_durably(tmp_path / "latest", "new")
    assert (tmp_path / "latest").read_text() == "old" and os.listdir(tmp_path) == ["latest"]
