"""A student's folder generates as it was judged, can be read by whom the umask lets, and says what it was made of."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, Qwen2Config

from kvds.checkpoint.aligner_file import save_aligner
from kvds.checkpoint.export import save_architecture, save_student
from kvds.checkpoint.model_card import recorded_results, save_card_facts, write_model_card
from kvds.config import RunConfig
from kvds.data.encoding import EncodedCorpus, EncodedSample, Segment, encode_examples
from kvds.data.synthetic import synthetic_examples
from kvds.data.token_files import _write_corpus
from kvds.data.tokenizer import train_problem_tokenizer
from kvds.durable_files import put_in_place, write_durably
from kvds.evaluation.model import evaluate_model
from kvds.models.generation import end_tokens, source_generation
from kvds.teacher.cache_shards import write_shard
from tests.evaluation.test_model import overfit
from tests.hostile.test_fuzz_input import EXAMPLES

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1}
fuzzed = settings(
    max_examples=int(EXAMPLES or 60), derandomize=EXAMPLES is None, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Pad 0, end 1, and two end tokens of chats that a source may have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_problem_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|done|>"]})
    return tokenizer


def small(tokenizer, family: str = "qwen2", **settings: object):
    """As a source that was trained somewhere: its settings are its own."""
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_layer=2, n_embd=32, n_head=2, n_positions=96, **settings)
    else:
        config = Qwen2Config(
            vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=True, **settings,
        )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def saved(model, tokenizer, folder: Path, **options):
    save_student(model, tokenizer, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def tokens_per_forward(model, ids: torch.Tensor, **options: object) -> list[int]:
    counts: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    model.generate(ids, **options)
    hook.remove()
    return counts


def test_a_saved_student_generates_with_a_cache(tokenizer, tmp_path):
    model = small(tokenizer, use_cache=False)  # as a source that was exported before, or a model in training
    model.generation_config.use_cache = False
    student = saved(model, tokenizer, tmp_path / "student")
    ids = torch.arange(11)[None] + 5
    assert tokens_per_forward(student, ids, max_new_tokens=5, min_new_tokens=5) == [11, 1, 1, 1, 1]
    assert student.generation_config.use_cache and student.config.use_cache
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "student" / file).read_text())["use_cache"] is True


@pytest.mark.parametrize(("family", "sampling"), [("qwen2", SAMPLING), ("gpt2", {})])
def test_plain_generation_is_what_was_judged(family, sampling, tokenizer, tmp_path, caplog):
    """A source that ends texts with another token, an Instruct model's tokenizer: as it is the other way round."""
    rows = synthetic_examples("eval", problems=1, seed=0)[:5]
    model = small(tokenizer, family, eos_token_id=7, pad_token_id=None, bos_token_id=3, use_cache=False)
    if sampling:
        model.generation_config = GenerationConfig(eos_token_id=7, bos_token_id=3, **sampling)
    model = overfit(model, tokenizer, rows)
    file = tmp_path / "p.jsonl"
    results = evaluate_model(
        model, tokenizer, rows, batch_size=2, max_new_tokens=60, max_length=64, progress=False, predictions_path=file
    )
    assert results["all"]["exact_match"] == 1.0
    judged = [json.loads(line)["completion"] for line in file.read_text().splitlines()]
    with caplog.at_level("WARNING", "kvds"):
        student = saved(model, tokenizer, tmp_path / "student", max_new_tokens=60)
    assert ("do_sample=True, temperature=0.7" in caplog.text) == bool(sampling)
    assert ("the student was judged by its likeliest tokens" in caplog.text) == bool(sampling)
    own = AutoTokenizer.from_pretrained(tmp_path / "student")
    greedy = {"do_sample": False, "repetition_penalty": 1.0} if sampling else {}
    for sample, completion in zip(encode_examples(rows, own, 64).samples, judged, strict=True):
        prompt = sample.input_ids[: sample.segment_ids.count(Segment.PROMPT)]
        found = student.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist()
        assert found[-1] == own.eos_token_id and len(found) < 60
        assert own.decode(found, skip_special_tokens=True) == completion
    again = evaluate_model(student, own, rows, batch_size=2, max_new_tokens=60, max_length=64, progress=False)
    assert again == results
    for name, value in sampling.items():
        assert getattr(student.generation_config, name) == value


def test_an_end_token_of_the_source_that_the_tokenizer_has_ends_a_judged_text_too(tokenizer, tmp_path):
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    rows = synthetic_examples("eval", problems=1, seed=0)[:3]
    model = overfit(small(tokenizer), tokenizer, rows)
    with torch.no_grad():  # the end of the rows is now that of a chat's turn
        weight = model.lm_head.weight
        weight[[tokenizer.eos_token_id, turn]] = weight[[turn, tokenizer.eos_token_id]]
    judge = {"batch_size": 3, "max_new_tokens": 60, "max_length": 64, "progress": False}
    without = evaluate_model(model, tokenizer, rows, **judge, predictions_path=tmp_path / "without.jsonl")
    model.generation_config = GenerationConfig(eos_token_id=[turn, 10**6])
    within = evaluate_model(model, tokenizer, rows, **judge, predictions_path=tmp_path / "with.jsonl")
    assert within["all"]["exact_match"] == 1.0 >= without["all"]["exact_match"]
    long, short = ((tmp_path / f"{name}.jsonl").read_text() for name in ("without", "with"))
    assert len(short) < len(long)
    student = saved(model, tokenizer, tmp_path / "student")
    assert student.generation_config.eos_token_id == [tokenizer.eos_token_id, turn] == student.config.eos_token_id


def test_a_published_file_that_transformers_would_not_save_is_kept(tokenizer, tmp_path):
    (tmp_path / "source").mkdir()
    content = {"temperature": 0.9, "top_p": 0.6, "max_length": 80, "eos_token_id": 99999, "pad_token_id": 99999}
    (tmp_path / "source/generation_config.json").write_text(json.dumps(content))
    model = small(tokenizer)
    model.generation_config = source_generation(str(tmp_path / "source"))
    model.generation_config.eos_token_id = [2, 99999]
    saved(model, tokenizer, tmp_path / "student", max_new_tokens=33)
    kept = json.loads((tmp_path / "student/generation_config.json").read_text())
    kept.pop("transformers_version")
    assert kept == {
        "temperature": 0.9, "top_p": 0.6, "max_length": 80, "eos_token_id": 1, "pad_token_id": 0, "use_cache": True
    }  # fmt: skip


ids = st.one_of(st.none(), st.integers(0, 600), st.lists(st.integers(0, 600), min_size=1, max_size=3))
one = st.one_of(st.none(), st.integers(0, 600))


@fuzzed
@given(
    config=st.fixed_dictionaries({"eos_token_id": ids, "bos_token_id": one, "use_cache": st.booleans()}),
    source=st.none() | st.fixed_dictionaries(
        {"eos_token_id": ids, "bos_token_id": one, "pad_token_id": one},
        optional={"use_cache": st.booleans(), "do_sample": st.booleans(), "temperature": st.floats(0.1, 2),
                  "top_k": st.integers(1, 99), "max_length": st.integers(1, 99), "max_new_tokens": st.integers(1, 99)},
    ),
    limit=st.none() | st.integers(1, 99),
)  # fmt: skip
def test_whatever_the_source_said_the_folder_says_how_it_was_judged(config, source, limit, tokenizer, tmp_path_factory):
    model = small(tokenizer, **config)
    if source is not None:
        model.generation_config = GenerationConfig(**source)
    folder = tmp_path_factory.mktemp("any") / "student"
    expected_ends = end_tokens(model, tokenizer)
    student = saved(model, tokenizer, folder, max_new_tokens=limit)
    found, own = student.generation_config, AutoConfig.from_pretrained(folder)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    assert ends == expected_ends and ends[0] == tokenizer.eos_token_id
    assert set(ends) <= {1, *tokenizer.added_tokens_decoder}
    assert found.eos_token_id == own.eos_token_id and found.pad_token_id == tokenizer.pad_token_id
    # A padding token's embedding is not trained: one that ends texts is none in the model's configuration.
    assert own.pad_token_id == (None if found.pad_token_id in ends else found.pad_token_id)
    assert found.bos_token_id == own.bos_token_id and (
        found.bos_token_id is None or found.bos_token_id in tokenizer.added_tokens_decoder
    )
    assert found.use_cache is True and own.use_cache is True
    for name in ("do_sample", "temperature", "top_k"):
        assert getattr(found, name) == (source or {}).get(name)
    limits = [(source or {}).get(name) for name in ("max_length", "max_new_tokens")]
    if not any(limits):
        limits = [96, None] if limit is not None and limit >= 96 else [None, limit]
    assert [found.max_length, found.max_new_tokens] == limits


def test_plain_generation_asks_for_no_position_that_the_model_lacks(tokenizer, tmp_path):
    model = small(tokenizer, "gpt2", eos_token_id=7)
    student = saved(model, tokenizer, tmp_path / "student", max_new_tokens=256)
    student.generation_config.eos_token_id = None  # an untrained model might end before
    assert student.generate(torch.arange(11)[None] + 5).shape == (1, 96)


# -- modes -------------------------------------------------------------------------------------------------------------


def modes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*")}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_every_file_has_the_mode_of_the_umask(umask, tokenizer, tmp_path):
    before = os.umask(umask)
    try:
        model = small(tokenizer)
        save_student(model, tokenizer, tmp_path / "student")
        save_architecture(tmp_path, model, tokenizer, None)
        save_aligner({}, {}, tmp_path / "map_aligner.pt")
        write_durably(tmp_path / "text", "x")
        sample = EncodedSample((1, 2), (1, 2), 0)
        _write_corpus(tmp_path / "tokens/x.safetensors", EncodedCorpus([sample], 0))
        write_shard(tmp_path, 0, {"keys": [torch.ones(1, 1, 1, 1)]}, "fp32")
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert {"student/model.safetensors", "tokens/x.safetensors", "shard-00000.safetensors"} <= set(found)
    for name, mode in found.items():
        wanted = 0o777 if (tmp_path / name).is_dir() else 0o666
        assert mode == wanted & ~umask, f"{name}: {mode:o}"


def test_a_folder_keeps_the_group_that_it_hands_on(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new").chmod(0o2700)
    put_in_place(tmp_path / "new", tmp_path / "shared")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o2777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_the_shipped_teacher_generates_with_a_cache():
    folder = REPOSITORY / "launch/quickstart_teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Lee has 68 balls eats 2?\n", return_tensors="pt")["input_ids"]
    counts = tokens_per_forward(model, ids, max_new_tokens=8)
    assert counts[0] == ids.shape[1] and set(counts[1:]) == {1}
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


# -- the card ----------------------------------------------------------------------------------------------------------


def card(tmp_path: Path, results: dict, **changes: object) -> tuple[dict, str]:
    values = {"teacher_name": "Qwen/Qwen2-1.5B", "student_name": "Qwen/Qwen2-0.5B", "output_dir": str(tmp_path)}
    cfg = RunConfig(**{**values, "datasets": ("gsm8k:2", "arc", "/home/me/rows.jsonl"), "lr": 1e-4, **changes})
    cfg.save(tmp_path / "config.yaml")
    (tmp_path / "checkpoints/model").mkdir(parents=True)
    save_card_facts(tmp_path, {"gsm8k": 7000, "rows": 3}, {"gsm8k": 200})
    (tmp_path / "student").mkdir()
    write_model_card(tmp_path, tmp_path / "student", 40, results)
    text = (tmp_path / "student/README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_the_student_was_made_of(tmp_path):
    scores = {"cross_entropy": 1.25, "perplexity": 3.5, "exact_match": 0.5, "samples": 200}
    head, body = card(tmp_path, {"gsm8k": scores, "all": {**scores, "kv_loss": 0.125}})
    assert head["base_model"] == "Qwen/Qwen2-0.5B" and head["library_name"] == "transformers"
    assert head["datasets"] == ["openai/gsm8k", "allenai/ai2_arc"] and "license" not in head
    [entry] = head["model-index"]
    assert {m["type"]: m["value"] for r in entry["results"] for m in r["metrics"]}["exact_match"] == 0.5
    for part in (
        "- base model: Qwen/Qwen2-0.5B (its weights)", "- teacher: Qwen/Qwen2-1.5B", "| gsm8k | 7000 | 200 |",
        "| rows | 3 | 0 |", "alignment_mode: structured", "lr: 0.0001", "for 40 steps", "## Licence",
        "| gsm8k | 1.2500 | 3.5000 | 0.5000 | – | 200 |", "| all | 1.2500 | 3.5000 | 0.5000 | 0.1250 | 200 |",
    ):  # fmt: skip
        assert part in body, part
    assert str(tmp_path) not in body and "/home/me" not in body


def test_a_card_without_a_teacher_weights_or_rows_judged(tmp_path):
    (tmp_path / "own").mkdir()
    own = {"teacher_name": None, "student_name": str(tmp_path / "own"), "student_init": "random"}
    head, body = card(tmp_path, {}, alignment_mode="none", student_config_overrides="num_hidden_layers=3", **own)
    assert "base_model" not in head and "model-index" not in head
    assert "- base model: own (its architecture, random weights, with num_hidden_layers=3)" in body
    assert "- teacher: none" in body and "None were judged." in body


def test_results_of_a_step_are_read_from_the_records(tmp_path):
    lines = [{"step": 2, "eval/a/b/cross_entropy": 2.0, "loss/task": 3.0}, {"step": 4, "eval/all/exact_match": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert recorded_results(tmp_path, 2) == {"a/b": {"cross_entropy": 2.0}}
    assert recorded_results(tmp_path, 4) == {"all": {"exact_match": 0.5}} and recorded_results(tmp_path, 3) == {}
