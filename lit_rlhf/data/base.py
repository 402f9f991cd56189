"""The path every row takes, whatever it becomes: read, parse, split and tokenize in `setup`, batch in the loaders."""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Generic, cast, get_args

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from lit_rlhf.data.batches import Batch, ExampleDataset, collate
from lit_rlhf.data.errors import BadRows, DataError, Notes, OnBadRow
from lit_rlhf.data.formats import PublicFormat, RowConverter, converted_rows, find_converter
from lit_rlhf.data.order import LengthGroupedSampler, ResumableLoader
from lit_rlhf.data.parsing import Fields, Format, cut_transcripts, load_records
from lit_rlhf.data.records import Ranking, Record, Tokens, TokensT
from lit_rlhf.data.sources import HUB_PREFIX, Row, load_hub
from lit_rlhf.data.texts import ControlTokens
from lit_rlhf.data.tokens import TokenizeOptions, pad_token_id, tokenize
from lit_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextData(LightningDataModule, ABC, Generic[TokensT]):
    """Base of the data modules: reads, splits and tokenizes, once, in `setup`.

    The tokenizer is the LightningModule's `tokenizer`, unless the data module's own attribute `tokenizer` was
    set before. Rows are shuffled by `split_seed` before they are limited and split.

    Args:
        train: Source or sources of the rows: paths of .jsonl, .json (both also as .gz), .csv or .parquet files or of
            folders written by `datasets.Dataset.save_to_disk`, or hub:owner/name[:split].
        validation: Source of the validation rows; None splits them off the rows of `train`.
        validation_size: Rows to split off if `validation` is None: a count or a fraction below 1; 0 for none.
            Prompts are split off whole, so that it can be more rows; a message says how many.
        split_seed: Seed of the shuffle.
        limit: Use this many rows of `train` (before the split), the first of the shuffle; None for all.
        format: "columns" reads a prompt field and response fields (text or chat messages), "hh" reads
            chosen and rejected as whole HH-RLHF transcripts, "auto" tells these two apart row by row. "gpt4_llm",
            "oasst", "tldr", "stack_exchange" and "shp" read those data sets as they are published; what expresses
            no preference is counted in a warning. For any other layout give the import path of a function
            from a `Row` to its list of `Ranking`.
        prompt_column: Field of the prompt.
        chosen_column: Field of the chosen response.
        rejected_column: Field of the rejected response.
        on_bad_row: Stop at the first row that cannot be used, or leave such rows out and report how many there were.
        max_prompt_length: Longest prompt in tokens; of a longer one BOS and the last tokens are kept, of a chat the
            system message and the last turns.
        drop_overlong_prompts: Leave out rows with a longer prompt instead.
        control_tokens: What to do where the text of a control token stands in a chat message, or in a response
            before its end: keep it as that token and count it in a warning, "escape" it in all texts by a
            zero-width space behind its first character, or "refuse" the row.
        batch_size: Rows per batch and device.
        num_workers: Processes that build batches; 0 builds them in the training process.

    Settings are checked together in `setup`, before any file is read.
    """

    def __init__(
        self,
        train: str | list[str],
        validation: str | None = None,
        validation_size: int | float = 0.05,
        split_seed: int = 0,
        limit: int | None = None,
        format: Format | PublicFormat | RowConverter = "auto",
        prompt_column: str = "prompt",
        chosen_column: str = "chosen",
        rejected_column: str = "rejected",
        on_bad_row: OnBadRow = "error",
        max_prompt_length: int = 512,
        drop_overlong_prompts: bool = False,
        control_tokens: ControlTokens = "keep",
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.sources = [train] if isinstance(train, str) else list(train)
        self.validation = validation
        self.validation_size = validation_size
        self.split_seed = split_seed
        self.limit = limit
        self.format = format
        self.becomes_rankings = callable(format) or format not in get_args(Format)
        layout = "columns" if self.becomes_rankings else cast(Format, format)
        self.fields = Fields(layout, prompt_column, chosen_column, rejected_column)
        self.on_bad_row: OnBadRow = on_bad_row
        self.max_prompt_length = max_prompt_length
        self.drop_overlong_prompts = drop_overlong_prompts
        self.control_tokens: ControlTokens = control_tokens
        self.batch_size = batch_size
        self.eval_batch_size: int | None = None
        self.num_workers = num_workers
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.train_dataset: ExampleDataset[TokensT] | None = None
        self.val_dataset: ExampleDataset[TokensT] | None = None
        self.pad_id = -1  # known from setup on

    @abstractmethod
    def parse(self, row: Row) -> Record[TokensT]:
        """Turn a row into this module's record, or raise a DataError."""

    @abstractmethod
    def expand(self, rankings: Iterable[Ranking], notes: Notes) -> Iterator[Row]:
        """Turn the rankings of a published format into the rows this module parses."""

    @property
    def options(self) -> TokenizeOptions:
        """Length limits and EOS policy."""
        return TokenizeOptions(
            self.max_prompt_length,
            drop_overlong_prompts=self.drop_overlong_prompts,
            control_tokens=self.control_tokens,
        )

    def problems(self) -> list[str]:
        """What is wrong with the settings; a subclass with more settings adds to it."""
        size = self.validation_size
        columns = (self.fields.prompt, self.fields.chosen, self.fields.rejected)
        problems = unmet(
            (any(self.sources), "train must name at least one source"),
            (size >= 0, f"validation_size must not be negative, not {size}"),
            (size < 1 or not isinstance(size, float), f"validation_size {size} is not a fraction below 1"),
            at_least_1("limit", self.limit, or_none=True),
            at_least_1("max_prompt_length", self.max_prompt_length),
            at_least_1("batch_size", self.batch_size),
            (self.num_workers >= 0, f"num_workers must not be negative, not {self.num_workers}"),
            (
                not self.becomes_rankings or columns == ("prompt", "chosen", "rejected"),
                f"the *_column options act on formats {', '.join(get_args(Format))} only, not on {self.format!r}",
            ),
        )
        try:
            find_converter(self.format)
        except ConfigError as error:
            problems.append(str(error))
        return problems

    def check_settings(self) -> None:
        """Refuse settings that cannot work, all of them at once; no files are read.

        Raises:
            ConfigError: There are :meth:`problems`.
        """
        if problems := self.problems():
            raise ConfigError("; ".join(problems))

    def prepare_data(self) -> None:
        """Download hub sources, on one process per node, so that `setup` finds them in the cache.

        Raises:
            DataError: A hub dataset cannot be loaded.
        """
        for source in [*self.sources, self.validation]:
            if source is not None and source.startswith(HUB_PREFIX):
                load_hub(source)

    def setup(self, stage: str) -> None:
        """Read, split and tokenize everything; does nothing the second time.

        Raises:
            DataError: A source cannot be read, a row is bad (with on_bad_row "error"), or no rows are left.
            MisconfigurationException: There is no tokenizer.
        """
        if self.train_dataset is not None:
            return
        self.check_settings()
        tokenizer = self._find_tokenizer()
        self.pad_id = pad_token_id(tokenizer)
        bad = BadRows(self.on_bad_row)
        if self.becomes_rankings:
            convert = partial(converted_rows, format=self.format, expand=self.expand, on_bad=bad)
        else:
            convert = partial(cut_transcripts, fields=self.fields)
        records = load_records(self.sources, self.parse, bad, convert)
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(self.split_seed))
        records = [records[index] for index in order[: self.limit].tolist()]
        if self.validation is not None:
            held_out = load_records([self.validation], self.parse, bad, convert)
        else:
            held_out, records = split(records, self.validation_size, ", ".join(self.sources))
        train, val = (tokenize(part, tokenizer, self.options, bad) for part in (records, held_out))
        bad.warn()
        for name, part, before in (("training", train, records), ("validation", val, held_out)):
            if before and not part:
                fix = "Raise max_prompt_length or max_response_length, or change what they drop."
                raise DataError(f"none of the {len(before)} {name} rows is left", where=str(self.sources), fix=fix)
        rank_zero_info(f"Training data: {describe(train)}; validation: {describe(val)}.")
        self.val_dataset = ExampleDataset(val)
        self.train_dataset = ExampleDataset(train)

    def _find_tokenizer(self) -> PreTrainedTokenizerBase:
        module = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = self.tokenizer if self.tokenizer is not None else getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise MisconfigurationException(
                f"{type(self).__name__} has no tokenizer: the LightningModule must have an attribute "
                "`tokenizer` before setup, or set the data module's own `tokenizer`."
            )
        return tokenizer

    def _ready(self, dataset: ExampleDataset[TokensT] | None) -> ExampleDataset[TokensT]:
        if dataset is None:
            raise MisconfigurationException(f"{type(self).__name__} has no data yet: call setup() first.")
        return dataset

    def collate_fn(self) -> Callable[[Sequence[TokensT]], Batch]:
        """Stage 5: `collate` with the tokenizer's pad id. Workers pickle it: it holds no reference to this module."""
        return partial(collate, pad_id=self.pad_id)

    def _loader(
        self, dataset: ExampleDataset[TokensT], batch_size: int, sampler: LengthGroupedSampler | None = None
    ) -> DataLoader[TokensT]:
        kind = DataLoader if sampler is None else ResumableLoader
        return kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_ignore_sigterm,
            collate_fn=self.collate_fn(),
        )

    def val_dataloader(self) -> DataLoader[TokensT] | list[Batch]:
        """Validation batches in a fixed order, or an empty list if there is no validation.

        Raises:
            MisconfigurationException: `setup` has not run.
        """
        dataset = self._ready(self.val_dataset)
        return self._loader(dataset, self.eval_batch_size or self.batch_size) if len(dataset) else []

    def test_dataloader(self) -> DataLoader[TokensT] | list[Batch]:
        """The validation batches; to test on other rows, name them in `validation`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[TokensT] | list[Batch]:
        """The validation batches."""
        return self.val_dataloader()


def _ignore_sigterm(worker: int) -> None:
    """Schedulers signal every process; a worker that exited would bring the run down before it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def split(
    records: list[Record[TokensT]], size: int | float, where: str
) -> tuple[list[Record[TokensT]], list[Record[TokensT]]]:
    """Hold out whole prompts, each with all its records, until there are `size` records (a count, or a fraction).

    Prompts are taken in the order of the records, those with more records than are missing only where no others are
    left: then the smallest of them, unless nothing would remain to train on.

    Returns:
        The records held out, and the rest.

    Raises:
        DataError: None would be left.
    """
    if isinstance(size, float):
        size = max(1, round(size * len(records))) if size > 0 else 0
    if size >= len(records):
        raise DataError(
            f"splitting {size} validation rows off {len(records)} leaves none to train on",
            where=where,
            fix="Lower validation_size (0 for no validation), or name a validation source.",
        )
    keys = [json.dumps(record.prompt) for record in records]
    rows = Counter(keys)  # in the order of their first records
    missing = size
    prompts: set[str] = set()
    for key, count in rows.items():
        if count <= missing:
            prompts.add(key)
            missing -= count
    larger = [key for key in rows if key not in prompts]
    if missing and (len(larger) > 1 or not prompts):
        prompts.add(min(larger, key=rows.__getitem__))
    held_out, rest = (
        [r for r, key in zip(records, keys, strict=True) if (key in prompts) is out] for out in (True, False)
    )
    if not rest:
        raise DataError(
            "all rows share one prompt, so that holding out validation rows leaves none to train on",
            where=where,
            fix="Name a validation source, or set validation_size to 0.",
        )
    return held_out, rest


def describe(examples: Sequence[Tokens]) -> str:
    """The number of examples, and of the different prompts in them."""
    prompts = len({hash(tuple(example.prompt)) for example in examples})
    return f"{len(examples)} rows over {prompts} prompt{'s' if prompts != 1 else ''}"


def unmet(*conditions: tuple[bool, str]) -> list[str]:
    """The messages of the conditions, given as (condition, message), that do not hold."""
    return [message for holds, message in conditions if not holds]


def at_least_1(name: str, value: int | None, or_none: bool = False) -> tuple[bool, str]:
    """The condition that a setting is 1 or more, or None where that is allowed, with its message."""
    holds = or_none if value is None else value >= 1
    return holds, f"{name} must be at least 1{' or None' if or_none else ''}, not {value}"
