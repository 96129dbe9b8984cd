"""Checkpoint writer: all ranks save together, whole or not at all, on a disk that may be full."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import IO, Any, cast

import deepspeed
import torch
from deepspeed.checkpoint import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from torch import distributed as dist

from kvds.checkpoint.folder import CHECKPOINTS, commit_checkpoint, step_tag, unfinished_tag
from kvds.checkpoint.manifest import ChecksummedFile, FileEntry, file_fault
from kvds.checkpoint.origin import Origin, write_origin
from kvds.errors import RunError

log = logging.getLogger("kvds")

# Saves that may fail one after the other before the run stops.
ATTEMPTS = 3


class RecordingCheckpointEngine(TorchCheckpointEngine):
    """DeepSpeed's way to the disk: keeps size and checksum of what it writes, and failures instead of raising them.

    A rank that raised in the middle of ``save_checkpoint`` would leave the others waiting in its next collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[Path, FileEntry] = {}
        self.faults: list[str] = []

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.faults.append(f"{path}: {error.strerror}")

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write one file and read it back."""
        try:
            with open(path, "wb") as plain:
                file = ChecksummedFile(plain)
                torch.save(state_dict, cast(IO[bytes], file))
                entry = file.finish()
        except OSError as error:
            self.faults.append(f"{path}: {error.strerror}")
            return
        fault = file_fault(Path(path), entry)
        if fault is not None:
            self.faults.append(f"{path} {fault}")
        self.files[Path(path)] = entry


class CheckpointWriter:
    """Saves an engine's checkpoints under ``RUN_DIR/checkpoints``; every rank has one.

    Args:
        engine: The engine around student and aligner; its checkpoint engine is replaced.
        run_dir: The run's ``--output_dir``.
        keep: How many checkpoints stay; 0 = all.
        identity: Of the run, which goes with each checkpoint.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, run_dir: Path, *, keep: int = 0, identity: dict[str, str] | None = None
    ) -> None:
        self._engine, self._run_dir, self._keep, self._identity = engine, run_dir, keep, identity
        self._failures = 0
        # Its scripts to turn a checkpoint into weights are written unguarded; `kvds export` does that.
        engine._copy_recovery_script = lambda *arguments: None

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Save engine, optimizer and schedule with ``state`` (plain values); all ranks call it.

        Returns:
            False where it could not be written: the reason is logged, the checkpoint before is whole and still the
            latest.

        Raises:
            RunError: the weights are not finite, or this was the third failure in a row.
        """
        if not finite_weights(self._engine):
            raise RunError(
                f"step {step}: weights of the student or the map are not finite; no checkpoint was written of them "
                "(go on from the one before with a lower --lr or with --max_grad_norm 1.0)"
            )
        fault = self._save(step, state)
        self._failures = 0 if fault is None else self._failures + 1
        if fault is None:
            return True
        log.warning("checkpoint %s was not saved: %s; the one before is whole, the run goes on", step_tag(step), fault)
        if self._failures >= ATTEMPTS:
            raise RunError(
                f"{self._failures} checkpoints in a row could not be saved, the last at step {step}: {fault} (make "
                "room, then start again with --resume auto)"
            )
        return False

    def _save(self, step: int, state: dict[str, Any]) -> str | None:
        folder = self._run_dir / CHECKPOINTS
        aside = folder / unfinished_tag(step)
        main = dist.get_rank() == 0
        if main:
            shutil.rmtree(aside, ignore_errors=True)
        recorder = self._engine.checkpoint_engine = RecordingCheckpointEngine()
        # The second entry is what DeepSpeed wants to see before it deals the shards out to another number of ranks.
        client = {"kvds": {**state, "step": step}, UNIVERSAL_CHECKPOINT_INFO: {}}
        self._engine.save_checkpoint(str(folder), tag=aside.name, client_state=client, save_latest=False)
        mine = {str(path.relative_to(aside)): entry for path, entry in recorder.files.items()}
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, recorder.faults))
        faults = [fault for _, of_rank in everyone for fault in of_rank]
        if main and not faults:
            files = {name: entry for of_rank, _ in everyone for name, entry in of_rank.items()}
            engine = self._engine
            origin = Origin(
                dist.get_world_size(), engine.train_batch_size(), engine.zero_optimization_stage(), self._identity
            )  # fmt: skip
            try:
                files |= {str(path.relative_to(aside)): entry for path, entry in write_origin(aside, origin).items()}
                commit_checkpoint(self._run_dir, step, files, keep=self._keep)
            except OSError as error:
                faults.append(f"{error.filename or aside}: {error.strerror}")
        if main and faults:
            shutil.rmtree(aside, ignore_errors=True)  # its bytes are what the disk lacks
        told = [faults[0] if faults else None]
        dist.broadcast_object_list(told, src=0)
        return told[0]


@torch.no_grad()
def finite_weights(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether every weight that the engine trains is a finite number, on all ranks; all ranks call it."""
    bad = torch.zeros((), dtype=torch.int32, device=engine.device)
    for parameter in engine.module.parameters():
        values = parameter
        if hasattr(parameter, "ds_id"):
            # The last rank's share ends in elements that nobody has set.
            values = parameter.ds_tensor.flatten()
            values = values[: max(0, parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.ds_numel)]
        bad += (~torch.isfinite(values)).any().to(bad)
    dist.all_reduce(bad)
    return int(bad) == 0
