"""MLflow's sqlite file, made whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

_SQLITE = "sqlite:///"
# What MLflow's pages open on: runs with their curves side by side, not the traces of an application.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


def make_database(uri: str) -> None:
    """Where ``uri`` names a sqlite file that is not there, make it with all of MLflow's tables.

    MLflow makes its tables in dozens of migrations, which take seconds. A process killed meanwhile would leave a file
    that no later one can open ("table _alembic_tmp_… already exists"). So they are made beside the file and put in its
    place when they are whole; of several processes the first wins.

    Args:
        uri: MLflow's store; anything but ``sqlite:///FILE`` is left alone.
    """
    if not uri.startswith(_SQLITE):
        return
    file = Path(uri.removeprefix(_SQLITE).partition("?")[0])  # behind it stand options, such as timeout=60
    if file.exists():
        return
    from mlflow import MlflowClient

    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.{os.getpid()}.unfinished")
    aside.unlink(missing_ok=True)
    try:
        MlflowClient(tracking_uri=f"{_SQLITE}{aside}").search_experiments(max_results=1)
        try:
            os.link(aside, file)  # unlike a rename, it never replaces what another process has begun to fill
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
