"""Names of a run's corpora in results, and the files of one's own among them.

A name is no key: two files of one stem lie in different folders, and a file may be called as a known corpus is. Each is
called by as little of its path as tells it from all others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from kvds.config.values import DATA_SUFFIXES
from kvds.data.corpora import CORPORA
from kvds.errors import InputError

# Names with a meaning of their own; ``all`` is that of the mean over all corpora.
_KNOWN = {*CORPORA, "arc", "synthetic"}
_TAKEN = _KNOWN | {"all"}
_SPLITS = re.compile(r"(?P<name>.+)@(?P<splits>[\w.-]+(?:,[\w.-]+)?)")
_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)?")


def split_names(name: str) -> tuple[str, list[str]]:
    """``"OWNER/NAME@TRAIN,EVAL"`` → name, and the splits that it says; a file has none."""
    found = None if name.endswith(DATA_SUFFIXES) else _SPLITS.fullmatch(name)
    return (found["name"], found["splits"].split(",")) if found else (name, [])


def is_own_file(name: str) -> bool:
    """Whether a name is that of a file or folder, not of a known corpus or a data set of the hub."""
    place = split_names(name)[0]
    anchored = place.startswith(("./", "../", "/", "~"))
    return name.endswith(DATA_SUFFIXES) or anchored or (place not in _KNOWN and is_folder(Path(place)))


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a data set of the hub, ``OWNER/NAME``, with a configuration or not."""
    return not is_own_file(name) and _HUB.fullmatch(split_names(name)[0]) is not None


def is_own(name: str) -> bool:
    """Whether a name is that of data whose format must be recognised."""
    return is_own_file(name) or is_hub_name(name)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder; one that no file system could have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; one that no file system could have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def own_file(name: str, data_dir: str | None) -> Path:
    """Where a file or folder of one's own lies: as named, else below ``data_dir``."""
    here = data_dir is None or is_file(Path(name)) or is_folder(Path(name))
    return Path(name) if here else Path(str(data_dir)) / name


def held_out_file(path: Path) -> Path:
    """Where the held-out rows of a file lie if they do not lie in it."""
    return path.with_name(f"{path.stem}.eval{path.suffix}")


def _real_path(path: Path) -> Path:
    """Without links, where the path can be followed; who reads the file tells of one that cannot."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # too long, links in a circle, a NUL in the name
        return path.absolute()


def corpus_names(names: Iterable[str], data_dir: str | None) -> dict[str, str]:
    """Name as given, without weight → what the corpus is called, different for each.

    Raises:
        InputError: two names of one file.
    """
    files: dict[str, Path] = {}
    for name in filter(is_own_file, names := list(names)):
        path = _real_path(own_file(split_names(name)[0], data_dir))
        for other, known in files.items():
            if known == path:
                raise InputError(
                    f"datasets={name}: the same file as {other}; expected each corpus once (to weigh it: {name}:2)"
                )
        files[name] = path
    parts = dict.fromkeys(files, 0)

    def called(name: str) -> str:
        path, more = files[name], parts[name]
        whole = path.stem if name.endswith(DATA_SUFFIXES) else path.name
        return whole if more == 0 else "/".join(path.parts[-more:])

    while True:
        counts = Counter(map(called, files))
        alike = [name for name in files if counts[called(name)] > 1 or called(name) in _TAKEN]
        if not alike:
            return {name: called(name) if name in files else re.sub("[@,]", " ", name) for name in names}
        for name in alike:
            parts[name] += 1
