"""MLflow's sqlite file is there with all its tables, or not there."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from kvds.tracking.mlflow_database import make_database

MAKE = """
import sys
from kvds.tracking.mlflow_database import make_database

print('begun', flush=True)
make_database(sys.argv[1])
"""


def test_a_process_killed_while_it_makes_the_tables_leaves_none(tmp_path):
    file = tmp_path / "mlflow.db"
    process = subprocess.Popen([sys.executable, "-c", MAKE, f"sqlite:///{file}"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    begun = time.monotonic()
    while not (list(tmp_path.iterdir()) or process.poll() is not None) and time.monotonic() - begun < 120:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was in the middle of it
    assert [path.name for path in tmp_path.iterdir()] == [f"mlflow.db.{process.pid}.unfinished"]
    make_database(f"sqlite:///{file}")
    assert MlflowClient(tracking_uri=f"sqlite:///{file}").get_experiment_by_name("Default") is not None
    assert not (tmp_path / f"mlflow.db.{os.getpid()}.unfinished").exists()


def test_what_is_there_is_left_alone(tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"
    file.write_text("somebody's")
    make_database(f"sqlite:///{file}")
    assert file.read_text() == "somebody's"
    make_database("http://127.0.0.1:9")  # a server makes its own
    # Another process was faster: its file stays.
    other = tmp_path / "other.db"
    real_link = os.link

    def late(source: Path, target: Path) -> None:
        other.write_text("the first one's")
        real_link(source, target)

    monkeypatch.setattr(os, "link", late)
    make_database(f"sqlite:///{other}")
    assert other.read_text() == "the first one's" and sorted(p.name for p in tmp_path.iterdir()) == [
        "mlflow.db", "other.db",
    ]  # fmt: skip
