"""What chat templates make of conversations: the ids are the template's own, and only what an assistant says counts."""

import dataclasses

import pytest

from kvds.data.chat_template import ChatTemplate
from kvds.data.conversation import conversation
from kvds.data.encoding import EncodedSample, encode_examples
from kvds.data.example import Example, Message, Segment
from kvds.data.rows import BadRow
from kvds.errors import InputError
from tests.harness import chat_tokenizers as templates
from tests.harness.chat_tokenizers import chat_tokenizer, qwen2_tokenizer, turns

LONG = turns("system: Be kind.", "user: Hi, you?", "assistant: Fine. 漢字", "user: And\n now?", "assistant: Still  so!")


def example(messages: list[dict], tokenizer, **how) -> Example:
    rendered = ChatTemplate(tokenizer, **how).render(conversation(messages, "messages"))
    return Example("p", "", "a", "c", "f:1", form="messages", rendered=rendered)


def encoded(messages: list[dict], tokenizer, *, steps: bool = False, **how) -> EncodedSample:
    [sample] = encode_examples([example(messages, tokenizer, **how)], tokenizer, 999, reasoning_steps=steps).samples
    return sample


def of_segment(sample: EncodedSample, tokenizer, *wanted: Segment) -> str:
    pairs = zip(sample.input_ids, sample.segment_ids, strict=True)
    return tokenizer.decode([token for token, segment in pairs if segment in wanted])


@pytest.fixture(params=["bytes", "marked", "qwen2"])
def tokenizer(request):
    if request.param == "qwen2":
        return qwen2_tokenizer()
    return chat_tokenizer(templates.MARKED if request.param == "marked" else templates.CHATML)


def test_the_ids_are_those_of_apply_chat_template(tokenizer):
    sample = encoded(LONG, tokenizer)
    whole = tokenizer.apply_chat_template(LONG, tokenize=True)["input_ids"]
    ends = 1 if sample.input_ids[-1] == whole[len(sample.input_ids) - 1] else 2
    own = sample.input_ids if ends == 1 else sample.input_ids[:-1]
    assert list(own) == whole[: len(own)]
    assert tokenizer.decode(whole[len(own) :]) == "\n"  # behind the last turn nothing is to be said
    assert sample.input_ids[-1] == tokenizer.eos_token_id


def test_only_what_the_assistant_says_counts(tokenizer):
    sample = encoded(LONG, tokenizer)
    end = "" if tokenizer.eos_token == "<|im_end|>" else tokenizer.eos_token
    answers = of_segment(sample, tokenizer, Segment.ANSWER)
    assert answers == f"Fine. 漢字<|im_end|>Still  so!<|im_end|>{end}"
    assert "kind" in of_segment(sample, tokenizer, Segment.PROMPT)
    assert not any(said in of_segment(sample, tokenizer, Segment.PROMPT) for said in ("Fine", "Still"))


def test_the_last_turn_alone_counts_where_that_is_asked_for(tokenizer):
    sample = encoded(LONG, tokenizer, turns="last")
    assert of_segment(sample, tokenizer, Segment.ANSWER).startswith("Still  so!<|im_end|>")
    assert sample.input_ids == encoded(LONG, tokenizer).input_ids


def test_marked_turns_are_those_of_the_assistant_mask():
    tokenizer = chat_tokenizer(templates.MARKED)
    sample = encoded(LONG, tokenizer)
    mask = tokenizer.apply_chat_template(
        LONG, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]  # fmt: skip
    assert [segment == Segment.ANSWER for segment in sample.segment_ids] == [
        bool(i) for i in mask[: len(sample.input_ids)]
    ]
    assert sum(mask) == sample.label_count
    assert sample == encoded(LONG, chat_tokenizer(templates.CHATML))  # rendering by prefixes finds the same


@pytest.mark.parametrize("field", ["reasoning_content", "content"])
def test_a_reasoning_trace_is_the_rationale(tokenizer, field):
    last = {"reasoning_content": "One.\nTwo."} if field == "reasoning_content" else {}
    said = "So." if last else "<think>\nOne.\nTwo.\n</think>\n\nSo."
    sample = encoded(turns("user: Why?", f"assistant: {said}", **last), tokenizer, steps=True)
    assert of_segment(sample, tokenizer, Segment.RATIONALE) == "<think>\nOne.\nTwo.\n</think>\n\n"
    assert of_segment(sample, tokenizer, Segment.ANSWER).startswith("So.<|im_end|>")
    assert sample.reasoning_step_count == 4  # a line each
    assert [s > 0 for s in sample.reasoning_step_ids] == [s == Segment.RATIONALE for s in sample.segment_ids]


def test_a_template_that_forgets_is_refused_unless_the_last_turn_alone_counts():
    tokenizer = chat_tokenizer(templates.FORGETFUL)
    long = turns("user: a", "assistant: b", "user: c", "assistant: d", reasoning_content="r")
    with pytest.raises(
        BadRow, match=r"prefix-stable: all up to the end of turn 2 .*--chat_template FILE.*--assistant_turns"
    ):
        encoded(long, tokenizer)
    sample = encoded(long, tokenizer, turns="last")
    assert of_segment(sample, tokenizer, Segment.RATIONALE) == "<think>\nr\n</think>\n\n"
    assert of_segment(sample, tokenizer, Segment.ANSWER) == "d<|im_end|>"
    assert of_segment(encoded(turns("user: a", "assistant: b"), tokenizer), tokenizer, Segment.ANSWER).endswith(
        "b<|im_end|>"
    )


def test_what_ends_a_turn_need_not_end_a_text():
    tokenizer = chat_tokenizer(ends_turns=False)
    sample = encoded(LONG, tokenizer)
    assert tokenizer.decode(sample.input_ids[-2:]) == "<|im_end|><|end|>" and sample.segment_ids[-2:] == (3, 3)


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (templates.WITHOUT_SYSTEM, LONG, "leaves out or changes turn 1 (system): 'Be kind.' is not in what it writes"),
        (templates.WITHOUT_ANSWERS, LONG, "leaves out or changes turn 1 (system)"),
        (templates.REFUSING, LONG, "the chat template refuses it (No system role)"),
        (templates.UNMARKED_TURN, LONG, "marks 1 turns with {% generation %} where the assistant has 2"),
        (templates.BEGINS_THE_TRACE, LONG[1:3], "not prefix-stable: what comes before turn 2 (assistant) is written"),
        (templates.CHATML, turns("user: a<|im_end|>", "assistant: b"), "turn 1 (user) holds '<|im_end|>'"),
        (templates.CHATML, turns("user: a", "assistant: b", reasoning="<|end|>"), "turn 2 (assistant) holds"),
        ("{{ messages[0].content.nothing.at_all }}", LONG, "the chat template refuses it ("),
    ],
)  # fmt: skip
def test_a_conversation_that_cannot_be_written_is_a_bad_row(template, messages, message):
    with pytest.raises(BadRow) as caught:
        encoded(messages, chat_tokenizer(template))
    assert message in str(caught.value)


def test_a_tokenizer_that_cannot_write_conversations_is_refused():
    with pytest.raises(InputError, match="has no chat template, which conversations need; .*--chat_template FILE"):
        ChatTemplate(chat_tokenizer(None))
    with pytest.raises(InputError, match=r"chat template of .*: line 1: .*expected a Jinja template"):
        ChatTemplate(chat_tokenizer("{% for message in messages %}"))


def test_a_turn_of_weight_0_is_read_and_not_learned():
    tokenizer = chat_tokenizer()
    first = [Message("user", "a"), Message("assistant", "b", counted=False)]
    messages = [*first, Message("user", "c"), Message("assistant", "d")]
    rendered = ChatTemplate(tokenizer).render(messages)
    assert [rendered.text[begin:end] for begin, end, _ in rendered.spans] == ["d<|im_end|>"]
    assert rendered == dataclasses.replace(ChatTemplate(tokenizer, "last").render(messages))
