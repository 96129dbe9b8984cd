"""Rows of every form on their way to tokens: cut, skipped, compared with their text, stored, batched and shown."""

import json

import pytest
from tokenizers import normalizers

from kvds.data.encoding import compare_rows, encode_examples
from kvds.data.example import Example, Segment
from kvds.data.mixture import load_mixture
from kvds.data.ready_rows import ready_rows
from kvds.data.row_display import one_line_of, segment_table, stretches, whole_row
from kvds.data.token_files import TokenFiles, encode_once, rows_identity
from kvds.errors import InputError
from tests.harness import chat_tokenizers as templates
from tests.harness.chat_tokenizers import chat_tokenizer, qwen2_tokenizer, turns
from tests.harness.small_run_data import load

CHAT = [
    {"messages": turns("user: Hi", "assistant: Hello\n you", "user: Why? é", "assistant: So.", reasoning="a\nb")},
    {"messages": turns("system: S", "user: Hm", "assistant: 漢字")},
]


def rows_file(folder, rows: list, name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    (folder / name.replace(".", ".eval.")).write_text(json.dumps(rows[0]))
    return str(folder / name)


def examples_of(folder, rows: list, tokenizer, **how) -> list[Example]:
    return ready_rows(load_mixture([rows_file(folder, rows)], "train").examples, tokenizer, 64, **how).examples


@pytest.fixture(params=["bytes", "qwen2"])
def tokenizer(request):
    return qwen2_tokenizer() if request.param == "qwen2" else chat_tokenizer()


def test_texts_are_cut_to_the_length_and_then_do_not_end(tokenizer):
    words = "word another, third " * 50
    rows = [Example("", "", text, "c", f"f:{i}", form="text") for i, text in enumerate((words, "short", "x" * 500))]
    ready = ready_rows(rows, tokenizer, 40)
    assert ready.cut == 2 and [row.ends for row in ready.examples] == [False, True, False]
    assert words.startswith(ready.examples[0].answer) and words[len(ready.examples[0].answer)] == " "
    corpus = encode_examples(ready.examples, tokenizer, 40)
    assert corpus.too_long == 0 and min(len(corpus.samples[i].input_ids) for i in (0, 2)) > 20
    assert [row.input_ids[-1] == tokenizer.eos_token_id for row in corpus.samples] == [False, True, False]
    assert all(set(row.segment_ids) == {Segment.ANSWER} for row in corpus.samples)
    assert compare_rows(corpus.samples, ready.examples, tokenizer).lossy == 0


def test_conversations_that_cannot_be_written_are_an_error_or_counted(tmp_path):
    rows = [*CHAT, {"messages": turns("user: <|end|>", "assistant: a")}]
    examples = load_mixture([rows_file(tmp_path, rows)], "train").examples
    with pytest.raises(InputError, match=r"^rows.jsonl:3: turn 1 \(user\) holds '<\|end\|>'.*or --on_bad_row skip\)$"):
        ready_rows(examples, chat_tokenizer(), 64)
    ready = ready_rows(examples, chat_tokenizer(), 64, on_bad_row="skip")
    assert len(ready.examples) == 2 and ready.skipped == {"rows.jsonl": 1}


def test_tokens_of_a_conversation_are_compared_with_its_text(tmp_path, tokenizer):
    examples = examples_of(tmp_path, CHAT, tokenizer)
    samples = encode_examples(examples, tokenizer, 999).samples
    assert compare_rows(samples, examples, tokenizer).lossy == 0
    assert compare_rows(samples[::-1], examples[::-1], tokenizer).lossy == 2  # rows that belong to other texts
    narrow = chat_tokenizer()
    narrow.backend_tokenizer.normalizer = normalizers.Replace("é", "")
    samples = encode_examples(examples, narrow, 999).samples
    found = compare_rows(samples, examples, narrow)
    assert (found.lossy, found.lost, found.first) == (1, ("é",), 0)


def test_files_of_tokens_know_rows_of_every_form(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer()
    same = {"prompt": "p", "answer": "a"}, {"prompt": "p", "completion": "a"}
    files, found = TokenFiles(tmp_path / "cache"), []
    for rows in ([same[0]], [same[1]], [{"text": "pa"}], CHAT[1:]):
        for turns_that_count in ("all", "last"):
            examples = examples_of(tmp_path, rows, tokenizer, assistant_turns=turns_that_count)
            first, again = (encode_once(examples, tokenizer, 64, files=files).samples for _ in range(2))
            assert list(first) == list(again)
            found.append(rows_identity(first))
    assert len(list((tmp_path / "cache").iterdir())) == 4 == len(set(found))
    marked = chat_tokenizer(templates.MARKED.replace("<|im_start|>{{", "<|im_start|>the {{"))
    encode_once(examples_of(tmp_path, CHAT[1:], marked), marked, 64, files=files)
    assert len(list((tmp_path / "cache").iterdir())) == 5  # another template is another row


@pytest.mark.parametrize("how", [{}, {"packing": "true"}, {"tokens_per_batch": 512}])
def test_batches_count_what_the_assistant_says_and_nothing_else(tmp_path, how):
    rows = [{"messages": turns(f"user: {i}", "assistant: yes", "user: sure?", f"assistant: {i}!")} for i in range(12)]
    tokenizer = chat_tokenizer()
    name = rows_file(tmp_path, rows)
    data = load(tokenizer, tmp_path, datasets=name, max_length=128, **how)
    assert data.rows == {"rows": 11}  # the held-out one asks what the first asks
    said = []
    for step in range(data.loader.steps_per_epoch):
        for batch in data.loader.step(step):
            labelled = batch.labels[batch.labels >= 0].tolist()
            said += tokenizer.decode(labelled).split("<|im_end|>")[:-1]
            assert (batch.segment_ids[batch.labels >= 0] == Segment.ANSWER).all()
    assert sorted(said) == sorted(["yes"] * 11 + [f"{i}!" for i in range(1, 12)])


def test_a_run_tells_what_it_read(tmp_path, caplog):
    rows = [*CHAT, {"messages": turns("user: <|end|>", "assistant: a")}, {"messages": []}]
    with caplog.at_level("INFO", "kvds"):
        load(chat_tokenizer(), tmp_path, datasets=rows_file(tmp_path, rows), on_bad_row="skip", max_length=256)
    for told in (
        "read as messages (by its columns: messages)", "a row as the model reads it (rows.jsonl:2): [prompt] ",
        "1 malformed rows of", "1 conversations of rows.jsonl that the chat template cannot write were skipped",
    ):  # fmt: skip
        assert told in caplog.text


def test_a_row_is_shown_as_the_model_reads_it(tmp_path):
    tokenizer = chat_tokenizer()
    examples = examples_of(tmp_path, CHAT, tokenizer)
    samples = encode_examples(examples, tokenizer, 999).samples
    parts = stretches(samples[0], tokenizer)
    assert [segment.name for segment, _, _ in parts] == ["PROMPT", "ANSWER", "PROMPT", "RATIONALE", "ANSWER"]
    assert "".join(text for _, text, _ in parts) == examples[0].rendered.text
    plain = whole_row(samples[0], examples, tokenizer, colour=False)
    assert "[rationale 22] <think>\na\nb\n</think>" in plain and "\x1b" not in plain
    coloured = whole_row(samples[0], examples, tokenizer, colour=True)
    assert "\x1b[33m<think>\na\nb\n</think>\n\n\x1b[0m\x1b[32mSo.<|im_end|>\x1b[0m" in coloured
    assert one_line_of(samples[0], examples, tokenizer).isprintable()
    head, line = segment_table(samples[:1], examples).splitlines()
    assert head.split() == ["corpus", "rows", "mean", "longest", "prompt", "rationale", "answer"]
    count = len(samples[0].input_ids)
    assert line.split()[:4] == ["rows", "1", f"{count}.0", str(count)] and line.split()[5] == "22.0"


def test_what_a_terminal_would_obey_is_shown_as_letters(tmp_path):
    tokenizer = chat_tokenizer()
    examples = examples_of(tmp_path, [{"text": "a\x1b[31mb"}], tokenizer)
    samples = encode_examples(examples, tokenizer, 99).samples
    assert "a\\x1b[31mb" in whole_row(samples[0], examples, tokenizer, colour=False)
