"""Stage 5, batches: tokenized records of one kind, and padded tensors of them.

Every batch has the prompts padded on the left to width P and the responses padded on the right to width T,
so that response column t is sequence column P + t in every row. Masks are made from lengths, never by
comparing with the pad id, which may be the id of a real token (often EOS).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_rlhf.data.records import Ids, PromptTokens, Tokens, TokensT

Batch = dict[str, Any]  # tensors, texts and columns by name, see `collate`


class ExampleDataset(Dataset[TokensT]):
    """Tokenized examples as a map-style dataset.

    Args:
        examples: The examples.
    """

    def __init__(self, examples: Sequence[TokensT]) -> None:
        super().__init__()
        self.examples: Sequence[TokensT] = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> TokensT:
        return self.examples[index]

    def longest(self) -> int:
        """Tokens of the longest example, 0 of none."""
        return max(map(len, self.examples), default=0)

    def largest_id(self) -> int:
        """The largest token id, 0 of none."""
        return max((max(ids, default=0) for e in self.examples for ids in (e.prompt, *e.responses)), default=0)


def collate(examples: Sequence[Tokens], pad_id: int) -> Batch:
    """Batch n examples with k responses each, k being 2 for pairs, 1 for instructions, 0 for prompts.

    Of pairs, the n chosen rows come first, then the n rejected rows in the same order.

    Returns:
        tokens (kn, P+T) long and attention_mask (kn, P+T) bool, True = not padding; mask (kn, T) bool,
        True = response token, EOS included. For prompts instead: tokens (n, P); attention_mask (n, P); prompts, n
        decoded strings. columns, name of each other field -> its n values, if the examples are prompts or have any.

    Raises:
        ValueError: There are no examples.
    """
    responses = [ids for one_of_each in zip(*(e.responses for e in examples), strict=True) for ids in one_of_each]
    prompts = [example.prompt for example in examples]
    if responses:
        batch: Batch = _join(prompts * (len(responses) // len(prompts)), responses, pad_id)
    else:
        tokens, mask = pad(prompts, pad_id, left=True)
        batch = {"tokens": tokens, "attention_mask": mask}
        batch["prompts"] = [example.text for example in examples if isinstance(example, PromptTokens)]
    if examples[0].columns or not responses:
        batch["columns"] = {name: [e.columns[name] for e in examples] for name in examples[0].columns}
    return batch


def pad(rows: Sequence[Ids], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pad n rows of token ids to the longest, of length L.

    Returns:
        tokens (n, L) long; mask (n, L) bool, True = not padding.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("a batch needs at least one example")
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
