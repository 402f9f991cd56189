"""Stage 2, formats: published rows become rankings, and rankings become rows in column format.

Rows in column format and HH-RLHF transcripts skip this stage.

Field names are those of the publishers: GPT-4-LLM (arXiv:2304.03277, github.com/Instruction-Tuning-with-GPT-4),
OASST1 (arXiv:2304.07327, hub OpenAssistant/oasst1), TL;DR comparisons (arXiv:2009.01325,
github.com/openai/summarize-from-feedback), Stack Exchange (hub HuggingFaceH4/stack-exchange-preferences and
lvwerra/stack-exchange-paired) and SHP (arXiv:2110.08420, hub stanfordnlp/SHP).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from typing import Any, Literal, get_args

from lit_rlhf.data.errors import BadRowHandler, DataError, Notes, parsed
from lit_rlhf.data.fields import bad_field, choice_at, list_at, number_at, text_at, value_at
from lit_rlhf.data.oasst import oasst
from lit_rlhf.data.parsing import Format
from lit_rlhf.data.records import Ranking
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import ConfigError

PublicFormat = Literal["gpt4_llm", "oasst", "tldr", "stack_exchange", "shp"]
RowConverter = Callable[[Row], Iterable[Ranking]]
Converter = Callable[[Iterable[Row], BadRowHandler, Notes], Iterator[Ranking]]
TLDR_PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def each(convert: RowConverter) -> Converter:
    """Converter of a whole source from a function that converts one row.

    A row for which it raises a DataError is bad; a row without rankings is counted in the notes.
    """

    def convert_one(row: Row) -> list[Ranking]:
        try:
            return list(convert(row))
        except Exception as error:
            if not isinstance(error, DataError):
                error.add_note(f"while converting {row.where}")
            raise

    def convert_all(rows: Iterable[Row], on_bad: BadRowHandler, notes: Notes) -> Iterator[Ranking]:
        for rankings in parsed(rows, convert_one, on_bad):
            notes["rows without a ranking"] += not rankings
            yield from rankings

    return convert_all


def gpt4_llm(row: Row) -> list[Ranking]:
    """GPT-4-LLM comparisons: responses with scores (comparision_data_v2.json), or two of them, the better one first."""
    prompt = text_at(row, "user_input")
    if value_at(row, "responses_and_scores") is None and value_at(row, "completion_a") is not None:
        return [_two(row, prompt, text_at(row, "completion_a"), text_at(row, "completion_b"))]
    return [_scored(row, prompt, "responses_and_scores", "response", "score")]


def tldr(row: Row) -> list[Ranking]:
    """Comparisons of "Learning to summarize from human feedback"; those of news articles give no ranking."""
    if value_at(row, "info", "post") is None and value_at(row, "info", "article") is not None:
        return []
    info = {name: text_at(row, "info", name) for name in ("subreddit", "post")}
    info["title"] = text_at(row, "info", "title", may_be_empty=True)
    if (count := len(list_at(row, "summaries"))) != 2:
        raise bad_field(row, ("summaries",), f"must hold two summaries, not {count}", "wrong number of items in field")
    summaries = [text_at(row, "summaries", index, "text") for index in range(2)]
    better = choice_at(row, "choice")
    columns = {"id": value_at(row, "info", "id"), **info}
    return [_two(row, TLDR_PROMPT.format(**info), summaries[better], summaries[1 - better], columns)]


def stack_exchange(row: Row) -> list[Ranking]:
    """Stack Exchange answers: all of a question with scores, or two of them, response_j being the better one."""
    prompt = text_at(row, "question")
    columns = _some(row, "qid", "date", "metadata")
    if {"response_j", "response_k"} & set(row.data):
        return [_two(row, prompt, text_at(row, "response_j"), text_at(row, "response_k"), columns)]
    return [_scored(row, prompt, "answers", "text", "pm_score", columns)]


def shp(row: Row) -> list[Ranking]:
    """Stanford Human Preferences: two comments on a post; `score_ratio` says how far apart they are."""
    prompt = text_at(row, "history")
    comments = [text_at(row, name) for name in ("human_ref_B", "human_ref_A")]
    better = choice_at(row, "labels")  # 1: A
    ratio = number_at(row, "score_ratio") if value_at(row, "score_ratio") is not None else 1.0
    if ratio <= 0:
        raise bad_field(row, ("score_ratio",), f"must be positive, not {ratio:g}", "number out of range of field")
    columns = _some(row, "post_id", "domain", "upvote_ratio")
    return [_two(row, prompt, comments[better], comments[1 - better], columns, ratio)]


FORMATS: dict[PublicFormat, Converter] = {
    "gpt4_llm": each(gpt4_llm),
    "oasst": oasst,
    "tldr": each(tldr),
    "stack_exchange": each(stack_exchange),
    "shp": each(shp),
}


def find_converter(format: Format | PublicFormat | RowConverter) -> Converter | None:
    """The converter of a format, None for the formats whose rows are parsed as they are.

    Raises:
        ConfigError: There is no such format.
    """
    if callable(format):
        return each(format)
    if format in get_args(Format):
        return None
    if format not in FORMATS:
        known = ", ".join([*get_args(Format), *FORMATS])
        raise ConfigError(f"format must be one of {known}, or a function from a row to its rankings, not {format!r}")
    return FORMATS[format]


def converted_rows(
    rows: Iterable[Row],
    format: Format | PublicFormat | RowConverter,
    expand: Callable[[Iterable[Ranking], Notes], Iterable[Row]],
    on_bad: BadRowHandler,
) -> Iterator[Row]:
    """Turn rows of another format into rows in column format; warn of how many things were left out.

    Args:
        rows: The rows as published.
        format: Their format; rows of "auto", "columns" and "hh" stay as they are.
        expand: `pair_rows`, `instruction_rows` or `prompt_rows`.
        on_bad: Called with the error of each bad row; when it returns, the row is left out.

    Raises:
        ConfigError: There is no such format.
    """
    convert = find_converter(format)
    if convert is None:
        yield from rows
        return
    notes = Notes()
    yield from expand(convert(rows, on_bad, notes), notes)
    notes.warn(getattr(format, "__qualname__", str(format)))


def pair_rows(rankings: Iterable[Ranking], notes: Notes, per_prompt: int | None = None) -> Iterator[Row]:
    """A row for every two responses with different scores.

    Args:
        rankings: The rankings; several of them may have one prompt.
        notes: Takes the counts of rankings and pairs that are left out.
        per_prompt: Keep at most this many pairs per prompt, those with the largest difference in scores; None for all.

    Returns:
        Rows of `prompt`, `chosen` and `rejected`, prompt by prompt if `per_prompt` is set.
    """
    pairs = (pair for ranking in rankings for pair in _pairs(ranking, notes))
    if per_prompt is None:
        yield from (row for _, row in pairs)
        return
    groups: dict[str, list[tuple[float, Row]]] = {}
    for margin, row in pairs:
        groups.setdefault(json.dumps(row.data["prompt"]), []).append((margin, row))
    for group in groups.values():
        group.sort(key=lambda pair: -pair[0])  # stable: of equal margins the first in the file
        yield from (row for _, row in group[:per_prompt])
        notes[f"pairs beyond pairs_per_prompt={per_prompt}"] += max(0, len(group) - per_prompt)


def instruction_rows(rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
    """A row for each prompt with its best response, at the place of its first occurrence.

    The best response has the most won minus lost comparisons over all rankings of its prompt; of equals it is the
    first.

    Returns:
        Rows of `prompt` and `response`.
    """
    first: dict[str, Ranking] = {}
    wins: dict[str, Counter[str]] = {}
    for ranking in rankings:
        if not ranking.responses:
            notes["prompts without a response"] += 1
            continue
        key = json.dumps(ranking.prompt)
        notes["repetitions of a prompt, after choosing its best response"] += key in first
        first.setdefault(key, ranking)
        table = wins.setdefault(key, Counter())
        for text, score in zip(ranking.responses, ranking.scores, strict=True):
            table[text] += sum(_sign(score, other) for other in ranking.scores)
    for key, ranking in first.items():
        best = max(wins[key], key=wins[key].__getitem__)
        yield Row({"prompt": ranking.prompt, "response": best}, ranking.where)


def prompt_rows(rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
    """A row for each prompt, once, at the place of its first occurrence, with or without responses.

    Returns:
        Rows of `prompt` and the ranking's columns.
    """
    seen: set[str] = set()
    for ranking in rankings:
        key = json.dumps(ranking.prompt)
        if key in seen:
            notes["repetitions of a prompt"] += 1
            continue
        seen.add(key)
        yield Row({**ranking.columns, "prompt": ranking.prompt}, ranking.where)


def _two(
    row: Row, prompt: str, better: str, worse: str, columns: dict[str, Any] | None = None, margin: float = 1.0
) -> Ranking:
    return Ranking(prompt, [better, worse], [margin, 0.0], row.where, columns or {})


def _scored(row: Row, prompt: str, items: str, text: str, score: str, columns: dict[str, Any] | None = None) -> Ranking:
    indices = range(len(list_at(row, items)))
    responses = [text_at(row, items, index, text) for index in indices]
    scores = [number_at(row, items, index, score) for index in indices]
    return Ranking(prompt, responses, scores, row.where, columns or {})


def _some(row: Row, *names: str) -> dict[str, Any]:
    return {name: row.data[name] for name in names if name in row.data}


def _pairs(ranking: Ranking, notes: Notes) -> Iterator[tuple[float, Row]]:
    """The pairs of a ranking, the best responses first, each with its difference of scores."""
    scored = zip(ranking.scores, ranking.responses, strict=True)
    ranked = sorted(((score, text) for score, text in scored if score is not None), key=lambda item: -item[0])
    if len(ranking.responses) < 2:
        notes["prompts with fewer than two responses"] += 1
        return
    notes["responses without a rank"] += len(ranking.responses) - len(ranked)
    if len(ranked) < 2:
        notes["prompts with fewer than two ranked responses"] += 1
        return
    if ranked[0][0] == ranked[-1][0]:
        notes["prompts whose responses all tie"] += 1
        return
    for (high, chosen), (low, rejected) in combinations(ranked, 2):
        if high == low:
            continue
        if chosen == rejected:
            notes["pairs whose two responses are the same"] += 1
            continue
        yield high - low, Row({"prompt": ranking.prompt, "chosen": chosen, "rejected": rejected}, ranking.where)


def _sign(score: float | None, other: float | None) -> int:
    return 0 if score is None or other is None else (score > other) - (score < other)
