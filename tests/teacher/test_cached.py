"""A teacher on disk: the same states and losses as the teacher that runs, and refusals that name the difference."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from kvds import cli
from kvds.align import build_aligner
from kvds.config import RunConfig
from kvds.config.recipe import parse_run_config
from kvds.data.batches import TokenBatch
from kvds.data.encoding import EncodedSample
from kvds.data.labels import LabelledPositions
from kvds.data.loader import BatchLoader
from kvds.data.model_inputs import repacked, unpacked
from kvds.data.run_data import load_run_data
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.distillation.module import DistillationModule
from kvds.distillation.step import LossWeights, StepInput
from kvds.errors import InputError
from kvds.identity.folder_owner import FolderOwner
from kvds.kv import KVShape, Selection, select_tokens, selected_count
from kvds.teacher import cached as teacher_cache
from kvds.teacher.cache_fingerprint import cache_fingerprint, check_fingerprint
from kvds.teacher.cache_shards import ShardReader, shard_path, write_shard
from kvds.teacher.cached import CachedTeacher, write_teacher_cache
from kvds.teacher.teacher import Teacher
from tests.harness.hub_cache import hub_copy
from tests.harness.kv_settings import both_parts

CPU = torch.device("cpu")
MADE_OF = {"data set": "these"}
METHODS = [("full", None), ("right_crop", 3), ("right_crop", 0.4)]


def model_of(layers: int, hidden: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=50, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # constants on the keys, as Qwen2 has
        for layer in model.model.layers:
            layer.self_attn.k_proj.bias.normal_(0, 20)
    return model


def samples(count: int = 11) -> list[EncodedSample]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        length = int(torch.randint(3, 16, (), generator=generator))
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append(EncodedSample(tuple(ids), (1,) + (2,) * (length - 2) + (3,), number))
    return rows


def loader(method: str, budget: Any, pack_to: int | None = None) -> BatchLoader:
    return BatchLoader(
        samples(), batch_size=4, gradient_accumulation_steps=1, rank=0, world_size=1, seed=3, pad_token_id=0,
        position_count=lambda n: selected_count(method, budget, n), pack_to=pack_to,
    )  # fmt: skip


def select(batch: TokenBatch, method: str, budget: Any) -> Selection:
    rows = unpacked(batch)
    return repacked(select_tokens(method, budget, rows.segment_ids, rows.attention_mask), batch)


def written(folder: Path, teacher: Teacher, store: str, method: str, budget: Any, **how: Any) -> bool:
    values = {"fingerprint": MADE_OF, "batch_size": 3, "shard_samples": 4, "device": CPU, **how}
    return write_teacher_cache(
        folder, teacher, samples(), lambda b: select(b, method, budget), store=store, **values
    )  # fmt: skip


def cached(folder: Path, dtype: torch.dtype = torch.float32) -> CachedTeacher:
    return CachedTeacher(folder, dtype=dtype, device=CPU, fingerprint=MADE_OF)


def flat(states: Any) -> list[Tensor]:
    return [*states.keys, *states.values]


@pytest.mark.parametrize("pack_to", [None, 20])
@pytest.mark.parametrize(("method", "budget"), METHODS)
@pytest.mark.parametrize(("mode", "parts"), [("flat", "kv"), ("structured", "kv"), ("structured", "v"), ("flat", "k")])
def test_losses_are_those_of_the_teacher_that_runs(
    tmp_path: Path, mode: str, parts: str, method: str, budget: Any, pack_to: int | None
) -> None:
    teacher, student = Teacher(model_of(3, 24, 1), device=CPU), model_of(2, 16, 2)
    made_of = MADE_OF | {"parts": {"kv": "keys values", "k": "keys", "v": "values"}[parts]}
    assert written(tmp_path, teacher, "fp32", method, budget, fingerprint=made_of)
    stored = CachedTeacher(tmp_path, dtype=torch.float32, device=CPU, fingerprint=made_of)
    shapes = [KVShape.from_config(student.config), teacher.shape]
    aligner: nn.Module = build_aligner(*shapes, both_parts(alignment_mode=mode, kv_parts=parts))
    module = DistillationModule(student, aligner)
    batches = loader(method, budget, pack_to)
    for step in range(batches.steps_per_epoch):
        [batch] = batches.step(step)
        selection = select(batch, method, budget)
        results = []
        for source in (teacher, stored):
            module.zero_grad()
            inputs = StepInput(
                batch, LabelledPositions.from_labels(batch.labels), selection, source(batch, selection), None,
                LossWeights(kv=1.0),
            )  # fmt: skip
            loss, metrics = module(inputs)
            loss.backward()
            results.append(
                (float(metrics["loss/kv"]), [p.grad.clone() for p in module.parameters() if p.grad is not None])
            )
        (online, gradients), (offline, others) = results
        assert offline == pytest.approx(online, rel=1e-6) and online > 0
        largest = max(float(g.abs().max()) for g in gradients)
        for a, b in zip(others, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * largest)


def test_what_was_read_ahead_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(tmp_path, Teacher(model_of(3, 24, 1), device=CPU), "fp32", "full", None)
    stored = cached(tmp_path)
    [first], [second] = (loader("full", None).step(step) for step in (0, 1))
    expected = [flat(stored(batch).states) for batch in (first, second)]
    reads: list[int] = []
    sample = ShardReader.sample
    monkeypatch.setattr(ShardReader, "sample", lambda self, i: reads.append(i) or sample(self, i))
    stored.read_ahead(first)
    stored.read_ahead(second)
    for batch, states in ((second, expected[1]), (first, expected[0])):
        assert all(map(torch.equal, flat(stored(batch).states), states))
    once = sorted(first.sample_ids.tolist() + second.sample_ids.tolist())
    assert sorted(reads) == once
    stored(first)
    assert sorted(reads) == sorted(once + first.sample_ids.tolist())  # nothing is kept for longer than one call


@pytest.mark.parametrize(("store", "tolerance"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_what_is_read_is_what_was_written_to_the_precision_stored(tmp_path: Path, store: str, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    offset = torch.randn(3, 2, 6, generator=generator) * 50
    keys = [torch.randn(n, 3, 2, 6, generator=generator) + offset for n in (4, 0, 7)]
    values = [torch.randn(n, 3, 2, 6, generator=generator) for n in (4, 0, 7)]
    write_shard(tmp_path, 0, {"keys": keys, "values": values}, store)
    record = json.loads(shard_path(tmp_path, 0).with_suffix(".json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({"store": store, "shards": [record]}))
    reader = ShardReader(tmp_path, torch.float32)
    assert len(reader) == 3
    for expected, side in ((keys, "keys"), (values, "values")):
        everything = torch.cat(expected)
        half_range = (everything.amax(0) - everything.amin(0)) / 2
        # Floats err with their size, integers with the channel's range; fp8's coded values lie within that range.
        bound = everything.abs().amax(0) if store in ("fp32", "bf16") else half_range
        for number, sample in enumerate(expected):
            found = reader.sample(number)[side]
            assert found.shape == sample.shape
            assert bool(((found - sample).abs() <= tolerance * bound * 1.001 + 1e-6 * (tolerance > 0)).all())
    if store == "int8":  # keys of offset 50 are as exact as values of offset 0: bf16 would be off by 0.1
        assert float((reader.sample(0)["keys"] - keys[0]).abs().max()) < 0.03


def test_resuming_and_concurrent_processes_write_the_same_cache(tmp_path: Path) -> None:
    teacher = Teacher(model_of(2, 16, 1), device=CPU)
    assert written(tmp_path / "one", teacher, "fp32", "full", None)
    two = tmp_path / "two"
    assert not written(two, teacher, "fp32", "full", None, rank=1, world_size=2)  # shard 1 of 3
    before = shard_path(two, 1).stat().st_mtime_ns
    shard_path(two, 0).write_bytes(b"cut short")  # another process died over it
    with pytest.raises(InputError, match=r"holds no manifest\.json"):
        cached(two)
    assert written(two, teacher, "fp32", "full", None, rank=0, world_size=2)
    assert shard_path(two, 1).stat().st_mtime_ns == before
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two"))
    assert one == other and len(one["shards"]) == 3
    assert not list(two.glob("*.unfinished"))


def test_a_damaged_or_foreign_cache_is_refused(tmp_path: Path) -> None:
    teacher = Teacher(model_of(2, 16, 1), device=CPU)
    assert written(tmp_path, teacher, "bf16", "full", None)
    with pytest.raises(InputError, match=r"its data set is these, the run's others"):
        CachedTeacher(tmp_path, dtype=torch.float32, device=CPU, fingerprint={"data set": "others"})
    with pytest.raises(InputError, match="its store is bf16, the run's int8"):
        written(tmp_path, teacher, "int8", "full", None)
    path = shard_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum differs"):
        cached(tmp_path)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match="missing or cut short"):
        cached(tmp_path)


def test_one_part_takes_half_the_room_and_serves_runs_that_match_it_alone(tmp_path: Path) -> None:
    teacher = Teacher(model_of(2, 16, 1), device=CPU)
    both, values = ({"parts": parts} | MADE_OF for parts in ("keys values", "values"))
    assert written(tmp_path / "both", teacher, "fp32", "full", None, fingerprint=both)
    assert written(tmp_path / "values", teacher, "fp32", "full", None, fingerprint=values)
    sizes = [
        sum(ShardReader(tmp_path / name, torch.float32).manifest["shards"][n]["bytes"] for n in range(3))
        for name in ("both", "values")
    ]
    assert 1.7 < sizes[0] / sizes[1] < 2.0  # the files' headers stay
    [batch] = loader("full", None).step(0)
    whole, half, less = (
        CachedTeacher(tmp_path / name, dtype=torch.float32, device=CPU, fingerprint=made_of)(batch).states
        for name, made_of in (("both", both), ("both", values), ("values", values))
    )
    assert whole is not None and half is not None and less is not None
    assert len(whole.keys) == 2 and half.keys == less.keys == ()
    for states in (half, less):
        assert all(map(torch.equal, states.values, whole.values)) and len(states.values) == 2
    with pytest.raises(InputError, match="its parts is values, the run's keys values"):
        CachedTeacher(tmp_path / "values", dtype=torch.float32, device=CPU, fingerprint=both)
    with pytest.raises(InputError, match="its parts is keys values, the run's values"):
        written(tmp_path / "both", teacher, "fp32", "full", None, fingerprint=values)  # nothing is mixed in one cache


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models")
    train_problem_tokenizer(folder / "tokenizer")
    size = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    for name, layers in (("teacher", 3), ("student", 2)):
        config = Qwen2Config(
            vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128,
        )  # fmt: skip
        torch.manual_seed(layers)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def flags(models: Path, **changes: Any) -> list[str]:
    values = {
        "teacher_name": models / "teacher", "student_name": models / "student", "tokenizer_name": models / "tokenizer",
        "synthetic_problems": 24, "max_length": 64, "eval_subset_size": 0, "report_to": "none", "batch_size": 8,
        "kv_weight": 1.0, "max_steps": 3, "logging_steps": 1, "deepspeed_config": "ds_configs/zero3_cpu.json",
        "kv_parts": "kv", **changes,
    }  # fmt: skip
    return [token for key, value in values.items() for token in (f"--{key}", str(value))]


def fingerprint(models: Path, **changes: Any) -> dict[str, str]:
    from kvds.models.architecture import load_config
    from kvds.models.tokenizer import load_tokenizer

    cfg: RunConfig = parse_run_config(flags(models, output_dir="x", **changes))
    tokenizer = load_tokenizer(cfg)
    rows = load_run_data(cfg, tokenizer, rank=0, world_size=1).loader.samples
    teacher = load_config(cfg.first_teacher or "", cfg.teacher_config_overrides, flag="teacher")
    return cache_fingerprint(cfg, tokenizer, teacher, rows, "fp32")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"kv_method": "right_crop", "kv_budget": 4}, "selection"),
        ({"mask_first_token": "false"}, "selection"),
        ({"kv_rope": "post"}, "kv_rope"),
        ({"kv_parts": "kv"}, "parts"),
        ({"seed": 1}, "data set"),
        ({"synthetic_problems": 23}, "data set"),
        ({"teacher_init": "random"}, "teacher weights"),
        ({"teacher_init": "random", "teacher_config_overrides": "num_hidden_layers=4"}, "teacher architecture"),
    ],
)
def test_a_cache_of_something_else_is_named(models: Path, changes: dict[str, Any], name: str) -> None:
    made_of = fingerprint(models, kv_parts="auto")
    changes = {"kv_parts": "auto", **changes}
    like = {"batch_size": 2, "lr": 0.5, "alignment_mode": "flat", "kv_parts": "v"}
    check_fingerprint(made_of, fingerprint(models, **like), Path("c"))
    check_fingerprint(fingerprint(models), made_of, Path("c"))  # a cache of both serves a run of one
    with pytest.raises(InputError, match=f"teacher_cache=c: its {name} is "):
        check_fingerprint(made_of, fingerprint(models, **changes), Path("c"))


def test_other_weights_or_tokenizer_are_named(models: Path, tmp_path: Path) -> None:
    made_of = fingerprint(models)
    for name in ("teacher", "tokenizer"):
        assert made_of[f"{name} weights" if name == "teacher" else name]
    torch.manual_seed(9)
    from transformers import AutoConfig

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "teacher")).save_pretrained(tmp_path / "t")
    other = fingerprint(models, teacher_name=tmp_path / "t")
    assert [key for key in made_of if made_of[key] != other[key]] == ["teacher weights"]


def test_command_writes_what_training_reads(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = flags(models)
    assert cli.main(["cache", "--output", str(tmp_path / "c"), "--shard_samples", "10", "--", *own]) == 0
    assert "24 rows" in capsys.readouterr().out
    assert len(list((tmp_path / "c").glob("shard-*.safetensors"))) == 3
    made_of = fingerprint(models, teacher_cache=tmp_path / "c")
    CachedTeacher(tmp_path / "c", dtype=torch.float32, device=CPU, fingerprint=made_of)
    assert cli.main(["cache", "--output", str(tmp_path / "c"), "--store", "int8", "--", *own]) == 2
    assert "its store is bf16, the run's int8" in capsys.readouterr().err


def test_one_weight_in_the_middle_of_a_large_teacher_is_another_teacher(models: Path, tmp_path: Path) -> None:
    config = Qwen2Config.from_pretrained(models / "teacher", intermediate_size=40_000)  # 3 × 7.3 MiB
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "t")
    made_of = fingerprint(models, teacher_name=tmp_path / "t")
    tensors = load_file(tmp_path / "t/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][20_000, 7] += 1
    save_file(tensors, tmp_path / "t/model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="its teacher weights is "):
        check_fingerprint(made_of, fingerprint(models, teacher_name=tmp_path / "t"), Path("c"))
    del made_of["format"]  # as an earlier version wrote it
    with pytest.raises(InputError, match="an earlier version wrote it.*kvds cache, into another folder"):
        check_fingerprint(made_of, fingerprint(models, teacher_name=tmp_path / "t"), Path("c"))


def test_a_run_from_a_cache_does_without_the_teachers_weights(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub name whose configuration alone is here is not downloaded, and a folder need hold no more."""
    from kvds.checkpoint.run_identity import run_identity
    from kvds.models.architecture import load_model_configs
    from kvds.models.tokenizer import load_tokenizer

    made_of = fingerprint(models)
    (tmp_path / "c").mkdir()
    (tmp_path / "t").mkdir()
    shutil.copy(models / "teacher/config.json", tmp_path / "t")
    hub_name = hub_copy(tmp_path / "t", tmp_path / "hub", "some/teacher", monkeypatch)
    for name in (str(tmp_path / "t"), hub_name):
        caplog.clear()
        found = fingerprint(models, teacher_name=name, teacher_cache=tmp_path / "c")
        check_fingerprint(made_of, found, Path("c"))
        assert set(made_of) - set(found) == {"teacher weights"}
        assert f"--teacher_name={name}: its weights are not here; the cache is taken to be of them" in caplog.messages
        cfg = parse_run_config(flags(models, output_dir="x", teacher_name=name, teacher_cache=tmp_path / "c"))
        tokenizer = load_tokenizer(cfg)
        data = load_run_data(cfg, tokenizer, rank=0, world_size=1)
        identity = run_identity(cfg, tokenizer=tokenizer, models=load_model_configs(cfg, tokenizer), data=data)
        assert "teacher architecture" in identity and "teacher weights" not in identity


def test_a_second_command_is_refused_and_other_shares_are_not(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c").mkdir()
    command = ["cache", "--output", str(tmp_path / "c"), "--shard_samples", "10", "--", *flags(models)]
    with FolderOwner(tmp_path / "c"):
        assert cli.main(command) == 2
        assert f"output={tmp_path / 'c'}: belongs to process {os.getpid()}" in capsys.readouterr().err
        assert not list((tmp_path / "c").glob("*.safetensors"))
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert cli.main(command) == 0 and "this process's shards" in capsys.readouterr().out


def test_a_command_that_is_asked_to_stop_ends_with_the_shard_in_flight_and_goes_on(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["cache", "--output", str(tmp_path / "c"), "--shard_samples", "10", "--", *flags(models)]
    write = teacher_cache.write_shard

    def write_and_signal(folder: Path, number: int, *data: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        write(folder, number, *data)

    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache, "write_shard", write_and_signal)
        assert cli.main(command) == 85
    assert "stopped: SIGUSR1 arrived; what is written stays" in capsys.readouterr().err
    [shard] = (tmp_path / "c").glob("shard-*.safetensors")
    before = shard.stat().st_mtime_ns
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL and not (tmp_path / "c/manifest.json").exists()
    assert cli.main(command) == 0
    assert "24 rows" in capsys.readouterr().out and shard.stat().st_mtime_ns == before
