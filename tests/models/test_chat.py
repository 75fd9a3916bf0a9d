"""Chat templates get the messages as they were sent, in the form that they read."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from labkit.models.chat import as_chat, check_variables, text_of
from labkit.models.load import load_model

FROM_TEXT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }};{% endfor %}"
FROM_PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}<{{ part['text'] }}>{% endif %}{% endfor %};{% endfor %}"
)
FIRST_PART = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }};{% endfor %}"
FROM_BOTH = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{{ m['content'] | map(attribute='text') | join('+') }}{% endif %};{% endfor %}"
)
WITH_NAMES = "{% for m in messages %}{{ m['name'] or m['role'] }}: {{ m['content'] }};{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m['content'] is not string %}{{ raise_exception('text alone') }}{% endif %}"
    "[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
)
WITH_SYSTEM = (  # Llama 2's kind: adds a string to a string
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + ';' }}{% endfor %}"
)

TALK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi there"}]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
    {"role": "user", "content": "hi there"},
]


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model("tiny-random", say=None).tokenizer


def written(loaded: Any, template: str, messages: Any) -> str:
    tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template = template
    before = copy.deepcopy(messages)
    ids = as_chat(tokenizer, messages)
    assert messages == before
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("template", "of_text", "of_parts"),
    [
        (FROM_TEXT, "[system]be brief;[user]hi there;", "[system]be brief;[user]hi there;"),
        (FROM_PARTS, "[system]<be brief>;[user]<hi there>;", "[system]<be ><brief>;[user]<hi there>;"),
        (FIRST_PART, "[system]be brief;[user]hi there;", "[system]be brief;[user]hi there;"),
        (FROM_BOTH, "[system]be brief;[user]hi there;", "[system]be +brief;[user]hi there;"),
        (STRICT, "[system]be brief;[user]hi there;", "[system]be brief;[user]hi there;"),
        (WITH_SYSTEM, "[system]be brief;[user]hi there;", "[system]be brief;[user]hi there;"),
    ],
    ids=["text", "parts", "the first part", "both", "text alone", "sum of strings"],
)
def test_contents_come_in_the_form_that_the_template_reads(
    loaded: Any, template: str, of_text: str, of_parts: str
) -> None:
    assert written(loaded, template, TALK) == of_text
    assert written(loaded, template, PARTS) == of_parts


def test_names_reach_the_template(loaded: Any) -> None:
    talk = [{"role": "user", "name": "Ada", "content": "hi"}, {"role": "user", "content": "hello"}]
    assert written(loaded, WITH_NAMES, talk) == "Ada: hi;user: hello;"


def test_without_a_template_there_are_paragraphs() -> None:
    assert as_chat(object(), PARTS) == "be brief\n\nhi there"
    assert [text_of(message) for message in PARTS] == ["be brief", "hi there"]


def test_a_conversation_ends_where_one_says(loaded: Any) -> None:
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    text = {key: loaded.decode(as_chat(loaded, talk, **options)) for key, options in {
        "begun": {},
        "ended": {"add_generation_prompt": False},
        "open": {"continue_final_message": True},
    }.items()}  # fmt: skip
    assert text["open"].endswith("two") and text["ended"].startswith(text["open"])
    assert text["begun"].startswith(text["ended"]) and len(text["begun"]) > len(text["ended"])


@pytest.mark.parametrize("name", ["colour", "mo", "tokenize", "messages", "chat_template", "mood["])
def test_variables_that_a_template_does_not_read_are_refused(loaded: Any, name: str) -> None:
    tokenizer = copy.deepcopy(loaded)
    tokenizer.chat_template = "{{ mood }}{{ messages[0]['content'] }}"
    check_variables(tokenizer, {"mood": "calm"})
    with pytest.raises(ValueError, match="chat_template_kwargs: the model's chat template has no variable"):
        check_variables(tokenizer, {"mood": "calm", name: 1})
    with pytest.raises(ValueError, match="no variable 'mood'"):
        check_variables(object(), {"mood": "calm"})
