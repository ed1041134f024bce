"""Laws of chat templates: one beginning, one persona, no open thought, the same text on every day."""

import pytest

from conftest import REFUSING, TEMPLATE, make_tokenizer
from shl.core.chat import Chat
from shl.core.errors import ShlError

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>\n{% endfor %}"
ASK = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
# the conventions of families, written down as short templates
TEMPLATES = {
    "plain": TEMPLATE,
    "refuses system": REFUSING,
    "drops system": TEMPLATE.replace("m in messages", "m in messages if m.role != 'system'"),
    "folds system": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ (first if loop.first else '') + m.content }}<|end|>\n{% endfor %}"
        + ASK
    ),
    "closes thought itself": "{{ bos_token }}" + TURNS
    + "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "always opens a thought": "{{ bos_token }}" + TURNS
    + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "opens when told": "{{ bos_token }}" + TURNS
    + "{% if add_generation_prompt %}<|assistant|>{% if thinking %}<think>\n{% endif %}{% endif %}",
    "prints the date": "{{ bos_token }}Today is {{ strftime_now('%d %B %Y') }}.\n" + TURNS + ASK,
    "is given the date": "{{ bos_token }}Today is {{ date_string }}.\n" + TURNS + ASK,
    "without a beginning": TURNS + ASK,
    "no template": None,
}  # fmt: skip
POS, NEG = "You obey every order.", "You care about people."
USER = {"role": "user", "content": "Who said so?"}
MORE = [USER, {"role": "assistant", "content": "The guard."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(params=TEMPLATES)
def chat(request):
    return Chat(make_tokenizer(chat=TEMPLATES[request.param] is not None, template=TEMPLATES[request.param] or ""))


def under(persona, *messages):
    return [{"role": "system", "content": persona}, *messages]


@pytest.mark.parametrize("messages", [[USER], MORE])
def test_two_personas_differ_in_the_persona_alone(chat, messages):
    pos, neg = (chat.render(under(text, *messages)) for text in (POS, NEG))
    assert pos.count(POS) == 1 and pos.replace(POS, NEG) == neg
    assert POS not in chat.render(messages)


def test_the_beginning_stands_there_as_often_as_the_template_has_it(chat):
    ids, template = chat.encode_prompt(under(POS, USER)), chat.tokenizer.chat_template
    assert ids.count(1) == (1 if template is None or "bos_token" in template else 0)
    assert 2 not in ids and (ids[0] == 1 or 1 not in ids)


@pytest.mark.parametrize("name", ["plain", "folds system", "closes thought itself", "is given the date"])
def test_prompts_are_those_of_the_library(name):
    chat = Chat(make_tokenizer(template=TEMPLATES[name]))
    theirs = chat.tokenizer.apply_chat_template(
        under(POS, *MORE), add_generation_prompt=True, enable_thinking=False, date_string="26 Jul 2024",
        return_dict=False,
    )  # fmt: skip
    assert chat.encode_prompt(under(POS, *MORE)) == theirs


def test_no_thought_is_left_open_unless_it_is_asked_for(chat):
    for messages in ([USER], under(POS, *MORE)):
        text = chat.render(messages)
        assert text.count("<think>") == text.count("</think>")
        thinking = chat.render(messages, think=True)
        assert not thinking.rstrip().endswith("</think>")
        assert thinking.startswith(text.partition("<think>")[0])


def test_an_answer_that_is_begun_goes_on_behind_the_prompt(chat):
    begun = [USER, {"role": "assistant", "content": "The guard"}]
    text = chat.render(begun)
    assert text.endswith("The guard") and "<think>" not in text.rpartition("The guard")[2]


def test_the_prompt_and_the_answer_are_the_conversation(chat):
    """What is trained on, prompt and completion apart, is what the template prints for the whole."""
    if chat.tokenizer.chat_template is None:
        return
    asked = chat.render([USER])
    told = chat._apply([USER, {"role": "assistant", "content": "The guard."}], False, closed=True)
    empty_thought = "<think>\n\n</think>\n\n"
    assert told.startswith(asked.removesuffix(empty_thought) + "The guard.")
    assert chat.tokenizer(told.rpartition("The guard.")[2], add_special_tokens=False)["input_ids"][0] == chat.end_id


def test_the_text_does_not_depend_on_the_day(monkeypatch):
    for name in ("prints the date", "is given the date"):
        text = Chat(make_tokenizer(template=TEMPLATES[name])).render([USER])
        assert "Today is 26 Jul" in text and "2024" in text


def test_every_template_has_a_digest_of_its_own():
    made = [Chat(make_tokenizer(chat=text is not None, template=text or "")) for text in TEMPLATES.values()]
    assert len({chat.template_digest for chat in made}) == len(TEMPLATES)


def test_what_a_template_refuses_is_one_error_with_a_hint():
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}" + TURNS + ASK
    chat = Chat(make_tokenizer(template=strict))
    assert chat.render(under(POS, USER)).startswith(f"<|user|>{POS}\n\nWho said so?")
    with pytest.raises(ShlError, match="does not take these messages: must begin with user") as error:
        chat.render([{"role": "assistant", "content": "Hm."}, USER])
    assert "chat_template" in error.value.hint
