"""Any byte of a file is in its digest; a name and a date are not; what is remembered is not believed after a change."""

import logging
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvds.errors import InputError
from kvds.identity import file_digest as module
from kvds.identity.file_digest import file_digest, file_digests

LARGE = bytes(range(256)) * 8192  # 2 MiB: remembered


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, tmp_path):
    """Chunks of 64 KiB, so that 2 MiB are many; a memory of the test's own."""
    monkeypatch.setattr(module, "_CHUNK", 2**16)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Files whose bytes were read, once for each time."""
    files: list[Path] = []
    read = module._read
    monkeypatch.setattr(module, "_read", lambda paths: files.extend(paths) or read(paths))
    return files


def at_rest(path: Path, content: bytes = LARGE) -> Path:
    """``path`` with ``content``; with ``rested``, as if it had lain there for long."""
    path.write_bytes(content)
    return path


@pytest.fixture
def rested(monkeypatch):
    """Every file counts as untouched for long enough to be remembered."""
    monkeypatch.setattr(module, "_AT_REST_SECONDS", -1e9)


@settings(max_examples=200)
@given(data=st.data())
def test_any_change_anywhere_is_another_digest(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("digest")
    content = bytearray(data.draw(st.binary(min_size=1, max_size=300)) * data.draw(st.integers(1, 900)))
    before = file_digest(at_rest(folder / "a", bytes(content)))
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "grow", "drop", "swap"]))
    changed = bytearray(content)
    if change == "flip":
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
    elif change == "cut":
        del changed[place:]
    elif change == "grow":
        changed.append(0)
    elif change == "drop":
        del changed[place]
    else:
        changed = changed[place:] + changed[:place]
    (folder / "a").write_bytes(changed)
    assert (file_digest(folder / "a") == before) == (changed == content)


@pytest.mark.parametrize("place", [0, 2**16 - 1, 2**16, 2**16 + 1, 2**20, 2**21 - 1])
def test_where_chunks_meet_no_byte_is_left_out(tmp_path, place):
    content = bytearray(LARGE)
    before = file_digest(at_rest(tmp_path / "a", bytes(content)))
    content[place] ^= 1
    assert file_digest(at_rest(tmp_path / "a", bytes(content))) != before


def test_a_second_look_reads_nothing_and_small_files_are_not_remembered(tmp_path, rested, reads):
    large, small = at_rest(tmp_path / "large"), at_rest(tmp_path / "small", b"few")
    first = file_digests([large, small])
    assert reads == [large, small]
    assert file_digests([large, small]) == first and reads == [large, small, small]
    assert len(list((tmp_path / "hf/kvds/digests").iterdir())) == 1


def test_a_name_and_a_date_are_not_the_content(tmp_path, rested):
    path = at_rest(tmp_path / "a")
    digest = file_digest(path)
    os.utime(path, (1, 1))
    assert file_digest(path) == digest
    path.rename(tmp_path / "b")
    (tmp_path / "c").write_bytes(LARGE)
    assert file_digests([tmp_path / "b", tmp_path / "c"]) == [digest, digest]


def test_equal_size_and_date_do_not_hide_a_change(tmp_path, rested):
    path = at_rest(tmp_path / "a")
    digest, before = file_digest(path), path.stat()
    with path.open("r+b") as file:  # in place: the inode stays
        file.seek(1_000_000)
        file.write(b"\xff\xff\xff")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert file_digest(path) != digest


def test_another_file_of_the_same_name_size_and_date_is_read(tmp_path, rested):
    path = at_rest(tmp_path / "a")
    digest, before = file_digest(path), path.stat()
    other = tmp_path / "b"
    other.write_bytes(LARGE[::-1])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    assert file_digest(path) != digest


def test_a_file_just_touched_is_not_remembered(tmp_path, reads):
    path = at_rest(tmp_path / "a")
    assert file_digest(path) == file_digest(path)
    assert reads == [path, path] and not (tmp_path / "hf").exists()


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, rested, monkeypatch):
    path = at_rest(tmp_path / "a")
    chunk = module._chunk

    def written_meanwhile(file: Path, begin: int) -> bytes:
        found = chunk(file, begin)
        if begin == 0:
            with file.open("r+b") as behind:
                behind.write(b"new")
        return found

    monkeypatch.setattr(module, "_chunk", written_meanwhile)
    old = file_digest(path)
    monkeypatch.setattr(module, "_chunk", chunk)
    assert file_digest(path) != old


@pytest.mark.parametrize("record", ["", "[]", '{"stamp": [1], "digest": 5}', "cut"])
def test_a_damaged_memory_is_no_memory(tmp_path, rested, reads, record):
    path = at_rest(tmp_path / "a")
    digest = file_digest(path)
    [kept] = (tmp_path / "hf/kvds/digests").iterdir()
    kept.write_text(kept.read_text()[:-9] if record == "cut" else record)
    assert file_digest(path) == digest and reads == [path, path]


def test_a_folder_that_takes_nothing_costs_time_alone(tmp_path, rested):
    (tmp_path / "hf").write_text("a file is in the way")
    path = at_rest(tmp_path / "a")
    assert file_digest(path) == file_digest(path)


def test_what_takes_long_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.01)
    chunk = module._chunk
    monkeypatch.setattr(module, "_chunk", lambda *place: time.sleep(0.01) or chunk(*place))
    with caplog.at_level(logging.INFO, "kvds"):
        file_digest(at_rest(tmp_path / "a"))
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"reading all bytes of {tmp_path} (0.0 GB)")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/gone: No such file or directory; expected a file"):
        file_digest(tmp_path / "gone")
