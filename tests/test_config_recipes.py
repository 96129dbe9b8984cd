"""Flags, recipes and saved configurations: what goes in comes out, and nothing but InputError comes instead."""

import dataclasses
import json
import math
import string
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvds.config import RunConfig, load_recipe, parse_run_config
from kvds.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIRED = {"model_name": "gpt2", "output_dir": "outputs/x"}
GOOD = ["--model_name", "gpt2", "--output_dir", "outputs/x"]


def test_defaults_are_those_of_the_design():
    cfg = parse_run_config(GOOD)
    assert (cfg.alignment_mode, cfg.direction, cfg.aligner_update) == ("structured", "student_to_teacher", "trained")
    assert (cfg.kv_method, cfg.kv_budget, cfg.kv_rope, cfg.mask_first_token) == ("full", None, "pre", True)
    assert (cfg.kv_weight_share, cfg.kv_weight_value) == (2.0, None)
    assert (cfg.batch_size, cfg.lr, cfg.max_length, cfg.seed) == (8, 5e-5, 512, 0)
    assert cfg.datasets == ("synthetic",)
    assert (cfg.teacher, cfg.student) == ("gpt2", "gpt2")
    assert cfg.uses_kv and cfg.uses_teacher and cfg.warnings == []


def test_flags_have_the_types_of_their_settings():
    words = "--datasets gsm8k svamp:0.5 --lr 1e-4 --kv_method right_crop --kv_budget 0.25 --kv_weight 3 --max_steps 7"
    cfg = parse_run_config([*GOOD, *words.split()])
    assert cfg.datasets == ("gsm8k", "svamp:0.5")
    assert (cfg.lr, cfg.kv_budget, cfg.kv_weight_value, cfg.kv_weight_share, cfg.max_steps) == (
        1e-4,
        0.25,
        3.0,
        None,
        7,
    )
    tokens = parse_run_config([*GOOD, "--kv_method", "right_crop", "--kv_budget", "64"]).kv_budget
    assert tokens == 64 and isinstance(tokens, int)
    whole = parse_run_config([*GOOD, "--kv_method", "right_crop", "--kv_budget", "1.0"]).kv_budget
    assert whole == 1.0 and isinstance(whole, float)
    assert parse_run_config([*GOOD, "--run_name", "2024"]).run_name == "2024"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--map_proj_share_dim", True),
        ("--map_proj_share_dim true", True),
        ("--map_proj_share_dim=TRUE", True),
        ("--map_proj_share_dim false", False),
        ("--no_map_proj_share_dim", False),
        ("--map_proj_share_dim --no_map_proj_share_dim", False),
    ],
)
def test_switches_have_three_spellings(flags, expected):
    assert parse_run_config([*GOOD, *flags.split()]).map_proj_share_dim is expected


def test_what_launchers_add_is_dropped():
    words = ["--local_rank=1", *GOOD, "--deepspeed", "--local-rank", "2"]
    assert parse_run_config(words) == parse_run_config(GOOD)


def test_flags_go_before_the_recipe_and_none_unsets(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lr: 5e-4\nmax_steps: 9\nrun_name: old\nmap_proj_share_dim: true\ndatasets: gsm8k\n")
    words = ["--config", str(recipe), *GOOD]
    cfg = parse_run_config(words)
    assert (cfg.lr, cfg.max_steps, cfg.run_name, cfg.datasets) == (5e-4, 9, "old", ("gsm8k",))
    assert cfg.map_proj_share_dim
    changed = "--lr 1 --max_steps none --run_name none --no_map_proj_share_dim --datasets svamp"
    cfg = parse_run_config([*words, *changed.split()])
    assert (cfg.lr, cfg.max_steps, cfg.run_name, cfg.datasets) == (1, None, None, ("svamp",))
    assert not cfg.map_proj_share_dim


@pytest.mark.parametrize("recipe", sorted((REPOSITORY / "launch/recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(recipe, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    RunConfig(**{"output_dir": "outputs/x", **load_recipe(recipe)})


def test_an_empty_recipe_sets_nothing(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_recipe(tmp_path / "empty.yaml") == {}


NAMES = st.text(string.ascii_letters + string.digits + "-_./ äß#:'\"", min_size=1, max_size=12).filter(str.strip)


@st.composite
def valid_settings(draw: st.DrawFn) -> dict[str, object]:
    """Settings that must be accepted, of every type."""
    crop = draw(st.booleans())
    fraction = st.floats(0, 1, exclude_min=True)
    return (
        REQUIRED
        | draw(
            st.fixed_dictionaries(
                {"kv_method": st.just("right_crop" if crop else "full")},
                optional={
                    "lr": st.floats(0, 1e6, exclude_min=True),
                    "max_steps": st.none() | st.integers(1, 10**9),
                    "kv_weight": st.floats(0, 1e6) | fraction.map(lambda share: f"auto:{share}"),
                    "run_name": st.none() | NAMES,
                    "experiment_name": NAMES,
                    "student_config_overrides": st.sampled_from(["", "n_layer=4,n_embd=128"]),
                    "datasets": st.lists(
                        st.sampled_from(["gsm8k", "svamp:0.5", "arc_easy:2"]), min_size=1, unique=True
                    ),
                    "gradient_checkpointing": st.booleans(),
                    "layer_map": st.sampled_from([None, "learned", "endpoint", "last_aligned"]),
                    "max_grad_norm": st.none() | st.floats(0, 100),
                },
            )
        )
        | ({"kv_budget": draw(st.integers(1, 10**6) | fraction)} if crop else {})
    )


@settings(max_examples=60)
@given(valid_settings())
@example(REQUIRED | {"run_name": "1e5", "experiment_name": "null"})
@example(REQUIRED | {"run_name": "yes", "experiment_name": "0x1F"})
def test_a_saved_configuration_gives_the_same_one(tmp_path_factory, values):
    cfg = RunConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    file = tmp_path_factory.mktemp("saved") / "config.yaml"
    cfg.save(file)
    assert RunConfig(**load_recipe(file)) == cfg
    assert set(yaml.safe_load(file.read_text())) == {field.name for field in dataclasses.fields(RunConfig)}
    assert parse_run_config(["--config", str(file)]) == cfg


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    cfg = RunConfig(model_name="gpt2", output_dir="x", lr=1e-4, datasets=("gsm8k",))
    cfg.save(tmp_path / "config.yaml")
    cfg.check_resumable(tmp_path / "config.yaml")
    dataclasses.replace(cfg, output_dir="y", logging_steps=1, save_steps=0).check_resumable(tmp_path / "config.yaml")
    for changes, words in (({"lr": 1e-3}, "--lr 0.001.*0.0001"), ({"datasets": ("svamp",)}, "svamp.*gsm8k")):
        with pytest.raises(InputError, match=words):
            dataclasses.replace(cfg, **changes).check_resumable(tmp_path / "config.yaml")
    with pytest.raises(InputError, match="config.yaml: missing.*--resume never"):
        cfg.check_resumable(tmp_path / "gone/config.yaml")


def test_a_map_that_can_collapse_is_allowed_and_warned_about():
    joint = RunConfig(**REQUIRED, direction="teacher_to_student")
    assert len(joint.warnings) == 1 and "collapses" in joint.warnings[0]
    assert (
        RunConfig(**REQUIRED, direction="teacher_to_student", aligner_update="frozen", map_start="pca").warnings == []
    )
    assert RunConfig(**REQUIRED, direction="teacher_to_student", kv_weight=0).warnings == []


@pytest.mark.parametrize(
    ("changes", "kv", "teacher"),
    [
        ({}, True, True),
        ({"kv_weight": 0}, False, False),
        ({"alignment_mode": "none"}, False, False),
        ({"alignment_mode": "none", "logit_kd_weight": 0.5}, False, True),
        ({"kv_weight": 1.5, "task_weight": 0}, True, True),
    ],
)
def test_which_losses_need_what(changes, kv, teacher):
    cfg = RunConfig(student_name="s", teacher_name="t", output_dir="x", **changes)
    assert (cfg.uses_kv, cfg.uses_teacher) == (kv, teacher)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(**REQUIRED).lr = 1.0


def test_help_lists_every_setting_with_its_text(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_run_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name} " in text
        assert len(field.metadata["help"]) > 5
        assert " ".join(field.metadata["help"].split())[:20] in text, field.name


def test_reading_flags_imports_nothing_heavy():
    code = (
        "import sys; from kvds.config import parse_run_config; import kvds.deepspeed_config;"
        f"parse_run_config({GOOD!r});"
        "sys.exit(sorted({'torch', 'deepspeed', 'transformers', 'mlflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


FLAG_NAMES = [f"--{field.name}" for field in dataclasses.fields(RunConfig)]
WORDS = st.one_of(
    st.sampled_from([*FLAG_NAMES, *(name.replace("--", "--no_") for name in FLAG_NAMES), "--config", "--", "-", ""]),
    st.sampled_from(["none", "true", "nan", "-1", "1e999", "9" * 5000, "auto:1", "a=1", "gsm8k:", ":1", "="]),
    st.sampled_from(["\x00", "\n", "\ud800", "١"]),
    st.text(max_size=6),
    st.tuples(st.sampled_from(FLAG_NAMES), st.text(max_size=5)).map("=".join),
    st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(WORDS, max_size=6))
def test_any_flags_give_a_configuration_or_an_input_error(words):
    if {"-h", "--help"} & set(words) or any(word.startswith("-h") for word in words):
        return
    try:
        cfg = parse_run_config([*GOOD, *words])
    except InputError as error:
        assert str(error) and str(error).isprintable()
    else:
        assert isinstance(cfg, RunConfig) and math.isfinite(cfg.lr)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
SETTING_NAMES = st.sampled_from([name.removeprefix("--") for name in FLAG_NAMES])


@settings(max_examples=150)
@given(
    st.dictionaries(SETTING_NAMES | st.text(max_size=4), YAML_VALUES, max_size=4).map(yaml.safe_dump)
    | st.dictionaries(SETTING_NAMES, YAML_VALUES, max_size=4).map(lambda values: json.dumps(values, default=str))
    | st.text(max_size=40)
    | st.lists(st.sampled_from([*"[]{}:&*!|>%@`,?- \n\t", "lr", "<<: ", "&a", "*a", "!!map "]), max_size=12).map(
        "".join
    )
    | st.binary(max_size=40)
)
def test_any_recipe_gives_a_configuration_or_an_input_error(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        cfg = parse_run_config(["--config", str(file), *GOOD])
    except InputError as error:
        assert str(error) and str(error).isprintable()
    else:
        assert isinstance(cfg, RunConfig) and math.isfinite(cfg.lr)
