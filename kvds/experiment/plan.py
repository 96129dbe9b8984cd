"""An experiment's plan: arms × seeds over one recipe, read from a YAML file, checked before anything runs.

A plan says beforehand what is compared and by which number. ``prepared:NAME`` in a setting stands for the student that
the prepared run NAME leaves; ``tune`` lists the values that an arm tries on seeds that are never reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvds.config import RunConfig
from kvds.config.recipe import checked_settings, load_recipe
from kvds.config.shipped_files import PLANS, find_shipped
from kvds.config.yaml_file import load_mapping
from kvds.durable_files import json_text
from kvds.errors import InputError, near_miss, one_line

PREPARED = "prepared:"
REPORT, TUNE, PREPARE = "report", "tune", "prepare"
_KEYS = (
    "base", "settings", "primary", "better", "seeds", "baseline", "comparisons", "prepare", "tuning_seeds",
    "tuned_from",
)  # fmt: skip
_IDENTITY = {field.name: field.metadata["identity"] for field in dataclasses.fields(RunConfig)}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Job:
    """One training run of an experiment.

    Attributes:
        phase: ``"prepare"``, ``"tune"`` or ``"report"``.
        arm: The arm, or the name of the prepared run.
        seed: Of data order, initial weights and drawn problems: arms of one seed form a pair.
        variant: While tuning, the position of the value tried; else 0.
        settings: All that the recipe, the plan and the arm set, ``prepared:NAME`` not yet replaced.
        config_hash: Of these settings and those of the prepared runs they name; says whether a stored result is still
            the one asked for. Defaults of settings that nobody names are not in it (the revision beside it tells them).
    """

    phase: str
    arm: str
    seed: int
    variant: int
    settings: dict[str, Any]
    config_hash: str

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What makes two jobs the same."""
        return self.phase, self.arm, self.seed, self.variant, self.config_hash

    @property
    def name(self) -> str:
        """A folder's name."""
        variant = f"-value{self.variant}" if self.phase == TUNE else ""
        return f"{self.phase}-{self.arm}{variant}-seed{self.seed}"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        settings: What it sets differently from the recipe.
        tune: Settings to choose from on the tuning seeds; empty: nothing is chosen.
        tuned_as: The arm whose choice this one takes over (a control with everything else equal); None: its own.
        versus: The arms that it is compared with; empty: the plan's baseline.
        seeds: Its own, some of the plan's; empty: all of them.
    """

    name: str
    settings: dict[str, Any]
    tune: tuple[dict[str, Any], ...] = ()
    tuned_as: str | None = None
    versus: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExperimentPlan:
    """What is run and how it is judged; see the module's text for the file.

    Attributes:
        name: Of the file.
        common: Settings of every arm: the base recipe's and the plan's own.
        arms: By name, in the order of the file.
        seeds: Reported.
        tuning_seeds: Never reported.
        primary: The result that decides, a column of ``runs.csv``.
        higher_is_better: Which way ``primary`` is good.
        baseline: The arm that each other one is compared with.
        comparisons: Further pairs (arm, reference).
        prepare: Runs made first, by name: their settings on top of ``common``.
        tuned_from: The plan, run into the same output folder, whose chosen values this one takes over; None: its own.
    """

    name: str
    common: dict[str, Any]
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    primary: str
    higher_is_better: bool
    baseline: str
    comparisons: tuple[tuple[str, str], ...]
    prepare: dict[str, dict[str, Any]]
    tuned_from: str | None

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The family of comparisons: each arm with what it is compared with, then the plan's further pairs."""
        pairs = [(arm.name, other) for arm in self.arms.values() for other in arm.versus or (self.baseline,)]
        pairs += [pair for pair in self.comparisons if pair not in pairs]
        return [(arm, other) for arm, other in pairs if arm != other]

    def preparation_jobs(self) -> list[Job]:
        """The runs that others build on, in the order of the file."""
        return [self._job(PREPARE, name, 0, 0, settings) for name, settings in self.prepare.items()]

    def tuning_jobs(self) -> list[Job]:
        """Every arm's values on the tuning seeds: seed by seed, so that whatever has finished is balanced."""
        longest = max((len(arm.tune) for arm in self.arms.values()), default=0)
        return [
            self._job(TUNE, arm.name, seed, variant, {**arm.settings, **arm.tune[variant]})
            for seed in self.tuning_seeds
            for variant in range(longest)
            for arm in self.arms.values()
            if variant < len(arm.tune)
        ]

    def report_jobs(self, chosen: dict[str, dict[str, Any]]) -> list[Job]:
        """Every arm with its chosen values: seed by seed, so that whatever has finished is paired.

        Raises:
            InputError: an arm that is to be tuned has no chosen value.
        """
        jobs = []
        for seed in self.seeds:
            for arm in self.arms.values():
                if arm.seeds and seed not in arm.seeds:
                    continue
                source = arm.tuned_as or (arm.name if arm.tune else None)
                if source is not None and source not in chosen:
                    raise InputError(
                        f"arm {arm.name}: no tuned value of {source}; expected it in the file of tuned values "
                        "(kvds ab PLAN --tune, or --tuned FILE)"
                    )
                values = chosen[source] if source is not None else {}
                jobs.append(self._job(REPORT, arm.name, seed, 0, {**arm.settings, **values}))
        return jobs

    def _job(self, phase: str, arm: str, seed: int, variant: int, settings: dict[str, Any]) -> Job:
        merged = {**self.common, **settings}
        # A prepared run is the same for all seeds of the experiment: its seed is its own setting.
        merged = {"seed": 0, **merged} if phase == PREPARE else {**merged, "seed": seed}
        needed = {name: {**self.common, **self.prepare[name]} for name in references(merged)}
        return Job(phase, arm, merged["seed"], variant, merged, _hash({"run": merged, "prepared": needed}))


def references(settings: dict[str, Any]) -> list[str]:
    """Names of the prepared runs that settings build on."""
    texts = [value for value in settings.values() if isinstance(value, str)]
    return [text.removeprefix(PREPARED) for text in texts if text.startswith(PREPARED)]


def _hash(parts: dict[str, dict[str, Any]]) -> str:
    def identity(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: identity(item) for key, item in value.items() if _IDENTITY.get(key, True)}

    return hashlib.sha256(json_text(identity(parts), sort_keys=True).encode()).hexdigest()[:12]


def load_plan(path: str | Path, overrides: dict[str, Any] | None = None) -> ExperimentPlan:
    """Read and check a plan; every arm's settings are built once, so that a wrong one is told before the first run.

    Args:
        path: A YAML file with ``base``, ``arms``, ``seeds``, ``primary``, ``baseline`` and what else
            :class:`ExperimentPlan` has, or the name of one that kvds brings.
        overrides: Settings on top of every arm's, such as another ``data_dir``.

    Raises:
        InputError: the file or one of its settings is not as expected.
    """
    path = find_shipped(path, PLANS)
    content = load_mapping(path)
    for key in content:
        if key not in (*_KEYS, "arms"):
            raise InputError(f"{path}: unknown key {one_line(key)}{near_miss(key, [*_KEYS, 'arms'])} (expected arms, "
                             f"{', '.join(_KEYS)})")  # fmt: skip
    for key in ("arms", "seeds", "primary", "baseline"):
        if not content.get(key) and content.get(key) != 0:
            raise InputError(f"{path}: {key} is missing; expected a line `{key}: …` (see launch/recipes/experiments/)")
    base = load_recipe(path.parent / _text(content, "base", path)) if content.get("base") else {}
    override = dict(overrides or {})
    common = {**base, **_settings(content.get("settings"), path, "settings"), **override}
    arms = {name: _arm(name, value, path) for name, value in _mapping(content["arms"], path, "arms").items()}
    prepare = _mapping(content.get("prepare") or {}, path, "prepare")
    plan = ExperimentPlan(
        name=path.stem,
        common=common,
        arms={name: dataclasses.replace(arm, settings={**arm.settings, **override}) for name, arm in arms.items()},
        seeds=_seeds(content["seeds"], path, "seeds"),
        tuning_seeds=_seeds(content.get("tuning_seeds") or [], path, "tuning_seeds"),
        primary=_text(content, "primary", path),
        higher_is_better=_better(content.get("better", "higher"), path),
        baseline=_text(content, "baseline", path),
        comparisons=tuple(_pair(pair, path) for pair in content.get("comparisons") or []),
        prepare={n: {**_settings(v, path, f"prepare.{n}"), **override} for n, v in prepare.items()},
        tuned_from=_text(content, "tuned_from", path) if content.get("tuned_from") else None,
    )
    _check(plan, path)
    return plan


def _check(plan: ExperimentPlan, path: Path) -> None:
    def known(name: str, place: str, names: Iterable[str]) -> None:
        if name not in names:
            raise InputError(f"{path}: {place} {one_line(name)}{near_miss(name, names)} (expected {', '.join(names)})")

    known(plan.baseline, "baseline", plan.arms)
    for pair in plan.pairs:
        for name in pair:
            known(name, "comparisons", plan.arms)
    for arm in plan.arms.values():
        if foreign := set(arm.seeds) - set(plan.seeds):
            raise InputError(f"{path}: arms.{arm.name}.seeds: {min(foreign)}: expected some of the plan's seeds")
        if arm.tuned_as is not None:
            tuned = [name for name, other in plan.arms.items() if other.tune]
            known(arm.tuned_as, f"arms.{arm.name}.tuned_as", [arm.tuned_as] if plan.tuned_from else tuned)
    budgets = {len(arm.tune): arm.name for arm in plan.arms.values() if arm.tune}
    if len(budgets) > 1:
        few, many = min(budgets), max(budgets)
        raise InputError(
            f"{path}: arm {budgets[few]} tunes over {few} values, {budgets[many]} over {many}; expected equal numbers "
            "(an arm that may choose among more looks better by luck)"
        )
    if budgets and not plan.tuning_seeds:
        raise InputError(f"{path}: tuning_seeds is missing; expected seeds that are not reported, such as [100, 101]")
    shared = set(plan.seeds) & set(plan.tuning_seeds)
    if shared:
        raise InputError(f"{path}: tuning_seeds: {min(shared)} is reported, too; expected others than seeds holds")
    earlier: list[str] = []
    for name, settings in plan.prepare.items():
        for reference in references({**plan.common, **settings}):
            known(reference, f"prepare.{name}: {PREPARED}", earlier)
        earlier.append(name)
    candidates = {arm.name: [{**arm.settings, **values} for values in arm.tune or ({},)] for arm in plan.arms.values()}
    for name, variants in [*candidates.items(), *((name, [settings]) for name, settings in plan.prepare.items())]:
        for settings in variants:
            merged = {**plan.common, **settings}
            for reference in references(merged):
                known(reference, f"{name}: {PREPARED}", plan.prepare)
            try:
                RunConfig(**{**merged, "output_dir": "unset"})
            except InputError as error:
                raise InputError(f"{path}: arm {name}: {error}") from error


def _arm(name: str, value: Any, path: Path) -> Arm:
    content = _mapping(value or {}, path, f"arms.{name}")
    tune, tuned_as = content.pop("tune", None) or [], content.pop("tuned_as", None)
    versus, seeds = content.pop("versus", None) or [], content.pop("seeds", None)
    if not isinstance(tune, list) or (tune and tuned_as is not None):
        raise InputError(f"{path}: arms.{name}: expected tune (a list of settings to choose from) or tuned_as (an arm)")
    return Arm(
        name,
        _settings(content, path, f"arms.{name}"),
        tuple(_settings(values, path, f"arms.{name}.tune") for values in tune),
        tuned_as,
        tuple(versus if isinstance(versus, list) else [str(versus)]),
        () if seeds is None else _seeds(seeds, path, f"arms.{name}.seeds"),
    )


def _mapping(value: Any, path: Path, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {place} holds a {type(value).__name__}; expected lines of `name: value`")
    if place in ("arms", "prepare"):
        for name in value:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise InputError(f"{path}: {place}: {one_line(name)}: expected a name of letters, digits, _ . and -")
    return dict(value)


def _settings(value: Any, path: Path, place: str) -> dict[str, Any]:
    content = _mapping(value or {}, path, place)
    if "seed" in content and not place.startswith("prepare"):
        raise InputError(f"{path}: {place}: seed={content['seed']}: expected no seed here (seeds lists them)")
    return checked_settings(content, f"{path}: {place}")


def _seeds(value: Any, path: Path, place: str) -> tuple[int, ...]:
    try:
        seeds = parse_seeds(value)
    except ValueError as error:
        raise InputError(f"{path}: {place}={one_line(value)}: expected whole numbers, such as [0, 1] or 0-9") from error
    return seeds


def parse_seeds(value: Any) -> tuple[int, ...]:
    """``[0, 1]``, ``3``, ``"0-9"`` or ``"0,2-4"`` → the seeds.

    Raises:
        ValueError: something else, or a seed twice.
    """
    parts: Sequence[Any] = value if isinstance(value, list | tuple) else str(value).split(",")
    seeds: list[int] = []
    for part in parts:
        first, dash, last = str(part).strip().partition("-")
        seeds += range(int(first), int(last if dash else first) + 1)
    if len(set(seeds)) != len(seeds):
        raise ValueError(value)
    return tuple(seeds)


def _text(content: dict[str, Any], key: str, path: Path) -> str:
    value = content[key]
    if not isinstance(value, str):
        raise InputError(f"{path}: {key}={one_line(value)}: expected a text")
    return value


def _better(value: Any, path: Path) -> bool:
    if value not in ("higher", "lower"):
        raise InputError(f"{path}: better={one_line(value)}: expected higher or lower")
    return value == "higher"


def _pair(value: Any, path: Path) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{path}: comparisons: {one_line(value)}: expected pairs of arms, such as [structured, flat]")
    return str(value[0]), str(value[1])


def load_tuned(path: str | Path) -> dict[str, dict[str, Any]]:
    """The chosen settings per arm of a file that tuning wrote.

    Raises:
        InputError: no such file, or not one that tuning wrote.
    """
    path = Path(path)
    content = _mapping(load_mapping(path), path, "the file")
    return {arm: _settings(settings, path, arm) for arm, settings in content.items()}


def save_tuned(path: Path, chosen: dict[str, dict[str, Any]], note: str) -> None:
    """Write the chosen settings per arm with a comment that says how they were chosen."""
    plain = {arm: {k: list(v) if isinstance(v, tuple) else v for k, v in s.items()} for arm, s in chosen.items()}
    comment = "".join(f"# {line}\n" for line in note.splitlines())
    path.write_text(comment + yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")
