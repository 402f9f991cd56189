"""Padded batches from tokenised examples.

Every batch has the prompts padded on the left to width P and the responses padded on the right to width T,
so that response column t is sequence column P + t in every row. Masks are made from lengths, never by
comparing with the pad id, which may be the id of a real token (often EOS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.data.tokenize import Ids, InstructionTokens, PairTokens, PromptTokens


def collate_pairs(examples: Sequence[PairTokens], pad_id: int) -> dict[str, Tensor]:
    """Batch n preference pairs: the n chosen rows first, then the n rejected rows in the same order.

    Returns:
        tokens (2n, P+T) long; attention_mask (2n, P+T) bool, True = not padding; mask (2n, T) bool,
        True = response token, EOS included.

    Raises:
        ValueError: There are no examples.
    """
    prompts = [example.prompt for example in examples]
    responses = [example.chosen for example in examples] + [example.rejected for example in examples]
    return _join(prompts + prompts, responses, pad_id)


def collate_instructions(examples: Sequence[InstructionTokens], pad_id: int) -> dict[str, Tensor]:
    """Batch n instructions.

    Returns:
        tokens (n, P+T) long; attention_mask (n, P+T) bool, True = not padding; mask (n, T) bool,
        True = response token, EOS included.

    Raises:
        ValueError: There are no examples.
    """
    prompts = [example.prompt for example in examples]
    return _join(prompts, [example.response for example in examples], pad_id)


def collate_prompts(examples: Sequence[PromptTokens], pad_id: int) -> dict[str, Any]:
    """Batch n prompts.

    Returns:
        tokens (n, P) long; attention_mask (n, P) bool, True = not padding; prompts, n decoded strings;
        columns, name of each other field -> its n values.

    Raises:
        ValueError: There are no examples.
    """
    tokens, mask = pad([example.prompt for example in examples], pad_id, left=True)
    columns = {name: [example.columns[name] for example in examples] for name in examples[0].columns}
    prompts = [example.text for example in examples]
    return {"tokens": tokens, "attention_mask": mask, "prompts": prompts, "columns": columns}


def pad(rows: Sequence[Ids], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad n rows of token ids to the longest, of length L.

    Returns:
        tokens (n, L) long; mask (n, L) bool, True = not padding.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("cannot make a batch of no examples")
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[index, columns] = torch.tensor(list(row), dtype=torch.long)
        mask[index, columns] = True
    return tokens, mask


def _join(prompts: Sequence[Ids], responses: Sequence[Ids], pad_id: int) -> dict[str, Tensor]:
    prompt_tokens, prompt_mask = pad(prompts, pad_id, left=True)
    response_tokens, mask = pad(responses, pad_id, left=False)
    return {
        "tokens": torch.cat([prompt_tokens, response_tokens], dim=1),
        "attention_mask": torch.cat([prompt_mask, mask], dim=1),
        "mask": mask,
    }
