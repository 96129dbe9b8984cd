"""The training run: data, models, calibration, the loop, what it logs and what it leaves."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kvds.align import aligner_config_dict
from kvds.checkpoint.aligner_file import ALIGNER_START_FILE, save_aligner
from kvds.checkpoint.export import STUDENT_FOLDER, save_architecture
from kvds.checkpoint.hub_upload import push_student
from kvds.checkpoint.loading import load_checkpoint
from kvds.checkpoint.model_card import save_card_facts, write_model_card
from kvds.checkpoint.origin import fit_to_origin, read_origin
from kvds.checkpoint.run_folder import find_checkpoint, open_run_folder
from kvds.checkpoint.run_identity import check_identity, run_identity
from kvds.checkpoint.writer import CheckpointWriter
from kvds.config import RunConfig
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.engine_config import student_engine_config
from kvds.config.outcome_rules import repository_of
from kvds.config.resume_rules import as_begun
from kvds.data.batches import TokenBatch
from kvds.data.run_data import RunData, load_run_data
from kvds.distillation.step import LossWeights, StepInput
from kvds.distillation.step_input_builder import StepInputBuilder
from kvds.distributed.preemption import StopRequest
from kvds.distributed.process_group import from_first_rank, init_distributed
from kvds.durable_files import json_text
from kvds.models.architecture import ModelConfigs, load_model_configs
from kvds.models.tokenizer import check_same_tokenizer, load_tokenizer
from kvds.plan.token_budget import with_token_budget
from kvds.teacher.token_selection import TokenChoice
from kvds.training.best_model import BestModel
from kvds.training.build import RunModels, build_run_models
from kvds.training.dry_run import this_machine
from kvds.training.engine import build_engine, check_engine_config
from kvds.training.fixed_order import fixed_order
from kvds.training.guard import guarded
from kvds.training.input_feed import InputFeed, MicroBatch, make_ready, micro_batches
from kvds.training.kv_course import KVCourse
from kvds.training.meters import IntervalMeter, PhaseTimer
from kvds.training.nonfinite_steps import NonfiniteSteps
from kvds.training.on_policy import OnPolicyRows
from kvds.training.results import RunResults
from kvds.training.run_log import RunLog, lines_above_bars, quiet_logs

log = logging.getLogger("kvds")


def train(cfg: RunConfig, stop: StopRequest | None = None, *, draw_report: bool = True) -> Path:
    """Run one distillation from data to exported student; every rank calls it. Joins the process group if none is
    there. Without ``draw_report`` no ``report/`` is made (of many small runs, an experiment draws one).

    Args:
        cfg: The run.
        stop: A request to stop that already listens to signals; None: one of its own.

    Returns:
        The output folder.

    Raises:
        InputError: before any model is loaded where the fault can be seen by then.
        Preempted: it was asked to stop, has saved a checkpoint and can be resumed.
        RunError: it cannot go on.
    """
    raw = load_deepspeed_config(cfg.deepspeed_config)
    with fixed_order(cfg.deterministic):
        device = init_distributed()
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        quiet_logs(main_rank=dist.get_rank() == 0)
        with lines_above_bars(), guarded(cfg, stop) as guard:
            guard.run = run = TrainingRun(cfg, raw, device, guard.stop)
            guard.stop.save_first()
            run.fit()
            run.finish(draw_report=draw_report)
    return run.output_dir


class TrainingRun:
    """One run on one rank. Construction does all that can fail on bad input, cheapest first."""

    def __init__(
        self, cfg: RunConfig, raw: dict[str, Any], device: torch.device, stop: StopRequest | None = None
    ) -> None:
        self.device, self.stop = device, StopRequest() if stop is None else stop
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.output_dir = Path(cfg.output_dir)
        resume_step = find_checkpoint(cfg)
        asked = cfg = cfg if resume_step is None else as_begun(cfg, self.output_dir / "config.yaml")
        cfg, engine_config = self._open(cfg, raw, resume_step)
        self.cfg = cfg

        self.tokenizer, model_configs, self.data = self._load_data()
        identity = self._identify(model_configs, resume_step)
        open_run_folder(asked, resume_step, main_rank=self.rank == 0)
        self.loader = self.data.loader
        self.total_steps = cfg.max_steps or cfg.epochs * self.loader.steps_per_epoch

        choice = TokenChoice(cfg, cfg.seed)
        models = self._build_models(raw, engine_config, model_configs, choice, calibrate=resume_step is None)
        self.teachers = models.teachers
        self.inputs = StepInputBuilder(cfg, models.teachers, choice, device)
        self.aligner_config = None if models.aligner is None else aligner_config_dict(models.aligner)

        self.engine = build_engine(models.module(cfg, self.tokenizer), cfg, engine_config, self.total_steps)
        self.on_policy: OnPolicyRows | None = None
        if cfg.on_policy_share:
            self.on_policy = OnPolicyRows(cfg, self.loader, self.engine.module.student, self.tokenizer, device)
        self.results = RunResults(cfg, self.tokenizer, self.data, self.engine, self.inputs, device, self.stop.check)
        self.checkpoints = CheckpointWriter(self.engine, self.output_dir, keep=cfg.keep_checkpoints, identity=identity)
        self.nonfinite_steps = NonfiniteSteps(self.engine, self.output_dir, cfg.max_bad_steps)

        self.step = 0
        self.first_step_seconds: float | None = None
        self.saved_step = 0  # of the newest checkpoint; there is nothing to save before the first step
        self.evaluation_pending = False
        self.evaluated: tuple[int, dict[str, dict[str, float]]] | None = None  # the last step that was, and its results
        self.best = BestModel(cfg, self.output_dir, main_rank=self.rank == 0)
        self.meter = IntervalMeter(device)
        self.kv = KVCourse(cfg, self.engine, self.loader, self.inputs, self.total_steps)
        mlflow_run_id = self._restore(resume_step)
        if resume_step is None:
            self.kv.begin(models.start_r2)
        self.run_log = RunLog(
            cfg, self.engine.module, self.nonfinite_steps, rank=self.rank, world_size=self.world_size,
            kv_weight=self.kv.weight.value, total_steps=self.total_steps, resume_step=resume_step,
            mlflow_run_id=mlflow_run_id,
        )  # fmt: skip
        self.run_log.record_starts(models.start_r2, models.start_outputs)
        if resume_step is None:
            self.run_log.warn(0, self.kv.ended_at_start)

    # -- construction ---------------------------------------------------------------------------------------------

    def _open(self, cfg: RunConfig, raw: dict[str, Any], resume_step: int | None) -> tuple[RunConfig, dict[str, Any]]:
        """The run as these ranks train it, and the engine's settings."""
        if resume_step is not None:
            origin, stage = read_origin(self.output_dir, resume_step), raw["zero_optimization"]["stage"]
            cfg = fit_to_origin(cfg, origin, step=resume_step, world_size=self.world_size, zero_stage=stage)
        budget = [with_token_budget(cfg, this_machine()).tokens_per_batch if self.rank == 0 else None]
        dist.broadcast_object_list(budget, src=0)  # one number, should GPUs differ
        cfg = replace(cfg, tokens_per_batch=budget[0])
        engine_config = student_engine_config(raw, cfg, self.world_size)
        check_engine_config(engine_config, cfg.deepspeed_config)
        for warning in cfg.warnings:
            log.warning("%s", warning)
        return cfg, engine_config

    def _load_data(self) -> tuple[PreTrainedTokenizerBase, ModelConfigs, RunData]:
        """Tokenizer, architectures that go with it, and rows."""
        cfg, tokenizer = self.cfg, load_tokenizer(self.cfg)
        check_same_tokenizer(cfg, tokenizer)
        model_configs = load_model_configs(cfg, tokenizer)
        first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
        data = load_run_data(
            cfg, tokenizer, rank=self.rank, world_size=self.world_size, first=first_of_node, wait=dist.barrier
        )
        return tokenizer, model_configs, data

    def _identify(self, model_configs: ModelConfigs, resume_step: int | None) -> dict[str, str]:
        """What the run is made of, which must be what the checkpoint to go on from was made of."""
        cfg, tokenizer, data = self.cfg, self.tokenizer, self.data
        found = from_first_rank(lambda: run_identity(cfg, tokenizer=tokenizer, models=model_configs, data=data))
        if resume_step is not None:
            found = check_identity(cfg, read_origin(self.output_dir, resume_step), resume_step, found)
        return found

    def _build_models(
        self, raw: dict[str, Any], engine_config: dict[str, Any], model_configs: ModelConfigs, choice: TokenChoice, *,
        calibrate: bool,
    ) -> RunModels:  # fmt: skip
        """Student, aligner and teachers; what turning a checkpoint into plain models takes is left beside them."""
        cfg = self.cfg
        models = build_run_models(
            cfg, raw, model_configs=model_configs, engine_config=engine_config, tokenizer=self.tokenizer,
            loader=self.loader, choice=choice, device=self.device,
        )  # fmt: skip
        aligner = models.aligner
        if calibrate:
            models.calibrate(cfg, self.loader, choice, self.device, self.stop.check)
            if self.rank == 0 and aligner is not None:  # `kvds profile` tells what training made of it
                start = self.output_dir / ALIGNER_START_FILE
                save_aligner(aligner_config_dict(aligner), aligner.state_dict(), start)
        if cfg.gradient_checkpointing:
            models.student.gradient_checkpointing_enable({"use_reentrant": False})
        if self.rank == 0:
            save_architecture(self.output_dir, models.student, self.tokenizer, aligner)
            save_card_facts(self.output_dir, self.data.rows, Counter(e.corpus for e in self.data.eval_examples))
        return models

    def _restore(self, resume_step: int | None) -> str | None:
        """Go on from a checkpoint, if there is one, whose MLflow run is returned."""
        if resume_step is None:
            return None
        state = load_checkpoint(self.engine, self.output_dir, resume_step)
        self.step = self.saved_step = state["step"]
        self.evaluation_pending = state["evaluation_pending"]
        self.meter.restore(state["meters"])
        self.kv.restore(state)
        self.best.restore(state)
        log.info("resumed from step %d of %d", self.step, self.total_steps)
        return state["mlflow_run_id"]

    # -- the loop -------------------------------------------------------------------------------------------------

    def _weights(self) -> LossWeights:
        cfg = self.cfg
        return LossWeights(cfg.task_weight, self.kv.weight_at(self.step), cfg.logit_kd_weight, cfg.handoff_weight)

    def fit(self) -> None:
        """Train from ``self.step`` to the last step."""
        self._weights()  # says to the thread whether keys and values are matched still
        ahead = self.loader.read_ahead(range(self.step, self.total_steps), self._ready)
        with ahead if self.on_policy is None else contextlib.nullcontext():
            self._fit()

    def _ready(self, batches: list[TokenBatch]) -> list[TokenBatch]:
        """A step's micro-batches as the feed takes them."""
        # What no step asks for would stay in memory.
        return make_ready(batches, self.teachers if self.inputs.reads_keys_and_values else [], self.device)

    def _feed(self, timer: PhaseTimer) -> InputFeed:
        cfg, steps = self.cfg, range(self.step, self.total_steps)

        def batches_of(step: int) -> list[TokenBatch]:
            if self.on_policy is None:
                return self.loader.step(step)
            judged = self.inputs.matching or cfg.logit_kd_weight > 0
            return self._ready(self.on_policy.step(step, timer, judged=judged))

        ordered = micro_batches(batches_of, steps, seed=cfg.seed, rank=self.rank, world_size=self.world_size)

        def make(micro: MicroBatch) -> StepInput:
            return self.inputs(micro.batch, step=micro.step)

        return InputFeed(ordered, make, timer, device=self.device, ahead=cfg.teacher_ahead(self.device.type))

    def _fit(self) -> None:
        cfg = self.cfg
        meter, timer = self.meter, PhaseTimer(self.device)
        feed = self._feed(timer)
        meter.restart_clock()
        self.engine.train()
        bar = tqdm(
            total=self.total_steps, initial=self.step, desc=f"train {self.output_dir.name}", unit="step",
            disable=self.rank != 0, mininterval=1.0,
        )  # fmt: skip
        with bar:  # closed by what is raised, too: what is told of it begins a line of its own
            if self.evaluation_pending:
                self._evaluate_on_the_way()
            while self.step < self.total_steps and not self.best.exhausted:
                self.stop.check()
                watch = self.step == 0 or (self.step + 1) % cfg.logging_steps == 0 or self.step + 1 == self.total_steps
                weights = self._weights()
                begun, last = time.perf_counter(), False
                while not last:
                    micro, inputs = feed.take(weights, watch=watch)
                    last = micro.last
                    self.engine.set_gradient_accumulation_boundary(last)
                    with timer.phase("forward"):
                        loss, metrics = self.engine(step=inputs)
                    feed.make_next()
                    with timer.phase("backward"):
                        # How many micro-batches a step has is known here alone.
                        self.engine.backward(loss / micro.count, scale_wrt_gas=False)
                    with timer.phase("optimizer"):
                        self.engine.step()
                    gradient_watch = self.engine.module.gradient_watch
                    squares = gradient_watch.squares() if gradient_watch is not None else {}
                    # All ranks together count one step, so that steps on other numbers of ranks weigh the same.
                    share = 1 / (micro.count * self.world_size)
                    figures = {} if self.on_policy is None else self.on_policy.figures
                    meter.update(metrics | squares | figures, micro.tokens, share=share)
                    self.kv.weight.note(metrics, share)
                    self.nonfinite_steps.note(inputs.batch, metrics)
                self.step += 1
                bar.update()
                self._tell_first_step(begun)
                self.nonfinite_steps.end_step(self.step)
                self.kv.weight.end_step()
                self.run_log.record_nonfinite_steps(wait=watch)
                if watch:
                    self._record(meter.read(timer.read()), weights, bar)
                if self.kv.due(self.step):
                    agreement, told = self.kv.ask_the_task(self.step)
                    self.run_log.record(self.step, {"kv/agreement": agreement})
                    self.run_log.warn(self.step, told)
                    meter.restart_clock()
                if self._due(cfg.eval_steps):
                    self._evaluate_on_the_way()
                ended = self.step == self.total_steps or self.best.exhausted
                if self._due(cfg.save_steps) or (cfg.save_at_end and ended):
                    self._save()
                if self._due(cfg.eval_steps) or self._due(cfg.save_steps):
                    meter.restart_clock()

    def _tell_first_step(self, begun: float) -> None:
        """How long the first step of this attempt took, in which all is compiled and met for the first time."""
        if self.first_step_seconds is None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.first_step_seconds = time.perf_counter() - begun
            log.info("the first step took %.1f s", self.first_step_seconds)

    def _due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0 and self.step < self.total_steps

    def _record(self, metrics: dict[str, float], weights: LossWeights, bar: tqdm) -> None:
        """Log a step, and see to keys and values; the same on all ranks."""
        metrics["lr"] = self.engine.get_lr()[0]
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            metrics["grad_norm"] = float(norm)
        self.run_log.warn(self.step, self.kv.look(self.step, metrics, weights.kv))
        self.run_log.record(self.step, metrics)
        told = (("task", "loss/task"), ("kv", "loss/kv"), ("generate_s", "perf/seconds_generate"))
        shown = {name: f"{metrics[key]:.4f}" for name, key in told if key in metrics}
        bar.set_postfix(shown, refresh=False)

    def _evaluate_on_the_way(self) -> None:
        self.run_log.record_nonfinite_steps()
        self.evaluation_pending = True  # what a stop in the middle of it leaves for the resumed run
        model = self.results.plain_student()
        self.best.judge(
            self.step, self._evaluate(model), lambda folder: self.results.export(model, self.aligner_config, folder)
        )
        self.evaluation_pending = False
        self.engine.train()

    def save_before_leaving(self) -> None:
        """Save a checkpoint of the last step taken, unless there is one; all ranks call it."""
        if self.step > self.saved_step:
            self._save()

    def _save(self) -> None:
        self.run_log.record_nonfinite_steps()  # their count and records go with the checkpoint
        state = {
            "evaluation_pending": self.evaluation_pending,
            "meters": self.meter.states(),
            **self.kv.state,
            **self.best.state,
            "mlflow_run_id": self.run_log.mlflow_run_id,
        }
        # Rank 0 alone tracks; the other ranks' states must not disagree with its file.
        shared = [state]
        dist.broadcast_object_list(shared, src=0)
        if self.checkpoints.save(self.step, shared[0]):
            self.saved_step = self.step
            self.best.saved()

    # -- evaluation and export ------------------------------------------------------------------------------------

    def _evaluate(self, model: torch.nn.Module) -> dict[str, dict[str, float]]:
        if self.evaluated is None or self.evaluated[0] != self.step:  # a run that ends early has done it
            self.evaluated = self.step, self.results.evaluate(model)
            self.run_log.record_evaluation(*self.evaluated)
        return self.evaluated[1]

    def finish(self, *, draw_report: bool = True) -> None:
        """Export the student and the aligner, evaluate on held-out rows and write ``eval.json``."""
        model = self.results.plain_student()
        self.results.export(model, self.aligner_config, self.output_dir)
        student, results = self.output_dir / STUDENT_FOLDER, dict[str, dict[str, float]]()
        if self.rank == 0:  # should the evaluation be killed, its student is whole
            write_model_card(self.output_dir, student, self.step, results)
        if self.data.eval_examples:
            step, results = self.best.settle(self.step, self._evaluate(model))
            if self.rank == 0:
                (self.output_dir / "eval.json").write_text(json_text(results, indent=1) + "\n")
                write_model_card(self.output_dir, student, step, results)
        if self.rank == 0 and self.cfg.push_to_hub:
            push_student(student, repository_of(self.cfg), private=self.cfg.hub_private_repo)
        self.run_log.conclude(draw_report=draw_report)

    def close(self, status: str) -> None:
        """Say to the tracker how it ended."""
        self.run_log.close(status)
