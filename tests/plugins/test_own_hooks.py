"""Hooks of one's own that return the wrong thing: the error names the hook and what it must return."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_ppo, make_trainer

from lit_rlhf import PPO, Engine, Experience, PromptData, ReinforcePlusPlus


class NoEngine(Engine):
    def respond(self, *args: Any) -> Any:
        return None


class NoStatistics(PPO):
    def policy_loss(self, *args: Any) -> Any:
        return super().policy_loss(*args)[0]


class NoStatisticsWithoutCritic(ReinforcePlusPlus):
    def policy_loss(self, *args: Any) -> Any:
        return super().policy_loss(*args)[0]


class OneAResponse(PPO):
    def estimate(self, experience: Experience) -> None:
        super().estimate(experience)
        experience.advantages = experience.scores


class NoEstimate(PPO):
    def estimate(self, experience: Experience) -> None:
        self.set_returns(experience, torch.zeros_like(experience.values))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPO, {"engine": NoEngine()}, r"PPO.sample \(engine NoEngine\) must return an Experience, got NoneType"),
        (NoStatistics, {}, r"NoStatistics.policy_loss must return \(loss, statistics\), a dict; got one Tensor"),
        (NoStatisticsWithoutCritic, {}, r"policy_loss must return \(loss, statistics\)"),
        (OneAResponse, {}, r"OneAResponse.estimate must fill advantages of shape \[N, T\] = \[8, \d\].*got \[8\]"),
        (NoEstimate, {}, r"experience has no advantages yet.*\(estimate fills it\)"),
    ],
)
def test_the_hook_is_named(
    kind: Any, settings: dict[str, Any], message: str, prompts: PromptData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, 1).fit(make_ppo(kind, **settings), prompts)
