"""What kvds brings along is found by bare name from any folder; what lies where the user stands comes first."""

import pytest

from kvds.config import shipped_files
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.recipe import load_recipe, parse_run_config
from kvds.config.shipped_files import DEEPSPEED_CONFIGS, PLANS, RECIPES, find_shipped, shipped_names, shipped_root
from kvds.errors import InputError
from kvds.experiment.plan import load_plan


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", shipped_names(RECIPES))
def test_every_recipe_is_a_run_by_its_name(name):
    cfg = parse_run_config(["--config", name, "--output_dir", "out"])
    assert cfg.output_dir == "out" and load_recipe(name) == load_recipe(shipped_root() / f"launch/recipes/{name}.yaml")


@pytest.mark.parametrize("name", shipped_names(DEEPSPEED_CONFIGS))
def test_every_deepspeed_configuration_has_a_name(name):
    assert load_deepspeed_config(name) == load_deepspeed_config(f"ds_configs/{name}.json")


def test_every_plan_has_a_name():
    assert "problems_300" in shipped_names(PLANS) and not set(shipped_names(PLANS)) & set(shipped_names(RECIPES))
    assert load_plan("problems_300").common == load_plan("launch/recipes/experiments/problems_300.yaml").common


def test_a_file_of_the_user_comes_first(elsewhere):
    (elsewhere / "quickstart").write_text("seed: 99\n")
    (elsewhere / "launch/recipes").mkdir(parents=True)
    (elsewhere / "launch/recipes/gpt2_ab.yaml").write_text("seed: 98\n")
    assert load_recipe("quickstart") == {"seed": 99}
    assert load_recipe("launch/recipes/gpt2_ab.yaml") == {"seed": 98}
    (elsewhere / "qwen2_reasoning").mkdir()  # a run's folder of that name is no recipe
    assert load_recipe("qwen2_reasoning")["student_name"] == "Qwen/Qwen2-0.5B"


def test_a_model_that_is_brought_along_is_a_folder_wherever_one_stands(elsewhere):
    teacher = str(shipped_root() / "launch/quickstart_teacher")
    assert load_recipe("quickstart")["model_name"] == teacher
    flags = ["--output_dir", "out", "--model_name"]
    assert parse_run_config([*flags, "quickstart_teacher"]).student == teacher
    assert parse_run_config([*flags, "gpt2"]).student == "gpt2"
    (elsewhere / "quickstart_teacher").mkdir()
    assert parse_run_config([*flags, "quickstart_teacher"]).student == "quickstart_teacher"


@pytest.mark.parametrize("name", ["", ".", "../kvds/errors.py", "/", "~", "a\0b", "x" * 5000])
def test_odd_names_are_left_to_their_reader(name):
    assert str(find_shipped(name, RECIPES)) == str(find_shipped(name, ("", ""))) or not name.strip("./~")
    with pytest.raises(InputError, match="--config"):
        load_recipe(name)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"qwen2_resoning: No such file .* did you mean qwen2_reasoning\? \(kvds bri"):
        load_recipe("qwen2_resoning")
    with pytest.raises(InputError, match=r"zero3_fp23: No such file .* did you mean zero3_fp32\?"):
        load_deepspeed_config("zero3_fp23")
    with pytest.raises(InputError, match=r"did you mean problems_3000?\?"):
        load_plan("problems_30")


def test_an_installed_package_has_them_beside_its_modules(elsewhere, monkeypatch):
    (elsewhere / "shipped/ds_configs").mkdir(parents=True)
    (elsewhere / "shipped/ds_configs/own.json").write_text("{}")
    monkeypatch.setattr(shipped_files, "_INSTALLED", elsewhere / "shipped")
    assert shipped_names(DEEPSPEED_CONFIGS) == ["own"]
    assert find_shipped("own", DEEPSPEED_CONFIGS) == elsewhere / "shipped/ds_configs/own.json"
