"""Write a teacher's selected keys and values of a corpus to disk, once, for training with --teacher_cache DIR."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvds.distributed.preemption import EXIT_CODE, Preempted, StopRequest, leave_at_once
from kvds.errors import InputError
from kvds.identity.folder_owner import FolderOwner

if TYPE_CHECKING:
    from kvds.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="folder of the cache")
    parser.add_argument(
        "--store", choices=("fp32", "bf16", "int8", "fp8"), default="bf16",
        help="precision on disk; int8 and fp8 with an offset and a scale per channel (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--shard_samples", type=int, default=512, metavar="N", help="rows per file (default: %(default)s)"
    )
    parser.add_argument(
        "run_flags", nargs="*", metavar="-- --config RECIPE --flag value …",
        help="after --: the flags of the training run (--output_dir may be left away)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write this process's shards; RANK and WORLD_SIZE, where a launcher sets them, share the work out. Asked to stop
    (SIGUSR1, SIGTERM), it ends after the shard in flight with exit code 85; before the first one at once.
    """
    stop = StopRequest().install(leave_at_once)
    try:
        return _write(arguments, stop)
    except Preempted as reason:
        print(f"stopped: {reason}; what is written stays, the same command goes on from there", file=sys.stderr)
        return EXIT_CODE
    finally:
        stop.remove()


def _write(arguments: argparse.Namespace, stop: StopRequest) -> int:
    """Check, own the folder (each process its share of it: they do not talk to each other) and write."""
    if arguments.shard_samples < 1:
        raise InputError(f"--shard_samples {arguments.shard_samples}: expected at least 1 row per file")
    if arguments.output.exists() and not arguments.output.is_dir():  # who owns it: see below, by shares
        raise InputError(f"--output {arguments.output}: is a file; expected a folder")
    from kvds.config.recipe import parse_run_config
    from kvds.config.setting_rules import check
    from kvds.config.teacher_rules import cache_rules

    cfg = parse_run_config(["--output_dir", "unused", *arguments.run_flags])
    if not cfg.uses_teacher_kv:
        raise InputError(f"alignment_mode={cfg.alignment_mode}: expected a run that reads keys and values")
    check(cache_rules(cfg, arguments.output))
    arguments.output.mkdir(parents=True, exist_ok=True)
    owner = FolderOwner(arguments.output, flag="output", share=int(os.environ.get("RANK", "0")))
    with owner.take(between=stop.check):
        return _write_owned(arguments, cfg, stop)


def _write_owned(arguments: argparse.Namespace, cfg: RunConfig, stop: StopRequest) -> int:
    import torch
    from tqdm import tqdm

    from kvds.align.loss import state_names
    from kvds.config.deepspeed_file import compute_dtype, load_deepspeed_config
    from kvds.data.run_data import load_run_data
    from kvds.kv import select_tokens
    from kvds.models.architecture import load_model_config
    from kvds.models.loading import TORCH_DTYPES, load_model
    from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer
    from kvds.teacher.cache_fingerprint import cache_fingerprint
    from kvds.teacher.cached import write_teacher_cache
    from kvds.teacher.teacher import Teacher

    name = cfg.first_teacher or ""
    tokenizer = load_tokenizer(cfg)
    check_same_tokenizer(cfg, tokenizer)
    config = load_model_config(cfg, tokenizer, name, flag="teacher")
    samples = load_run_data(cfg, tokenizer, rank=0, world_size=1).loader.samples
    dtype = compute_dtype(load_deepspeed_config(cfg.deepspeed_config))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if world_size > 1 else 0)
    if not torch.cuda.is_available():
        device = torch.device("cpu")
    model = load_model(
        name, config, init=cfg.teacher_init, dtype=TORCH_DTYPES[dtype], attn_implementation=cfg.attn_implementation,
        seed=cfg.teacher_seed(), flag="teacher",
    )  # fmt: skip
    begun = time.monotonic()

    def count(rows: int) -> None:
        bar.update(rows)
        stop.check()

    stop.save_first()
    with tqdm(total=len(samples), desc=f"cache {arguments.output.name}", unit="row", disable=rank != 0) as bar:
        finished = write_teacher_cache(
            arguments.output,
            Teacher(model, device=device, rope=cfg.kv_rope, parts=state_names(cfg)),
            samples,
            lambda batch: select_tokens(
                cfg.kv_method, cfg.kv_budget, batch.segment_ids, batch.attention_mask,
                mask_first_token=cfg.mask_first_token,
            ),
            fingerprint=cache_fingerprint(cfg, tokenizer, config, samples, dtype),
            store=arguments.store, batch_size=cfg.batch_size, shard_samples=arguments.shard_samples, device=device,
            rank=rank, world_size=world_size, progress=count,
        )  # fmt: skip
    if not finished:
        print("written: this process's shards; the last process to end finishes the cache")
        return 0
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    tokens = sum(len(sample.input_ids) for sample in samples)
    seconds = time.monotonic() - begun
    per_million = f"{size / tokens / 1e3:.2f} GB, {1e6 * seconds / tokens:.0f} s"
    print(f"written: {arguments.output}, {len(samples)} rows, {size / 2**20:.1f} MiB in {seconds:.1f} s", end="; ")
    print(f"per million tokens {per_million}")
    return 0
