"""Fuzzing of what users write and download: nothing but InputError comes of it, and what is right is read as it stands.

200 examples a property, the same ones in every run; ``KVDS_FUZZ_EXAMPLES=4000`` draws that many new ones.
"""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvds.config import RunConfig
from kvds.config.deepspeed_file import load_deepspeed_config
from kvds.config.recipe import load_recipe, parse_run_config
from kvds.data.example import Example
from kvds.data.mixture import load_mixture
from kvds.data.rows import BadRow, file_rows
from kvds.errors import InputError
from tests.hostile.fuzz_rows import DATA_FILES, GOOD_ROWS, JSON, SCALARS, spelled, valid_rows

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = os.environ.get("KVDS_FUZZ_EXAMPLES")
fuzzed = settings(
    max_examples=int(EXAMPLES or 200), derandomize=EXAMPLES is None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
REQUIRED = {"model_name": "gpt2", "output_dir": "outputs/x"}
GOOD = ["--model_name", "gpt2", "--output_dir", "outputs/x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return path


def told(error: InputError) -> bool:
    """Whether a message can be printed as one line."""
    return bool(str(error)) and str(error).isprintable()


# -- rows --------------------------------------------------------------------------------------------------------------


def read_as(folder: Path, corpus: str, rows: list[bytes], on_bad_row: str = "error") -> list[Example]:
    """All rows of ``corpus`` from a file with ``rows``."""
    name = DATA_FILES[corpus]
    write(folder / name, b"[" + b",\n".join(rows) + b"]" if name.endswith(".json") else b"\n".join(rows))
    if corpus == "own":
        write(folder / "rows.eval.jsonl", json.dumps(GOOD_ROWS["own"]))
        return load_mixture([str(folder / name)], "train", on_bad_row=on_bad_row).examples
    return load_mixture([corpus], "train", data_dir=str(folder), on_bad_row=on_bad_row).examples


@pytest.mark.parametrize("corpus", GOOD_ROWS)
@fuzzed
@given(data=st.data())
def test_a_valid_row_is_read_as_it_stands(folder, corpus, data):
    rows = data.draw(st.lists(valid_rows(corpus), min_size=1, max_size=3))
    lines = [data.draw(spelled(row)) for row, _ in rows]
    found = read_as(folder, corpus, lines)
    assert [(e.prompt, e.rationale, e.answer, e.teacher_rationale) for e in found] == [parts for _, parts in rows]


@pytest.mark.parametrize("corpus", GOOD_ROWS)
@fuzzed
@given(data=st.data())
def test_any_row_is_an_example_or_an_input_error(folder, corpus, data):
    """Rows that are nearly right: a good one with some fields replaced by anything."""
    good = GOOD_ROWS[corpus]
    change = data.draw(st.dictionaries(st.sampled_from(list(good)), JSON, max_size=2))
    row = data.draw(st.sampled_from([{**good, **change}, change])) if data.draw(st.booleans()) else data.draw(JSON)
    on_bad_row = data.draw(st.sampled_from(["error", "skip"]))
    try:
        [found] = read_as(folder, corpus, [json.dumps(row).encode()], on_bad_row)
    except InputError as error:
        assert told(error)
        return
    # A text has nothing before it and stands as it is.
    assert (found.prompt.strip() or found.form == "text") and found.answer.strip() and "####" not in found.rationale
    assert found.form == "text" or "\r" not in found.answer and (corpus == "own" or "\n" not in found.answer)
    (found.prompt + found.rationale + found.answer).encode()


@fuzzed
@given(st.sampled_from(sorted(GOOD_ROWS)), st.binary(max_size=60), st.sampled_from(["error", "skip"]), st.data())
def test_any_bytes_are_examples_or_an_input_error(folder, corpus, noise, on_bad_row, data):
    """A good row with bytes put in somewhere."""
    good = json.dumps(GOOD_ROWS[corpus]).encode()
    at = data.draw(st.integers(0, len(good)))
    try:
        examples = read_as(folder, corpus, [good[:at] + noise + good[at:], good], on_bad_row)
    except InputError as error:
        assert told(error)
        return
    assert examples and all(isinstance(example, Example) for example in examples)


@fuzzed
@given(rows=st.lists(JSON, max_size=6), indent=st.sampled_from([None, 2]))
def test_a_list_reads_as_json_would(folder, rows, indent):
    rows = json.loads(json.dumps(rows).replace("NaN", "0"))
    path = write(folder / "any.json", json.dumps(rows, indent=indent))
    assert [row for _, row in file_rows(path)] == rows


@fuzzed
@given(name=st.text(max_size=5), values=st.tuples(SCALARS, SCALARS), nested=st.booleans())
def test_a_field_given_twice_is_never_read(folder, name, values, nested):
    fields = ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for value in values)
    text = f'{{"x": [{{{fields}}}]}}' if nested else f"{{{fields}}}"
    for path, content in ((folder / "twice.jsonl", text), (folder / "twice.json", f"[{text}]")):
        [(_, row)] = file_rows(write(path, content))
        assert isinstance(row, BadRow) and "stands there twice" in str(row)


# -- flags and recipes -------------------------------------------------------------------------------------------------

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


@fuzzed
@given(words=st.lists(WORDS, max_size=6))
def test_any_flags_give_a_configuration_or_an_input_error(words):
    if any(word.startswith(("-h", "--help")) for word in words):
        return
    try:
        cfg = parse_run_config([*GOOD, *words])
    except InputError as error:
        assert told(error)
    else:
        assert isinstance(cfg, RunConfig) and math.isfinite(cfg.lr)


NAMES = st.text(st.characters(categories=["L", "N", "P", "S"], include_characters=" "), min_size=1, max_size=8).filter(
    str.strip
)


@st.composite
def valid_settings(draw: st.DrawFn) -> dict[str, object]:
    """Settings that must be accepted, of every type."""
    fraction = st.floats(0, 1, exclude_min=True)
    optional = {
        "lr": st.floats(0, 1e6, exclude_min=True),
        "max_steps": st.none() | st.integers(1, 10**9),
        "kv_weight": st.floats(0, 1e6) | fraction.map(lambda share: f"auto:{share}"),
        "run_name": st.none() | NAMES,
        "experiment_name": NAMES,
        "student_config_overrides": st.sampled_from(["", "n_layer=4,n_embd=128"]),
        "datasets": st.lists(st.sampled_from(["gsm8k", "svamp:0.5", "arc_easy:2"]), min_size=1, unique=True).map(tuple),
        "gradient_checkpointing": st.booleans(),
        "mask_first_token": st.booleans(),
        "layer_map": st.sampled_from([None, "learned", "endpoint", "last_aligned"]),
        "max_grad_norm": st.none() | st.floats(0, 100),
        "seed": st.integers(0, 2**31 - 1),
    }  # fmt: skip
    values = REQUIRED | draw(st.fixed_dictionaries({}, optional=optional))
    if draw(st.booleans()):
        values |= {"kv_method": "right_crop", "kv_budget": draw(st.integers(1, 10**6) | fraction)}
    return values


def as_flags(draw: st.DrawFn, name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        forms = [[f"--{name}"], [f"--{name}", "True"]] if value else [[f"--no_{name}"], [f"--{name}=false"]]
        return draw(st.sampled_from(forms))
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    text = "none" if value is None else str(value)
    # As argparse has it, a value that begins with a dash must be joined to its flag.
    return [f"--{name}={text}"] if text.startswith("-") or draw(st.booleans()) else [f"--{name}", text]


@fuzzed
@given(values=valid_settings(), data=st.data())
def test_flags_mean_what_they_say(values, data):
    if str(values.get("run_name")).lower() == "none":
        values["run_name"] = None  # the one text that says "unset"
    flags = [token for name, value in values.items() for token in as_flags(data.draw, name, value)]
    assert parse_run_config(flags) == RunConfig(**values)


@settings(fuzzed, max_examples=fuzzed.max_examples // 4)  # each dumps and reads a hundred settings
@given(values=valid_settings())
@example(REQUIRED | {"run_name": "1e5", "experiment_name": "null"})
@example(REQUIRED | {"run_name": "yes", "experiment_name": "0x1F"})
@example(REQUIRED | {"run_name": "010", "experiment_name": "1:30"})
def test_a_saved_configuration_gives_the_same_one(folder, values):
    cfg = RunConfig(**values)
    file = folder / "config.yaml"
    cfg.save(file)
    assert RunConfig(**load_recipe(file)) == cfg
    assert set(yaml.safe_load(file.read_text())) == {field.name for field in dataclasses.fields(RunConfig)}
    assert parse_run_config(["--config", str(file)]) == cfg


@fuzzed
@given(name=st.sampled_from(["epochs", "lr", "max_minutes", "kv_budget"]), text=st.from_regex(r"[-+]?[0-9:_.]{1,7}\Z"))
@example(name="epochs", text="1_")
def test_a_number_is_the_same_number_as_flag_and_in_a_recipe(folder, name, text):
    """YAML 1.1 has numbers of its own, in base 8 and 60: they are refused, not read otherwise than as a flag."""
    more = ["--kv_method", "right_crop"] if name == "kv_budget" else []
    recipe = write(folder / "number.yaml", f"{name}: {text}\n")
    try:
        found = getattr(parse_run_config(["--config", str(recipe), *GOOD, *more]), name)
    except InputError as error:
        assert told(error)
    else:
        assert found == getattr(parse_run_config([*GOOD, *more, f"--{name}={text}"]), name)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
SETTING_NAMES = st.sampled_from([name.removeprefix("--") for name in FLAG_NAMES])
YAML_PIECES = [
    *"[]{}:&*!|>%@`,?- \n\t",
    "lr",
    "<<: ",
    "&a",
    "*a",
    "!!map ",
    "!!int ",
    "!!timestamp ",
    "010",
    "0001-01-01",
]


@fuzzed
@given(
    content=st.dictionaries(SETTING_NAMES | st.text(max_size=4), YAML_VALUES, max_size=4).map(yaml.safe_dump)
    | st.dictionaries(SETTING_NAMES, YAML_VALUES, max_size=4).map(lambda values: json.dumps(values, default=str))
    | st.text(max_size=40)
    | st.lists(st.sampled_from(YAML_PIECES), max_size=12).map("".join)
    | st.binary(max_size=40)
)
def test_any_recipe_gives_a_configuration_or_an_input_error(folder, content):
    file = write(folder / "fuzzed.yaml", content)
    try:
        cfg = parse_run_config(["--config", str(file), *GOOD])
    except InputError as error:
        assert told(error)
    else:
        assert isinstance(cfg, RunConfig) and math.isfinite(cfg.lr)


@fuzzed
@given(data=st.data())
def test_any_deepspeed_file_is_read_or_an_input_error(folder, data):
    """Files that are nearly right: one of those that come with kvds, with some values replaced by anything."""
    name = data.draw(st.sampled_from(sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))))
    content = json.loads((REPOSITORY / "ds_configs" / name).read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        section = data.draw(st.sampled_from([content, *(v for v in content.values() if isinstance(v, dict))]))
        key = data.draw(st.sampled_from([*section, "wandb", "aio", "offload_param", "x"]))
        section[key] = data.draw(JSON | st.sampled_from([{"enabled": True}, {"device": "cpu"}, {"device": "nvme"}]))
    try:
        read = load_deepspeed_config(write(folder / "ds.json", json.dumps(content)))
    except InputError as error:
        assert told(error)
    else:
        assert read == content
