"""The weight files of a model folder: safetensors alone, each tensor listed once with its file, shape and type.

kvds reads ``model.safetensors``, or the parts that ``model.safetensors.index.json`` names, which must lie in the folder
and hold what the index says. Pickles (``pytorch_model.bin``) are never read: alone they are refused, beside safetensors
they are left alone, as are ``consolidated*.safetensors``, a publisher's second copy of the same weights, and the map
``handoff.safetensors`` that may lie beside a student.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open

from kvds.errors import one_line

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
HANDOFF_FILE = "handoff.safetensors"
# What a model of the hub is loaded from; nothing else is downloaded for its weights.
WEIGHT_PATTERNS = (WEIGHTS_FILE, INDEX_FILE, "*-of-*.safetensors")

_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")


class UnusableWeights(ValueError):
    """Why the weight files of a folder cannot be used, in words that follow its name, with what was expected."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: read no further than the file's header.

    Attributes:
        file: Where it lies.
        name: What it is called there.
        shape: Its sizes.
        dtype: As safetensors call it, such as ``"BF16"``.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def weight_parts(folder: Path) -> list[Path]:
    """The safetensors that make up the model in ``folder``; all are there.

    Raises:
        UnusableWeights: there are none, or not all, or more than one set, or an index that leads elsewhere.
    """
    return sorted(_parts(folder))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the model in ``folder`` by name; the headers of its files are read and no weights.

    Raises:
        UnusableWeights: see :func:`weight_parts`; or a file is damaged, or the index says other than the files.
    """
    tensors: dict[str, StoredTensor] = {}
    for file, promised in sorted(_parts(folder).items()):
        held = _header(file)
        for name, tensor in held.items():
            if name in tensors:
                raise UnusableWeights(f"{name} is stored twice, in {tensors[name].file.name} and {file.name}; {_WHOLE}")
            tensors[name] = tensor
        for names, fault in ((promised - held.keys(), "lacks"), (held.keys() - promised, "holds beside them")):
            if promised and names:
                raise UnusableWeights(
                    f"{file.name} is not what {INDEX_FILE} says: it {fault} {min(names)} ({len(names)} such); {_WHOLE}"
                )
    return tensors


_WHOLE = "expected the files as save_pretrained writes them"


def _parts(folder: Path) -> dict[Path, set[str]]:
    """File → tensors that the index promises in it; empty where there is no index."""
    if (folder / ADAPTER_FILE).is_file():
        raise UnusableWeights(adapter_fault(folder))
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise UnusableWeights(f"holds {WEIGHTS_FILE} and {INDEX_FILE}; expected one of the two (remove the stale one)")
    parts = {single: set()} if single.is_file() else _indexed(index) if index.is_file() else {}
    if not parts:
        raise UnusableWeights(_nothing(folder))
    surplus = [
        file.name
        for file in sorted(folder.glob("*.safetensors"))
        if file not in parts and file.name != HANDOFF_FILE and not file.name.startswith("consolidated")
    ]
    if surplus:
        raise UnusableWeights(
            f"{surplus[0]} is no part of the model ({len(surplus)} such files); expected {WEIGHTS_FILE}, or what "
            f"{INDEX_FILE} names, and no others (move them elsewhere)"
        )
    absent = sorted(file.name for file in parts if not file.is_file())
    if absent:
        raise UnusableWeights(f"{absent[0]} is missing ({len(absent)} of {len(parts)} parts); {_WHOLE}")
    return parts


def _indexed(index: Path) -> dict[Path, set[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        entries = {str(name): part for name, part in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnusableWeights(f"{index.name} is damaged ({one_line(error)}); {_WHOLE}") from error
    parts: dict[Path, set[str]] = {}
    for name, part in entries.items():
        path = PurePosixPath(part) if isinstance(part, str) else PurePosixPath()
        inside = not path.is_absolute() and ".." not in path.parts and "\\" not in str(part)
        if not inside or path.suffix != ".safetensors":
            raise UnusableWeights(
                f"{index.name} says that {one_line(name)} lies in {one_line(part)!r}; expected a file "
                "*.safetensors of the folder itself"
            )
        parts.setdefault(index.parent / path, set()).add(name)
    return parts


def _nothing(folder: Path) -> str:
    pickles = sorted({file.name for pattern in _PICKLES for file in folder.glob(pattern)})
    if not pickles:
        return f"there is no {WEIGHTS_FILE}; {_WHOLE}"
    return (
        f"there is no {WEIGHTS_FILE}, only {pickles[0]}, and weights are read as safetensors alone; expected the model "
        "saved anew, once, where the file is trusted: AutoModelForCausalLM.from_pretrained(FOLDER, "
        "use_safetensors=False).save_pretrained(OTHER)"
    )


def adapter_fault(folder: Path) -> str:
    """That a folder with ``adapter_config.json`` is no model, whose adapter it is and what to do."""
    base = None
    try:
        content = json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))
        base = content.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        pass
    of = f" of {one_line(base)}" if base else ""
    return (
        f"{ADAPTER_FILE}: it is an adapter{of}, not a model; expected it merged into its model: PeftModel"
        ".from_pretrained(MODEL, FOLDER).merge_and_unload().save_pretrained(OTHER)"
    )


def _header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, "pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, name, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise UnusableWeights(f"{file.name}: {one_line(error)}; {_WHOLE}") from error
