"""Where a response begins and ends, on tokenizers and templates of the kinds that models ship."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import lit_rlhf
from lit_rlhf.data import (
    DataError,
    Instruction,
    Pair,
    Prompt,
    Row,
    TokenizeOptions,
    answer_end_ids,
    parse_instruction,
    parse_pair,
    parse_prompt,
    tokenize,
)

TINY = Path(lit_rlhf.__file__).parent / "assets" / "tiny"
CHARACTERS = "abcdfghnorstwAT,.:'[]/INS"


def sentencepiece():
    """A tokenizer as that of Llama 2: text begins with a space marker, and bytes stand for unknown characters."""
    words = [
        "▁" + part for word in ("dogs", "and", "The", "cat") for part in (word[:i] for i in range(1, len(word) + 1))
    ]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *CHARACTERS, *"eu", *words]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [(piece[:-1], piece[-1]) for piece in dict.fromkeys(words)]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


LLAMA = sentencepiece()


def split(tokenizer, prompt, response, **options):
    (example,) = tokenize([Instruction(prompt, response, "f:1")], tokenizer, TokenizeOptions(**options))
    return list(example.prompt), list(example.response)


@pytest.mark.parametrize(
    ("prompt", "response", "pieces"),
    [
        ("dogs", ", and", [",", "▁and"]),
        ("Answer:\n", "The", ["T", "h", "e"]),
        ("Answer:", " The", ["▁The"]),
        ("Answer: ", "The", ["T", "h", "e"]),  # the joined text has "▁The", which the prompt's last token begins
        ("do", "gs", ["g", "s"]),
    ],
)
def test_response_has_no_space_that_the_text_has_not(prompt, response, pieces):
    ids, answer = split(LLAMA, prompt, response)
    assert LLAMA.convert_ids_to_tokens(answer) == [*pieces, "</s>"]
    assert LLAMA.decode(ids + answer, skip_special_tokens=True) == prompt + response
    (alone,) = tokenize([Prompt(prompt, {}, "f:1")], LLAMA)
    assert ids == list(alone.prompt)


@settings(max_examples=200, deadline=None)
@given(st.text("ab \n,T", min_size=1, max_size=6), st.text("ab \n,T", min_size=1, max_size=6))
def test_prompt_and_response_decode_to_the_joined_text(prompt, response):
    prompt = "a" + prompt  # the decoder drops one space at the beginning
    ids, answer = split(LLAMA, prompt, response, append_eos=False)
    assert LLAMA.decode(ids + answer, skip_special_tokens=True) == prompt + response


@settings(max_examples=50, deadline=None)
@given(st.text("ab \n,T", min_size=1, max_size=6))
def test_byte_level_tokenizers_read_responses_as_before(response):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert split(tokenizer, "a", response, append_eos=False)[1] == tokenizer(response)["input_ids"]


def chat_tokenizer(template, *special, eos=None):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER_ALWAYS_WRITTEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDS = ("<start_of_turn>", "<end_of_turn>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>", "<s>", "</s>", "<|eos|>")


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "answer"),
    [
        (GEMMA, "<eos>", "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n", "A b<end_of_turn>"),
        (PHI, "<|eos|>", "<|user|>\nQ<|end|>\n<|assistant|>\n", " A b<|end|>"),
        (QWEN3, "<|eos|>", "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
         "<think>\n\n</think>\n\n A b<|im_end|>"),
        (HEADER_ALWAYS_WRITTEN, None, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", " A b<|im_end|>"),
        (LLAMA_2, "</s>", "<s>[INST] Q [/INST]", "  A b </s>"),
        (PLAIN, None, "user: Q\nassistant:", "  A b<|im_end|>"),
    ],
    ids=["gemma", "phi", "qwen3", "header", "llama2", "plain"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Length limits")
def test_answers_begin_and_end_as_the_template_writes_them(template, eos, prompt, answer):
    tokenizer = chat_tokenizer(template, *ENDS, eos=eos)
    question, reply = [{"role": "user", "content": "Q"}], [{"role": "assistant", "content": " A b"}]
    ids, response = split(tokenizer, question, reply)
    assert tokenizer.decode(ids).removeprefix(tokenizer.bos_token if template is GEMMA else "") == prompt
    assert tokenizer.decode(response) == answer
    assert response[-1] in answer_end_ids(tokenizer)
    (alone,) = tokenize([Prompt(question, {}, "f:1")], tokenizer)
    assert list(alone.prompt) == ids
    cut = split(tokenizer, question, reply, max_response_length=len(response) - 1)[1]
    assert cut == [*response[:-2], response[-1]]


@pytest.mark.parametrize("template", [GEMMA, PHI, QWEN3, HEADER_ALWAYS_WRITTEN, LLAMA_2])
def test_chats_on_sentencepiece_have_the_tokens_of_the_whole_conversation(template):
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ENDS], special_tokens=True)
    tokenizer.chat_template = template
    question, reply = [{"role": "user", "content": "The dogs"}], [{"role": "assistant", "content": "and dogs"}]
    prompt, response = split(tokenizer, question, reply, append_eos=False)
    whole = tokenizer.apply_chat_template(question + reply, tokenize=False)
    assert [*prompt, *response] == tokenizer(whole, add_special_tokens=False)["input_ids"][: len(prompt + response)]


REFUSES_PLAIN = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
DROPS_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("template", [REFUSES_PLAIN, DROPS_REASONING])
def test_an_answer_that_cannot_be_cut_out_is_its_content(template):
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    tokenizer = chat_tokenizer(template)
    _, response = split(tokenizer, messages, [{"role": "assistant", "content": "A"}])
    assert tokenizer.decode(response) == "A<|im_end|>"


def test_an_end_written_in_the_answer_is_not_doubled():
    tokenizer = chat_tokenizer(GEMMA, *ENDS, eos="<eos>")
    for end in ("<eos>", "<end_of_turn>"):
        reply = [{"role": "assistant", "content": "A" + end}]
        _, response = split(tokenizer, [{"role": "user", "content": "Q"}], reply)
        assert tokenizer.decode(response) == "A<end_of_turn>"


def test_without_append_eos_answers_have_no_end():
    tokenizer = chat_tokenizer(GEMMA, *ENDS, eos="<eos>")
    reply = [{"role": "assistant", "content": "A"}]
    _, response = split(tokenizer, [{"role": "user", "content": "Q"}], reply, append_eos=False)
    assert tokenizer.decode(response) == "A"


WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("tools", [[TOOL], [{**TOOL, "strict": None}], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_reach_the_template(tools):
    tokenizer = chat_tokenizer(WITH_TOOLS)
    user, good, bad = ([{"role": r, "content": c}] for r, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
    row = Row({"prompt": user, "chosen": good, "rejected": bad, "tools": tools}, "f:1")
    for parse in (parse_pair, parse_instruction, parse_prompt):
        (example,) = tokenize([parse(row)], tokenizer)
        text = tokenizer.decode(list(example.prompt))
        assert text == '{"type": "function", "function": {"name": "f"}}\n<|im_start|>user\nQ<|im_end|>\n' + (
            "<|im_start|>assistant\n"
        )


@pytest.mark.parametrize("tools", ["{", 3, [3], {"a": 1}])
def test_tools_that_are_no_schemas_are_a_bad_row(tools):
    row = Row({"prompt": [{"role": "user", "content": "Q"}], "tools": tools}, "f:1")
    with pytest.raises(DataError, match=r"^f:1: field 'tools' must be a list of objects"):
        parse_prompt(row)
    assert parse_prompt(Row({"prompt": "Q", "tools": tools}, "f:1")).columns["tools"] == tools  # a column of text rows


def test_answers_may_be_tool_calls():
    tokenizer = chat_tokenizer(WITH_TOOLS)
    call = {"role": "assistant", "content": None, "tool_calls": [TOOL]}
    other = {**call, "tool_calls": [{"type": "function", "function": {"name": "g"}}]}
    row = Row({"prompt": [{"role": "user", "content": "Q"}], "chosen": [call], "rejected": [other]}, "f:1")
    pair = parse_pair(row)
    assert isinstance(pair, Pair)
    (example,) = tokenize([pair], tokenizer)
    assert tokenizer.decode(list(example.chosen)) == "<call>f<|im_end|>"
    assert tokenizer.decode(list(example.rejected)) == "<call>g<|im_end|>"
