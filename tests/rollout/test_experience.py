"""The record of a rollout: fields that are not filled yet, copies, and what a module adds of its own."""

import copy
import pickle

import pytest
import torch

from lit_rlhf import Experience
from lit_rlhf.rollout import UnsetFieldError


def four() -> Experience:
    """Four samples of prompts of 2 and responses of 3 tokens."""
    tokens = torch.arange(20).view(4, 5)
    return Experience(tokens, tokens >= 0, tokens[:, 2:] >= 0, torch.zeros(4, dtype=torch.bool))


def test_a_field_that_is_not_filled_raises_and_says_so() -> None:
    experience = four()
    with pytest.raises(UnsetFieldError, match="experience has no values yet: the step that fills it has not run"):
        _ = experience.values
    with pytest.raises(AttributeError, match="an Experience has no field 'valuse'"):
        _ = experience.valuse
    assert not hasattr(experience, "values")
    assert getattr(experience, "values", None) is None
    assert experience.count is None
    experience.values = torch.ones(4, 3)
    assert experience.require("values") is experience.values
    experience.values = None  # type: ignore[assignment]
    assert not hasattr(experience, "values")


def test_copies_keep_what_is_filled_and_nothing_else() -> None:
    experience = four()
    experience.scores = torch.arange(4.0)
    for same in (copy.copy(experience), copy.deepcopy(experience), pickle.loads(pickle.dumps(experience))):
        assert vars(same).keys() == vars(experience).keys()
        assert torch.equal(same.scores, experience.scores)


def test_what_a_module_adds_travels_with_its_rows_and_columns() -> None:
    class Weighted(Experience):
        weights: torch.Tensor

    for experience in (four(), Weighted(*vars(four()).values())):
        experience.weights = torch.arange(12.0).view(4, 3)
        experience.group = torch.tensor([0, 0, 1, 1])
        part = experience[torch.tensor([3, 1])].trim(1, 2)
        assert type(part) is type(experience)
        assert part.weights.tolist() == [[9.0, 10.0], [3.0, 4.0]]
        assert part.group.tolist() == [1, 0]
        assert part.tokens.tolist() == [[16, 17, 18], [6, 7, 8]]
    with pytest.raises(UnsetFieldError, match="no weights yet"):
        _ = Weighted(*vars(four()).values()).weights
