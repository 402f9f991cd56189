"""Chat messages to text, by the tokenizer's chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lit_rlhf.data.errors import DataError
from lit_rlhf.data.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str, *, add_generation_prompt: bool = True
) -> str:
    """The text of a conversation.

    Arguments of tool calls that are JSON texts, as in OpenAI's layout, are handed to the template as mappings; if it
    fails on those or prints them as Python does, as texts.

    Args:
        messages: The conversation.
        tokenizer: Its chat template is used.
        where: Place of the row, for errors.
        add_generation_prompt: End with the header of the answer.

    Raises:
        DataError: There is no chat template, or it fails on the messages, whatever it raises.
    """
    if not tokenizer.chat_template:
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
            text = str(tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=add_generation_prompt))
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
        fix="Change the roles, their order or the tool calls to what the template accepts.",
        reason="refused by the chat template",
    ) from error


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
