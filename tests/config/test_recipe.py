"""Flags, recipes and saved configurations: what goes in comes out, and nothing but InputError comes instead."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kvds.align.aligner import aligner_settings
from kvds.config import RunConfig
from kvds.config.recipe import load_recipe, parse_run_config
from kvds.config.resume_rules import as_begun, check_resumable
from kvds.config.values import parse_overrides
from kvds.errors import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIRED = {"model_name": "gpt2", "output_dir": "outputs/x"}
GOOD = ["--model_name", "gpt2", "--output_dir", "outputs/x"]


def test_defaults_are_those_of_the_design():
    cfg = parse_run_config(GOOD)
    assert (cfg.alignment_mode, cfg.direction, cfg.aligner_update) == ("structured", "student_to_teacher", "trained")
    assert (cfg.kv_method, cfg.kv_budget, cfg.kv_rope, cfg.mask_first_token) == ("full", None, "pre", True)
    assert (cfg.kv_weight_share, cfg.kv_weight_value) == (2.0, None)
    assert (cfg.batch_size, cfg.lr, cfg.max_length, cfg.seed) == (8, 5e-5, 512, 0)
    assert cfg.datasets == ("synthetic",)
    assert (cfg.first_teacher, cfg.student) == ("gpt2", "gpt2")
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


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    cfg = RunConfig(model_name="gpt2", output_dir="x", lr=1e-4, datasets=("gsm8k",))
    cfg.save(tmp_path / "config.yaml")
    check_resumable(cfg, tmp_path / "config.yaml")
    other = dataclasses.replace(cfg, output_dir="y", logging_steps=1, save_steps=0, pad_to_multiple_of=64)
    check_resumable(other, tmp_path / "config.yaml")
    for changes, words in (({"lr": 1e-3}, "--lr 0.001.*0.0001"), ({"datasets": ("svamp",)}, "svamp.*gsm8k")):
        with pytest.raises(InputError, match=words):
            check_resumable(dataclasses.replace(cfg, **changes), tmp_path / "config.yaml")
    with pytest.raises(InputError, match="config.yaml: missing.*--resume never"):
        check_resumable(cfg, tmp_path / "gone/config.yaml")


def test_maps_start_fitted_where_a_student_is_pretrained():
    """A random map would pull what the student has learned away; from scratch there is nothing to pull away."""

    def start(**changes):
        return aligner_settings(RunConfig(**REQUIRED, **changes)).map_start

    for mode in ("flat", "structured", "structural_kv", "hidden"):
        assert start(alignment_mode=mode) == "ridge"
        assert start(alignment_mode=mode, student_init="random") == "random"
        assert start(alignment_mode=mode, map_start="random") == "random"
        assert start(alignment_mode=mode, map_start="procrustes", student_init="random") == "procrustes"
    assert start(alignment_mode="relation") == "random"
    assert start(aligner_update="frozen") == "ridge"
    with pytest.raises(InputError, match="aligner_update=frozen: expected --map_start pca, procrustes or ridge"):
        start(aligner_update="frozen", student_init="random")


def test_a_run_begun_with_random_maps_goes_on_as_that(tmp_path):
    saved = tmp_path / "config.yaml"
    RunConfig(**REQUIRED, map_start="random").save(saved)
    cfg = RunConfig(**REQUIRED)
    check_resumable(cfg, saved)
    assert as_begun(cfg, saved) == dataclasses.replace(cfg, map_start="random")
    named = dataclasses.replace(cfg, map_start="ridge")
    assert as_begun(named, saved) is named
    with pytest.raises(InputError, match="--map_start ridge: the checkpoint .* was trained with random"):
        check_resumable(named, saved)
    for other in (cfg, named):
        other.save(saved)
        assert as_begun(cfg, saved) is cfg
    with pytest.raises(InputError, match="--map_start auto: the checkpoint .* was trained with ridge"):
        check_resumable(cfg, saved)


def test_a_map_that_can_collapse_is_allowed_and_warned_about():
    joint = RunConfig(**REQUIRED, direction="teacher_to_student")
    assert len(joint.warnings) == 1 and "collapses" in joint.warnings[0]
    assert (
        RunConfig(**REQUIRED, direction="teacher_to_student", aligner_update="frozen", map_start="pca").warnings == []
    )
    [resting] = RunConfig(**REQUIRED, direction="teacher_to_student", kv_weight=0).warnings
    assert "collapses" not in resting


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


def test_every_model_of_a_run_has_a_seed_of_its_own():
    cfg = RunConfig(student_name="gpt2", teacher_names=("a", "b", "c"), output_dir="x", seed=7)
    assert [cfg.seed, *(cfg.teacher_seed(number) for number in range(len(cfg.all_teachers)))] == [7, 8, 9, 10]
    assert cfg.teacher_seed() == cfg.teacher_seed(0)


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(**REQUIRED).lr = 1.0


def test_help_lists_every_setting_with_its_text(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_run_config(["--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit_.value.code == 0
    for field in dataclasses.fields(RunConfig):
        assert f"--{field.name} " in text
        assert len(field.metadata["help"]) > 5
        assert " ".join(field.metadata["help"].split())[:20] in text, field.name


def test_reading_flags_imports_nothing_heavy():
    code = (
        "import sys; from kvds.config.recipe import parse_run_config; import kvds.config.deepspeed_file;"
        f"parse_run_config({GOOD!r});"
        "sys.exit(sorted({'torch', 'deepspeed', 'transformers', 'mlflow'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_overrides_are_typed():
    parsed = parse_overrides(" n_layer=4, rope_theta=1e4 ,tie_word_embeddings=false,hidden_act=silu,dropout=-0.5")
    assert parsed == {
        "n_layer": 4, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu", "dropout": -0.5,
    }  # fmt: skip
    assert [type(value) for value in parsed.values()] == [int, float, bool, str, float]
    assert parse_overrides("") == {}


def test_a_recipe_that_is_not_text_is_explained(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00lr\x80")
    with pytest.raises(InputError, match="recipe.yaml: not YAML"):
        load_recipe(tmp_path / "recipe.yaml")
    with pytest.raises(InputError, match="expected a recipe file"):
        load_recipe(tmp_path)
