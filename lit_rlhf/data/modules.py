"""The public data modules: each names its record and adds its few settings; `TextData` does the rest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lit_rlhf.data.base import TextData, at_least_1, unmet
from lit_rlhf.data.batches import Batch
from lit_rlhf.data.errors import Notes
from lit_rlhf.data.formats import instruction_rows, pair_rows, prompt_rows
from lit_rlhf.data.order import LengthGroupedSampler
from lit_rlhf.data.parsing import parse_instruction, parse_pair, parse_prompt
from lit_rlhf.data.records import (
    Instruction,
    InstructionTokens,
    Pair,
    PairTokens,
    Prompt,
    PromptTokens,
    Ranking,
    TokensT,
)
from lit_rlhf.data.sources import Row
from lit_rlhf.data.tokens import TokenizeOptions, TruncatedResponse


class ResponseData(TextData[TokensT]):
    """Base of the modules whose rows hold responses: adds the responses' limits and the training loader.

    The training order is determined by `seed_everything` and the epoch, see `LengthGroupedSampler`; each rank gets
    its own examples.

    Args:
        max_response_length: Longest response in tokens, EOS included; of a longer one the first are kept.
        truncated_response: How a response that is cut ends: with EOS in place of the last kept token, or without
            EOS; or leave the row out.
        append_eos: End each response with the tokenizer's EOS, or as the chat template ends an answer.
        group_by_length: Fill batches with examples of similar length, which saves padding.
        eval_batch_size: Rows per validation batch and device; None for `batch_size`.
        kwargs: Arguments of `TextData`.

    """

    def __init__(
        self,
        max_response_length: int = 512,
        truncated_response: TruncatedResponse = "keep_eos",
        append_eos: bool = True,
        group_by_length: bool = True,
        eval_batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_response_length = max_response_length
        self.truncated_response: TruncatedResponse = truncated_response
        self.append_eos = append_eos
        self.group_by_length = group_by_length
        self.eval_batch_size = eval_batch_size

    @property
    def options(self) -> TokenizeOptions:
        """Length limits and EOS policy."""
        return replace(
            super().options,
            max_response_length=self.max_response_length,
            truncated_response=self.truncated_response,
            append_eos=self.append_eos,
        )

    def problems(self) -> list[str]:
        """Add the settings of this module."""
        return super().problems() + unmet(
            at_least_1("max_response_length", self.max_response_length),
            at_least_1("eval_batch_size", self.eval_batch_size, or_none=True),
        )

    def train_dataloader(self) -> DataLoader[TokensT]:
        """Training batches, in a new order every epoch.

        Raises:
            ConfigError: There are fewer examples than ranks.
            MisconfigurationException: `setup` has not run.
        """
        dataset = self._ready(self.train_dataset)
        # Ask the strategy, not world_size: ranks that share a model shard must get the same data.
        ranks = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = LengthGroupedSampler(
            [len(example) for example in dataset.examples],
            self.batch_size,
            num_replicas=ranks.get("num_replicas", 1),
            rank=ranks.get("rank", 0),
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),  # as Lightning seeds its own samplers
            group=self.group_by_length,
        )
        return self._loader(dataset, self.batch_size, sampler)


class PreferenceData(ResponseData[PairTokens]):
    """Preference pairs, for reward models and direct preference optimization.

    Batches (see `collate`): tokens (2n, P+T), the n chosen rows before the n rejected; attention_mask; mask (2n, T).

    Args:
        pairs_per_prompt: For published formats: the largest number of pairs per prompt, those with the largest
            difference in scores or ranks; None for every two responses that differ in it. Ties give no pair.
        kwargs: Arguments of `ResponseData` and `TextData`.

    """

    def __init__(self, pairs_per_prompt: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pairs_per_prompt = pairs_per_prompt

    def problems(self) -> list[str]:
        """Add the settings of this module."""
        acts = self.pairs_per_prompt is None or self.becomes_rankings
        return super().problems() + unmet(
            at_least_1("pairs_per_prompt", self.pairs_per_prompt, or_none=True),
            (acts, f"pairs_per_prompt does not act on format {self.format!r}"),
        )

    def parse(self, row: Row) -> Pair:
        """Turn a row into a pair, see `parse_pair`."""
        return parse_pair(row, self.fields)

    def expand(self, rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
        """Rows of pairs, see `pair_rows`."""
        return pair_rows(rankings, notes, self.pairs_per_prompt)


class InstructionData(ResponseData[InstructionTokens]):
    """Prompts with one response, for supervised fine-tuning; of a pair, the chosen response is used.

    A published format gives each prompt once, with its best response.
    Batches (see `collate`): tokens (n, P+T); attention_mask; mask (n, T).

    Args:
        response_column: Field of the response; a row without it gives its `chosen_column`.
        kwargs: Arguments of `ResponseData` and `TextData`.

    """

    def __init__(self, response_column: str = "response", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fields = replace(self.fields, response=response_column)

    def problems(self) -> list[str]:
        """Add the settings of this module."""
        acts = self.fields.response == "response" or not self.becomes_rankings
        return super().problems() + unmet((acts, f"response_column does not act on format {self.format!r}"))

    def parse(self, row: Row) -> Instruction:
        """Turn a row into an instruction, see `parse_instruction`."""
        return parse_instruction(row, self.fields)

    def expand(self, rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
        """Rows of each prompt with its best response, see `instruction_rows`."""
        return instruction_rows(rankings, notes)


class PromptData(TextData[PromptTokens]):
    """Prompts for on-policy algorithms, whose rollout buffer is the training loader.

    The buffer decides how many prompts it takes at a time (`prompt_batch`); `batch_size` counts the
    prompts of a validation batch. A published format gives each prompt once.
    Batches (see `collate`): tokens (n, P); attention_mask; prompts, n strings; columns, name -> n values.

    Args:
        response_column: Field of a response, which as a whole conversation holds the prompt; a row without it may
            hold the prompt in its `chosen_column`.
        kwargs: Arguments of `TextData`.

    """

    def __init__(self, response_column: str = "response", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.fields = replace(self.fields, response=response_column)

    def problems(self) -> list[str]:
        """Add the settings of this module."""
        acts = self.fields.response == "response" or not self.becomes_rankings
        return super().problems() + unmet((acts, f"response_column does not act on format {self.format!r}"))

    def parse(self, row: Row) -> Prompt:
        """Turn a row into a prompt, see `parse_prompt`."""
        return parse_prompt(row, self.fields)

    def expand(self, rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
        """Rows of each prompt once, see `prompt_rows`."""
        return prompt_rows(rankings, notes)

    @property
    def num_prompts(self) -> int:
        """Number of training prompts.

        Raises:
            MisconfigurationException: `setup` has not run.
        """
        return len(self._ready(self.train_dataset))

    def prompt_batch(self, indices: Sequence[int]) -> Batch:
        """Batch of the training prompts at `indices`, in that order, all padded to one width.

        Raises:
            IndexError: An index is not below `num_prompts`.
            ValueError: There are no indices.
            MisconfigurationException: `setup` has not run.
        """
        dataset = self._ready(self.train_dataset)
        return self.collate_fn()([dataset[index] for index in indices])

    def train_dataloader(self) -> Iterable[object]:
        """The LightningModule's `rollout_buffer`.

        Raises:
            MisconfigurationException: There is no LightningModule, or it has no such buffer.
        """
        module = self.trainer.lightning_module if self.trainer is not None else None
        buffer: Iterable[object] | None = getattr(module, "rollout_buffer", None)
        if buffer is None:
            raise MisconfigurationException(
                "PromptData is for on-policy algorithms, which train on their `rollout_buffer`; "
                f"{type(module).__name__ if module is not None else 'no LightningModule'} has none. "
                "Use PreferenceData or InstructionData with other algorithms."
            )
        return buffer
