"""Origin of a checkpoint: the ranks, rows of a global step and ZeRO stage of its run, and what it was made of; and what
that asks of a resume.

The order of samples is that of global steps, so that a run goes on with the same samples on another number of ranks as
long as a step has the same rows: the gradient accumulation makes up for the ranks.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kvds.checkpoint.folder import CHECKPOINTS, step_tag
from kvds.checkpoint.manifest import ChecksummedFile, FileEntry
from kvds.config import RunConfig
from kvds.durable_files import json_text
from kvds.errors import InputError

log = logging.getLogger("kvds")

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Origin:
    """What wrote a checkpoint.

    Attributes:
        ranks: Processes, each of which wrote its shard.
        rows_per_step: Rows of a global step: batch size × gradient accumulation × ranks.
        zero_stage: How far weights, gradients and optimizer were sharded.
        identity: What :func:`kvds.checkpoint.run_identity.run_identity` says of the run; None: an earlier version
            wrote it and did not know.
    """

    ranks: int
    rows_per_step: int
    zero_stage: int
    identity: dict[str, str] | None = None


def write_origin(folder: Path, origin: Origin) -> dict[Path, FileEntry]:
    """Write ``origin.json`` into the checkpoint in ``folder``; its path and what its manifest says of it.

    Raises:
        OSError: it could not be written.
    """
    path = folder / ORIGIN_FILE
    with path.open("wb") as plain:
        file = ChecksummedFile(plain)
        file.write((json_text(asdict(origin)) + "\n").encode())
        return {path: file.finish()}


def read_origin(run_dir: Path, step: int) -> Origin:
    """The origin of the checkpoint after ``step`` optimizer steps, whose manifest has been checked.

    Raises:
        InputError: the checkpoint has none.
    """
    path = run_dir / CHECKPOINTS / step_tag(step) / ORIGIN_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        identity = content.pop("identity", None)
        known = None if identity is None else {str(name): str(text) for name, text in identity.items()}
        return Origin(**{name: int(value) for name, value in content.items()}, identity=known)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: does not say how many ranks wrote the checkpoint; expected one that this version of kvds saved "
            "(or --resume never)"
        ) from error


def fit_to_origin(cfg: RunConfig, origin: Origin, *, step: int, world_size: int, zero_stage: int) -> RunConfig:
    """``cfg`` as it goes on from a checkpoint on ``world_size`` ranks: with another gradient accumulation where their
    number has changed, so that a global step keeps its rows.

    Raises:
        InputError: the rows of a step would change without ``--change_global_batch``, or the shards cannot be dealt
            out anew.
    """
    saved = f"{step_tag(step)} in {cfg.output_dir} was saved by {origin.ranks} ranks"
    if zero_stage != origin.zero_stage:
        raise InputError(
            f"deepspeed_config={cfg.deepspeed_config}: ZeRO stage {zero_stage}, and {step_tag(step)} in "
            f"{cfg.output_dir} was saved under stage {origin.zero_stage}; expected the same stage (or --resume never)"
        )
    if world_size != origin.ranks and zero_stage > 0 and cfg.optimizer == "sgd":
        raise InputError(
            f"--optimizer sgd: {saved}, and DeepSpeed deals the shards of Adam alone out to other ranks, here "
            f"{world_size}; expected the same number (start {origin.ranks} ranks, or --resume never)"
        )
    rows = cfg.batch_size * cfg.gradient_accumulation_steps * world_size
    if rows == origin.rows_per_step:
        return cfg
    if cfg.change_global_batch:
        log.warning(
            "--change_global_batch: %s with %d rows per optimizer step; from here on a step has %d, and step n takes "
            "the n-th %d rows of its epoch", saved, origin.rows_per_step, rows, rows,
        )  # fmt: skip
        return cfg
    accumulation, rest = divmod(origin.rows_per_step, cfg.batch_size * world_size)
    if world_size != origin.ranks and accumulation and not rest:
        log.info(
            "%s, now there are %d: --gradient_accumulation_steps is %d instead of %d, so that an optimizer step keeps "
            "its %d rows", saved, world_size, accumulation, cfg.gradient_accumulation_steps, origin.rows_per_step,
        )  # fmt: skip
        return replace(cfg, gradient_accumulation_steps=accumulation)
    raise InputError(
        f"--batch_size {cfg.batch_size} × --gradient_accumulation_steps {cfg.gradient_accumulation_steps} × "
        f"{world_size} ranks = {rows} rows per optimizer step: {saved} with {origin.rows_per_step}; expected a product "
        f"of {origin.rows_per_step} (or --change_global_batch to go on with another)"
    )
