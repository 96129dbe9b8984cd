"""Tasks of lm-evaluation-harness, by its own library, for a model that is loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvds.errors import InputError, near_miss

log = logging.getLogger("kvds")


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, float]]:
    """Judge ``model`` on tasks of the harness.

    Args:
        model: A causal language model on its device.
        tokenizer: Of the model.
        tasks: Names of tasks or groups.
        include_path: A folder with task files of one's own.
        num_fewshot: Examples in each prompt; None: as the task says.
        limit: Rows of each task; None: all.
        batch_size: Rows at once.

    Returns:
        Task → metric (and ``…_stderr``) → value.

    Raises:
        InputError: a task that the harness does not know, or whose data cannot be loaded.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            near = near_miss(task, manager.all_tasks)
            raise InputError(
                f"--tasks {task}: no task of lm-evaluation-harness{near}; expected one that `lm-eval ls tasks` lists, "
                "or a file of your own (--include_path DIR)"
            )
    judged = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = simple_evaluate(
            judged, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False,
            bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, ConnectionError) as error:  # the harness fetches what a task is made of
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--tasks {' '.join(tasks)}: their data cannot be loaded ({reason})") from error
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "sample_len"
        }
        for task, values in found["results"].items()
    }
