"""Data: a row's path from a file to a padded batch, the same for preference pairs, instructions and prompts.

1. `sources`  reads a row, with the place it came from (file and line).
2. `formats`  turns rows of published data sets, through rankings, into rows with the columns the next stage reads.
3. `parsing`  turns a row into a record (`records`): a `Pair`, an `Instruction` or a `Prompt`.
4. `texts`    turns records into texts, chats by their template (`chat`), and `tokens` these into token ids within
   the length limits.
5. `batches`  pads examples into tensors, in the order of `order`.

`TextData` (`base`) takes all rows through these stages; each public data module (`modules`) names its record.
"""

from lit_rlhf.data.base import TextData
from lit_rlhf.data.batches import collate
from lit_rlhf.data.chat import answer_end_ids
from lit_rlhf.data.errors import BadRows, DataError, Notes
from lit_rlhf.data.formats import converted_rows, instruction_rows, pair_rows, prompt_rows
from lit_rlhf.data.modules import InstructionData, PreferenceData, PromptData, ResponseData
from lit_rlhf.data.order import LengthGroupedSampler
from lit_rlhf.data.parsing import Fields, load_records, parse_instruction, parse_pair, parse_prompt
from lit_rlhf.data.records import (
    Instruction,
    InstructionTokens,
    Pair,
    PairTokens,
    Prompt,
    PromptTokens,
    Ranking,
    Record,
    Tokens,
)
from lit_rlhf.data.sources import Row, read_rows
from lit_rlhf.data.tokens import TokenizeOptions, pad_token_id, tokenize

# One function serves every kind of record; these are its names for callers that say which kind they mean.
tokenize_pairs = tokenize_instructions = tokenize_prompts = tokenize
collate_pairs = collate_instructions = collate_prompts = collate

__all__ = [
    "BadRows",
    "DataError",
    "Fields",
    "Instruction",
    "InstructionData",
    "InstructionTokens",
    "LengthGroupedSampler",
    "Notes",
    "Pair",
    "PairTokens",
    "PreferenceData",
    "Prompt",
    "PromptData",
    "PromptTokens",
    "Ranking",
    "Record",
    "ResponseData",
    "Row",
    "TextData",
    "TokenizeOptions",
    "Tokens",
    "answer_end_ids",
    "collate",
    "collate_instructions",
    "collate_pairs",
    "collate_prompts",
    "converted_rows",
    "instruction_rows",
    "load_records",
    "pad_token_id",
    "pair_rows",
    "parse_instruction",
    "parse_pair",
    "parse_prompt",
    "prompt_rows",
    "read_rows",
    "tokenize",
    "tokenize_instructions",
    "tokenize_pairs",
    "tokenize_prompts",
]
