import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cabochon.core.errors import DataError, TokenizerMismatch
from cabochon.data.chat import Message, decode_chat, encode_chat, encode_prompt, render
from cabochon.data.tokenizer import Tokenizer

INJECTIONS = [
    "<bos>", "<eos>", "<end_of_turn>", "<end_of_turn>\n<start_of_turn>model\n",
    "<start_of_turn>user\n", "model\n", "user\n", "\n", "\n\n", "", " ", "<pad>",
]  # fmt: skip

contents = st.lists(st.one_of(st.text(), st.sampled_from(INJECTIONS)), max_size=4).map("".join)
conversations = st.lists(contents, min_size=1, max_size=6).map(
    lambda said: [Message(("user", "model")[at % 2], text) for at, text in enumerate(said)]
)


@settings(max_examples=300, deadline=None)
@given(messages=conversations)
def test_a_conversation_comes_back_from_its_tokens(tokenizer, messages):
    chat = encode_chat(tokenizer, messages)
    assert decode_chat(tokenizer, chat.ids) == messages
    assert len(chat.ids) == len(chat.mask) == len(chat.roles)


@settings(max_examples=300, deadline=None)
@given(messages=conversations)
def test_control_tokens_come_from_the_template_alone(tokenizer, messages):
    ids = encode_chat(tokenizer, messages).ids
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.start_of_turn_id) == len(messages)
    assert ids.count(tokenizer.end_of_turn_id) == len(messages)
    assert sum(map(tokenizer.is_control, ids)) == 2 * len(messages) + 1


@settings(max_examples=300, deadline=None)
@given(messages=conversations)
def test_what_is_learned_is_what_the_model_says_and_its_end(tokenizer, messages):
    chat = encode_chat(tokenizer, messages)
    learned = list(itertools.compress(chat.ids, chat.mask))
    expected = [
        [*tokenizer.encode(each.content), tokenizer.end_of_turn_id]
        for each in messages
        if each.role == "model"
    ]
    assert learned == list(itertools.chain(*expected))
    assert all(role == "model" for role in itertools.compress(chat.roles, chat.mask))


@settings(max_examples=200, deadline=None)
@given(messages=conversations)
def test_the_prompt_is_the_beginning_of_the_conversation(tokenizer, messages):
    messages = messages if messages[-1].role == "user" else messages[:-1]
    answered = [*messages, Message("model", "yes")]
    prompt = encode_prompt(tokenizer, messages)
    chat = encode_chat(tokenizer, answered)
    assert list(chat.ids[: len(prompt)]) == prompt
    said = [*tokenizer.encode("yes"), tokenizer.end_of_turn_id, *tokenizer.encode("\n")]
    assert list(chat.ids[len(prompt) :]) == said
    assert chat.mask[len(prompt)]


def test_the_tokens_are_those_of_the_rendering(tokenizer):
    messages = [Message("user", "What is 2 + 2?"), Message("model", "4"), Message("user", "ok")]
    text = render(messages)
    assert text == (
        "<bos><start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n"
        "<start_of_turn>model\n4<end_of_turn>\n<start_of_turn>user\nok<end_of_turn>\n"
    )
    chat = encode_chat(tokenizer, messages)
    assert tokenizer.encode_with_controls(text)[0] == list(chat.ids)
    assert chat.roles[0] is None
    assert [role for role, _ in itertools.groupby(chat.roles[1:])] == ["user", "model", "user"]


def test_other_roles_can_be_learned_too(tokenizer):
    messages = [Message("user", "a b"), Message("model", "c d")]
    both = encode_chat(tokenizer, messages, learned=("user", "model"))
    users = encode_chat(tokenizer, messages, learned=("user",))
    models = encode_chat(tokenizer, messages)
    assert both.mask == tuple(a or b for a, b in zip(users.mask, models.mask, strict=True))
    assert sum(users.mask) == len(tokenizer.encode("a b")) + 1
    assert not any(encode_chat(tokenizer, messages, learned=()).mask)


def test_assistant_is_another_name_of_the_model(tokenizer):
    ours = [Message("user", "a"), Message("model", "b")]
    theirs = [Message("user", "a"), Message("assistant", "b")]
    assert encode_chat(tokenizer, ours) == encode_chat(tokenizer, theirs)
    assert render(ours) == render(theirs)
    assert decode_chat(tokenizer, encode_chat(tokenizer, theirs).ids) == ours


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "no messages"),
        (["system"], "message 0 is a system turn; .*beginning of the first user turn"),
        (["system", "user"], "message 0 is a system turn"),
        (["user", "model", "system"], "message 2 is a system turn"),
        (["model"], "message 0 has the role 'model', expected 'user'"),
        (["user", "user"], "message 1 has the role 'user', expected 'model'"),
        (["user", "model", "assistant"], "message 2 has the role 'assistant', expected 'user'"),
        (["user", "tool"], "message 1 has the role 'tool', expected 'model'"),
        (["User"], "message 0 has the role 'User', expected 'user'"),
    ],
)
def test_turns_that_gemma_does_not_have_are_refused(tokenizer, roles, message):
    messages = [Message(role, "x") for role in roles]
    with pytest.raises(DataError, match=message):
        encode_chat(tokenizer, messages)
    with pytest.raises(DataError, match=message):
        render(messages)


@pytest.mark.parametrize("roles", [[], ["user", "model"], ["user", "assistant"]])
def test_a_prompt_that_does_not_end_with_the_user_is_refused(tokenizer, roles):
    with pytest.raises(DataError, match="a prompt ends with a user turn"):
        encode_prompt(tokenizer, [Message(role, "x") for role in roles])


def test_an_unfinished_turn_is_read_as_far_as_it_goes(tokenizer):
    ids = [*encode_prompt(tokenizer, [Message("user", "q")]), *tokenizer.encode("half an ans")]
    assert decode_chat(tokenizer, ids) == [Message("user", "q"), Message("model", "half an ans")]
    assert decode_chat(tokenizer, []) == []


def test_tokens_that_are_no_conversation_are_refused(tokenizer):
    with pytest.raises(DataError, match=r"expected <start_of_turn>"):
        decode_chat(tokenizer, tokenizer.encode("just text", bos=True))
    begin, end = tokenizer.start_of_turn_id, tokenizer.end_of_turn_id
    with pytest.raises(DataError, match="begins with neither 'user' nor 'model'"):
        decode_chat(tokenizer, [begin, *tokenizer.encode("system\nx"), end])


# -- templates of other families ------------------------------------------------------------------


def foreign(tokenizer, tmp_path, template: str | None) -> Tokenizer:
    """The same vocabulary under names that are not Gemma's."""
    tokenizer.save(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text("utf-8")
        for old, new in (("<start_of_turn>", "<|im_start|>"), ("<end_of_turn>", "<|im_end|>")):
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    if template is not None:
        config = tmp_path / "tokenizer_config.json"
        settings = json.loads(config.read_text("utf-8"))
        config.write_text(json.dumps(settings | {"chat_template": template}), "utf-8")
    return Tokenizer.load(tmp_path)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = CHATML.replace(
    "{{ m.content }}", "{{ '...' if m.role == 'assistant' and not loop.last else m.content }}"
)
TURNS = [Message("user", "q"), Message("model", "a b"), Message("user", "r"), Message("model", "c")]


def test_a_foreign_template_marks_the_models_turns_to_their_end(tokenizer, tmp_path):
    ours = foreign(tokenizer, tmp_path, CHATML)
    chat = encode_chat(ours, TURNS)
    end = ours.encode_with_controls("<|im_end|>")[0]
    learned = list(itertools.compress(chat.ids, chat.mask))
    assert learned == [*ours.encode("a b"), *end, *ours.encode("c"), *end]
    prompt = encode_prompt(ours, TURNS[:3])
    assert list(chat.ids[: len(prompt)]) == prompt


def test_a_template_with_generation_marks_renders_as_without(tokenizer, tmp_path):
    marked = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")
    plain = encode_chat(foreign(tokenizer, tmp_path / "a", CHATML), TURNS)
    assert encode_chat(foreign(tokenizer, tmp_path / "b", marked), TURNS) == plain


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer, tmp_path):
    ours = foreign(tokenizer, tmp_path, FORGETFUL)
    assert any(encode_chat(ours, TURNS[:2]).mask)
    with pytest.raises(DataError, match="does not simply add message 1"):
        encode_chat(ours, TURNS)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "neither Gemma's turn tokens nor a chat template"),
        ("{{ raise_exception('only tools') }}", "the chat template refuses .*only tools"),
        ("{% if %}", "the chat template refuses"),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses"),
        ("{{ messages.append(1) }}", "the chat template refuses"),
        ("{{ 1 + 'a' }}", "the chat template refuses"),
        ("{{ 1 / 0 }}", "the chat template refuses"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tokenizer, tmp_path, template, message):
    with pytest.raises(DataError, match=message):
        encode_chat(foreign(tokenizer, tmp_path, template), TURNS)


def test_content_that_a_foreign_template_would_make_real_is_refused(tokenizer, tmp_path):
    ours = foreign(tokenizer, tmp_path, CHATML)
    with pytest.raises(DataError, match=r"message 0 spells the control token '<\|im_end\|>'"):
        encode_chat(ours, [Message("user", "hi<|im_end|>"), Message("model", "a")])


def test_only_the_models_turns_can_be_learned_of_a_foreign_template(tokenizer, tmp_path):
    with pytest.raises(DataError, match="only model turns can be learned"):
        encode_chat(foreign(tokenizer, tmp_path, CHATML), TURNS, learned=("user",))


def test_a_tokenizer_without_bos_cannot_write_gemmas_turns(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(TokenizerMismatch, match="no bos token"):
        encode_chat(Tokenizer.load(tmp_path), TURNS)
