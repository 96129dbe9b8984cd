"""Kinds of runs that are interrupted, kills at random moments, and a disk that is full at each write in turn."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvds.checkpoint.folder import latest_step, saved_steps
from kvds.checkpoint.manifest import folder_faults
from kvds.cli import main
from tests.harness.survival_runs import REPOSITORY, check_equal, cut, flags, make_models, starter
from tests.reliability.chaos import Tally, chaos


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def start(rank_server, folder):
    return starter(rank_server, folder)


STAGE0 = REPOSITORY / "ds_configs/zero0_fp32.json"
KINDS = {
    "packing": {"packing": True, "gradient_checkpointing": True},
    "grouped by length from a cache, without ZeRO": {
        "group_by_length": True, "teacher_cache": "cache", "deepspeed_config": STAGE0, "save_steps": 5,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_each_kind_go_on_in_the_same_bits(kind, start, folder, tmp_path):
    settings = dict(KINDS[kind])
    if "teacher_cache" in settings:
        settings["teacher_cache"] = tmp_path / "cache"
        own = flags(folder, tmp_path / "unused", group_by_length=True, deepspeed_config=STAGE0)
        assert main(["cache", "--output", str(tmp_path / "cache"), "--store", "fp32", "--", *own]) == 0
    codes, log = start(kind, **settings)
    assert codes == [0], log[-3000:]
    step = settings.get("save_steps", 3)  # of 8, five of which are an epoch
    cut(folder / kind, folder / f"{kind} cut", step)
    codes, log = start(f"{kind} cut", **settings)
    assert codes == [0] and f"resumed from step {step} of 8" in log
    check_equal(folder / kind, folder / f"{kind} cut")
    assert main(["export", "--run", str(folder / kind), "--output", str(tmp_path / "exported")]) == 0
    student, exported = (load_file(run / "student/model.safetensors") for run in (folder / kind, tmp_path / "exported"))
    assert student.keys() == exported.keys() and all(torch.equal(student[name], exported[name]) for name in student)


def test_killed_at_random_moments_it_ends_in_the_same_bits(rank_server, folder, tmp_path):
    tally = Tally()
    moments = ("in a save", "in a step")
    figures = chaos(rank_server, folder, tmp_path, kills=2, kinds=("kill -9",), moments=moments, tally=tally)
    assert figures["kills"] == tally.kills == 2 and tally.done["kill -9", "in a save"] >= 1
    assert figures["ranks_left_behind"] == 0 and tally.tracebacks == []
    assert figures["bytes_compared"] > 9000 and figures["records_compared"] > 4


# Every second save of a run has a disk that is full from its n-th write on, the first time at once.
FULL_AT_THE_NTH_WRITE = """
from kvds.checkpoint.manifest import ChecksummedFile
from kvds.checkpoint.writer import CheckpointWriter

left = [None]

class Full:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

def opened(self, file, ask=ChecksummedFile.__init__):
    ask(self, Full(file))

def save(self, step, state, ask=CheckpointWriter.save):
    left[0] = None if step % 2 == 0 or step > {last} else (step - 1) // 2 * {stride}
    return ask(self, step, state)

ChecksummedFile.__init__, CheckpointWriter.save = opened, save
"""


def test_a_disk_that_is_full_at_any_write_costs_one_checkpoint_and_no_more(start, folder):
    codes, log = start("straight", max_steps=24, save_steps=0, report_to="none")
    assert codes == [0], log[-3000:]
    setup = FULL_AT_THE_NTH_WRITE.format(stride=17, last=20)
    codes, log = start("full", max_steps=24, save_steps=1, setup=setup)
    assert codes == [0] and "Traceback" not in log, log[-3000:]
    run = folder / "full"
    assert log.count("was not saved") == log.count("No space left on device") == 10
    kept = [step for step in range(1, 25) if step % 2 == 0 or step > 20]
    assert saved_steps(run) == kept and latest_step(run) == 24
    assert all(folder_faults(run / f"checkpoints/step-{step:06d}") == [] for step in kept)
    assert not list((run / "checkpoints").glob("*.unfinished"))
    check_equal(folder / "straight", run)
