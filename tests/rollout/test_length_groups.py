"""Groups of similar length: what is dropped is padding, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_ppo, make_trainer
from torch import Tensor

from lit_rlhf import Experience, PromptData, ReMax
from lit_rlhf.rollout import length_groups, map_groups


def uneven(prompts: list[int], responses: list[int]) -> Experience:
    """Samples of these lengths, left- and right-padded by hand; token ids tell row and column."""
    n, p, t = len(prompts), max(prompts), max(responses)
    attention = torch.zeros(n, p + t, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        attention[row, p - prompt : p + response] = True
    tokens = torch.arange(n * (p + t)).view(n, p + t)
    return Experience(tokens, attention, attention[:, p:], torch.zeros(n, dtype=torch.bool))


LENGTHS = ([3, 1, 5, 2, 2], [4, 1, 7, 1, 6])


def test_groups_are_sorted_and_as_narrow_as_their_longest_sample() -> None:
    experience = uneven(*LENGTHS)
    groups = length_groups(experience, 2)
    assert [group.rows.tolist() for group in groups] == [[1, 3], [0, 4], [2]]
    assert [(group.prompt, group.response) for group in groups] == [(2, 1), (3, 6), (5, 7)]


def test_every_counting_token_stays_and_only_padding_goes() -> None:
    experience = uneven(*LENGTHS)
    experience.values = torch.rand(5, 7)
    for group in length_groups(experience, 2):
        part, whole = group.take(experience), experience[group.rows]
        assert part.tokens[part.attention_mask].tolist() == whole.tokens[whole.attention_mask].tolist()
        assert part.require("values")[part.mask].tolist() == whole.require("values")[whole.mask].tolist()
        assert part.tokens.shape[1] == group.prompt + group.response
        # Response column t is token column P + t, as everywhere.
        assert torch.equal(part.attention_mask[:, -part.mask.shape[1] :], part.mask)


def test_reading_in_groups_returns_the_samples_own_order() -> None:
    experience = uneven(*LENGTHS)

    def read(part: Experience) -> dict[str, Tensor]:
        responses = part.tokens[:, -part.mask.shape[1] :]
        return {"token": responses * part.mask, "sample": part.tokens[:, -part.mask.shape[1]]}

    found = map_groups(read, experience, 2)
    assert torch.equal(found["token"], experience.tokens[:, 5:] * experience.mask)
    assert torch.equal(found["sample"], experience.tokens[:, 5])


class Uneven:
    """Cuts sampled responses to very different lengths."""

    def sample(self, prompts: dict[str, Any]) -> Experience:
        experience = super().sample(prompts)  # type: ignore[misc]
        lengths = torch.tensor([1, 8, 2, 7, 1, 8, 3, 2]).clamp(max=experience.mask.shape[1])
        keep = torch.arange(experience.mask.shape[1]) < lengths[:, None]
        experience.mask &= keep
        experience.attention_mask[:, -keep.shape[1] :] &= keep
        if hasattr(experience, "log_probs"):
            experience.log_probs = experience.log_probs.masked_fill(~experience.mask, 0.0)
        return experience


def test_ratio_one_holds_in_bfloat16(hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path) -> None:
    """The same rows in the same columns in scoring and training: log-probs are bit-equal."""
    cut = type("Cut", (Uneven, ReMax), {})
    settings: dict[str, Any] = {"policy_checkpoint": str(hydra_checkpoint), "inner_epochs": 1, "dtype": "bfloat16"}
    module: Any = make_ppo(cut, group_by_length=True, minibatch_size=2, **settings)
    differences, loss = [], module.loss

    def compared(b: Experience) -> Tensor:
        differences.append(float((module.backbone(("actor",), b.tokens, b.attention_mask, b.mask)["actor"]
                                  - b.require("log_probs")).abs().max()))  # fmt: skip
        return loss(b)

    module.loss = compared
    make_trainer(tmp_path, 1, accumulate_grad_batches=4).fit(module, prompts)
    assert differences == [0.0] * 4


@pytest.mark.parametrize("kind", ["PPO", "ReMax"])
def test_scoring_is_the_same_and_training_touches_fewer_columns(
    kind: str, hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    from lit_rlhf import PPO

    base = {"PPO": PPO, "ReMax": ReMax}[kind]
    cut = type("Cut", (Uneven, base), {})
    experiences, widths = [], []
    for grouped in (False, True):
        settings: dict[str, Any] = {"policy_checkpoint": str(hydra_checkpoint), "inner_epochs": 1}
        module: Any = make_ppo(cut, group_by_length=grouped, minibatch_size=2, **settings)
        trainer = make_trainer(tmp_path / str(grouped), 1, accumulate_grad_batches=4)
        loss, seen = module.loss, []

        def counted(b: Experience, loss: Any = loss, seen: Any = seen) -> Tensor:
            seen.append(b.tokens.shape[1])
            return loss(b)

        estimate = module.estimate

        def kept(e: Experience, estimate: Any = estimate) -> None:
            estimate(e)
            experiences.append(e[:])

        module.loss, module.estimate = counted, kept
        trainer.fit(module, prompts)
        widths.append(seen)
        experiences.append({k: v.clone() for k, v in module.state_dict().items()})
    (plain, plain_weights, grouped, grouped_weights) = experiences
    for name in ("ref_log_probs", "scores", "advantages"):
        torch.testing.assert_close(getattr(grouped, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    # The same step, since all minibatches belong to it.
    for name, value in plain_weights.items():
        torch.testing.assert_close(grouped_weights[name], value, rtol=1e-3, atol=1e-5)
    assert sum(widths[1]) < sum(widths[0])
