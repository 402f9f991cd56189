"""The three kinds of record a row can become, each as text and as token ids.

Tokenizing and batching use only what all kinds have in common: a prompt, any number of responses, and columns.
Columns are the row's other fields; they stay with it up to the batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lit_rlhf.errors import ConfigError

Messages = list[dict[str, Any]]  # chat messages, each with "role" and "content"
Text = str | Messages
Tools = Sequence[Mapping[str, Any]]  # JSON schemas of what a conversation's tool calls may name
Columns = Mapping[str, Any]
Ids = Sequence[int]  # in practice array("i"): 4 bytes per token, where a list takes 36
Decode = Callable[[Ids], str]


class Tokens:
    """Token ids of a record.

    Attributes:
        prompt: Ids of the prompt.
        columns: The row's other fields.
    """

    prompt: Ids
    columns: Columns

    @property
    def responses(self) -> tuple[Ids, ...]:
        """Ids of each response to the prompt."""
        return ()

    def __len__(self) -> int:
        """Tokens of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses), default=0)


@dataclass(frozen=True)
class PairTokens(Tokens):
    """Token ids of a preference pair."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    columns: Columns = field(default_factory=dict)

    @property
    def responses(self) -> tuple[Ids, Ids]:
        """The chosen and the rejected response."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class InstructionTokens(Tokens):
    """Token ids of a prompt and its response."""

    prompt: Ids
    response: Ids
    columns: Columns = field(default_factory=dict)

    @property
    def responses(self) -> tuple[Ids]:
        """The one response."""
        return (self.response,)


@dataclass(frozen=True)
class PromptTokens(Tokens):
    """Token ids of a prompt, and the text they decode to without special tokens."""

    prompt: Ids
    text: str
    columns: Columns


TokensT = TypeVar("TokensT", bound=Tokens)


class Record(ABC, Generic[TokensT]):
    """A parsed row.

    Attributes:
        prompt: The prompt, as text or as chat messages.
        columns: The row's other fields.
        where: Place of the row, as in `Row`.
        tools: Tools for the chat template; None for none.
    """

    prompt: Text
    columns: Columns
    where: str
    tools: Tools | None = None

    @property
    def responses(self) -> tuple[Text, ...]:
        """Each response to the prompt, of the same kind as the prompt: text or chat messages."""
        return ()

    @abstractmethod
    def with_ids(self, ids: Sequence[Ids], columns: Columns, decode: Decode) -> TokensT:
        """The tokenized record.

        Args:
            ids: Token ids of the prompt and of each response, cut to their limits.
            columns: The columns, completed to those of all records.
            decode: Turns ids into text.
        """


@dataclass(frozen=True)
class Pair(Record[PairTokens]):
    """A preference: two responses to one prompt. The three are all strings or all chat messages."""

    prompt: Text
    chosen: Text
    rejected: Text
    where: str
    columns: Columns = field(default_factory=dict)
    tools: Tools | None = None

    @property
    def responses(self) -> tuple[Text, Text]:
        """The chosen and the rejected response."""
        return self.chosen, self.rejected

    def with_ids(self, ids: Sequence[Ids], columns: Columns, decode: Decode) -> PairTokens:
        """The tokenized pair."""
        prompt, chosen, rejected = ids
        return PairTokens(prompt, chosen, rejected, columns)


@dataclass(frozen=True)
class Instruction(Record[InstructionTokens]):
    """A prompt with its response. Both are strings or both are chat messages."""

    prompt: Text
    response: Text
    where: str
    columns: Columns = field(default_factory=dict)
    tools: Tools | None = None

    @property
    def responses(self) -> tuple[Text]:
        """The one response."""
        return (self.response,)

    def with_ids(self, ids: Sequence[Ids], columns: Columns, decode: Decode) -> InstructionTokens:
        """The tokenized instruction."""
        prompt, response = ids
        return InstructionTokens(prompt, response, columns)


@dataclass(frozen=True)
class Prompt(Record[PromptTokens]):
    """A prompt to respond to; reward functions see its columns."""

    prompt: Text
    columns: Columns
    where: str
    tools: Tools | None = None

    def with_ids(self, ids: Sequence[Ids], columns: Columns, decode: Decode) -> PromptTokens:
        """The tokenized prompt, with the text the model sees after the cut."""
        return PromptTokens(ids[0], decode(ids[0]), columns)


@dataclass(frozen=True)
class Ranking:
    """A prompt and any number of responses: what the published formats contain, before it becomes rows of one kind.

    Args:
        prompt: The prompt, as text or as chat messages.
        responses: The responses.
        scores: Score of each response, higher is better; equal scores express no preference, None means no score.
        where: Place of the prompt, as in `Row`.
        columns: Other fields of the prompt, for reward functions.

    Raises:
        ConfigError: There are not as many scores as responses.
    """

    prompt: Text
    responses: Sequence[str]
    scores: Sequence[float | None]
    where: str
    columns: Columns = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.responses) != len(self.scores):
            raise ConfigError(f"{self.where}: {len(self.responses)} responses, but {len(self.scores)} scores")
