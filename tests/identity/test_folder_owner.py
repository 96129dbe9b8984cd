"""A folder has one owner at a time, however many jobs want it, are killed in it, or stand still and wake up again."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from kvds.errors import InputError
from kvds.identity import folder_owner
from kvds.identity.folder_owner import FolderOwner, create_once, living_owner

FORK = multiprocessing.get_context("fork")


def owner_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_another_machine(folder: Path, *, silent: float) -> Path:
    """The folder's owner as one that runs elsewhere and was last seen ``silent`` seconds ago."""
    [path] = folder.glob(".owner.*.json")
    content = json.loads(path.read_text()) | {"machine": "another", "host": "node7", "pid": 4711}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - silent,) * 2)
    return path


def in_child(function, *arguments) -> int:
    child = FORK.Process(target=function, args=arguments)
    child.start()
    child.join(30)
    return child.exitcode


def take_and_die(folder: Path) -> None:
    FolderOwner(folder).take()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_second_job_is_refused_and_told_by_whom(tmp_path):
    with FolderOwner(tmp_path) as owner:
        assert owner.held and living_owner(tmp_path).pid == os.getpid()
        with pytest.raises(InputError) as refusal:
            FolderOwner(tmp_path, flag="output").take()
        text = str(refusal.value)
        assert text.startswith(f"output={tmp_path}: belongs to process {os.getpid()} on {os.uname().nodename}, ")
        assert "took it 0 s ago" in text and "another --output)" in text and "\n" not in text
        with FolderOwner(tmp_path, share=3):  # another share of the same job's work
            pass
    assert living_owner(tmp_path) is None and not owner.held
    with FolderOwner(tmp_path):
        assert owner_files(tmp_path) == [".owner-3.000002.json", ".owner.000003.json"]


def test_a_killed_owner_is_taken_over_at_once(tmp_path):
    assert in_child(take_and_die, tmp_path) == -signal.SIGKILL
    assert living_owner(tmp_path) is None
    begun = time.monotonic()
    with FolderOwner(tmp_path):
        assert time.monotonic() - begun < 1 and owner_files(tmp_path) == [".owner.000002.json"]


def test_a_number_that_another_process_bears_now_is_no_owner(tmp_path):
    FolderOwner(tmp_path).take()
    [path] = tmp_path.glob(".owner.*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ticks": "1"}))  # this pid, begun at another time
    FolderOwner(tmp_path).take()
    with pytest.raises(InputError):
        FolderOwner(tmp_path).take()


def test_elsewhere_a_sign_of_life_refuses_and_silence_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_owner, "_POLL_SECONDS", 0.02)
    FolderOwner(tmp_path).take()
    path = of_another_machine(tmp_path, silent=4)
    beat = threading.Timer(0.3, os.utime, [path])
    beat.start()
    with pytest.raises(InputError, match=r"process 4711 on node7, .* last sign of life 0 s ago"):
        FolderOwner(tmp_path).take()
    beat.join()
    os.utime(path, (time.time() - folder_owner.LOST_SECONDS + 0.5,) * 2)
    begun = time.monotonic()
    with FolderOwner(tmp_path):  # half a second later it has been silent for long enough
        assert 0.2 < time.monotonic() - begun < 5


def test_who_waits_can_be_stopped(tmp_path):
    FolderOwner(tmp_path).take()
    of_another_machine(tmp_path, silent=4)

    def asked() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FolderOwner(tmp_path).take(between=asked)
    assert living_owner(tmp_path).host == "node7"


def test_a_copy_of_a_living_job_s_folder_is_nobody_s(tmp_path):
    home, copy = tmp_path / "run", tmp_path / "copy"
    home.mkdir()
    with FolderOwner(home):
        [path] = home.glob(".owner.*.json")
        os.utime(path, (time.time() - 30,) * 2)
        shutil.copytree(home, copy)
        assert living_owner(copy) is not None  # a link, or the same folder by another way: its signs of life come here
        os.utime(path)
        assert living_owner(copy) is None and living_owner(home) is not None
        with FolderOwner(copy):
            assert living_owner(copy) is not None and living_owner(home) is not None
        (tmp_path / "link").symlink_to(home)
        with pytest.raises(InputError):
            FolderOwner(tmp_path / "link").take()


def test_a_folder_that_was_moved_stays_its_owner_s(tmp_path):
    home = tmp_path / "run"
    home.mkdir()
    with FolderOwner(home):
        home.rename(tmp_path / "moved")
        assert living_owner(tmp_path / "moved") is not None


def test_patience_waits_for_a_living_owner_to_leave(tmp_path):
    owner = FolderOwner(tmp_path).take()
    threading.Timer(0.3, owner.leave).start()
    with FolderOwner(tmp_path).take(patience=20) as second:
        assert second.held and not owner.held


def test_an_owner_that_stood_still_learns_that_it_was_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_owner, "BEAT_SECONDS", 0.2)
    lost = threading.Event()
    sleeper = FolderOwner(tmp_path, on_lost=lost.set).take()
    of_another_machine(tmp_path, silent=2 * folder_owner.LOST_SECONDS)
    monkeypatch.setattr(folder_owner.os, "utime", lambda *_: None)  # it stands still: no sign of life
    with FolderOwner(tmp_path) as second:
        assert lost.wait(5)
        sleeper.leave()  # and what it leaves is no longer its own
        assert second.held and living_owner(tmp_path).pid == os.getpid()


def test_a_file_cleared_away_comes_back_with_the_next_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_owner, "BEAT_SECONDS", 0.05)
    with FolderOwner(tmp_path):
        [path] = tmp_path.glob(".owner.*.json")
        path.unlink()
        deadline = time.monotonic() + 5
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(InputError):
            FolderOwner(tmp_path).take()


def test_half_written_files_are_alive_until_they_have_been_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_owner, "_POLL_SECONDS", 0.02)
    path = tmp_path / ".owner.000001.json"
    path.write_text('{"host": "no')
    assert living_owner(tmp_path) is not None
    os.utime(path, (time.time() - folder_owner.LOST_SECONDS - 1,) * 2)
    assert living_owner(tmp_path) is None
    with FolderOwner(tmp_path):
        assert owner_files(tmp_path) == [".owner.000002.json"]


def make_in_turn(folder: Path, start, wins) -> None:
    for number in range(200):
        start.wait(20)
        if create_once(folder / str(number), str(os.getpid())):
            wins[number] += 1


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_made_once_with_all_it_holds(tmp_path, monkeypatch, links):
    if not links:  # a file system that knows none

        def link(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
    start, wins = FORK.Barrier(3), FORK.Array("i", 200)
    children = [FORK.Process(target=make_in_turn, args=(tmp_path, start, wins)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert list(wins) == [1] * 200
    assert len(list(tmp_path.iterdir())) == 200  # nothing is left aside
    assert all(int((tmp_path / str(n)).read_text()) in {child.pid for child in children} for n in range(200))


def test_a_link_whose_answer_was_lost_was_made(tmp_path, monkeypatch):
    link = os.link

    def lossy(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")  # what NFS says when it answers the question put again

    monkeypatch.setattr(os, "link", lossy)
    assert create_once(tmp_path / "a", "text") and (tmp_path / "a").read_text() == "text"


def contend(folder: Path, seed: int, start) -> None:
    """Once in the folder, say so, work, and leave, or die without a word; whoever finds a living other one inside says
    that they were mixed.
    """
    draw = random.Random(seed)
    folder_owner._POLL_SECONDS = 0.001
    start.wait(20)
    time.sleep(draw.choice((0, 0, 0.001, 0.003)))
    owner = FolderOwner(folder)
    try:
        owner.take()
    except InputError:
        os._exit(2)
    inside = folder / "inside"
    with contextlib.suppress(FileNotFoundError):
        pid = int(inside.read_text() or "0")
        if pid and folder_owner.start_ticks(pid) is not None:
            (folder / "mixed").write_text(f"{pid} and {os.getpid()}")
    inside.write_text(str(os.getpid()))
    time.sleep(draw.choice((0, 0.002, 0.01)))
    if inside.read_text() != str(os.getpid()):
        (folder / "mixed").write_text(f"{os.getpid()} was joined")
    if draw.random() < 0.4:
        os.kill(os.getpid(), signal.SIGKILL)
    inside.unlink()
    owner.leave()
    os._exit(0)


def test_jobs_race_for_a_folder_fifty_times_and_are_never_mixed(tmp_path):
    codes: list[int] = []
    for turn in range(50):
        start = FORK.Barrier(4)
        children = [FORK.Process(target=contend, args=(tmp_path, 4 * turn + n, start)) for n in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join(30)
        codes += [child.exitcode for child in children]
        assert not (tmp_path / "mixed").exists(), (tmp_path / "mixed").read_text()
        assert any(child.exitcode != 2 for child in children[:4])  # whoever was first got it
    assert set(codes) == {0, 2, -signal.SIGKILL}
    assert len(list(tmp_path.glob(".owner*"))) <= 3  # the newest, and what a kill has left beside it
