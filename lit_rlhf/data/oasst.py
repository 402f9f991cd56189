"""OpenAssistant conversations to rankings, from nested message trees or from flat message rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from lit_rlhf.data.errors import BadRowHandler, DataError, Notes, parsed
from lit_rlhf.data.fields import Key, bad_field, flag_at, list_at, number_at, text_at, value_at
from lit_rlhf.data.records import Messages, Ranking
from lit_rlhf.data.sources import Row

READY = "ready_for_export"
CHAT_ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass
class _Message:
    """A message: its place (the row and the path in it), and its replies."""

    row: Row
    path: tuple[Key, ...] = ()
    replies: list[_Message] = field(default_factory=list)

    def thread(self) -> Iterator[_Message]:
        """The message and all replies below it."""
        pending = [self]
        for message in pending:
            pending.extend(message.replies)
        return iter(pending)

    def size(self) -> int:
        return sum(1 for _ in self.thread())


def oasst(rows: Iterable[Row], on_bad: BadRowHandler, notes: Notes) -> Iterator[Ranking]:
    """A ranking of each prompter's message, its prompt being the conversation up to it as chat messages.

    Rank 0 is the best reply; replies without a rank have no score. Flat rows may come in any order and are all read
    before the first ranking. Left out and noted: trees in a state other than ready_for_export, and messages
    that are deleted or rejected in review, with the replies below them. The replies below a bad message are lost too.
    """
    flat: list[Row] = []

    def trees() -> Iterator[Row]:
        for row in rows:
            if "message_id" in row.data:
                flat.append(row)
            else:
                yield row

    for root in chain(parsed(trees(), _tree, on_bad), _roots(flat, on_bad, notes)):
        yield from _rankings(root, on_bad, notes)


def _tree(row: Row) -> _Message:
    """The root of a tree row."""
    if value_at(row, "prompt") is None:
        raise bad_field(row, ("prompt",), "is missing, and so is 'message_id' of a single message", "missing field")
    root = _Message(row, ("prompt",))
    pending = [root]
    for message in pending:
        path = (*message.path, "replies")
        if value_at(row, *path) is not None:
            message.replies = [_Message(row, (*path, index)) for index in range(len(list_at(row, *path)))]
            pending.extend(message.replies)
    return root


def _roots(rows: list[Row], on_bad: BadRowHandler, notes: Notes) -> Iterator[_Message]:
    """The roots of flat message rows, in their order."""
    messages: dict[str, _Message] = {}

    def new_name(row: Row) -> tuple[str, Row]:
        name = text_at(row, "message_id")
        if name in messages:
            raise bad_field(row, ("message_id",), f"repeats that of {messages[name].row.where}", "repeated field")
        return name, row

    for name, row in parsed(rows, new_name, on_bad):
        messages[name] = _Message(row)
    roots: list[_Message] = []
    lost: list[_Message] = []
    for message in messages.values():
        try:
            parent = _parent(message, messages)
        except DataError as error:
            lost.append(message)
            on_bad(error)
        else:
            (roots if parent is None else parent.replies).append(message)
    below = {id(reply) for root in lost for reply in root.thread()}
    notes["replies below a bad message"] += len(below) - len(lost)
    reached = below | {id(reply) for root in roots for reply in root.thread()}
    for message in messages.values():
        if id(message) not in reached:
            on_bad(bad_field(message.row, ("parent_id",), "leads into a cycle of messages", "cycle in field"))
    yield from roots


def _parent(message: _Message, messages: dict[str, _Message]) -> _Message | None:
    if value_at(message.row, "parent_id") is None:
        return None
    parent = messages.get(text_at(message.row, "parent_id"))
    if parent is None:
        raise bad_field(
            message.row,
            ("parent_id",),
            "does not name a message of the data",
            "unknown message in field",
            fix="Name all files the conversation is spread over, or remove the row.",
        )
    return parent


def _rankings(root: _Message, on_bad: BadRowHandler, notes: Notes) -> Iterator[Ranking]:
    """The rankings of a tree, in the order of its conversations."""
    try:
        # A tree row has the state next to its root; flat rows have it in the root.
        if value_at(root.row, "tree_state") is not None and text_at(root.row, "tree_state") != READY:
            notes["messages of trees that are not ready for export"] += root.size()
            return
    except DataError as error:
        on_bad(error)
        return
    conversations: list[tuple[_Message, Messages]] = [(root, [])]
    while conversations:
        message, before = conversations.pop()
        asked = _read(message, "prompter", on_bad, notes)
        if asked is None:
            continue
        prompt = [*before, _turn("prompter", asked[0])]
        replies = [(reply, _read(reply, "assistant", on_bad, notes)) for reply in message.replies]
        kept = [(reply, *read) for reply, read in replies if read is not None]
        columns = {name: value_at(message.row, *message.path, name) for name in ("message_id", "lang")}
        texts, scores = [text for _, text, _ in kept], [score for _, _, score in kept]
        yield Ranking(prompt, texts, scores, message.row.where, columns)
        following = [(later, [*prompt, _turn("assistant", text)]) for reply, text, _ in kept for later in reply.replies]
        conversations.extend(reversed(following))


def _read(message: _Message, role: str, on_bad: BadRowHandler, notes: Notes) -> tuple[str, float | None] | None:
    """Text and score of a message, or None if it is left out."""
    row, path = message.row, message.path
    try:
        if flag_at(row, *path, "deleted") or flag_at(row, *path, "review_result") is False:
            notes["messages deleted or rejected in review, and the replies below them"] += message.size()
            return None
        found = text_at(row, *path, "role")
        if found != role:
            problem = f"must be {role!r} here, as roles alternate, not {found!r}"
            raise bad_field(row, (*path, "role"), problem, "wrong order of field")
        rank = (*path, "rank")
        is_ranked = role == "assistant" and value_at(row, *rank) is not None
        return text_at(row, *path, "text"), -number_at(row, *rank) if is_ranked else None
    except DataError as error:
        notes["replies below a bad message"] += message.size() - 1
        on_bad(error)
        return None


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": CHAT_ROLES[role], "content": text}
