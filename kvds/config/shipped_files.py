"""Files that kvds brings along: recipes, experiments' plans, DeepSpeed configurations, the quickstart's teacher.

They are found by bare name from any folder, in a checkout and in an installed package alike.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from kvds.errors import near_miss

_PACKAGE = Path(__file__).resolve().parents[1]
# setup.py copies the folders of the repository here, under their own names.
_INSTALLED = _PACKAGE / "shipped"

RECIPES = ("launch/recipes", ".yaml")
PLANS = ("launch/recipes/experiments", ".yaml")
DEEPSPEED_CONFIGS = ("ds_configs", ".json")
MODELS = ("launch", "")
Kind = tuple[str, str]
"""Folder of the repository, and how its files end."""


def shipped_root() -> Path:
    """What ``launch/`` and ``ds_configs/`` lie in: the repository, or a folder of the installed package."""
    return _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent


def shipped_names(kind: Kind) -> list[str]:
    """Bare names of this kind."""
    folder, suffix = kind
    return sorted(path.stem for path in (shipped_root() / folder).glob(f"*{suffix}") if path.is_file())


def find_shipped(name: str | Path, kind: Kind) -> Path:
    """A file or a folder by the name that a user gave it.

    Args:
        name: A path as it stands, a path of the repository, or a bare name such as ``qwen2_reasoning``.
        kind: What it is to be.

    Returns:
        The first of these that is there; ``name`` itself where none is, for the reader to tell of.
    """
    folder, suffix = kind
    given, parts = Path(name), PurePosixPath(name).parts
    there = Path.is_file if suffix else Path.is_dir
    try:
        if there(given) or not parts or given.is_absolute() or ".." in parts:
            return given
        below = (shipped_root() / given, shipped_root() / folder / f"{given}{suffix}")
        return next((path for path in below if there(path)), given)
    except (OSError, ValueError):  # no name that a path can have
        return given


def shipped_hint(name: str | Path, *kinds: Kind) -> str:
    """What a message says of a name under which nothing was found: the nearest of all kinds, and those of the first."""
    near = near_miss(Path(name).stem, [known for kind in kinds for known in shipped_names(kind)])
    return f"{near} (kvds brings {', '.join(shipped_names(kinds[0]))})"
