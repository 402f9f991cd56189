"""Chat messages to text, by the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lit_rlhf.data.errors import DataError
from lit_rlhf.data.records import Messages, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION: Messages = [{"role": "user", "content": "q"}]
MARK = "lit0rlhf0answer"  # an answer that no template changes


class ChatTemplate:
    """A tokenizer's chat template, and how answers begin and end in it.

    Args:
        tokenizer: The tokenizer; it may have no template, which is an error only once one is needed.

    Attributes:
        special: The texts of all control tokens, as a pattern; None if there are none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.special = special_texts(tokenizer)

    @cached_property
    def _around_answer(self) -> tuple[str, str] | None:
        """What a template that ignores `add_generation_prompt` writes before an answer, and what any writes after it.

        Space before the answer is no header: it belongs to the answer, whose first token may hold it. None for a
        template that refuses even a plain question and answer, or does not write the answer as it is.
        """
        try:
            text = self._apply([*QUESTION, {"role": "assistant", "content": MARK}])
            asked = self._apply(QUESTION, add_generation_prompt=True)
            ignores = asked == self._apply(QUESTION)
        except Exception:  # what it says of a row will be that row's error
            return None
        before, found, after = text.rpartition(MARK)
        if not found:
            return None
        header = before.removeprefix(asked) if ignores and before.startswith(asked) else ""
        return (header.rstrip(" ") if header.strip() else ""), after

    @cached_property
    def end(self) -> str:
        """What ends an answer: up to the first control token behind it; empty if there is none."""
        after = self._around_answer[1] if self._around_answer is not None else ""
        found = self.special.search(after) if self.special is not None else None
        return after[: found.end()] if found else ""

    @cached_property
    def end_id(self) -> int | None:
        """Id of the control token that ends an answer."""
        ids = self.tokenizer.encode(self.end, add_special_tokens=False) if self.end else []
        return ids[-1] if ids else None

    def prompt(self, messages: Messages, where: str, tools: Tools | None = None) -> str:
        """The text of a conversation up to where its answer begins.

        Raises:
            DataError: There is no chat template, or it fails on the messages, whatever it raises.
        """
        header = self._around_answer[0] if self._around_answer is not None else ""
        return self._render(messages, where, tools, add_generation_prompt=True) + header

    def answer(
        self, messages: Messages, answer: Messages, prompt: str, where: str, tools: Tools | None = None
    ) -> tuple[str, str]:
        """The text of an answer, cut out of that of the whole conversation, and what ends it.

        Where the conversation does not begin with the prompt (templates drop the reasoning of earlier turns, say), it
        is the answer's content.

        Args:
            messages: The conversation.
            answer: The answer, one message.
            prompt: The conversation's text, see `prompt`.
            where: Place of the row, for errors.
            tools: The tools the conversation may call.

        Raises:
            DataError: The template fails on the messages, whatever it raises.
        """
        whole = self._render([*messages, *answer], where, tools, add_generation_prompt=False)
        if self._around_answer is not None:
            after = self._around_answer[1]
            if whole.startswith(prompt) and whole.endswith(after) and len(whole) > len(prompt) + len(after):
                return whole[len(prompt) : len(whole) - len(after)], self.end
        return answer[-1]["content"], self.end

    def _render(self, messages: Messages, where: str, tools: Tools | None, *, add_generation_prompt: bool) -> str:
        """The text of messages.

        Arguments of tool calls that are JSON texts, as in OpenAI's layout, are handed to the template as mappings; if
        it fails on those or prints them as Python does, as texts.
        """
        if not self.tokenizer.chat_template:
            raise DataError(
                "holds chat messages, but the tokenizer has no chat template",
                where=where,
                field="prompt",
                fix="Use a chat model's tokenizer, set tokenizer.chat_template, or use text fields.",
                reason="no chat template",
            )
        mappings: list[dict[str, Any]] = []
        mapped = [_with_mappings(message, mappings) for message in messages]
        error: Exception | None = None
        for form in [mapped, messages] if mappings else [messages]:
            try:
                text = self._apply(form, tools, add_generation_prompt)
            except Exception as raised:  # a template is a program: what it raises on a row is that row's error
                error = error or raised
            else:
                if form is messages or not any(str(mapping) in text for mapping in mappings if mapping):
                    return text
        assert error is not None
        raise DataError(
            f"is refused by the tokenizer's chat template ({type(error).__name__}: {error})",
            where=where,
            field="prompt",
            fix="Change the roles, their order, the tools or their calls to what the template accepts.",
            reason="refused by the chat template",
        ) from error

    def _apply(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = False) -> str:
        more: dict[str, Any] = {"tools": tools} if tools else {}
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **more
            )
        )


def answer_end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer by the tokenizer: its EOS, and the control token its chat template ends answers with."""
    end = ChatTemplate(tokenizer).end_id if tokenizer.chat_template else None
    return sorted({token_id for token_id in (tokenizer.eos_token_id, end) if isinstance(token_id, int)})


def special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern of the texts that the tokenizer reads as control tokens, None if there are none."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _with_mappings(message: dict[str, Any], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The message with the arguments of its tool calls as mappings, where they are JSON texts; adds them to `found`."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_mapping(call, found) for call in calls]}


def _with_mapping(call: Any, found: list[dict[str, Any]]) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_mapping(call["function"], found)}
    try:
        values = json.loads(call.get("arguments", ""))
    except (TypeError, ValueError, RecursionError):  # no text, or no JSON: the template may take it as it is
        return call
    if not isinstance(values, dict):
        return call
    found.append(values)
    return {**call, "arguments": values}
