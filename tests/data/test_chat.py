"""Chat templates of the kinds that models ship, on rows as APIs and tables write them."""

import json

import pytest
from data_helpers import make_tokenizer

from lit_rlhf.data import BadRows, DataError, Prompt, Row, parse_prompt, tokenize_prompts
from lit_rlhf.data.chat import ChatTemplate

ITEMS = "{% for key, value in c.function.arguments | items %}{{ key }} {{ value }}{% endfor %}"  # Llama 3.1
JSON = "{{ c.function.arguments | tojson }}"  # Qwen 2.5, Hermes
PRINTED = "{{ c.function.arguments }}"
JOINED = "{{ '' + c.function.arguments }}"  # DeepSeek V3


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def calls(arguments, **more):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


def rendered(template, message):
    """What the template, of a tool call `c`, makes of a conversation with the message in it."""
    calls = "{% for c in m.tool_calls or [] %}" + template + "{% endfor %}"
    tokenizer = tokenizer_with("{% for m in messages %}" + calls + "{% endfor %}")
    messages = [{"role": "user", "content": "a"}, message, {"role": "tool", "content": "b"}]
    return ChatTemplate(tokenizer).prompt(parse_prompt(Row({"prompt": messages}, "f.jsonl:3")).prompt, "f.jsonl:3")


@pytest.mark.parametrize(
    ("template", "text"),
    [(ITEMS, "city Oslo"), (JSON, '{"city": "Oslo"}'), (PRINTED, '{"city": "Oslo"}'), (JOINED, '{"city": "Oslo"}')],
)
def test_arguments_as_json_text_reach_every_kind_of_template_as_it_wants_them(template, text):
    assert rendered(template, calls(json.dumps({"city": "Oslo"}))) == text


@pytest.mark.parametrize("template", [ITEMS, JSON])
def test_arguments_as_mappings_stay_so(template):
    assert "Oslo" in rendered(template, calls({"city": "Oslo"}))


def test_messages_may_hold_the_nulls_of_tables_and_apis():
    assert rendered(ITEMS, calls('{"a": 1}', content=None, name=None)) == "a 1"
    row = Row({"prompt": [{"role": "user", "content": "a", "tool_calls": None}]}, "f.jsonl:3")
    assert parse_prompt(row).prompt == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{% for c in messages[0].calls %}{{ c }}{% endfor %}{{ messages[0].calls.x.y }}", "UndefinedError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ 1 // (messages | length - 1) }}", "ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "TemplateError"),
    ],
)
def test_whatever_a_template_raises_belongs_to_its_row(template, error):
    tokenizer = tokenizer_with("{% if messages[0].content == 'b' %}" + template + "{% endif %}a")
    rows = [Prompt([{"role": "user", "content": text}], {}, f"f:{line}") for line, text in enumerate("abc", start=1)]
    with pytest.raises(DataError, match=f"^f:2: field 'prompt' is refused.*{error}"):
        tokenize_prompts(rows, tokenizer)
    bad = BadRows("skip")
    assert len(tokenize_prompts(rows, tokenizer, on_bad=bad)) == 2
    assert bad.counts == {"refused by the chat template": 1}
