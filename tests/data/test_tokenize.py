import pytest
from data_helpers import make_tokenizer

from lit_rlhf.data import (
    BadRows,
    DataError,
    Instruction,
    Pair,
    Prompt,
    TokenizeOptions,
    collate,
    pad_token_id,
    tokenize,
    tokenize_instructions,
    tokenize_pairs,
    tokenize_prompts,
)

BOS, EOS, UNK, USER, ASSISTANT = 1, 2, 3, 4, 5
A, B, C, D, E = 6, 7, 8, 9, 10


def instruction(prompt, response):
    return Instruction(prompt, response, "f:1")


def one(tokenizer, prompt="a b", response="c d e", on_bad=None, **options):
    """(prompt ids, response ids) of one instruction, or None if it is left out."""
    rows = [instruction(prompt, response)]
    result = tokenize_instructions(rows, tokenizer, TokenizeOptions(**options))
    return (list(result[0].prompt), list(result[0].response)) if result else None


def test_text_gets_bos_and_the_response_eos(tokenizer):
    assert one(tokenizer) == ([BOS, A, B], [C, D, E, EOS])
    assert one(tokenizer, append_eos=False) == ([BOS, A, B], [C, D, E])


def test_prompt_is_not_closed_by_a_tokenizer_that_appends_eos():
    assert one(make_tokenizer(close_with_eos=True)) == ([BOS, A, B], [C, D, E, EOS])


def test_eos_already_written_is_not_doubled(tokenizer):
    assert one(tokenizer, response="c <eos>")[1] == [C, EOS]


def test_bos_already_written_is_not_doubled(tokenizer):
    assert one(tokenizer, "<bos> a")[0] == [BOS, A]
    (prompt,) = tokenize_prompts([Prompt("<bos> a", {}, "f:1")], tokenizer)
    assert list(prompt.prompt) == [BOS, A]


@pytest.mark.parametrize("policy", ["keep", "escape", "refuse"])
def test_bos_at_the_beginning_and_eos_at_the_end_of_text_are_no_accident(tokenizer, policy, recwarn):
    assert one(tokenizer, "<bos> a", "c <eos>", control_tokens=policy) == ([BOS, A], [C, EOS])
    assert not [w for w in recwarn if "control token" in str(w.message)]


def test_control_tokens_in_data_are_counted_escaped_or_refused(tokenizer):
    user, answer = [{"role": "user", "content": "a <assistant> b"}], [{"role": "assistant", "content": "c"}]
    rows = [instruction("a", "b <eos> c"), instruction(user, answer), instruction("a <eos>", "c")]
    with pytest.warns(UserWarning, match="2 texts in messages and responses hold that of a control token"):
        kept = tokenize_instructions(rows, tokenizer)
    assert list(kept[0].response) == [B, EOS, C, EOS]
    escaped = tokenize_instructions(rows, tokenizer, TokenizeOptions(control_tokens="escape"))
    assert [list(e.response).count(EOS) for e in escaped] == [1, 1, 1]
    assert list(escaped[1].prompt).count(ASSISTANT) == 1
    assert EOS not in escaped[2].prompt
    bad = BadRows("skip")
    assert not tokenize_instructions(rows, tokenizer, TokenizeOptions(control_tokens="refuse"), bad)
    assert bad.counts == {"text of a control token": 3}


def test_chat_uses_the_template_once_and_no_second_bos(tokenizer):
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    result = one(tokenizer, chat, [{"role": "assistant", "content": "d"}])
    assert result == ([BOS, USER, A, ASSISTANT, B, USER, C, ASSISTANT], [D, EOS])


def test_order_is_kept_when_text_and_chat_rows_alternate(tokenizer):
    chat = [{"role": "user", "content": "b"}]
    rows = [Prompt("a", {}, "f:1"), Prompt(chat, {}, "f:2"), Prompt("c", {}, "f:3")]
    ids = [list(example.prompt) for example in tokenize_prompts(rows, tokenizer)]
    assert ids == [[BOS, A], [BOS, USER, B, ASSISTANT], [BOS, C]]


def test_many_texts_take_few_tokenizer_calls(tokenizer, monkeypatch):
    calls = []
    real = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
    rows = [instruction("a b", "c")] * 2500
    assert len(tokenize_instructions(rows, tokenizer)) == 2500
    assert len(calls) <= 6


@pytest.mark.parametrize(("limit", "kept"), [(4, [BOS, A, B, C]), (5, [BOS, A, B, C]), (3, [BOS, B, C]), (1, [C])])
@pytest.mark.filterwarnings("ignore:Length limits")
def test_long_prompt_keeps_bos_and_its_end(tokenizer, limit, kept):
    assert one(tokenizer, "a b c", max_prompt_length=limit)[0] == kept


@pytest.mark.parametrize(
    ("limit", "policy", "kept"),
    [
        (4, "keep_eos", [C, D, E, EOS]),
        (3, "keep_eos", [C, D, EOS]),
        (1, "keep_eos", [EOS]),
        (4, "no_eos", [C, D, E, EOS]),
        (3, "no_eos", [C, D, E]),
        (1, "no_eos", [C]),
        (4, "drop", [C, D, E, EOS]),
        (3, "drop", None),
    ],
)
@pytest.mark.filterwarnings("ignore:Length limits")
def test_long_response_keeps_its_beginning(tokenizer, limit, policy, kept):
    result = one(tokenizer, max_response_length=limit, truncated_response=policy)
    assert (result and result[1]) == kept


CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d e a b"},
]


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (12, [BOS, USER, A, B, ASSISTANT, C, USER, D, E, A, B, ASSISTANT]),
        (11, [BOS, USER, D, E, A, B, ASSISTANT]),
        (7, [BOS, USER, D, E, A, B, ASSISTANT]),
        (6, [BOS, USER, E, A, B, ASSISTANT]),
        (4, [BOS, USER, B, ASSISTANT]),
    ],
)
@pytest.mark.filterwarnings("ignore:Length limits")
def test_long_chat_loses_its_first_turns_before_the_beginning_of_the_last(tokenizer, limit, kept):
    (prompt,) = tokenize_prompts([Prompt(CHAT, {}, "f:1")], tokenizer, TokenizeOptions(limit))
    assert list(prompt.prompt) == kept


def test_system_message_of_a_long_chat_stays(tokenizer):
    tokenizer.chat_template = "<bos>{% for m in messages %}{{ {'system': 'f', 'user': 'g'}.get(m.role, 'h') }} " + (
        "{{ m.content }} {% endfor %}{% if add_generation_prompt %}h{% endif %}"
    )
    chat = [{"role": "system", "content": "j"}, *CHAT]
    with pytest.warns(UserWarning, match="1 prompts .* lost their beginning, but for BOS and the last turn's header"):
        (prompt,) = tokenize_prompts([Prompt(chat, {}, "f:1")], tokenizer, TokenizeOptions(8))
    assert prompt.text == "f j g e a b h"


def test_header_that_alone_is_too_long_is_counted(tokenizer):
    with pytest.warns(UserWarning, match="1 of these lost the header too"):
        (prompt,) = tokenize_prompts([Prompt(CHAT, {}, "f:1")], tokenizer, TokenizeOptions(3))
    assert list(prompt.prompt) == [BOS, B, ASSISTANT]


@pytest.mark.filterwarnings("ignore:Length limits")
def test_cut_response_has_no_eos_to_keep_without_append_eos(tokenizer):
    assert one(tokenizer, max_response_length=2, append_eos=False)[1] == [C, D]


def test_one_warning_counts_everything_cut(tokenizer):
    rows = [
        instruction("a b c", "a"),
        instruction("a", "a b c"),
        instruction("a", "a b c d"),
        instruction("a", "b"),
    ]
    with pytest.warns(UserWarning, match="^Length limits") as caught:
        tokenize_instructions(rows, tokenizer, TokenizeOptions(max_prompt_length=3, max_response_length=3))
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "4 rows" in message
    assert "1 prompts longer than max_prompt_length=3" in message
    assert "2 of 4 responses longer than max_response_length=3" in message
    assert "'keep_eos'" in message


def test_nothing_cut_gives_no_warning(tokenizer, recwarn):
    assert one(tokenizer, max_prompt_length=3, max_response_length=4)
    assert not [w for w in recwarn if "Length limits" in str(w.message)]


def test_overlong_prompts_can_be_dropped(tokenizer):
    rows = [instruction("a b c", "a"), instruction("a b", "c")]
    with pytest.warns(UserWarning, match="1 rows were left out, their prompt"):
        kept = tokenize_instructions(rows, tokenizer, TokenizeOptions(3, drop_overlong_prompts=True))
    assert [list(example.prompt) for example in kept] == [[BOS, A, B]]


def test_pairs(tokenizer):
    (pair,) = tokenize_pairs([Pair("a", "b", "c d", "f:1")], tokenizer)
    assert [list(part) for part in (pair.prompt, pair.chosen, pair.rejected)] == [
        [BOS, A],
        [B, EOS],
        [C, D, EOS],
    ]
    assert len(pair) == 5


def test_pairs_that_differ_only_past_the_limit_are_left_out(tokenizer):
    pairs = [Pair("a", "b c d", "b c e", "f:1"), Pair("a", "b", "c", "f:2")]
    with pytest.warns(UserWarning, match="1 pairs were left out, their responses being the same tokens"):
        assert len(tokenize_pairs(pairs, tokenizer, TokenizeOptions(max_response_length=3))) == 1


def test_prompt_text_is_what_the_model_sees_after_the_cut(tokenizer):
    rows = [Prompt("a b c", {"x": 1}, "f:1"), Prompt("d", {"y": [2]}, "f:2")]
    with pytest.warns(UserWarning, match="lost their beginning"):
        first, second = tokenize_prompts(rows, tokenizer, TokenizeOptions(max_prompt_length=2))
    assert (first.text, second.text) == ("c", "d")
    assert (first.columns, second.columns) == ({"x": 1, "y": None}, {"x": None, "y": [2]})


def test_columns_of_any_record_travel_with_it_into_the_batch(tokenizer):
    pairs = [Pair("a", "b", "c", "f:1", {"image": "x.png"}), Pair("a b", "c", "d", "f:2", {"size": 3})]
    batch = collate(tokenize(pairs, tokenizer), pad_id=0)
    assert batch["columns"] == {"image": ["x.png", None], "size": [None, 3]}
    assert len(batch["tokens"]) == 4
    instructions = [Instruction("a", "b", "f:1", {"image": "x.png"})]
    assert collate(tokenize(instructions, tokenizer), pad_id=0)["columns"] == {"image": ["x.png"]}


def test_missing_eos():
    tokenizer = make_tokenizer(eos_token=None)
    with pytest.raises(DataError, match=r"has no EOS token.*append_eos=False"):
        one(tokenizer)
    assert one(tokenizer, append_eos=False)[1] == [C, D, E]


def test_pad_id_falls_back_on_eos():
    assert pad_token_id(make_tokenizer()) == 0
    assert pad_token_id(make_tokenizer(pad_token=None)) == EOS
    with pytest.raises(DataError, match="neither a pad nor an EOS"):
        pad_token_id(make_tokenizer(pad_token=None, eos_token=None))


def chat_pair(role):
    message = {"role": "assistant", "content": "c"}
    return Instruction([{"role": role, "content": "a"}], [message], "f.jsonl:9")


def test_template_refusal_names_the_row_and_can_be_skipped(tokenizer):
    rows = [chat_pair("user"), chat_pair("robot")]
    with pytest.raises(DataError, match=r"f\.jsonl:9: field 'prompt' is refused.*no role robot"):
        tokenize_instructions(rows, tokenizer)
    bad = BadRows("skip")
    assert len(tokenize_instructions(rows, tokenizer, on_bad=bad)) == 1
    assert bad.counts == {"refused by the chat template": 1}


def test_missing_chat_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"f\.jsonl:9.*no chat template"):
        tokenize_instructions([chat_pair("user")], tokenizer)


@pytest.mark.parametrize("name", ["max_prompt_length", "max_response_length"])
def test_lengths_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        TokenizeOptions(**{name: 0})
