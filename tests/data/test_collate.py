import pytest
import torch

from lit_rlhf.data import (
    InstructionTokens,
    PairTokens,
    PromptTokens,
    collate_instructions,
    collate_pairs,
    collate_prompts,
)

T, F = True, False


def check(tensor, expected, dtype):
    assert tensor.dtype == dtype
    assert tensor.tolist() == expected


def test_pairs_chosen_rows_first_prompts_left_responses_right():
    batch = collate_pairs([PairTokens([1, 5], [6, 2], [7, 8, 2]), PairTokens([1, 3, 4], [9, 2], [2])], pad_id=0)
    assert set(batch) == {"tokens", "attention_mask", "mask"}
    tokens = [
        [0, 1, 5, 6, 2, 0],
        [1, 3, 4, 9, 2, 0],
        [0, 1, 5, 7, 8, 2],
        [1, 3, 4, 2, 0, 0],
    ]
    attention = [
        [F, T, T, T, T, F],
        [T, T, T, T, T, F],
        [F, T, T, T, T, T],
        [T, T, T, T, F, F],
    ]
    check(batch["tokens"], tokens, torch.long)
    check(batch["attention_mask"], attention, torch.bool)
    check(batch["mask"], [[T, T, F], [T, T, F], [T, T, T], [T, F, F]], torch.bool)


def test_instructions():
    batch = collate_instructions([InstructionTokens([1], [6, 2]), InstructionTokens([1, 4], [7])], pad_id=9)
    check(batch["tokens"], [[9, 1, 6, 2], [1, 4, 7, 9]], torch.long)
    check(batch["attention_mask"], [[F, T, T, T], [T, T, T, F]], torch.bool)
    check(batch["mask"], [[T, T], [T, F]], torch.bool)


def test_prompts():
    examples = [PromptTokens([1, 6], "a", {"x": 1, "y": [2]}), PromptTokens([7], "b", {"x": None, "y": []})]
    batch = collate_prompts(examples, pad_id=0)
    assert set(batch) == {"tokens", "attention_mask", "prompts", "columns"}
    check(batch["tokens"], [[1, 6], [0, 7]], torch.long)
    check(batch["attention_mask"], [[T, T], [F, T]], torch.bool)
    assert batch["prompts"] == ["a", "b"]
    assert batch["columns"] == {"x": [1, None], "y": [[2], []]}


def test_the_pad_id_as_a_real_token_stays_in_the_masks():
    pad = 2
    batch = collate_instructions([InstructionTokens([2, 1], [2, 5, 2]), InstructionTokens([1], [2])], pad_id=pad)
    check(batch["tokens"], [[2, 1, 2, 5, 2], [2, 1, 2, 2, 2]], torch.long)
    check(batch["attention_mask"], [[T, T, T, T, T], [F, T, T, F, F]], torch.bool)
    check(batch["mask"], [[T, T, T], [T, F, F]], torch.bool)


@pytest.mark.parametrize("collate", [collate_pairs, collate_instructions, collate_prompts])
def test_no_examples(collate):
    with pytest.raises(ValueError, match="at least one example"):
        collate([], pad_id=0)
