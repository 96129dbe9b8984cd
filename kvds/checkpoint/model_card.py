"""The model card of an exported student: what it was made of, how, and how well it did. Its licence is the user's.

Written from what a run keeps (``config.yaml``, facts beside its checkpoints, ``metrics.jsonl``): ``kvds export`` writes
the same card as the run itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from kvds.checkpoint.folder import CHECKPOINTS
from kvds.config import RunConfig
from kvds.config.recipe import load_recipe
from kvds.config.values import split_dataset_weight
from kvds.data.corpora import CORPORA
from kvds.data.corpus_names import is_hub_name, split_names
from kvds.durable_files import json_text, write_durably
from kvds.models.hub import is_folder_name
from kvds.tracking.metrics_file import METRICS_FILE, read_metrics
from kvds.tracking.provenance import collect_versions

CARD_FILE = "README.md"
_FACTS = f"{CHECKPOINTS}/model/card.json"
# Where a run reads and writes on its machine is nobody else's business; its models and data have sections of their own.
_LEFT_OUT = {
    "output_dir", "data_dir", "data_cache", "teacher_cache", "tracking_uri", "experiment_name", "run_name", "report_to",
    "resume", "dry_run", "chat_template",
    "model_name", "teacher_name", "teacher_names", "student_name", "tokenizer_name", "datasets",
    "deepspeed_config",
}  # fmt: skip
_METRICS = {
    "cross_entropy": "cross entropy (nats per token)", "perplexity": "perplexity", "exact_match": "exact match",
    "kv_loss": "KV loss", "cut_completions": "cut completions", "judged": "answers judged", "samples": "rows",
}  # fmt: skip


def save_card_facts(run_dir: Path, rows: Mapping[str, int], held_out: Mapping[str, int]) -> None:
    """Write down, beside the checkpoints, what a card says and no other file of the run keeps.

    Args:
        run_dir: Output folder of the run.
        rows: Corpus → rows trained on.
        held_out: Corpus → rows held out.
    """
    versions = {name: version for name, version in collect_versions().items() if name in ("kvds", "transformers")}
    content = {"rows": dict(rows), "held_out": dict(held_out), "versions": versions}
    write_durably(run_dir / _FACTS, json_text(content, indent=1) + "\n")


def recorded_results(run_dir: Path, step: int) -> dict[str, dict[str, float]]:
    """Corpus → metric → value of the evaluation after ``step`` steps, from ``metrics.jsonl``; empty without one."""
    results: dict[str, dict[str, float]] = {}
    for record in read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).is_file() else []:
        for key, value in record.items():
            corpus, _, metric = key.removeprefix("eval/").rpartition("/")
            if record["step"] == step and key.startswith("eval/") and metric in _METRICS:
                results.setdefault(corpus, {})[metric] = value
    return results


def write_model_card(run_dir: Path, student: Path, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
    """Write ``README.md`` into the folder of an exported student.

    Args:
        run_dir: Output folder of the run.
        student: The folder.
        step: Optimizer steps that the student has taken.
        results: Of its evaluation; empty without one.
    """
    cfg = RunConfig(**load_recipe(run_dir / "config.yaml"))
    facts = run_dir / _FACTS
    known = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    write_durably(student / CARD_FILE, str(_card(cfg, known, step, results, run_dir.resolve().name)))


def _card(
    cfg: RunConfig, known: Mapping[str, Any], step: int, results: Mapping[str, Mapping[str, float]], name: str
) -> ModelCard:
    pretrained = cfg.student_init == "pretrained"
    corpora = [split_dataset_weight(spec)[0] for spec in cfg.datasets]
    members = [part for corpus in corpora for part in (("arc_easy", "arc_challenge") if corpus == "arc" else (corpus,))]
    student = cfg.student
    data = ModelCardData(
        model_name=name, base_model=student if pretrained and not is_folder_name(student) else None,
        datasets=list(dict.fromkeys(filter(None, map(_hub_name, members)))) or None,
        library_name="transformers", pipeline_tag="text-generation", tags=["kvds", "distillation"],
        eval_results=_eval_results(results) or None,
    )  # fmt: skip
    version = known.get("versions", {}).get("kvds", "")
    start = "its weights" if pretrained else "its architecture, random weights"
    teachers = [_shown(teacher) for teacher in cfg.all_teachers] if cfg.uses_teacher else []
    lines = [
        f"# {name}", "",
        f"A causal language model trained with kvds {version} for {step} steps"
        + (", through a teacher's keys and values." if cfg.uses_kv else "."), "",
        "## Models", "",
        f"- base model: {_shown(student)} ({start}{_overrides(cfg.student_config_overrides)})",
        f"- teacher: {', '.join(teachers) or 'none'}"
        + (_overrides(cfg.teacher_config_overrides, ' ({})') if teachers else ""), "",
        "## Training data", "", *_rows(known, corpora), "",
        "## Recipe", "", "```yaml", yaml.safe_dump(_settings(cfg), sort_keys=False).strip(), "```", "",
        "## Held-out rows", "", *_table(results), "",
        "## Licence", "",
        "None is set. Choose one that the licences of base model, teacher and training data allow, and name it as "
        "`license:` in the metadata above.", "",
    ]  # fmt: skip
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines), ignore_metadata_errors=True)


def _hub_name(corpus: str) -> str | None:
    """A data set's name on the hub; None for one's own files."""
    if is_hub_name(corpus):
        return "/".join(split_names(corpus)[0].split("/")[:2])
    return CORPORA[corpus].hub_name if corpus in CORPORA else None


def _shown(name: str) -> str:
    """A hub name as it is, of a folder the last part."""
    return Path(name).resolve().name if is_folder_name(name) else name


def _overrides(text: str, form: str = ", {}") -> str:
    return form.format(f"with {text}") if text else ""


def _settings(cfg: RunConfig) -> dict[str, Any]:
    plain = RunConfig(model_name="any", output_dir="any").to_dict()
    always = ("alignment_mode", "kv_parts", "kv_method", "kv_weight", "layer_map", "direction", "seed")
    return {
        key: value
        for key, value in cfg.to_dict().items()
        if key not in _LEFT_OUT and (key in always or value != plain[key])
    }


def _rows(known: Mapping[str, Any], corpora: list[str]) -> list[str]:
    rows, held_out = known.get("rows"), known.get("held_out", {})
    if rows is None:
        return [f"- {corpus if is_hub_name(corpus) else _shown(corpus)}" for corpus in corpora]
    head = ["| data | rows trained on | rows held out |", "| --- | ---: | ---: |"]
    names = list(dict.fromkeys([*rows, *held_out]))
    return head + [f"| {name} | {rows.get(name, 0)} | {held_out.get(name, 0)} |" for name in names]


def _table(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    if not results:
        return ["None were judged."]
    metrics = [metric for metric in _METRICS if any(metric in values for values in results.values())]
    lines = [f"| data | {' | '.join(_METRICS[metric] for metric in metrics)} |", "| --- |" + " ---: |" * len(metrics)]
    for corpus in sorted(results, key=lambda name: (name == "all", name)):
        cells = (_cell(metric, results[corpus].get(metric)) for metric in metrics)
        lines.append(f"| {corpus} | {' | '.join(cells)} |")
    return lines


def _cell(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.0f}" if metric in ("cut_completions", "judged", "samples") else f"{value:.4f}"


def _eval_results(results: Mapping[str, Mapping[str, float]]) -> list[EvalResult]:
    return [
        EvalResult("text-generation", corpus, corpus, metric, round(values[metric], 6))
        for corpus, values in sorted(results.items())
        for metric in ("cross_entropy", "perplexity", "exact_match")
        if corpus != "all" and math.isfinite(values.get(metric, math.nan))
    ]
