"""The task of the results study: short reviews whose sentiment depends on a few words.

A tiny model trained from random weights learns it in seconds, reward models included, so that what differs between the
cells of the table is the algorithm and the layout. Preferences are drawn by a Bradley-Terry model of the gold score;
training sees the pairs alone.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORDS = {
    1: ("great", "wonderful", "lovely", "brilliant", "funny", "charming", "perfect", "happy"),
    -1: ("bad", "awful", "boring", "dull", "terrible", "sad", "poor", "horrible"),
    0: ("long", "short", "new", "old", "loud", "quiet", "early", "late"),
}
THINGS = ("plot", "music", "cast", "script", "story", "acting", "start", "sound")
WORKS = ("film", "show", "movie", "sequel", "remake", "series")
OPENINGS = ("The {thing} of the {work} was", "I found the {thing} of this {work}", "My friend called the {thing} of it")
TEMPLATES = (
    " {} and {}, with a {} end and {} scenes.",
    " {}, but also {}, and the rest was {} and {}.",
    " so {} that the {} parts felt {} and {}.",
)
PAIRS, HELD_OUT_OPENINGS, SHARPNESS = 1600, 36, 4.0


def make_response(generator: random.Random) -> str:
    """Return a continuation of four words, each of a random mood."""
    words = [generator.choice(WORDS[generator.choice((-1, 0, 1))]) for _ in range(4)]
    return generator.choice(TEMPLATES).format(*words)


def make_openings() -> list[str]:
    """Return every opening once, in a fixed random order."""
    found = [o.format(thing=t, work=w) for o in OPENINGS for t in THINGS for w in WORKS]
    openings = list(dict.fromkeys(found))
    random.Random(0).shuffle(openings)
    return openings


def write_task(folder: Path, gold: Callable[[Sequence[str]], list[float]]) -> None:
    """Write ``pairs.jsonl``, ``prompts_train.jsonl`` and ``prompts_heldout.jsonl``, the same in every call.

    Args:
        folder: Output folder.
        gold: Scores responses; preferences follow it with the noise of a Bradley-Terry model.
    """
    openings, generator = make_openings(), random.Random(1)
    train = openings[HELD_OUT_OPENINGS:]
    rows: list[dict[str, Any]] = []
    while len(rows) < PAIRS:
        first, second = make_response(generator), make_response(generator)
        if first == second:
            continue
        difference = SHARPNESS * (gold([first])[0] - gold([second])[0])
        if generator.random() > 1 / (1 + math.exp(-difference)):
            first, second = second, first
        rows.append({"prompt": generator.choice(train), "chosen": first, "rejected": second})
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "pairs.jsonl", rows)
    write_rows(folder / "prompts_train.jsonl", [{"prompt": text} for text in train])
    # Four samples to each held-out opening.
    write_rows(folder / "prompts_heldout.jsonl", [{"prompt": text} for text in openings[:HELD_OUT_OPENINGS] * 4])


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
