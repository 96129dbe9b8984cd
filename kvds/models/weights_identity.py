"""Identity of a model's weights: a short text of all their bytes, the same in whatever folder and by whatever name."""

from __future__ import annotations

from kvds.identity.contents import short_hash
from kvds.identity.file_digest import file_digests
from kvds.models.hub import folder_at_hand, is_folder_name, model_folder
from kvds.models.weight_files import UnusableWeights, weight_parts

NOT_HERE = "not here"


def weights_identity(name: str, *, init: str, seed: int, flag: str, fetch: bool = True) -> str:
    """Every byte of the files that a model's weights are loaded from; where they are drawn, what they are drawn from.

    Args:
        name: Folder or hub name.
        init: ``"pretrained"`` or ``"random"``.
        seed: Of a random start.
        flag: That named the model, for messages.
        fetch: Bring what is on the hub alone, as the run is about to; else :data:`NOT_HERE` is said of it.

    Raises:
        InputError: a file cannot be read, or the hub cannot be reached.
    """
    if init == "random":
        return f"random, seed {seed}"
    folder = model_folder(name, flag) if fetch or is_folder_name(name) else folder_at_hand(name)
    try:
        files = [] if folder is None else weight_parts(folder)
    except UnusableWeights:  # whoever loads it will say why; a cache's teacher need not be there
        files = []
    if not files:
        return NOT_HERE
    size = sum(path.stat().st_size for path in files)
    # Without names: those say where tensors lie, and what the tensors are called stands inside.
    return f"{size:,} bytes {short_hash(sorted(file_digests(files)))}"
