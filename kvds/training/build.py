"""The models of a run: student, aligner and teachers, each fault told before the next, dearer thing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kvds.align import AlignerGroup, KVAligner, build_aligner, members_of
from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.config.deepspeed_file import compute_dtype
from kvds.data.batches import TokenBatch
from kvds.data.loader import BatchLoader
from kvds.distillation.head_chunks import agreed_chunks, logit_divergence
from kvds.distillation.module import DistillationModule
from kvds.distributed.process_group import from_first_rank
from kvds.handoff.following_map import FollowingMap, following_map
from kvds.kv import KVShape, KVStates
from kvds.models.adapters import adapter_config, add_adapters, check_adapted
from kvds.models.architecture import ModelConfigs
from kvds.models.compiled_layers import check_compilable
from kvds.models.loading import TORCH_DTYPES, load_model
from kvds.teacher.build import build_teachers
from kvds.teacher.cache_fingerprint import cache_fingerprint
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher
from kvds.teacher.token_selection import TokenChoice
from kvds.training.calibration import attention_output_at_start, calibrate_aligner
from kvds.training.handoff_start import start_following_map

log = logging.getLogger("kvds")


@dataclass
class RunModels:
    """What a run trains and what it learns from.

    Attributes:
        student: In the run's dtype, on the device or in ZeRO-3's shards.
        aligner: On the device; None where no keys and values are matched.
        teachers: In the order of ``cfg.all_teachers``; empty where none is used.
        following_map: On the device; None without handoff.
        start_r2: For each teacher, part → R² that its fitted maps start with on held-out positions, for each target
            layer; empty where nothing was fitted.
        start_outputs: For each teacher the error of the attention output under the maps that the run starts with, see
            :class:`kvds.align.attention_output.AttentionOutputError`; empty where it is not measured.
    """

    student: Any
    aligner: KVAligner | AlignerGroup | None
    teachers: list[Teacher | CachedTeacher]
    following_map: FollowingMap | None = None
    start_r2: list[dict[str, list[float]]] = field(default_factory=list)
    start_outputs: list[dict[str, list[float]]] = field(default_factory=list)

    def calibrate(
        self, cfg: RunConfig, loader: BatchLoader, choice: TokenChoice, device: torch.device,
        between_batches: Callable[[], None],
    ) -> None:  # fmt: skip
        """Fit the aligner's statistics and closed-form starts, and the following map, on the first batches; every rank
        calls it.

        Sets :attr:`start_r2` and, on the batch after those where there is one, :attr:`start_outputs`.
        """

        def batches() -> Iterator[TokenBatch]:
            for step in range(min(cfg.calibration_batches, loader.steps_per_epoch)):
                for batch in loader.step(step):
                    between_batches()
                    yield batch.to(device)

        if self.aligner is not None:
            for (_, member), teacher in zip(members_of(self.aligner), self.teachers, strict=True):
                match = partial(choice.with_teacher, teacher)
                self.start_r2.append(calibrate_aligner(member, self.student, batches, match, rope=cfg.kv_rope))
            if cfg.teacher_kv == "matched":
                between_batches()
                judged = loader.out_of_turn(min(cfg.calibration_batches, loader.steps_per_epoch - 1))[0].to(device)
                self.start_outputs = [
                    attention_output_at_start(member, self.student, teacher, judged, choice.select, rope=cfg.kv_rope)
                    for (_, member), teacher in zip(members_of(self.aligner), self.teachers, strict=True)
                    if isinstance(teacher, Teacher)
                ]
        if self.following_map is not None:
            [teacher] = self.teachers

            def teacher_states(batch: TokenBatch) -> KVStates:
                states = teacher(batch).states
                assert isinstance(states, KVStates)
                return states

            start_following_map(self.following_map, self.student, batches(), teacher_states)

    def module(self, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DistillationModule:
        """Student and aligner as the one module that an engine trains."""
        tokens = cfg.tokens_per_batch or cfg.batch_size * cfg.max_length
        return DistillationModule(
            self.student,
            self.aligner,
            following_map=self.following_map,
            rope=cfg.kv_rope,
            head_chunks=agreed_chunks(cfg, self.student, tokens),
            kd_temperature=cfg.logit_kd_temperature,
            kd_divergence=logit_divergence(cfg),
            kd_vocab_size=max(tokenizer.get_vocab().values()) + 1,
            offload_checkpoints=cfg.checkpoint_offload,
        )


def build_run_models(
    cfg: RunConfig,
    raw: dict[str, Any],
    *,
    model_configs: ModelConfigs,
    engine_config: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    loader: BatchLoader,
    choice: TokenChoice,
    device: torch.device,
) -> RunModels:
    """Aligner, teachers and student of a run; every rank calls it.

    Args:
        cfg: The run.
        raw: The DeepSpeed configuration file.
        model_configs: The models' architectures.
        engine_config: The student's DeepSpeed configuration.
        tokenizer: Of the run.
        loader: Of the training rows, which a cache must have been made of.
        choice: What is observed of teachers.
        device: Of this rank.

    Raises:
        InputError: models that cannot be loaded, or keys and values that cannot be mapped.
    """
    dtype = TORCH_DTYPES[compute_dtype(raw)]
    if cfg.logit_kd_weight and not logit_divergence(cfg).plain:
        log.info("logit distillation: torch computes this divergence a few rows at a time, the kernel knows forward_kl")
    if cfg.token_weights == "attention" and ALIGNMENT_MODES[cfg.alignment_mode].fused and device.type == "cuda":
        log.info("token_weights attention: the KV loss is computed by lean, the kernel takes no weights of positions")
    check_compilable(cfg, model_configs)
    # The aligner's shapes come from the configurations, so a pair that cannot be mapped stops here, without weights.
    aligner: KVAligner | AlignerGroup | None = None
    if cfg.uses_kv:
        shape = KVShape.from_config(model_configs.student)
        members = [
            build_aligner(shape, KVShape.from_config(config), cfg, cfg.seed) for config in model_configs.teachers
        ]
        aligner = AlignerGroup(members, cfg.weights_of_teachers) if cfg.teacher_names else members[0]
        if cfg.impl == "triton" and ALIGNMENT_MODES[cfg.alignment_mode].fused:  # others take any shape and device
            for member in members:
                member.to(device).try_out(dtype, device)

    follower = None
    if cfg.handoff_weight:
        [teacher_config] = model_configs.teachers
        shapes = KVShape.from_config(teacher_config), KVShape.from_config(model_configs.student)
        follower = following_map(*shapes, cfg.handoff_source_layers).to(device)

    def made_of(config: Any) -> dict[str, str]:
        return from_first_rank(lambda: cache_fingerprint(cfg, tokenizer, config, loader.samples, compute_dtype(raw)))

    teachers = build_teachers(
        cfg, model_configs.teachers, raw, device=device, observe=choice.observing, made_of=made_of
    )
    student: Any = load_model(
        cfg.student or "", model_configs.student, init=cfg.student_init, dtype=dtype,
        attn_implementation=cfg.attn_implementation, seed=cfg.seed, flag="student", engine_config=engine_config,
    )  # fmt: skip
    if (adapters := adapter_config(cfg)) is not None:
        add_adapters(student, adapters, seed=cfg.seed)
        check_adapted(student, cfg)
    if not any(hasattr(p, "ds_id") for p in student.parameters()):
        student.to(device)
    student.train()
    if aligner is not None:
        aligner.to(device)
    return RunModels(student, aligner, teachers, follower)
