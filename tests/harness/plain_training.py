"""Training as a plain loop in one process, the oracle of every distributed run: full logits, Hugging Face's models."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvds.align import build_aligner
from kvds.align.fitting import AlignmentMoments
from kvds.align.mix_fitting import MixFitting
from kvds.config import RunConfig
from kvds.config.alignment_modes import ALIGNMENT_MODES
from kvds.data.run_data import load_run_data
from kvds.kv import (
    KVShape,
    KVStates,
    Selection,
    common_reasoning_steps,
    open_capture,
    pool_reasoning_steps,
    row_draws,
    select_tokens,
)
from tests.harness.plain_handoff import PlainHandoff

STEPS = 5


@torch.no_grad()
def plain_rkv(folder: Path, batch, budget: float, weight: float) -> Selection:
    """R-KV's selection with the answer's queries, row by row, from whole attention matrices and all pairs of keys."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    mask = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
    for row in range(len(mask)):
        n = int((batch.segment_ids[row] != 0).sum())
        output = teacher(input_ids=batch.input_ids[row : row + 1, :n], output_attentions=True, use_cache=True)
        answer = batch.segment_ids[row, :n] == 3
        scores = torch.zeros(n, dtype=torch.float64)
        layers = output.past_key_values.layers
        for attention, layer in zip(output.attentions, layers, strict=True):
            for head in range(2):
                important = attention[0, 2 * head : 2 * head + 2, answer].double().amax(0).mean(0)
                keys = layer.keys[0, head].double()
                similar = F.cosine_similarity(keys[:, None], keys[None], dim=-1).fill_diagonal_(0)
                redundant = similar.mean(0).softmax(0)
                scores += (weight * important - (1 - weight) * redundant) / (2 * len(layers))
        scores[0] = -torch.inf
        mask[row, scores.topk(math.ceil(budget * n)).indices] = True
    return Selection(None, mask)


def plain_training(models: Path, cfg: RunConfig) -> tuple[list[dict[str, float]], nn.Module, nn.Module | None]:
    """The same training as a plain loop: full logits, Hugging Face's models, torch's SGD, whole global batches of 8."""
    tokenizer = AutoTokenizer.from_pretrained(models / "tokenizer")
    loader = load_run_data(cfg, tokenizer, rank=0, world_size=1).loader
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").eval()
    student = AutoModelForCausalLM.from_pretrained(models / "student").train()
    aligner = None

    def captured(model: nn.Module, batch):
        mode = ALIGNMENT_MODES[cfg.alignment_mode]
        reads = mode.reads if aligner is not None and model is student else mode.teacher_reads
        with open_capture(model, reads) as capture:
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return capture, logits

    def pooled(capture, batch):
        steps = batch.reasoning_step_ids
        return (
            capture.states if steps is None else pool_reasoning_steps(capture.states, steps, batch.num_reasoning_steps)
        )

    def states(model: nn.Module, batch):
        capture, logits = captured(model, batch)
        return pooled(capture, batch), logits

    def selection(batch, step=0):
        if batch.reasoning_step_ids is not None:
            return common_reasoning_steps(batch.reasoning_step_ids, batch.reasoning_step_ids, batch.num_reasoning_steps)
        if cfg.kv_method == "rkv":
            return plain_rkv(models / "teacher", batch, cfg.kv_budget, cfg.rkv_lambda)
        return select_tokens(
            cfg.kv_method, cfg.kv_budget, batch.segment_ids, batch.attention_mask, mask_first_token=True,
            draws=row_draws(cfg.seed, step, batch.sample_ids),
        )  # fmt: skip

    if cfg.uses_kv:
        aligner = build_aligner(KVShape.from_config(student.config), KVShape.from_config(teacher.config), cfg, cfg.seed)
        for fitting in (MixFitting, AlignmentMoments):  # the maps are those of the mixes that have been fitted
            moments = fitting(aligner)
            with torch.no_grad():
                for step in range(cfg.calibration_batches if moments.parts else 0):
                    for batch in loader.step(step):
                        moments.update(states(student, batch)[0], states(teacher, batch)[0], selection(batch))
            moments.apply()

    handoff = None
    if cfg.handoff_weight:
        calibration = [batch for step in range(cfg.calibration_batches) for batch in loader.step(step)]
        handoff = PlainHandoff(teacher, student, calibration)

    def start_weight(batch) -> float | None:
        """``auto:SHARE``, where ``hold:SHARE`` begins: two separate backward passes of the student. Fitted maps leave
        little to learn at first, so that the loss itself bounds the weight, too.
        """
        if cfg.kv_weight_share is None:
            return cfg.kv_weight_value
        norms, losses = [], []
        for part in ("task", "kv"):
            student_states, logits = states(student, batch)
            if part == "kv":
                with torch.no_grad():
                    teacher_states = states(teacher, batch)[0]
                loss = aligner(student_states, teacher_states, selection(batch)).loss
            else:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
            gradients = torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)
            losses.append(loss.item())
            norms.append(torch.cat([g.flatten() for g in gradients if g is not None]).norm().item())
        of_losses = losses[0] / losses[1] if cfg.chosen_map_start == "ridge" else math.inf
        return cfg.kv_weight_share * min(norms[0] / norms[1], of_losses)

    trained = [*student.parameters(), *(aligner.parameters() if aligner is not None else ())]
    trained += handoff.map.parameters() if handoff is not None else []
    trained = [p for p in trained if p.requires_grad]
    optimizer = (torch.optim.SGD if cfg.optimizer == "sgd" else torch.optim.AdamW)(trained, lr=cfg.lr)
    if cfg.optimizer == "adamw":
        optimizer.param_groups[0]["weight_decay"] = 0.0
    records = []
    for step in range(STEPS):
        [batch] = loader.step(step)
        if step == 0:
            weight = start = cfg.kv_weight_value if aligner is None else start_weight(batch)
        capture, logits = captured(student, batch)
        student_states = pooled(capture, batch)
        record = {}
        task = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100)
        loss = cfg.task_weight * task
        record["loss/task"] = task.item()
        with torch.no_grad():
            teacher_states, teacher_logits = states(teacher, batch)
        if aligner is not None:
            kv = aligner(student_states, teacher_states, selection(batch, step)).loss
            record["kv/weight"] = weight * (1 - step / STEPS if cfg.kv_weight_schedule == "linear" else 1)
            loss = loss + record["kv/weight"] * kv
            record["loss/kv"] = kv.item()
        if handoff is not None:
            answers, followed = handoff.losses(batch)
            loss = loss + cfg.handoff_weight * answers + followed
            record |= {"loss/handoff": answers.item(), "loss/handoff_map": followed.item()}
        if cfg.logit_kd_weight:
            keep, t = batch.labels[:, 1:] != -100, cfg.logit_kd_temperature
            log_p = F.log_softmax(teacher_logits[:, :-1][keep] / t, -1)
            log_q = F.log_softmax(logits[:, :-1][keep] / t, -1)
            kd = t * t * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            loss = loss + cfg.logit_kd_weight * kd
            record["loss/logit_kd"] = kd.item()
        if cfg.kv_weight_held:
            # Directly, with keys and values cut off from the network; then all that arrives at the projections.
            leaves = [x.detach().requires_grad_() for x in (*student_states.keys, *student_states.values)]
            half = len(leaves) // 2
            cut = KVStates(tuple(leaves[:half]), tuple(leaves[half:]))
            direct = torch.autograd.grad(weight * aligner(cut, teacher_states, selection(batch, step)).loss, leaves)
            outputs = [output for output, _ in (*capture.key_outputs, *capture.value_outputs)]
            arriving = torch.autograd.grad(loss, outputs, retain_graph=True)
            own = [d.transpose(1, 2).flatten(2) for d in direct]
            rest = sum((a - d).square().sum() for a, d in zip(arriving, own, strict=True))
            ratio = float((sum(d.square().sum() for d in own) / rest).sqrt())
            record["kv/gradient_ratio"] = ratio
            change = 0.6 / ratio  # all the way at once, then half of it, within bounds
            change = change if weight == start else min(max(change**0.5, 0.8), 1.25)
            weight = min(max(weight * change, start / 100), start * 100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        records.append(record)
    return records, student, aligner
