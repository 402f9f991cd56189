"""Rankings of responses to one prompt, and the rows of pairs, instructions and prompts made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.data.readers import Row
from lit_rlhf.data.schemas import Text
from lit_rlhf.errors import ConfigError


@dataclass(frozen=True)
class Ranking:
    """A prompt and its responses.

    Args:
        prompt: The prompt, as text or as chat messages.
        responses: The responses, any number of them.
        scores: Score of each response, higher is better; equal scores state no preference, None is no score.
        where: Place of the prompt, as in `Row`.
        columns: Other fields of the prompt, for reward functions.

    Raises:
        ValueError: There are not as many scores as responses.
    """

    prompt: Text
    responses: Sequence[str]
    scores: Sequence[float | None]
    where: str
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.responses) != len(self.scores):
            raise ConfigError(f"{self.where}: {len(self.responses)} responses, but {len(self.scores)} scores")


class Notes(Counter[str]):
    """Number of things left out that are no fault of the data, by reason, for one warning."""

    def warn(self, name: str) -> None:
        """Issue one warning about the format `name`, or none if nothing was left out."""
        told = [f"{count} {reason}" for reason, count in self.items() if count]
        if told:
            rank_zero_warn(f"Format {name!r} left out: {'; '.join(told)}.")


def pair_rows(rankings: Iterable[Ranking], notes: Notes, per_prompt: int | None = None) -> Iterator[Row]:
    """Rows of every two responses with different scores.

    Args:
        rankings: The rankings; several of them may have one prompt.
        notes: Takes the counts of rankings and pairs that are left out.
        per_prompt: Largest number of pairs of one prompt, those with the largest difference of scores; None for all.

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
    """Rows of each prompt with its best response, where it stands first.

    The best response wins most comparisons, less those it loses, over all rankings of its prompt; of equals it is
    the first.

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
    """Rows of each prompt once, where it stands first, responses or not.

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
            notes["pairs of the same response twice"] += 1
            continue
        yield high - low, Row({"prompt": ranking.prompt, "chosen": chosen, "rejected": rejected}, ranking.where)


def _sign(score: float | None, other: float | None) -> int:
    return 0 if score is None or other is None else (score > other) - (score < other)
