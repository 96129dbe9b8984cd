"""Where tests find the publishers' data files, which are never committed."""

import os
from pathlib import Path

import pytest


def data_folder() -> Path:
    """``KVDS_DATA_DIR``, else ``../shared/data`` beside the repository; skips the test where there is neither."""
    folder = Path(os.environ.get("KVDS_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set KVDS_DATA_DIR to a folder with gsm8k/, svamp/, strategyqa/ and arc/")
    return folder
