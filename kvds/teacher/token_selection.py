"""Token choice: which positions of a batch are matched, and the teacher's forward; what the other reads comes first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import Tensor

from kvds.config.selection_methods import SELECTION_METHODS
from kvds.config.settings import AlignmentSettings
from kvds.data.batches import TokenBatch
from kvds.data.model_inputs import repacked, unpacked
from kvds.kv import Observed, ObservingRows, Selection, common_reasoning_steps, observing_rows, row_draws, select_tokens
from kvds.kv.received import attention_weights
from kvds.teacher.cached import CachedTeacher
from kvds.teacher.teacher import Teacher, TeacherOutput


def matched_reasoning_steps(batch: TokenBatch) -> Selection:
    """The reasoning steps of a batch, which has some, that student and teacher both read."""
    own, theirs = batch.reasoning_step_ids, (batch.teacher_text or batch).reasoning_step_ids
    assert own is not None
    return common_reasoning_steps(own, own if theirs is None else theirs, batch.num_reasoning_steps)


def weighed(selection: Selection, received: Tensor, batch: TokenBatch) -> Selection:
    """The selection with each position's weight, by the attention that it receives among the chosen of its sample.

    Args:
        selection: Of ``batch``.
        received: ``[N, S]`` of its samples, a row each.
        batch: Whose samples may share rows.
    """
    chosen, packing = selection.at(batch.input_ids.shape[1]), batch.packing
    if packing is None:
        weight = attention_weights(received, chosen)
    else:
        own = attention_weights(received, chosen.flatten()[packing.token_index] & packing.token_mask)
        weight = own.new_zeros(chosen.numel()).index_add(
            0, packing.token_index.flatten(), (own * packing.token_mask).flatten()
        ).view(chosen.shape)  # fmt: skip
    if selection.index is not None:
        weight = weight.gather(1, selection.index)
    return replace(selection, weight=weight * selection.mask)


class TokenChoice:
    """The choice that the settings of an alignment ask for.

    Args:
        cfg: With ``kv_method`` and its settings, or a run's, which hold them.
        seed: Of random draws.
    """

    def __init__(self, cfg: AlignmentSettings, seed: int) -> None:
        self._cfg, self._seed = cfg, seed

    def observing(self, batch: TokenBatch) -> ObservingRows | None:
        """The tokens of ``batch`` whose queries the choice reads; None where it reads none."""
        count = self._cfg.observing_tokens
        return observing_rows(self._cfg.kv_method, batch.segment_ids, batch.attention_mask, observing_tokens=count)

    def select(self, batch: TokenBatch, observed: Observed | None, step: int = 0) -> Selection:
        """The positions of ``batch`` whose keys and values are matched, or its steps of reasoning.

        Args:
            batch: On the device.
            observed: The teacher's keys and query rows, where the method reads them.
            step: What random draws depend on.
        """
        selection = self._choose(batch, observed, step)
        if self._cfg.teacher_kv == "matched":
            return selection
        alone = (batch.sample_ids >= 0).sum() < 2  # nothing but its own would be there to borrow
        return replace(selection, mask=selection.mask & ~alone)

    def _choose(self, batch: TokenBatch, observed: Observed | None, step: int) -> Selection:
        cfg = self._cfg
        if batch.reasoning_step_ids is not None:
            return matched_reasoning_steps(batch)
        rows = unpacked(batch)
        selection = select_tokens(
            cfg.kv_method, cfg.kv_budget, rows.segment_ids, rows.attention_mask,
            mask_first_token=cfg.mask_first_token, observed=observed, rkv_lambda=cfg.rkv_lambda,
            draws=row_draws(self._seed, step, batch.sample_ids),
        )  # fmt: skip
        return repacked(selection, batch)

    def with_teacher(
        self, teacher: Teacher | CachedTeacher, batch: TokenBatch, step: int = 0
    ) -> tuple[TeacherOutput, Selection]:
        """Run the teacher on ``batch`` and choose: of methods that look at no key, it keeps the chosen rows alone."""
        run: Callable[..., TeacherOutput] = teacher
        if self._cfg.token_weights == "attention":
            assert isinstance(teacher, Teacher)  # rules keep weights from a cache
            run = partial(teacher, received=True)
        if not SELECTION_METHODS[self._cfg.kv_method].reads_keys:
            selection = self.select(batch, None, step)
            output = run(batch, selection)
        else:
            output = run(batch)
            selection = self.select(batch, output.observed, step)
        if output.received is not None:
            selection = weighed(selection, output.received, batch)
        return replace(output, observed=None, received=None), selection
