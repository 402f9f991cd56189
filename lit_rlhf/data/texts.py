"""Records to the texts that are tokenized: chats by their template, control tokens in data as the user wishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.data.chat import ChatTemplate
from lit_rlhf.data.errors import BadRowHandler, DataError
from lit_rlhf.data.records import Messages, Record, Tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ControlTokens = Literal["keep", "escape", "refuse"]
ZERO_WIDTH_SPACE = "\u200b"
SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True)
class RowText:
    """The texts of a record.

    Args:
        prompt: Text of the prompt.
        responses: Text of each response, with what ends it in a chat.
        where: Place of the row.
        chat: The messages the prompt was made of; None if it was text.
        tools: Tools for the chat template.
    """

    prompt: str
    responses: list[str]
    where: str
    chat: Messages | None = None
    tools: Tools | None = None

    @property
    def is_text(self) -> bool:
        """Whether the prompt was text, to which the tokenizer adds its own control tokens."""
        return self.chat is None


class RowTexts:
    """Makes the texts of records, and counts those with control tokens in the data.

    Args:
        tokenizer: Its chat template and control tokens are used.
        control_tokens: See `TokenizeOptions`.
        with_end: Add to responses in chats what ends them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: ControlTokens, with_end: bool) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.policy = control_tokens
        self.with_end = with_end
        self.counted = 0

    def of(self, records: Sequence[Record[Any]], on_bad: BadRowHandler) -> Iterator[RowText | None]:
        """The texts of each record; None where `on_bad` was called with its error and returned."""
        for record in records:
            try:
                yield self._text(record) if isinstance(record.prompt, str) else self._chat(record, record.prompt)
            except DataError as error:
                on_bad(error)
                yield None

    def warn(self) -> None:
        """Issue one warning if control tokens were found in the data and kept."""
        if self.counted:
            rank_zero_warn(
                f"{self.counted} texts in messages and responses hold that of a control token, such as EOS, and are "
                "read as that token. Set control_tokens to 'escape' or 'refuse' to change that."
            )

    def shorter(self, row: RowText, limit: int) -> Iterator[str]:
        """Ever shorter prompts of a chat: without its first turns, then without the beginning of its last question.

        System messages stay, and so does the header of the last turn.

        Args:
            row: The texts of a chat; there are no shorter ones of others.
            limit: Tokens wanted.

        Raises:
            DataError: The chat template fails on what is left.
        """
        if row.chat is None:
            return
        system = row.chat[:1] if row.chat[0]["role"] in SYSTEM_ROLES else []
        questions = [i for i, message in enumerate(row.chat) if message["role"] == "user"]
        for start in questions[1:]:
            yield self.template.prompt([*system, *row.chat[start:]], row.where, row.tools)
        if not questions:
            return
        asked, *later = row.chat[questions[-1] :]
        ids = self._ids(asked["content"])
        text = self.template.prompt([*system, asked, *later], row.where, row.tools)
        keep = len(ids)
        while (beyond := len(self._ids(text)) - limit) > 0 and keep > beyond:
            keep -= beyond
            rest = str(self.tokenizer.decode(ids[-keep:])).lstrip("\ufffd")  # a character may have several tokens
            text = self.template.prompt([*system, {**asked, "content": rest}, *later], row.where, row.tools)
            yield text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _text(self, record: Record[Any]) -> RowText:
        prompt = str(record.prompt)
        bos = str(self.tokenizer.bos_token or "")
        begins = bos if bos and prompt.startswith(bos) else ""
        # Prompts may be chats that were rendered before, so that only the user's wish makes control tokens text.
        if self.policy != "keep":
            prompt = begins + self._checked(prompt.removeprefix(begins), record.where, "prompt")
        responses = []
        for response in map(str, record.responses):
            body, end = self._split_end(response)
            responses.append(self._checked(body, record.where, "response") + end)
        return RowText(prompt, responses, record.where)

    def _chat(self, record: Record[Any], messages: Messages) -> RowText:
        where = record.where

        def check(text: str) -> str:
            return self._checked(text, where, "messages")

        chat: Messages = [_map_texts(message, check) for message in messages]
        tools = _map_texts(record.tools, check) if record.tools else None
        prompt = self.template.prompt(chat, where, tools)
        responses = []
        for response in record.responses:
            assert not isinstance(response, str)
            last = {**response[-1], "content": self._split_end(response[-1]["content"])[0]}
            answer, end = self.template.answer(chat, [_map_texts(last, check)], prompt, where, tools)
            responses.append(answer + (end if self.with_end else ""))
        return RowText(prompt, responses, where, chat, tools)

    def _split_end(self, response: str) -> tuple[str, str]:
        """A response without the EOS, or what ends answers, written at its end; and that."""
        for end in (str(self.tokenizer.eos_token or ""), self.template.end if self.tokenizer.chat_template else ""):
            if end and response.endswith(end):
                return response.removesuffix(end), end
        return response, ""

    def _checked(self, text: str, where: str, field: str) -> str:
        special = self.template.special
        found = special.search(text) if special is not None else None
        if special is None or found is None:
            return text
        if self.policy == "refuse":
            raise DataError(
                f"holds the text of the control token {found[0]!r}",
                where=where,
                field=field,
                fix="Remove it, or set control_tokens to 'escape'.",
                reason="text of a control token",
            )
        if self.policy == "escape":
            return special.sub(lambda token: token[0][0] + ZERO_WIDTH_SPACE + token[0][1:], text)
        self.counted += 1
        return text


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each text in it changed, but for roles."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key == "role" else _map_texts(item, change) for key, item in value.items()}
    return [_map_texts(item, change) for item in value] if isinstance(value, list | tuple) else value
