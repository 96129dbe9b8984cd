"""Packages that only some of kvds needs: which extra brings each, and what is said where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from kvds.errors import InputError

# Package → extra of pyproject.toml that brings it.
EXTRAS = {
    "bitsandbytes": "quantization", "lm_eval": "tasks", "matplotlib": "plots", "mlflow": "mlflow", "peft": "lora",
    "scipy": "statistics", "shtab": "completion", "tensorboard": "tensorboard", "wandb": "wandb",
}  # fmt: skip


def installed(package: str) -> bool:
    """Whether a package of :data:`EXTRAS` can be imported; nothing is imported to know."""
    return find_spec(package) is not None


def missing(package: str) -> str:
    """``"matplotlib is not installed (pip install 'kvds[plots]')"``."""
    return f"{package} is not installed (pip install 'kvds[{EXTRAS[package]}]')"


def need(what: str, *packages: str) -> None:
    """Refuse what cannot be done without all of ``packages``.

    Raises:
        InputError: naming the first that is missing, and the command that installs it.
    """
    for package in packages:
        if not installed(package):
            raise InputError(f"{what}: {missing(package)}; expected an environment with it")
