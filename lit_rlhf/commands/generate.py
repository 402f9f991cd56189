"""``lit-rlhf generate``: sample responses from a checkpoint, an export or a model."""

import json
import os
import sys
from pathlib import Path

from lit_rlhf.errors import ConfigError


def generate(
    source: str,
    prompt: str | list[str] | None = None,
    prompts: str | None = None,
    chat: bool = False,
    role: str = "actor",
    greedy: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    out: str | None = None,
) -> None:
    """Sample one response per prompt.

    Args:
        source: A ``.ckpt`` file, a folder written by ``lit-rlhf export``, or a model name.
        prompt: Prompt text; give several with ``--prompt+``.
        prompts: A JSONL file (plain or .gz) with a ``prompt`` field, text or chat messages.
        chat: Put each prompt text into the tokenizer's chat template as a user message.
        role: The role to load from a checkpoint.
        greedy: Take the most probable token instead of sampling.
        max_new_tokens: Longest response.
        temperature: Divides the logits.
        top_p: Nucleus probability mass.
        seed: Seed of the sampling.
        batch_size: Prompts decoded at once.
        out: JSONL file to write; the default prints to the terminal.
    """
    import torch

    from lit_rlhf.commands.inference import complete, load_source
    from lit_rlhf.rollout import Sampling

    texts = ([prompt] if isinstance(prompt, str) else list(prompt or [])) + (_read_prompts(prompts) if prompts else [])
    if not texts:
        raise ConfigError("give --prompt TEXT or --prompts FILE")
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    problems = sampling.problems()
    if batch_size < 1:
        problems.append(f"batch_size must be at least 1, got {batch_size}")
    if problems:
        raise ConfigError("; ".join(problems))
    model, tokenizer = load_source(source, role)
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    torch.manual_seed(seed)
    as_chat = [[{"role": "user", "content": t}] if chat and isinstance(t, str) else t for t in texts]
    responses = complete(model, tokenizer, as_chat, sampling, greedy, batch_size)
    rows = [{"prompt": t, "response": r} for t, r in zip(texts, responses, strict=True)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if out is None:
        sys.stdout.write(lines)
        return
    temporary = Path(out).with_name(Path(out).name + ".partial")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(lines, encoding="utf-8")
    os.replace(temporary, out)


def _read_prompts(path: str) -> list[str | list[dict[str, str]]]:
    from lit_rlhf.data import Fields, parse_prompt, read_rows

    return [parse_prompt(row, Fields("columns")).prompt for row in read_rows(path)]


def main(argv: list[str]) -> None:
    """Parse the arguments and run."""
    from lit_rlhf.commands.run import run

    run(generate, argv, "generate")
